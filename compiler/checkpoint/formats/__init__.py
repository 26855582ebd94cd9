"""Formats: they read the files of a checkpoint."""
