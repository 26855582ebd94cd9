"""Passes that take away what computes nothing new."""
