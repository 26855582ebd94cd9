"""Break down an engine's memory by purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from belle_compile.compiler.backends.base import Payload, tensor_bytes
from belle_compile.compiler.report.data import Arena, Memory
from belle_compile.runtime.program import SERVED_TOKENS, Call, Program, Weight

EMBEDDING, HEAD, ATTENTION, FEED_FORWARD, OTHER = "embedding", "head", "attention", "feed-forward", "norms and tables"
ALL = "all weights"  # the only part for a backend that makes no program
_PARTS = (EMBEDDING, ATTENTION, FEED_FORWARD, HEAD, f"{EMBEDDING} and {HEAD}, shared", OTHER)
_WORDS = {"self_attn": ATTENTION, "self_attention": ATTENTION, "attn": ATTENTION, "mlp": FEED_FORWARD}


def memory_of(payload: Payload) -> Memory:
    """The memory of a rank from its payload."""
    need, kv, step = payload.footprint.memory(), payload.footprint.kv, payload.footprint.step
    tokens = min(SERVED_TOKENS, kv.max_context)
    if step is None:
        return Memory(need, kv, tokens, {ALL: need.weights})
    sizes = {tensor.name: tensor_bytes(tensor) for tensor in payload.tensors}
    arena = Arena(step.program.arena_bytes, step.buffers, len(step.program.calls))
    return Memory(need, kv, tokens, weight_parts(step.program, sizes), arena)


def memory_of_ranks(payloads: Sequence[Payload]) -> tuple[Memory, Sequence[Memory]]:
    """The memory of the rank that needs most, and that of each rank if there are several."""
    ranks = [memory_of(payload) for payload in payloads]
    return max(ranks, key=lambda rank: rank.need.total), ranks if len(ranks) > 1 else ()


def weight_parts(program: Program, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the weights by the purpose of the calls that read them; parts without weights are omitted."""
    readers: dict[str, set[str]] = {}
    for call in program.calls:
        for arg in call.args:
            if isinstance(arg, Weight):
                readers.setdefault(arg.name, set()).add(_part(call))
    part_bytes = dict.fromkeys(_PARTS, 0)
    for name, size in sizes.items():
        parts = readers.get(name, {OTHER})
        part = f"{EMBEDDING} and {HEAD}, shared" if parts >= {EMBEDDING, HEAD} else min(parts)
        part_bytes[part] += size
    return {part: size for part, size in part_bytes.items() if size}


def _part(call: Call) -> str:
    """The purpose of a call, derived from its kind, its rows and the name of its node."""
    if "embedding" in call.kind:
        return EMBEDDING
    if "linear" not in call.kind:
        return OTHER
    if call.rows == "R":
        return HEAD
    return next((_WORDS[word] for word in call.node.split(".") if word in _WORDS), OTHER)
