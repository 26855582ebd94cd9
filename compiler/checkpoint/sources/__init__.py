"""Sources: they provide the files of a checkpoint."""
