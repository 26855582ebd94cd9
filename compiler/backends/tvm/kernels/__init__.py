"""Kernels for CPUs, written in TIR."""
