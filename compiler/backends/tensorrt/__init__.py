"""The backend of TensorRT: a rank's graph as a plan, which TensorRT for RTX builds without a GPU, and TensorRT on one.

W8A8 needs activations with one scale for all tokens, which the method `static` finds. The preset with activations of 16 bits
becomes INT8 weights with float16 activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from belle_compile.compiler.backends.base import (
    FIXED_BYTES,
    ITEM_BYTES,
    SCALED_PRODUCTS,
    Backend,
    CompileOptions,
    Footprint,
    KVCache,
    LibraryChoice,
    Passes,
    Payload,
)
from belle_compile.compiler.backends.tensorrt.installed import builder_for, check_gpu
from belle_compile.compiler.devices import Device, Target
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.kv_types import AUTO
from belle_compile.runtime.artifact import KernelCalls
from belle_compile.runtime.executors.tensorrt_library import ARCHS, LIBRARIES
from belle_compile.runtime.executors.tensorrt_plan import (
    ANSWERS,
    FACTS_NAME,
    PLAN_NAME,
    PROFILES,
    PROMPTS,
    SEQUENCES,
    PlanFacts,
    capacity_for,
    facts_text,
    max_context,
)
from belle_compile.runtime.host import GPU_RESERVE_BYTES
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.schema import to_plain

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.passes.presets import Recipe

# TensorRT joins products and fuses quantizations itself; see rules.py.
_FUSIONS = frozenset({"fuse-dequantize", "fuse-add-norm"})
_WITHOUT_FLOAT32 = "sm_75"  # TensorRT refuses products in float32 for it, those of integers among them
_NAMES, _BOTH = ("answers", "prompts"), "answers and prompts"  # reports of layers, of each profile or of both
_VALUES_KEPT = 6  # values of one layer that are alive at the same time
_NO_STATIC = (
    "a scale for the activations of each token, where TensorRT multiplies integers with one for all tokens: add static to "
    "--methods, or take int8-accurate, whose activations are float16 here"
)


class TensorRtBackend(Backend):
    """Makes engines for NVIDIA GPUs that TensorRT for RTX or TensorRT knows; one rank. What one of the two cannot do is refused
    for both, so that it is the same engine.

    All floats of an engine are of the type of its KV cache: by default float16, or float32 where nothing is quantized. A block
    counts twice: in the store of all blocks, and where the attention of a running sequence reads it.
    """

    name = "tensorrt"
    kv_types = ("float32", "float16")
    libraries = tuple(LIBRARIES)

    def isas(self, device: Device) -> tuple[str, ...]:
        return tuple(isa for isa in device.isas if isa in ARCHS)

    def passes(self, recipe: Recipe) -> Passes:
        return Passes(fusions=_FUSIONS, needed=SCALED_PRODUCTS)

    def refusal(self, target: Target, recipe: Recipe) -> str:
        if target.ranks > 1:
            return "several ranks, where an engine for TensorRT runs on one GPU"
        if recipe.weights.group is not None:
            return f"weights {recipe.weights}, where TensorRT takes one scale per output channel"
        static = "static" in recipe.methods
        if recipe.quantizes and recipe.activation_bits == 8 and _WITHOUT_FLOAT32 in target.isas:
            return f"products of INT8 activations, which TensorRT has no kernels for on {_WITHOUT_FLOAT32}: take int8-accurate"
        if recipe.quantizes and recipe.activation_bits == 8 and not static:
            return _NO_STATIC
        if recipe.quantizes and recipe.activation_bits > 8 and static:
            return "scales for activations of 16 bits, which are float16 here: leave static out of --methods"
        return super().refusal(target, recipe)

    def check_library(self, target: Target, choice: LibraryChoice) -> None:
        (arch,) = target.isas
        check_gpu(builder_for(arch, choice).library, arch)

    def footprint(self, graphs: Sequence[ir.Model], target: Target, kv_cache: str = AUTO) -> list[Footprint]:
        return [_footprint(graph, _floats(graph, target.isas, kv_cache)) for graph in graphs]

    def compile(self, graphs: Sequence[ir.Model], target: Target, options: CompileOptions) -> list[Payload]:
        (arch,) = target.isas
        payloads = []
        for number, graph in enumerate(graphs):
            options.on_kernels(number, len(graphs))
            payloads.append(_payload(graph, arch, options))
        options.on_kernels(len(graphs), len(graphs))
        return payloads

    def has_kernels(self, graph: ir.Model) -> bool:
        from belle_compile.compiler.backends.tensorrt.rules import RULES

        return all(node.op_type in RULES for node in graph.graph)


def _payload(graph: ir.Model, arch: str, options: CompileOptions) -> Payload:
    from belle_compile.compiler.backends.tensorrt.build import build_plan
    from belle_compile.compiler.backends.tensorrt.layers import inspected_layers, layer_reports
    from belle_compile.compiler.backends.tensorrt.rules import translate

    builder = builder_for(arch, options.library)
    floats, dims = _floats(graph, (arch,), options.kv_cache), _dimensions(graph)
    context = max_context(dims["max_position"])
    plan = build_plan(translate(graph, floats, capacity_for(context)), arch, PROFILES, builder)
    reports = layer_reports(plan.content, len(PROFILES))
    layers = dict(zip(_NAMES, map(to_plain, reports), strict=True)) if reports else {}
    if inspected := inspected_layers(plan.inspected):
        layers = {_BOTH: inspected}
    facts = PlanFacts(
        builder.library.name, builder.version, options.library.version_compatible, arch, plan.content.nbytes, floats,
        dims["num_layers"], dims["num_kv_heads"], dims["head_dim"], dims["vocab_size"], context, capacity_for(context),
        "dynamic_rope_from" in graph.metadata_props, layers,
    )  # fmt: skip
    return Payload(
        files={PLAN_NAME: plan.content, FACTS_NAME: facts_text(facts).encode()},
        weights=[],
        footprint=_footprint(graph, floats),
        kernel_calls=KernelCalls(options.unfused_calls, reports[PROFILES.index(ANSWERS)].total if reports else 0),
        toolchain={builder.library.name: builder.version},
        quantization=_words(graph, floats),
    )


def _dimensions(graph: ir.Model) -> dict[str, int]:
    return {name: int(value) for name, value in graph.metadata_props.items() if value.isdecimal()}


def _floats(graph: ir.Model, isas: Sequence[str], kv_cache: str) -> str:
    """The type of all floats of an engine."""
    quantized = any(node.op_type == "QuantizeTokens" for node in graph.graph)
    if kv_cache == AUTO:
        return "float16" if quantized or _WITHOUT_FLOAT32 in isas else "float32"
    if kv_cache == "float32" and _WITHOUT_FLOAT32 in isas:
        what = f"float32 on {_WITHOUT_FLOAT32}, where TensorRT has no kernels for it"
        raise CompileError("kv cache", what, found=kv_cache, expected="float16", remedy="use --kv-cache float16")
    return kv_cache


def _words(graph: ir.Model, floats: str) -> dict[str, str]:
    """What the manifest says in place of the recipe's words: activations of 16 bits are floats, and floats may be float16."""
    from belle_compile.compiler.ir.ops import attributes_of

    bits = {attributes_of(node)["bits"] for node in graph.graph if node.op_type == "QuantizeTokens"}
    if not bits:
        return {"weights": floats, "activations": floats}
    return {} if 8 in bits else {"activations": floats}


