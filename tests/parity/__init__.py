"""Numbers: this project against Transformers on tiny random models."""
