"""Exports: the calibrated integers of a model as a checkpoint of another runtime. A format is one file and one line here."""

from __future__ import annotations

from belle_compile.compiler.exports.base import listing, register, registered
from belle_compile.compiler.exports.compressed_tensors import CompressedTensors
from belle_compile.compiler.exports.gguf import Gguf
from belle_compile.compiler.exports.onnx import Onnx
from belle_compile.compiler.exports.safetensors import Safetensors

__all__ = ["listing", "registered"]

register(CompressedTensors())
register(Gguf())
register(Onnx())
register(Safetensors())
