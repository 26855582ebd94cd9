"""compressed-tensors, which llm-compressor writes and vLLM loads: formats int-quantized and pack-quantized.

A linear of K inputs and N outputs has, with G groups of inputs (one where each output has one scale)::

    weight            int8 [N, K]             int-quantized: the integers
    weight_packed     int32 [N, ceil(K*b/32)] pack-quantized: integers of b bits plus 2^(b-1), from the lowest bits on
    weight_shape      int64 [2]               pack-quantized: N, K
    weight_scale      float [N, G], [N] or [1]
    weight_zero_point int8 like the scales, or packed along N; symmetric weights have none
    weight_g_idx      int32 [K]               pack-quantized: the group of each input

A weight is scale * (integer - zero point).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from belle_compile.compiler.checkpoint.packed.base import (
    FLOATS,
    Array,
    Indices,
    Module,
    Packing,
    Statement,
    groups_of_inputs,
    refused,
)
from belle_compile.compiler.checkpoint.packed.bits import WORD, centred, unpacked
from belle_compile.compiler.checkpoint.tensors import LazyTensor
from belle_compile.compiler.ir.quantized import Grid, QuantizedRows, QuantizedTensor

_FORMATS = ("int-quantized", "pack-quantized")
_PACKED_BITS = (2, 4, 8)  # others are packed in different ways by different versions
_LARGEST_BITS = 8
_ABSENT = ("sparsity_config", "transform_config", "kv_cache_scheme")  # settings that change the model
_MIXED = "mixed-precision"  # a format for each group of modules


class CompressedTensors(Packing):
    """See the module's docstring."""

    method, title = "compressed-tensors", "compressed-tensors"
    marks = ("weight_scale", "weight_packed")
    parts = ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx", "input_scale",
             "input_zero_point")  # fmt: skip
    spare_biases = False

    def check(self, stated: Statement) -> list[str]:
        settings = stated.settings
        for key in _ABSENT:
            if value := settings.get(key):
                if key == "sparsity_config" and isinstance(value, Mapping) and value.get("format") == "dense":
                    continue
                raise refused(stated, self.title, f"a {key}", f"none: {' or '.join(_FORMATS)} alone")
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise refused(stated, self.title, "no config_groups", "a scheme for each group of modules", "download it again")
        static = [self._check_group(stated, group) for group in groups.values()]
        if not any(static):
            return []
        return ["the checkpoint's scales for activations were left out: a build chooses its own, one for each token by default"]

    def _check_group(self, stated: Statement, group: Mapping[str, Any]) -> bool:
        """Check one scheme; returns whether it has scales for activations."""
        common = stated.settings.get("format")
        layout, weights = group.get("format") or common, group.get("weights")
        if layout not in _FORMATS or common not in (*_FORMATS, _MIXED, None):
            raise refused(stated, self.title, f"format {layout!r}", " or ".join(_FORMATS))
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
        known = _PACKED_BITS if layout == "pack-quantized" else range(2, _LARGEST_BITS + 1)
        if (
            not isinstance(weights, Mapping)
            or weights.get("type", "int") != "int"
            or type(bits) is not int
            or bits not in known
        ):
            kind = f"{weights.get('type', 'int')}, {bits!r} bits" if isinstance(weights, Mapping) else "none"
            raise refused(
                stated, self.title, f"weights of {kind} in {layout}", f"integers of {', '.join(map(str, known))} bits"
            )
        if group.get("output_activations"):
            raise refused(stated, self.title, "outputs that are rounded", "weights, or weights and inputs")
        inputs = group.get("input_activations")
        return isinstance(inputs, Mapping) and not inputs.get("dynamic", False)

    def weight(self, module: Module, stated: Statement) -> QuantizedTensor:
        packed = module.optional("weight_packed", 2, "int32")
        if packed is None:
            weight, bits = module.tensor("weight", 2, "int8"), _LARGEST_BITS
            outputs, inputs = weight.shape
        else:
            shape = module.tensor("weight_shape", 1, "int64", "int32")
            module.require(shape, (2,))
            outputs, inputs = (int(size) for size in shape.stored(0, 2))
            bits = next((b for b in _PACKED_BITS if packed.shape == (outputs, -(-inputs * b // WORD))), 0)
            if not bits:
                found = f"weight_packed of shape {list(packed.shape)} for a weight of {outputs} by {inputs}"
                raise module.error(found, f"integers of {', '.join(map(str, _PACKED_BITS))} bits", packed)
            weight = packed
        scale = _scale(module, outputs)
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        zero_points = module.optional("weight_zero_point", len(scale.shape), "int8", "int32")
        if zero_points is not None and zero_points.dtype == "int8":
            module.require(zero_points, scale.shape)
        elif zero_points is not None:
            module.require(zero_points, (-(-outputs * bits // WORD), groups))
        size, order = groups_of_inputs(module, "weight_g_idx", inputs, groups, None)
        stored = _Stored(weight, scale, zero_points, (outputs, inputs), bits, order)
        return QuantizedTensor((outputs, inputs), bits, size, stored.rows, stored.grid)


def _scale(module: Module, outputs: int) -> LazyTensor:
    """The scales: [outputs, groups], [outputs], or one for the whole weight."""
    given = module.tensors.get("weight_scale")
    dimensions = min(max(len(given.shape), 1), 2) if given is not None else 2
    scale = module.tensor("weight_scale", dimensions, *FLOATS)
    if scale.shape[0] != outputs and scale.shape not in ((1,), (1, 1)):
        raise module.error(f"weight_scale of shape {list(scale.shape)}", f"one for each of {outputs} outputs, or one", scale)
    return scale


@dataclass(frozen=True)
class _Stored:
    """The tensors of a module whose weight has a `shape`."""

    weight: LazyTensor
    scale: LazyTensor
    zero_points: LazyTensor | None
    shape: tuple[int, int]
    bits: int
    order: Indices | None

    def rows(self, start: int, stop: int) -> QuantizedRows:
        integers = self.weight.stored(start, stop)
        if self.weight.dtype == "int32":
            integers = centred(unpacked(integers, self.bits)[:, : self.shape[1]], self.bits)
        grid = self.grid()
        return QuantizedRows(
            integers, grid.scales[start:stop], None if grid.zero_points is None else grid.zero_points[start:stop],
            group_of=self.order,
        )  # fmt: skip

    def grid(self) -> Grid:
        scales = self._of_outputs(self.scale.stored(0, self.scale.shape[0]))
        if self.zero_points is None:
            return Grid(scales)
        zeros = self.zero_points.stored(0, self.zero_points.shape[0])
        if self.zero_points.dtype == "int8":
            return Grid(scales, self._of_outputs(zeros))
        return Grid(scales, centred(unpacked(zeros.T, self.bits)[:, : self.shape[0]].T, self.bits))

    def _of_outputs(self, stored: Array) -> Array:
        """[outputs, groups] of what is stored for each output or once."""
        matrix = stored.reshape(len(stored), -1)
        return np.ascontiguousarray(np.broadcast_to(matrix, (self.shape[0], matrix.shape[1])))
