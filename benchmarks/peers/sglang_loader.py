"""Loads a compressed-tensors export of a LLaMA by SGLang's own loader of that format, on a host without a GPU.

    pip download --no-deps sglang==0.5.23 && unzip sglang-0.5.23-*.whl -d sglang
    python sglang_loader.py sglang EXPORT       # by an interpreter that has torch, transformers and compressed-tensors

SGLang's packages for Linux need CUDA, and so does its scheme for W8A8. Here its classes read quantization_config, choose a
scheme for each of their fused linears, and load the integers and scales of the export, as a single rank. Two functions of the
scheme are CUDA kernels, `per_token_quant_int8` and `int8_scaled_mm`: torch computes what they are to compute. The outputs of
every linear are compared with products of the export's integers, and one line of JSON tells the largest relative difference.
Packages that SGLang imports and that are missing are replaced by empty ones.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

LEAST_CAPABILITY = (8, 0)  # of the GPU that SGLang is made to believe in: Ampere, its least for W8A8
FUSED: Mapping[str, tuple[tuple[str, Any], ...]] = {
    "self_attn.qkv_proj": (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v")),
    "self_attn.o_proj": (("o_proj", None),),
    "mlp.gate_up_proj": (("gate_proj", 0), ("up_proj", 1)),
    "mlp.down_proj": (("down_proj", None),),
}
TOKENS = 8
_MISSING_AT_MOST = 40


def imported() -> tuple[Any, Any, Any]:
    """SGLang's modules for the format, for its W8A8 scheme and for linears."""
    missing: set[str] = set()
    while True:
        try:
            from sglang.srt.layers import linear
            from sglang.srt.layers.quantization.compressed_tensors import compressed_tensors
            from sglang.srt.layers.quantization.compressed_tensors.schemes import compressed_tensors_w8a8_int8

            return compressed_tensors, compressed_tensors_w8a8_int8, linear
        except ModuleNotFoundError as error:
            name = error.name or ""
            if name in missing or name.startswith("sglang") or len(missing) == _MISSING_AT_MOST:
                raise
            missing.add(name)
            stand_in = MagicMock(name=name, __path__=[])
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = stand_in
            for begun in [module for module in sys.modules if module.startswith("sglang")]:
                del sys.modules[begun]


def rounded(x: Any) -> tuple[Any, Any]:
    """What per_token_quant_int8 is to compute: int8 [tokens, width] and a scale [tokens, 1]."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (x / scale).round().clamp(-128, 127).char(), scale


def product(x: Any, weight: Any, scale: Any, weight_scale: Any, out_dtype: Any, bias: Any = None) -> Any:
    """What int8_scaled_mm is to compute, by an exact product in float64."""
    scaled = (x.double() @ weight.double()) * scale * weight_scale.view(1, -1)
    return scaled.to(out_dtype) if bias is None else scaled.to(out_dtype) + bias


def made(linear: Any, config: Mapping[str, Any], quantization: Any, layer: str) -> dict[str, Any]:
    """SGLang's linears of a layer, as its LLaMA makes them."""
    width, hidden, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim, kv_heads = config.get("head_dim") or width // heads, config.get("num_key_value_heads") or heads
    common = {"bias": False, "quant_config": quantization}
    return {
        "self_attn.qkv_proj": linear.QKVParallelLinear(
            width, head_dim, heads, kv_heads, prefix=f"{layer}self_attn.qkv_proj", **common
        ),
        "self_attn.o_proj": linear.RowParallelLinear(heads * head_dim, width, prefix=f"{layer}self_attn.o_proj", **common),
        "mlp.gate_up_proj": linear.MergedColumnParallelLinear(
            width, [hidden, hidden], prefix=f"{layer}mlp.gate_up_proj", **common
        ),
        "mlp.down_proj": linear.RowParallelLinear(hidden, width, prefix=f"{layer}mlp.down_proj", **common),
    }


def loaded(module: Any, stem: str, parts: Sequence[tuple[str, Any]], tensors: Mapping[str, Any]) -> Any:
    """Load the parts of a fused linear by its own loader; returns their product of integers and scales."""
    import torch

    parameters = dict(module.named_parameters())
    for part, shard in parts:
        for kind in ("weight", "weight_scale"):
            given = (tensors[f"{stem}.{part}.{kind}"], *(() if shard is None else (shard,)))
            parameters[kind].weight_loader(parameters[kind], *given)
    module.quant_method.process_weights_after_loading(module)
    return torch.cat([tensors[f"{stem}.{part}.weight"].double() * tensors[f"{stem}.{part}.weight_scale"] for part, _ in parts])


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    with contextlib.redirect_stderr(io.StringIO()):  # warnings that there is no GPU
        compressed_tensors, scheme, linear = imported()
    import torch
    from safetensors.torch import load_file

    export = Path(sys.argv[2])
    config = json.loads((export / "config.json").read_text("utf-8"))
    tensors = {name: tensor for file in export.glob("*.safetensors") for name, tensor in load_file(file).items()}
    torch.cuda.get_device_capability = lambda device=None: LEAST_CAPABILITY
    linear._resolve_linear_group = lambda group: None  # one rank
    linear.get_group_rank_size = lambda group: (0, 1)
    scheme.per_token_quant_int8, scheme.int8_scaled_mm = rounded, product
    quantization = compressed_tensors.CompressedTensorsConfig.from_config(config["quantization_config"])
    quantization.packed_modules_mapping = {
        name.split(".")[-1]: [part for part, _ in parts] for name, parts in FUSED.items() if len(parts) > 1
    }
    schemes, largest, count = set(), 0.0, 0
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for name, module in made(linear, config, quantization, layer).items():
            weight = loaded(module, layer + name.rsplit(".", 1)[0], FUSED[name], tensors)
            x = torch.randn(TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(count))
            integers, scales = rounded(x)
            expected = (integers.double() * scales) @ weight.T
            got = module.scheme.apply_weights(module, x, None)
            largest = max(largest, float((got - expected).abs().max() / expected.abs().max()))
            schemes.add(type(module.scheme).__name__)
            count += 1
    head = quantization.get_lm_head_scheme(None, "lm_head")
    record = {"linears": count, "schemes": sorted(schemes), "largest_relative_difference": largest, "head": head or "floats"}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
