"""Overlays: they change the tensors of a checkpoint before a build uses them."""
