"""Tiny checkpoints whose linears are integers, in the layouts that releases have; packed and dequantized without the compiler.

    release = gptq_file(source, directory, bits=8, group=128)    # as BELLE published BELLE-7B-gptq

`source` is a float checkpoint as tests.parity.variants makes it. A release has its `directory`, the float checkpoint `plain`
that its integers stand for, which Transformers loads, and the `weights` by module. Layouts are those of the docstrings of
compiler/checkpoint/packed; integers are packed here as numbers of any length, bit by bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Array = npt.NDArray[Any]
Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Weight:
    """Unsigned `integers` [N, K] of some bits, `zeros` and `scales` [N, G], and the group of each input."""

    bits: int
    integers: Array
    zeros: Array
    scales: Array
    group_of: Array

    @property
    def values(self) -> Array:
        zeros, scales = self.zeros[:, self.group_of], self.scales[:, self.group_of].astype(np.float32)
        return (self.integers.astype(np.float32) - zeros.astype(np.float32)) * scales


@dataclass(frozen=True)
class Release:
    directory: Path
    plain: Path
    weights: Mapping[str, Weight]


def quantized(
    weight: Array, bits: int, group: int, *, symmetric: bool, act_order: bool = False, scales: Any = np.float16
) -> Weight:
    """Round to nearest; a `group` of -1 is the whole row. With `act_order`, inputs are in groups at random."""
    outputs, inputs = weight.shape
    size = inputs if group == -1 else group
    group_of = np.arange(inputs) // size
    if act_order:
        group_of = np.random.default_rng(inputs).permutation(group_of)
    count, most = int(group_of.max()) + 1, 2**bits - 1
    zeros, steps = np.empty((outputs, count), np.int64), np.empty((outputs, count), scales)
    for g in range(count):
        part = weight[:, group_of == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(high, -low)
            low = -high
        steps[:, g] = (high - low) / most
        zeros[:, g] = 2 ** (bits - 1) if symmetric else np.rint(-low / steps[:, g].astype(np.float64))
    integers = np.rint(weight / steps[:, group_of].astype(np.float64)) + zeros[:, group_of]
    return Weight(bits, np.clip(integers, 0, most).astype(np.int64), zeros, steps, group_of)


def words(integers: Array, bits: int) -> Array:
    """int32 [rows, ceil(count * bits / 32)] of unsigned integers [rows, count], the first in the lowest bits."""
    length = -(-integers.shape[1] * bits // 32) * 4
    rows = [sum(int(value) << (bits * place) for place, value in enumerate(row)).to_bytes(length, "little") for row in integers]
    return np.stack([np.frombuffer(row, "<i4") for row in rows])


def release(source: Path, directory: Path, store: Callable[[str, Weight], Tensors], **options: Any) -> Release:
    """Write all linears but the head as `store` returns them, beside the other tensors in float16 and the small files."""
    weights: dict[str, Weight] = {}
    stored, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.ndim < 2 or "embed" in name or "lm_head" in name:
            stored[name] = tensor.half()
            plain[name] = stored[name].float()
            continue
        weights[module] = quantized(tensor.numpy(), **options)
        stored |= {f"{module}.{part}": value for part, value in store(module, weights[module]).items()}
        plain[name] = torch.from_numpy(weights[module].values)
    for folder in (directory, float_copy := directory.with_name(f"{directory.name}-plain")):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(plain, float_copy / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return Release(directory, float_copy, weights)


def configure(made: Release, **settings: Any) -> Release:
    """Set quantization_config."""
    file = made.directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    return made


def of_gptq(weight: Weight, *, less: int = 1, scales: Any = torch.float16, order: bool = False) -> Tensors:
    """The tensors of GPTQ; zero points are stored less `less`."""
    most = 2**weight.bits - 1
    tensors = {
        "qweight": torch.from_numpy(np.ascontiguousarray(words(weight.integers, weight.bits).T)),
        "qzeros": torch.from_numpy(words((weight.zeros.T - less) & most, weight.bits)),
        "scales": torch.from_numpy(np.ascontiguousarray(weight.scales.T)).to(scales),
    }
    return tensors | ({"g_idx": torch.from_numpy(weight.group_of.astype(np.int32))} if order else {})


def gptq_file(source: Path, directory: Path, name: str = "bloom7b-2m-8bit-128g.pt", **options: Any) -> Release:
    """As models/gptq of BELLE's repository writes it: scales in float32, and a bias for each linear."""
    biased = {key.removesuffix(".bias") for key in load_file(source / "model.safetensors") if key.endswith(".bias")}

    def store(module: str, weight: Weight) -> Tensors:
        missing = {} if module in biased else {"bias": torch.zeros(len(weight.integers))}
        return of_gptq(weight, scales=torch.float32) | missing

    made = release(source, directory, store, **{"symmetric": False, "scales": np.float32} | options)
    torch.save(load_file(directory / "model.safetensors"), directory / name)
    (directory / "model.safetensors").unlink()
    return made


