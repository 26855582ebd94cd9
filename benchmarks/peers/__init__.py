"""Other CPU engines on the same checkpoints, side by side with ours: `python -m benchmarks.peers`, described in README.md."""
