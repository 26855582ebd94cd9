"""What a model's activations say, collected segment by segment over many sequences."""
