"""Runs one engine in several processes: ranks, their launcher and their sums."""
