"""Write a GGUF file with Q8_0 matrices: tensors under llama.cpp's names and in its order of rows, and the metadata it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.checkpoint.formats.gguf_rows import interleaved_halves
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports.directory import STAGE
from belle_compile.compiler.exports.gguf_vocabulary import add_value, add_vocabulary, vocabulary_of
from belle_compile.compiler.exports.model import ExportedModel, Integers, Order, blocks_of, chunks
from belle_compile.compiler.families.gguf import GgufLayout
from belle_compile.passes.presets import BLOCK

Array = npt.NDArray[Any]

BLOCK_BYTES = BLOCK + 2  # of integers and the float16 scale that they share
_ROWS = 4096  # rows of a matrix that are packed at a time
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file. `kind` is Q8_0 or F32; `data` computes its rows, a part at a time, as they are stored."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    data: Callable[[], Iterator[Array]]

    @property
    def bytes(self) -> int:
        count = prod(self.shape)
        return count // BLOCK * BLOCK_BYTES if self.kind == gguf.GGMLQuantizationType.Q8_0 else 4 * count


def check_model(model: ExportedModel) -> None:
    """Raise CompileError for a model that llama.cpp has no architecture, no rows of whole blocks or no tokenizer for."""
    layout = _layout(model)
    layout.write_config(model.config)
    names = {module: part for part, module in layout.modules.items()}
    for module in model.modules:
        if not module.is_norm and module.shape[1] % BLOCK:
            raise CompileError(
                STAGE, f"tensor {_stored_name(layout, names, module.name)}.weight", found=f"rows of {module.shape[1]} values",
                expected=f"a multiple of {BLOCK}, the block of Q8_0", remedy="use another --format",
            )  # fmt: skip
    vocabulary_of(model)


def write_gguf(model: ExportedModel, file: Path, on_progress: Callable[[int, int], None]) -> list[str]:
    """Write the file of a model that `check_model` accepts, one tensor in memory at a time; returns notes. `on_progress` is
    called with the bytes of tensors written so far and in all."""
    layout = _layout(model)
    writer = gguf.GGUFWriter(str(file), layout.architectures[0])
    tensors = planned_tensors(model)
    metadata = layout.write_config(model.config)
    writer.add_name(model.name)
    writer.add_quantized_by("belle-compile")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        add_value(writer, f"{layout.architectures[0]}.{key}", value)
    notes = add_vocabulary(writer, model)
    for tensor in tensors:
        dtype = np.dtype(np.float32) if tensor.kind == gguf.GGMLQuantizationType.F32 else np.dtype(np.uint8)
        shape = tensor.shape if dtype == np.float32 else (*tensor.shape[:-1], tensor.shape[-1] // BLOCK * BLOCK_BYTES)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.bytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(tensor.bytes for tensor in tensors)
    for tensor in tensors:
        writer.write_tensor_data(np.concatenate([np.ascontiguousarray(part).reshape(-1) for part in tensor.data()]))
        done += tensor.bytes
        on_progress(done, total)
    writer.close()
    _sync(file)
    return notes


def planned_tensors(model: ExportedModel) -> list[PlannedTensor]:
    """The tensors of the file in their order."""
    layout = _layout(model)
    names = {module: part for part, module in layout.modules.items()}
    planned: list[PlannedTensor] = []
    if divisors := layout.write_divisors(model.config):
        values = np.array(divisors, np.float32)
        planned.append(_floats(layout.rope_divisors, tuple(values.shape), lambda: iter([values])))
    for module in model.modules:
        stored = _stored_name(layout, names, module.name)
        order = _order(model, layout, stored, module.shape[0])
        weight = module.weight
        if isinstance(weight, Integers):
            data = partial(_blocks, f"{stored}.weight", weight, order)
        elif module.is_norm:
            data = partial(chunks, weight, order)
        else:
            data = partial(_packed_blocks, weight, order)
        kind = gguf.GGMLQuantizationType.F32 if module.is_norm else gguf.GGMLQuantizationType.Q8_0
        planned.append(PlannedTensor(f"{stored}.weight", kind, module.shape, data))
        if module.bias is not None:
            shape = tuple(module.bias.shape.numpy())
            planned.append(_floats(f"{stored}.bias", shape, partial(chunks, module.bias, order)))
    return planned


def _floats(name: str, shape: tuple[int, ...], data: Callable[[], Iterator[Array]]) -> PlannedTensor:
    return PlannedTensor(name, gguf.GGMLQuantizationType.F32, shape, data)


def _layout(model: ExportedModel) -> GgufLayout:
    layout = model.family.gguf
    if layout is None:
        found, remedy = "no layout of GGUF files", "use another --format"
        raise CompileError(STAGE, f"family {model.family.title}", found=found, remedy=remedy)
    return layout


def _stored_name(layout: GgufLayout, names: dict[str, str], module: str) -> str:
    """The name of a module in GGUF files: model.layers.3.mlp.up_proj is blk.3.ffn_up."""
    if module in names:
        return names[module]
    layer, _, part = module.removeprefix(f"{layout.layers}.").partition(".")
    return f"blk.{layer}.{names[part]}"


def _order(model: ExportedModel, layout: GgufLayout, stored: str, rows: int) -> Order | None:
    """The row of the graph that each row of the file holds; None where they are the same. Rows of BLOOM's fused projection are
    in the same order in both."""
    heads = layout.interleaved(f"{stored}.weight", _heads(model))
    if not heads:
        return None
    order: Order = np.argsort(interleaved_halves(rows // heads)(np.arange(rows)))
    return order


def _heads(model: ExportedModel) -> dict[str, Any]:
    """The numbers of heads under the keys of config.json that layouts name, which old releases leave out."""
    dimensions = model.dimensions
    return {"num_attention_heads": dimensions.num_heads, "num_key_value_heads": dimensions.num_kv_heads}


def _blocks(name: str, weight: Integers, order: Order | None) -> Iterator[Array]:
    """Rows of Q8_0 blocks, uint8 [rows, bytes]; raises CompileError for a scale that float16 cannot hold."""
    integers, scales = weight.integers.numpy(), weight.scales.numpy()
    if not float(scales.max(initial=0.0)) <= _LARGEST:
        found = f"a scale of {scales.max():,.0f}"
        raise CompileError("write", f"tensor {name}", found=found, expected=f"at most {_LARGEST:,.0f}, the largest float16")
    for start in range(0, len(integers), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(integers)))
        rows = rows if order is None else order[rows]
        yield _packed(integers[rows], scales[rows].astype(np.float16).reshape(len(rows), -1))


def _packed_blocks(weight: ir.TensorProtocol, order: Order | None) -> Iterator[Array]:
    """Rows of Q8_0 blocks of the floats of a matrix: the nearest integers for scales with the least squared error."""
    return starmap(_packed, blocks_of(weight, BLOCK, order))


def _packed(integers: Array, scales: Array) -> Array:
    """Rows of Q8_0 blocks, uint8 [rows, bytes], from int8 integers [rows, K] and float16 scales: [rows, 1], or one a block."""
    blocks = integers.reshape(len(integers), -1, BLOCK)
    packed = np.empty((*blocks.shape[:2], BLOCK_BYTES), np.uint8)
    packed[..., :2] = scales[..., None].view(np.uint8)
    packed[..., 2:] = blocks.view(np.uint8)
    return packed.reshape(len(packed), -1)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
