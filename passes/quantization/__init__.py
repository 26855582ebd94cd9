"""Passes that turn float weights and activations into INT8."""
