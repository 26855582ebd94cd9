"""Kernel choices per shape by measurement: candidates as data, a search on this host, tables that ordinary builds read."""
