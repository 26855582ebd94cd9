"""Rotations that weights absorb: the model computes the same, with fewer outliers (QuaRot, arXiv:2404.00456)."""
