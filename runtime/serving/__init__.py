"""Turns requests into steps of an executor: scheduling, KV blocks, sampling."""
