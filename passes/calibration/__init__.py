"""Statistics of a model's activations, collected segment by segment over many sequences."""
