"""Lower a graph to a program: rules turn nodes into kernel calls over buffers, and the memory plan places the buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from belle_compile.compiler.backends.program.lowering import (
    Buffer,
    CandidatePlaces,
    LoweredGraph,
    Lowering,
    PackedWeight,
    PendingCall,
    Place,
)
from belle_compile.compiler.backends.program.memory_plan import Lifetime, PlannedBuffer, plan_memory
from belle_compile.compiler.backends.program.rules import RULES, factors_dtype
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.ops import attributes_of, columns_of_targets, spec_of
from belle_compile.runtime.program import (
    AdapterLayout,
    AllReduce,
    Arena,
    Call,
    Candidates,
    FusionCalls,
    KVLayout,
    Logits,
    Program,
    Weight,
)


def lower_graph(
    backend: type[Lowering], model: ir.Model, calls_before_fusion: int, kv_cache: str = "auto", *, transposed_keys: bool = True
) -> LoweredGraph:
    """Lower a verified graph with a backend's kernels.

    `calls_before_fusion` is the number of kernel calls without fusion, which the program records. `kv_cache` is the type of the
    KV cache; "auto" is 16 bits where the graph has quantized linear layers, else float32. `transposed_keys` is as in
    `KVLayout`. Raises CompileError for an op that no rule lowers.
    """
    lowering = _lowering(backend, model, kv_cache)
    lowering.adapters = _adapters(model)
    for node in model.graph:
        _apply_rule(lowering, node)
    output = model.graph.outputs[0]
    logits, last = lowering.place(output), output.producer()
    assert last is not None, "verified"
    calls_of_graph = len(lowering.calls)
    candidates = lowering.finish(last, logits)
    calls_behind = len(lowering.calls) - calls_of_graph
    buffers, arena_bytes = _place_buffers(lowering.calls, _read_after(logits, candidates))
    offsets = {buffer: planned.offset for buffer, planned in buffers.items()}
    calls = tuple(_finish(call, offsets, lowering.weights) for call in lowering.calls)
    facts = {key: int(model.metadata_props.get(key, 0)) for key in ("rank", "ranks", "vocab_size", "first_token")}
    ranks = facts["ranks"] or 1
    program = Program(
        max_tokens=backend.sizes.tokens,
        max_rows=backend.sizes.rows,
        max_sequences=backend.sizes.sequences,
        max_blocks=lowering.max_blocks,
        arena_bytes=arena_bytes,
        vocab_size=facts["vocab_size"] if ranks > 1 else logits.width,
        logits=Logits(offsets[logits.buffer], logits.buffer.stride, facts["first_token"], logits.width),
        kv=_kv_layout(lowering, model, transposed_keys),
        calls=calls,
        # The calls of a decoding step: calls with when="runs" are for steps with prompts
        # or with adapters
        kernel_calls=FusionCalls(
            calls_before_fusion + calls_behind, sum(call.when not in ("runs", "adapted") for call in calls)
        ),
        rank=facts["rank"],
        ranks=ranks,
        scratch_bytes=lowering.scratch_bytes,
        candidates=None if candidates is None else _candidates(candidates, offsets),
        adapters=lowering.adapters,
    )
    kernels = list({call.kernel: None for call in lowering.calls if call.kernel})
    read = dict.fromkeys(arg.name for call in calls for arg in call.args if isinstance(arg, Weight))
    return LoweredGraph(program, [lowering.weights[name] for name in read], kernels, list(buffers.values()))


def _lowering(backend: type[Lowering], model: ir.Model, kv_cache: str) -> Lowering:
    """The backend's lowering of a graph, to which no rule has added anything yet."""
    layers, head_dim, max_position = (int(model.metadata_props[key]) for key in ("num_layers", "head_dim", "max_position"))
    specs = [spec_of(node) for node in model.graph]
    quantized = any(spec.is_linear and not spec.is_float_linear for spec in specs)
    return backend(model, _kv_dtype(backend, kv_cache, quantized, head_dim), layers, -(-max_position // 16))


def _kv_dtype(backend: type[Lowering], kv_cache: str, quantized: bool, head_dim: int) -> str:
    """The type of the KV cache. Elements of bfloat16 are stored in pairs, so heads must have an even size."""
    if kv_cache == "bfloat16" and (backend.half != "bfloat16" or head_dim % 2):
        raise CompileError(
            "kv cache", "bfloat16 is not available", found=f"heads of {head_dim} for the backend {backend.backend}",
            expected="heads of an even size on a CPU", remedy="use float16",
        )  # fmt: skip
    half = "float16" if head_dim % 2 else backend.half
    return kv_cache if kv_cache != "auto" else half if quantized else "float32"


def _kv_layout(lowering: Lowering, model: ir.Model, transposed_keys: bool) -> KVLayout:
    kv_heads, head_dim = (int(model.metadata_props[key]) for key in ("num_kv_heads", "head_dim"))
    return KVLayout(lowering.num_layers, kv_heads, head_dim, lowering.kv_dtype, transposed_keys)


def _adapters(model: ir.Model) -> AdapterLayout | None:
    """The slots for the adapters of a graph; None if it takes none."""
    changes = [node for node in model.graph if spec_of(node).adapted]
    sizes = {}
    for node in changes:
        x = node.inputs[1]
        assert x is not None and x.shape is not None
        inputs, dtype = x.shape[1], factors_dtype(node)
        assert isinstance(inputs, int), "only rows are symbolic"
        for target, columns in columns_of_targets(node).items():
            sizes[target] = inputs, columns.stop - columns.start, dtype
    return AdapterLayout.of(max(attributes_of(node)["rank"] for node in changes), sizes) if changes else None


def _apply_rule(lowering: Lowering, node: ir.Node) -> None:
    rule = RULES.get(node.op_type)
    if rule is None:
        raise CompileError(
            lowering.backend, f"op {node.op_type}", node=str(node.name), found="no kernel", expected=", ".join(sorted(RULES)),
            remedy="run the fuse passes or add a rule to compiler/backends/program/rules.py",
        )  # fmt: skip
    rule(lowering, node, attributes_of(node))


def _read_after(logits: Place, candidates: CandidatePlaces | None) -> list[Buffer]:
    """The buffers that the runtime reads after the last call."""
    places = [] if candidates is None else [candidates.counts, candidates.tokens, candidates.values]
    return [place.buffer for place in (logits, *places)]


def _candidates(candidates: CandidatePlaces, offsets: Mapping[Buffer, int]) -> Candidates:
    counts, tokens, values = (offsets[place.buffer] for place in (candidates.counts, candidates.tokens, candidates.values))
    return Candidates(counts, tokens, values, candidates.capacity)


def _buffers(call: PendingCall) -> Iterable[Buffer]:
    return (operand.buffer for operand in call.operands if isinstance(operand, Place))


def _place_buffers(calls: Sequence[PendingCall], read_after: Iterable[Buffer]) -> tuple[dict[Buffer, PlannedBuffer], int]:
    """Place every buffer in the arena; returns the places and the bytes of the arena."""
    spans: dict[Buffer, tuple[int, int]] = {}
    for index, call in enumerate(calls):
        for buffer in _buffers(call):
            spans[buffer] = (spans.get(buffer, (index, index))[0], index)
    for buffer in read_after:
        spans[buffer] = (spans[buffer][0], len(calls))
    plan = plan_memory([Lifetime(buffer.bytes, first, last) for buffer, (first, last) in spans.items()])
    placed = zip(spans.items(), plan.offsets, strict=True)
    planned = {
        buffer: PlannedBuffer(calls[first].node, offset, buffer.bytes, first, last)
        for (buffer, (first, last)), offset in placed
    }
    return planned, plan.arena_bytes


def _arena(buffer: Buffer, offset: int) -> Arena:
    """A buffer as an argument."""
    return Arena(offset, buffer.row_bytes, None if buffer.workspace else buffer.rows)


def _finish(call: PendingCall, offsets: Mapping[Buffer, int], weights: Mapping[str, PackedWeight]) -> Call:
    """Turn a pending call into one of the program, with addresses and the bytes of weights that it reads."""
    args = tuple(_arena(op.buffer, offsets[op.buffer]) if isinstance(op, Place) else op for op in call.operands)
    if call.kernel is None:
        (place,) = (operand for operand in call.operands if isinstance(operand, Place))
        all_reduce = AllReduce(place.width, place.buffer.stride)
        return Call(kind="all_reduce", node=call.node, rows=call.rows, args=args, all_reduce=all_reduce)
    read = sum(weights[arg.name].bytes for arg in args if isinstance(arg, Weight))
    if "embedding" in call.kernel.kind:
        read = 0  # an embedding reads one row per token, not the table
    finished = Call(kind=call.kernel.kind, node=call.node, rows=call.rows, args=args, bytes=read, when=call.when)
    variants = call.kernel.variants()
    if len(variants) == 1:
        return replace(finished, kernel=variants[0][1].name)
    return replace(finished, variants=tuple((bound, kernel.name) for bound, kernel in variants))
