"""Read an export in Transformers' layout back, as the float graph that its files stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors import safe_open

from belle_compile.compiler.checkpoint import Checkpoint
from belle_compile.compiler.checkpoint.templates import PromptTemplate
from belle_compile.compiler.checkpoint.tensors import LazyTensor
from belle_compile.compiler.families import build_graph, registry
from belle_compile.compiler.json_files import read_json

_SCALE = "_scale"
_CODES = {"I8": "int8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def graph_of(folder: Path) -> ir.Model:
    """The float32 graph of a directory of safetensors files with config.json; int8 weights are multiplied by their scales."""
    config = {key: value for key, value in read_json(folder / "config.json").items() if key != "quantization_config"}
    family = registry.by_config(config, folder)
    stored = _stored(folder)
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE):
            continue
        scale = stored.get(name + _SCALE)
        whole = tensor if scale is None else tensor.changed("dequantized", partial(_product, tensor, scale))
        canonical = family.canonical_name(name)
        tensors[canonical] = replace(whole, name=canonical)
    return build_graph(Checkpoint(folder, family.name, config, tensors, "", {}, PromptTemplate("", ""), {}, ()))


def _stored(folder: Path) -> Mapping[str, LazyTensor]:
    """The tensors of all files by their stored names."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                shape, dtype = tuple(part.get_shape()), _CODES[part.get_dtype()]
                tensors[name] = LazyTensor(name, shape, dtype, file, partial(_rows, file, name))
    return tensors


def _rows(file: Path, name: str, start: int, stop: int) -> npt.NDArray[Any]:
    with safe_open(file, framework="pt") as opened:
        rows: npt.NDArray[Any] = opened.get_slice(name)[start:stop].float().numpy()
    return rows


def _product(integers: LazyTensor, scales: LazyTensor, start: int, stop: int) -> npt.NDArray[np.float32]:
    product: npt.NDArray[np.float32] = integers.rows(start, stop) * scales.rows(start, stop)
    return product
