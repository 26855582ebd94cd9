"""The graph of a model: an onnx_ir.Model of ONNX ops and ops of the domain `belle`, with shape rules and NumPy meanings."""
