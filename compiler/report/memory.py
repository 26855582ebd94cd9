"""Breaks down an engine's memory by purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from belle_compile.compiler.report.data import Memory
from belle_compile.runtime.program import Call, Program, Weight

if TYPE_CHECKING:
    from belle_compile.compiler.backends import Lowered

EMBEDDING, HEAD, ATTENTION, FEED_FORWARD, OTHER = "embedding", "head", "attention", "feed-forward", "norms and tables"
_PARTS = (EMBEDDING, ATTENTION, FEED_FORWARD, HEAD, f"{EMBEDDING} and {HEAD}, shared", OTHER)
_WORDS = {"self_attn": ATTENTION, "self_attention": ATTENTION, "attn": ATTENTION, "mlp": FEED_FORWARD}


def memory_of(lowered: Lowered, required: int, kv_tokens: int) -> Memory:
    """The memory of an engine that requires so many bytes of a host, with room for `kv_tokens` in its KV cache."""
    program = lowered.program
    return Memory(
        weights=weight_parts(program, {weight.name: weight.bytes for weight in lowered.weights}),
        arena=program.arena_bytes,
        buffers=tuple(lowered.buffers),
        calls=len(program.calls),
        kv_block=program.kv.block_bytes,
        kv_block_tokens=program.block_size,
        kv_tokens=min(kv_tokens, program.max_context),
        max_context=program.max_context,
        required=required,
    )


def weight_parts(program: Program, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes of the weights by the purpose of the calls that read them; parts without weights are omitted."""
    readers: dict[str, set[str]] = {}
    for call in program.calls:
        for arg in call.args:
            if isinstance(arg, Weight):
                readers.setdefault(arg.name, set()).add(_part(call))
    found = dict.fromkeys(_PARTS, 0)
    for name, size in sizes.items():
        parts = readers.get(name, {OTHER})
        part = f"{EMBEDDING} and {HEAD}, shared" if parts >= {EMBEDDING, HEAD} else min(parts)
        found[part] += size
    return {part: size for part, size in found.items() if size}


def _part(call: Call) -> str:
    """The purpose of a call, derived from its kind, its rows and the name of its node."""
    if "embedding" in call.kind:
        return EMBEDDING
    if "linear" not in call.kind:
        return OTHER
    if call.rows == "R":
        return HEAD
    return next((_WORDS[word] for word in call.node.split(".") if word in _WORDS), OTHER)
