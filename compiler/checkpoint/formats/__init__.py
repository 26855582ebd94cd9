"""What the files of a checkpoint hold."""
