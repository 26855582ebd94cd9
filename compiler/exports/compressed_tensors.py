"""compressed-tensors: W8A8 INT8 as vLLM and SGLang load it, with the integers and scales of engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.compiler.exports.base import CHANNEL, Carries, Format, Simulation
from belle_compile.passes.presets import INT8

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from belle_compile.compiler.exports.model import ExportedModel
    from belle_compile.compiler.exports.runtimes import ForeignRuntime


# Ops whose results are hardly ever negative: half the levels of a symmetric scale would stand for values that do not occur.
_ONE_SIDED = frozenset({"Gelu"})
_LEAST_SCALE = 1e-12  # of a row whose values are all the same


class CompressedTensors(Format):
    """The format `int-quantized`: int8 `weight` [out, in] and float32 `weight_scale` [out, 1], activations quantized for each
    token while running, with a zero point where an activation function makes nearly all of them positive. Embedding and head
    keep floats."""

    name = "compressed-tensors"
    summary = "W8A8 INT8 for vLLM and SGLang"
    runtimes = "vLLM, SGLang"
    integers = True
    granularities = (CHANNEL,)
    options = frozenset({"keep_tied", "dtype"})
    keeps_tied = "without the online rotation, SmoothQuant alone loses less, and a second table costs memory"
    smooths_instead = "SmoothQuant alone loses less, and the rotation undoes its factors of norms"
    carries = Carries(
        methods=frozenset({"smooth", "rotate", "gptq"}),
        weights=INT8,
        activation_bits=8,
        reasons={
            "rotate-online": "which needs a transform of activations that vLLM does not compute reliably",
            "static": "since activations get a scale for each token",
            "reorder": "which changes nothing where a whole row shares a scale",
        },
        substitutes={"rotate-online": ("smooth",)},  # the inputs of the feed-forward's second linear have outliers otherwise
    )

    def check_model(self, model: ExportedModel) -> None:
        model.release.config(model.config)
        model.check_head(self.name)

    def write(self, model: ExportedModel, folder: Path, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
        from belle_compile.compiler.exports.release import stored_tensors, tokenizer_notes, write_release
        from belle_compile.compiler.exports.shards import SHARD_BYTES, write_shards

        write_release(model, folder, quantization_config(model))
        files = write_shards(folder, stored_tensors(model), SHARD_BYTES, on_progress)
        return {"weights": files, "notes": tokenizer_notes(model.tokenizer_json)}

    def stored_bytes(self, model: ExportedModel) -> int:
        from belle_compile.compiler.exports.release import stored_tensors

        return sum(tensor.bytes for tensor in stored_tensors(model))

    def runtime(self) -> ForeignRuntime | None:
        from belle_compile.compiler.exports.runtimes import VLLM

        return VLLM

    def simulation(self, folder: Path) -> Simulation:
        from belle_compile.compiler.exports.read_back import graph_of

        return Simulation(graph_of(folder), _rounded_input)


def _rounded_input(node: ir.Node, x: Tensor) -> Tensor:
    """Each row rounded to 8 bits with a scale of its own, or a scale and a zero point; the head reads floats."""
    from belle_compile.compiler.exports.model import source_of
    from belle_compile.compiler.ir.stream import quantized

    if node.outputs[0].is_graph_output():
        return x
    return _rounded_from_zero_point(x) if source_of(node) in _ONE_SIDED else quantized(x, 8)


def _rounded_from_zero_point(x: Tensor) -> Tensor:
    """x [rows, width] after rounding to 256 levels from the least to the greatest value of each row, as float32."""
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    scale = ((high - low) / 255).clamp(min=_LEAST_SCALE)
    zero = (-128 - low / scale).round()
    return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


def quantization_config(model: ExportedModel) -> dict[str, Any]:
    """The quantization_config of config.json, as llm-compressor writes it for W8A8."""
    from belle_compile.compiler.exports.model import HEAD, Integers
    from belle_compile.compiler.exports.release import stored_name

    linears = [module for module in model.modules if not (module.is_norm or module.is_table)]
    kept = [stored_name(model, module.name) for module in linears if not isinstance(module.weight, Integers)]
    common = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "block_structure": None, "actorder": None}
    activations = common | {"strategy": "token", "dynamic": True, "observer": None, "observer_kwargs": {}}
    weights = common | {"strategy": "channel", "dynamic": False, "observer": "minmax", "observer_kwargs": {}}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    groups = {"group_0": group}
    one_sided = [module for module in linears if module.source in _ONE_SIDED and isinstance(module.weight, Integers)]
    if one_sided:  # names go before classes of modules
        names = [stored_name(model, module.name) for module in one_sided]
        groups["group_1"] = group | {"targets": names, "input_activations": activations | {"symmetric": False}}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dict.fromkeys([HEAD, *kept])),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