def gptq(source: Path, directory: Path, layout: str = "gptq", **options: Any) -> Release:
    """As GPTQModel and AutoGPTQ write it."""
    less = 1 if layout == "gptq" else 0
    options = {"symmetric": True} | options
    made = release(source, directory, lambda _, weight: of_gptq(weight, less=less, order=True), **options)
    return configure(
        made,
        quant_method="gptq", bits=options["bits"], group_size=options["group"], sym=options["symmetric"],
        desc_act=options.get("act_order", False), checkpoint_format=layout,
    )  # fmt: skip


def awq(source: Path, directory: Path, **options: Any) -> Release:
    """As AutoAWQ writes its version "gemm"."""

    def interleaved(integers: Array) -> torch.Tensor:
        ordered = integers.reshape(len(integers), -1, 8)[:, :, AWQ_ORDER].reshape(integers.shape)
        return torch.from_numpy(words(ordered, 4))

    def store(_: str, weight: Weight) -> Tensors:
        scales = torch.from_numpy(np.ascontiguousarray(weight.scales.T))
        return {"qweight": interleaved(weight.integers.T), "qzeros": interleaved(weight.zeros.T), "scales": scales}

    options = {"bits": 4, "symmetric": False} | options
    made = release(source, directory, store, **options)
    return configure(made, quant_method="awq", bits=4, group_size=options["group"], version="gemm", zero_point=True)


def compressed_tensors(source: Path, directory: Path, layout: str = "int-quantized", **options: Any) -> Release:
    """As llm-compressor writes it: W8A8 in int-quantized, weights alone in pack-quantized."""
    options = {"bits": 8, "group": -1, "symmetric": True} | options
    bits, middle = options["bits"], 2 ** (options["bits"] - 1)

    def store(_: str, weight: Weight) -> Tensors:
        scale = {"weight_scale": torch.from_numpy(weight.scales)}
        zeros = torch.from_numpy((weight.zeros - middle).astype(np.int8))
        if layout == "int-quantized":
            integers = {"weight": torch.from_numpy((weight.integers - middle).astype(np.int8))}
            return integers | scale | ({} if options["symmetric"] else {"weight_zero_point": zeros})
        packed = {"weight_packed": torch.from_numpy(words(weight.integers, bits))}
        shape = {"weight_shape": torch.tensor(weight.integers.shape)}
        points = torch.from_numpy(np.ascontiguousarray(words(weight.zeros.T, bits).T))
        return packed | shape | scale | ({} if options["symmetric"] else {"weight_zero_point": points})

    grouped = options["group"] != -1
    weights = {
        "num_bits": bits, "type": "int", "symmetric": options["symmetric"], "dynamic": False, "actorder": None,
        "strategy": "group" if grouped else "channel", "group_size": options["group"] if grouped else None,
    }  # fmt: skip
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    inputs = dynamic if layout == "int-quantized" else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return configure(
        release(source, directory, store, **options),
        quant_method="compressed-tensors", format=layout, quantization_status="compressed", ignore=["lm_head"],
        config_groups={"group_0": group}, kv_cache_scheme=None,
    )  # fmt: skip
