"""Passes that make one kernel call out of several."""
