"""Numbers of the ops' meanings that modules need which load neither NumPy nor onnx_ir."""

from __future__ import annotations

GROUP = 128  # neighbouring inputs of an output that share a scale, of INT4 weights; the last group may have fewer
