"""The graph: ONNX through onnx_ir, with the ops, shapes and meanings of the `belle` domain."""