def _footprint(graph: ir.Model, floats: str) -> Footprint:
    dims, item = _dimensions(graph), ITEM_BYTES[floats]
    context = max_context(dims["max_position"])
    token = 2 * item * dims["num_layers"] * dims["num_kv_heads"] * dims["head_dim"]
    return Footprint(
        weights=sum(_weight_bytes(value, item) for value in graph.graph.initializers.values() if value.uses()),
        activations=SEQUENCES * capacity_for(context) * token + _activation_bytes(dims, item),
        reserve=FIXED_BYTES + GPU_RESERVE_BYTES,
        kv=KVCache(floats, token * BLOCK_SIZE, BLOCK_SIZE, context),
    )


def _weight_bytes(value: ir.Value, item: int) -> int:
    tensor = value.const_value
    assert tensor is not None
    return prod(tensor.shape.numpy()) * min(ITEM_BYTES[str(tensor.dtype.numpy())], item)


def _activation_bytes(dims: dict[str, int], item: int) -> int:
    """An estimate: the values of the widest layer of a chunk, its mask or the biases of its attention, and logits."""
    widest = max(dims["intermediate_size"], 2 * dims["hidden_size"])
    scores = dims["num_heads"] * capacity_for(max_context(dims["max_position"]))
    return PROMPTS.tokens * (_VALUES_KEPT * widest * 4 + scores * (item + 4)) + 8 * PROMPTS.rows * dims["vocab_size"]
