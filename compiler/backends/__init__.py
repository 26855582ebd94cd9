"""Backends: each folder turns a graph into something an executor of the runtime can run."""
