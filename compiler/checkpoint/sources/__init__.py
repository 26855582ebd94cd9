"""Where the files of a checkpoint come from: a directory, a single file, a download."""
