"""Rotations folded into weights: the same function of the tokens, activations without outliers (QuaRot, arXiv:2404.00456)."""
