"""What differs between translations for the execution providers of ONNX Runtime, whose best kernels are for different ops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import onnx_ir as ir

from belle_compile.compiler.backends.onnx.graph import DTYPES, OnnxGraph
from belle_compile.compiler.backends.onnx.interface import Interface
from belle_compile.compiler.backends.onnx.translation import Rule, Translation


class Kernels(ABC):
    """The parts of a translation that an execution provider decides.

    Activations are float32. `weight_floats` is the type of the weights of linears and embeddings that are not quantized, with
    which activations are multiplied, and `kv_floats` that of queries, keys and values. The outputs of a linear with 8-bit
    weights are filled up to a multiple of `column_unit`. `capacity` is the number of positions in tables and in the cache; None
    where tables have as many as the model, and the cache has as many as the executor wants. `signs_in_scales` says whether the
    signs of a rotation go into the scales of the linear before it where they can. `rules` replace rules by op.
    """

    weight_floats: str
    kv_floats: str
    column_unit: int
    capacity: int | None
    signs_in_scales: bool
    rules: Mapping[str, Rule]

    @abstractmethod
    def integers(self, graph: OnnxGraph, x: ir.Value, name: str, steps: int = 1) -> ir.Value:
        """What stands for the 8-bit integers that are nearest to `steps` times float32 values."""

    @abstractmethod
    def integer_product(
        self, graph: OnnxGraph, integers: ir.Value, weight: ir.Value, scales: ir.Value, outputs: int, name: str
    ) -> ir.Value:
        """float32: the exact product of what `integers` gave with a weight [inputs, outputs], times the scales of its outputs.
        `outputs` is their number without those that fill up."""

    @abstractmethod
    def alibi(self, t: Translation, slopes: ir.Value, heads: int) -> ir.Value:
        """What ALiBi adds to the scores, of the type `kv_floats`."""


class RuntimeTranslation(Translation):
    """A translation for an execution provider of ONNX Runtime."""

    def __init__(self, source: ir.Model, interface: Interface, kernels: Kernels) -> None:
        super().__init__(source, interface)
        self.kernels, self.kv_floats = kernels, kernels.kv_floats

    @property
    def positions(self) -> int:
        return super().positions if self.kernels.capacity is None else self.kernels.capacity

    def matrix(self, tensor: ir.TensorProtocol, dtype: str, unit: int = 1) -> ir.Value:
        return super().matrix(tensor, dtype, self.kernels.column_unit if dtype == "int8" else unit)

    def cast(self, value: ir.Value, dtype: str, name: str, of: str = "float32") -> ir.Value:
        """A value of the type `of` in the type `dtype`; `name` is used where that is another one."""
        return value if dtype == of else self.graph.op("Cast", value, name=name, to=int(DTYPES[dtype]))
