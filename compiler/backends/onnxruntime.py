"""The backend of ONNX Runtime: a rank's graph as model.onnx, with weights.safetensors as its external data."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from belle_compile.compiler.backends.base import (
    FIXED_BYTES,
    PROCESS_BYTES,
    Backend,
    CompileOptions,
    Footprint,
    KVCache,
    Passes,
    Payload,
    tensor_bytes,
)
from belle_compile.compiler.devices import Device, Target
from belle_compile.compiler.kv_types import AUTO
from belle_compile.runtime.artifact import KernelCalls
from belle_compile.runtime.executors.onnxruntime_factory import VNNI
from belle_compile.runtime.executors.onnxruntime_sizes import CHUNK_TOKENS, MODEL_NAME, STEP_ROWS
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.kv_blocks import blocks_for

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.compiler.backends.onnx.graph import OnnxModel
    from belle_compile.passes.presets import Recipe

# Quantizations stay apart: a fused one would be translated into the same nodes.
_FUSIONS = frozenset({"fuse-dequantize", "fuse-projections", "fuse-add-norm"})
_ISAS = {"x86_64": (VNNI,), "aarch64": ("neon",)}  # by machine; within these, ONNX Runtime chooses kernels itself
_VALUES_KEPT = 6  # values of one layer that are alive at the same time


class OnnxRuntimeBackend(Backend):
    """Makes engines for processors of any kind that ONNX Runtime has kernels for, which it chooses itself; one rank.

    Keys and values are float32. A block counts twice: in the store of all blocks, and where the attention of a running sequence
    reads it, which must lie in one piece.
    """

    name = "onnxruntime"
    kv_types = ("float32",)

    def isas(self, device: Device) -> tuple[str, ...]:
        return _ISAS.get(device.arch, ())

    def passes(self, recipe: Recipe) -> Passes:
        return Passes(fusions=_FUSIONS)

    def refusal(self, target: Target, recipe: Recipe) -> str:
        if target.ranks > 1:
            return "several ranks, where ONNX Runtime runs in one process"
        if recipe.weights.group is not None:
            return f"weights {recipe.weights}, for which ONNX Runtime has no kernels with integer activations"
        return super().refusal(target, recipe)

    def footprint(self, graphs: Sequence[ir.Model], target: Target, kv_cache: str = AUTO) -> list[Footprint]:
        return [_footprint(graph, _translated(graph)) for graph in graphs]

    def compile(self, graphs: Sequence[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        payloads = []
        for number, graph in enumerate(graphs):
            options.on_kernels(number, len(graphs))
            model = _translated(graph)
            payloads.append(
                Payload(
                    files={MODEL_NAME: model.content},
                    weights=[model.weights],
                    footprint=_footprint(graph, model),
                    kernel_calls=KernelCalls(options.unfused_calls, self.kernel_calls(graph)),
                    toolchain={"onnx": version("onnx")},
                )
            )
        options.on_kernels(len(graphs), len(graphs))
        return payloads


def _translated(graph: ir.Model) -> OnnxModel:
    from belle_compile.compiler.backends.onnx.interface import ServingInterface
    from belle_compile.compiler.backends.onnx.translate import translate

    return translate(graph, ServingInterface())


def _footprint(graph: ir.Model, model: OnnxModel) -> Footprint:
    from belle_compile.compiler.backends.onnx.attention import cached_head_dim

    facts = {name: int(value) for name, value in graph.metadata_props.items() if value.isdecimal()}
    block = 2 * facts["num_layers"] * facts["num_kv_heads"] * cached_head_dim(facts["head_dim"]) * BLOCK_SIZE * 4
    return Footprint(
        weights=sum(map(tensor_bytes, model.weights)),
        activations=_activation_bytes(facts),
        reserve=FIXED_BYTES + PROCESS_BYTES,
        kv=KVCache("float32", 2 * block, BLOCK_SIZE, blocks_for(facts["max_position"]) * BLOCK_SIZE),
    )


def _activation_bytes(facts: dict[str, int]) -> int:
    """An estimate of what ONNX Runtime allocates: it keeps some values of the widest layer of a chunk at a time, the scores of
    its attention, and the logits of a step."""
    widest = max(facts["intermediate_size"], 2 * facts["hidden_size"])
    scores = facts["num_heads"] * facts["max_position"]
    return 4 * (CHUNK_TOKENS * (_VALUES_KEPT * widest + 2 * scores) + 2 * STEP_ROWS * facts["vocab_size"])
