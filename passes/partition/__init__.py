"""Passes that give each of several ranks its part of a model."""
