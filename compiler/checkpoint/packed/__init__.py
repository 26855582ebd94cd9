"""Weights that a checkpoint stores as integers with scales, by the tool that made them."""
