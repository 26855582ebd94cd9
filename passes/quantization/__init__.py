"""Passes that turn float weights and activations into integers."""
