"""Passes that make room for adapters, which are loaded at run time."""
