"""Writes releases of BELLE-7B's shape with random values: the pickle in float32, an adapter over it, and integers of GPTQ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.compiler.checkpoint.formats.pickles import open_pickle
from belle_compile.compiler.checkpoint.tensors import StoredValues
from benchmarks.checkpoints import COMMON, SHAPES, STD, write_tokenizer

SHAPE = "bloom-7b1"
RANK, ALPHA = 16, 32  # of BELLE's adapters
GROUP = 128  # inputs of BELLE's GPTQ releases that share a scale
GPTQ_NAME = "bloom7b-2m-8bit-128g.pt"
_POOL_VALUES = 16 << 20  # random numbers, of which each tensor repeats a part that begins elsewhere


def write_release(directory: Path, layers: int | None = None) -> Path:
    """A directory as BELLE-7B-2M's: config.json, a tokenizer, and pytorch_model.bin with a tied head. Returns the pickle.

    PyTorch writes it without values, which are then filled in: no more than a few megabytes of it are in memory."""
    import torch

    shapes = _begin(directory, layers)
    file = directory / "pytorch_model.bin"
    tensors = {key: torch.empty(shape) for key, shape in shapes.items()}  # memory that nothing ever touches
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"]
    with torch.serialization.skip_data():
        torch.save(tensors, file)
    pool = _pool()
    with file.open("r+b") as stream:
        for number, tensor in enumerate(open_pickle(file)):
            assert isinstance(tensor.load, StoredValues), "a state dict has plain tensors"
            _fill(stream, tensor.load.start, tensor.name, int(np.prod(tensor.shape)), np.roll(pool, 7919 * number))
    return file


def write_adapter(directory: Path, release: Path) -> Path:
    """An adapter of PEFT for queries, keys and values of all layers of a release, as BELLE trained them. Returns its
    directory."""
    import torch

    config = json.loads((release / "config.json").read_text())
    directory.mkdir()
    target, width, pool = "query_key_value", config["hidden_size"], _pool()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05,
                "target_modules": [target], "bias": "none", "fan_in_fan_out": False,
                "base_model_name_or_path": "BelleGroup/BELLE-7B-2M", "inference_mode": True}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tensors: dict[str, Any] = {}
    for layer in range(config["n_layer"]):
        name = f"base_model.model.transformer.h.{layer}.self_attention.{target}"
        for part, shape in (("lora_A", (RANK, width)), ("lora_B", (3 * width, RANK))):
            tensors[f"{name}.{part}.weight"] = torch.from_numpy(np.resize(np.roll(pool, 7919 * len(tensors)), shape))
    torch.save(tensors, directory / "adapter_model.bin")
    return directory


def write_gptq(directory: Path, layers: int | None = None) -> Path:
    """A directory as BELLE-7B-gptq's: linears of 8 bits in groups of 128 inputs, the rest in float16. Returns the `.pt` file,
    of which all values are in memory before they are written."""
    import torch

    tensors: dict[str, Any] = {}
    pool, random = _pool(), np.random.default_rng(0).integers(0, 1 << 32, _POOL_VALUES, np.uint32).view(np.int32)
    for number, (key, shape) in enumerate(_begin(directory, layers).items()):
        if key.endswith(".weight") and ".h." in key and len(shape) == 2:
            (outputs, inputs), module = shape, key.removesuffix(".weight")
            qweight = np.resize(np.roll(random, 7919 * number), (inputs // 4, outputs))
            zeros = torch.full((inputs // GROUP, outputs // 4), 0x7F7F7F7F, dtype=torch.int32)  # 128, stored less 1
            scales = torch.full((inputs // GROUP, outputs), STD / 64)
            tensors |= {f"{module}.qweight": torch.from_numpy(qweight), f"{module}.qzeros": zeros, f"{module}.scales": scales}
        elif len(shape) == 2:
            tensors[key] = torch.from_numpy(np.resize(np.roll(pool, 7919 * number).astype(np.float16), shape))
        else:
            norm = "layernorm" in key or ".ln_f." in key
            tensors[key] = torch.full(shape, float(norm and key.endswith("weight")), dtype=torch.float16)
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"]
    torch.save(tensors, directory / GPTQ_NAME)
    return directory / GPTQ_NAME


def _begin(directory: Path, layers: int | None) -> dict[str, tuple[int, ...]]:
    """Write what is no weight: config.json and a tokenizer. Returns the shapes of the parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True)
    config = SHAPES[SHAPE] | COMMON["bloom"] | ({} if layers is None else {"n_layer": layers})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(directory, config["vocab_size"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}


def _pool() -> Any:
    return np.random.default_rng(0).standard_normal(_POOL_VALUES, np.float32) * np.float32(STD)


def _fill(stream: Any, start: int, name: str, count: int, pool: Any) -> None:
    """Write random numbers, or the neutral ones of a norm, as the values of a tensor."""
    if "layernorm" in name or ".ln_f." in name:
        pool = np.full(count, 1.0 if name.endswith("weight") else 0.0, np.float32)
    stream.seek(start)
    while count:
        count -= stream.write(pool[:count].data) // pool.itemsize
