"""Constants of the ops' meanings, for modules that must load neither NumPy nor onnx_ir."""

from __future__ import annotations

GROUP = 128  # neighbouring inputs that share a scale in a row of an INT4 weight; the last group of a row may have fewer
