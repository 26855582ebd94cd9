"""The backend of ONNX Runtime: a rank's graph as model.onnx, with weights.safetensors as its external data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from belle_compile.compiler.backends.base import (
    FIXED_BYTES,
    ITEM_BYTES,
    PROCESS_BYTES,
    SCALED_PRODUCTS,
    Backend,
    CompileOptions,
    Footprint,
    KVCache,
    Passes,
    Payload,
    tensor_bytes,
)
from belle_compile.compiler.devices import Device, Target
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.kv_types import AUTO
from belle_compile.runtime.artifact import KernelCalls
from belle_compile.runtime.executors.onnxruntime_factory import VNNI
from belle_compile.runtime.executors.onnxruntime_sizes import (
    CUDA,
    GPU_SEQUENCES,
    MODEL_NAME,
    STEP_ROWS,
    activation_bytes,
    gpu_activation_bytes,
    gpu_capacity,
    gpu_context,
)
from belle_compile.runtime.host import GPU_RESERVE_BYTES
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.kv_blocks import blocks_for

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.compiler.backends.onnx.graph import OnnxModel
    from belle_compile.passes.presets import Recipe

# Quantizations stay apart: a fused one would be translated into the same nodes.
_FUSIONS = frozenset({"fuse-dequantize", "fuse-projections", "fuse-add-norm"})


@dataclass(frozen=True)
class _Provider:
    """An execution provider of ONNX Runtime: how graphs are translated for it, and what its executor needs beside the weights.

    `floats` is the type of weights that are not quantized, of keys and of values. `memory` gives the bytes of activations, the
    bytes of a block of the cache, and the tokens of the longest sequence, from the numbers of the model's metadata and the
    bytes of a token's keys and values; `reserve` is that of the footprint.
    """

    floats: str
    translate: Callable[[ir.Model], OnnxModel]
    memory: Callable[[Mapping[str, int], int], tuple[int, int, int]]
    reserve: int


def _for_processors(graph: ir.Model) -> OnnxModel:
    from belle_compile.compiler.backends.onnx.interface import ServingInterface
    from belle_compile.compiler.backends.onnx.translate import translate

    return translate(graph, ServingInterface())


def _for_gpus(graph: ir.Model) -> OnnxModel:
    from belle_compile.compiler.backends.onnx.cuda import CudaInterface, CudaKernels
    from belle_compile.compiler.backends.onnx.translate import translate

    capacity = gpu_capacity(gpu_context(int(graph.metadata_props["max_position"])))
    return translate(graph, CudaInterface(capacity), CudaKernels(capacity))


def _processor_memory(facts: Mapping[str, int], token: int) -> tuple[int, int, int]:
    """A block counts twice: in the store of all blocks, and where the attention of a running sequence reads it."""
    context = blocks_for(facts["max_position"]) * BLOCK_SIZE
    return activation_bytes(facts, 8, facts["max_position"], STEP_ROWS), 2 * token * BLOCK_SIZE, context


def _gpu_memory(facts: Mapping[str, int], token: int) -> tuple[int, int, int]:
    """Beside the store of all blocks, there are places for the longest sequences, whether they run or not."""
    context = gpu_context(facts["max_position"])
    slots = GPU_SEQUENCES * gpu_capacity(context) * token
    return slots + gpu_activation_bytes(facts), token * BLOCK_SIZE, context


_PROCESSORS = _Provider("float32", _for_processors, _processor_memory, FIXED_BYTES + PROCESS_BYTES)
_GPUS = _Provider("float16", _for_gpus, _gpu_memory, FIXED_BYTES + GPU_RESERVE_BYTES)
_PROVIDERS = {VNNI: _PROCESSORS, "neon": _PROCESSORS, CUDA: _GPUS}  # by instruction set
_ISAS = {"x86_64": (VNNI,), "aarch64": ("neon",)}  # by machine; within these, ONNX Runtime chooses kernels itself
_GPU_ARCHS = frozenset({"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"})  # onnxruntime-gpu 1.31 has machine code for


class OnnxRuntimeBackend(Backend):
    """Makes engines for processors of any kind that ONNX Runtime has kernels for, and for NVIDIA GPUs; one rank.

    Keys and values are float32 on processors and float16 on GPUs.
    """

    name = "onnxruntime"
    kv_types = ("float32", "float16")

    def isas(self, device: Device) -> tuple[str, ...]:
        return (CUDA,) if _GPU_ARCHS.intersection(device.isas) else _ISAS.get(device.arch, ())

    def passes(self, recipe: Recipe) -> Passes:
        return Passes(fusions=_FUSIONS, needed=SCALED_PRODUCTS)

    def refusal(self, target: Target, recipe: Recipe) -> str:
        if target.ranks > 1:
            return "several ranks, where ONNX Runtime runs in one process"
        return self.recipe_refusal(recipe) or super().refusal(target, recipe)

    def recipe_refusal(self, recipe: Recipe) -> str:
        """The reason, as a phrase, why a recipe has no translation into standard ONNX; empty if it has one."""
        if recipe.weights.group is not None:
            return f"weights {recipe.weights}, for which ONNX Runtime has no kernels with integer activations"
        return ""

    def footprint(self, graphs: Sequence[ir.Model], target: Target, kv_cache: str = AUTO) -> list[Footprint]:
        provider = self._provider(target, kv_cache)
        return [_footprint(graph, provider.translate(graph), provider) for graph in graphs]

    def compile(self, graphs: Sequence[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        provider, payloads = self._provider(target, options.kv_cache), []
        for number, graph in enumerate(graphs):
            options.on_kernels(number, len(graphs))
            model = provider.translate(graph)
            payloads.append(
                Payload(
                    files={MODEL_NAME: model.content},
                    weights=[model.weights],
                    footprint=_footprint(graph, model, provider),
                    kernel_calls=KernelCalls(options.unfused_calls, self.kernel_calls(graph)),
                    toolchain={"onnx": version("onnx")},
                    quantization=_words(graph, provider),
                )
            )
        options.on_kernels(len(graphs), len(graphs))
        return payloads

    def _provider(self, target: Target, kv_cache: str) -> _Provider:
        """The execution provider of a target; raises CompileError for a type of the KV cache that it does not have."""
        provider = _PROVIDERS[self.isas(target.device)[0]]
        if kv_cache not in (AUTO, provider.floats):
            what, remedy = f"type under ONNX Runtime on {target.device.name}", f"use --kv-cache {provider.floats}"
            raise CompileError("kv cache", what, found=kv_cache, expected=provider.floats, remedy=remedy)
        return provider


def _words(graph: ir.Model, provider: _Provider) -> dict[str, str]:
    """What the manifest says in place of the recipe's words: without quantization, the type of floats."""
    quantized = any(node.op_type == "QuantizeTokens" for node in graph.graph)
    return {} if quantized else {"weights": provider.floats, "activations": provider.floats}


def _footprint(graph: ir.Model, model: OnnxModel, provider: _Provider) -> Footprint:
    from belle_compile.compiler.backends.onnx.attention import cached_head_dim

    facts = {name: int(value) for name, value in graph.metadata_props.items() if value.isdecimal()}
    heads = facts["num_layers"] * facts["num_kv_heads"]
    token = 2 * heads * cached_head_dim(facts["head_dim"]) * ITEM_BYTES[provider.floats]
    activations, block, context = provider.memory(facts, token)
    return Footprint(
        weights=sum(map(tensor_bytes, model.weights)),
        activations=activations,
        reserve=provider.reserve,
        kv=KVCache(provider.floats, block, BLOCK_SIZE, context),
    )
