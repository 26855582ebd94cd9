"""What ONNX Runtime's CUDA provider does with an engine, where there is no GPU: over libraries of CUDA that compute nothing."""
