"""Graphs as standard ONNX: for the `onnxruntime` backend, and for exports to ONNX Runtime GenAI."""
