"""Measured tilings of linear kernels: candidates as data, a search on this host, and tables that builds read."""
