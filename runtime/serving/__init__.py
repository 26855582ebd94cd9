"""Serves requests in steps of an executor: scheduling, KV blocks, sampling, speculation."""
