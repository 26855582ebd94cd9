"""What changes the tensors of a checkpoint on their way into a build."""
