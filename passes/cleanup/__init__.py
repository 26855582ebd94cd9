"""Passes that remove what computes nothing new."""
