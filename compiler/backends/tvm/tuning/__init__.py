"""Tilings of linear kernels chosen by measurement: candidates as data, a search on this host, tables that builds read."""
