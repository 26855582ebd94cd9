"""Servers under load: workloads of real requests, driven by AIPerf, beside the servers of others."""
