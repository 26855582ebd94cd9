"""What the files of a checkpoint hold: safetensors, pickles, GGUF."""
