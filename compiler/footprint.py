"""The memory that a rank of an engine needs of its host, and whether a target has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from belle_compile.compiler.backends import Lowered
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.targets import Target
from belle_compile.compiler.terminal import size
from belle_compile.compiler.writer import tensor_bytes
from belle_compile.runtime.host import GPU_RESERVE_BYTES

FIXED_BYTES = 32 << 20  # kernels, runtime library, tokenizer, program
PROCESS_BYTES = 256 << 20  # a host needs for Python and the tokenizer
SERVED_TOKENS = 2048  # of KV cache a host must have room for at least


def file_bytes(lowered: Lowered) -> int:
    """Of a rank's files."""
    return _weight_bytes(lowered) + sum(map(len, lowered.kernels.values())) + FIXED_BYTES


def required_bytes(lowered: Lowered) -> int:
    """Of a host, for a rank that serves one sequence of `SERVED_TOKENS`, or of the model's context."""
    beside = GPU_RESERVE_BYTES if lowered.program.launches or lowered.program.candidates else PROCESS_BYTES
    return file_bytes(lowered) + _working_bytes(lowered) + _kv_bytes(lowered) + beside


def check_memory(target: Target, lowered: Callable[[int], Sequence[Lowered]]) -> None:
    """Raises CompileError where a rank needs more than the target's devices have, with the smallest number of ranks that would
    fit; `lowered` gives the programs for a number of ranks, and raises CompileError where a model cannot have so many."""
    memory, most = target.device.memory, target.device.max_ranks
    if not memory:
        return
    ranks = [(required_bytes(rank), number, rank) for number, rank in enumerate(lowered(target.ranks))]
    needed, number, rank = max(ranks, key=lambda entry: entry[0])
    if needed <= memory:
        return
    fitting = next((count for count in range(target.ranks + 1, most + 1) if _fits(count, memory, lowered)), None)
    name = target.device.name
    which = f"rank {number} of {target.ranks}" if target.ranks > 1 else "the model"
    remedy = f"build for {fitting} ranks (--target {name}x{fitting})" if fitting else f"no number of ranks up to {most} will do"
    parts = [("weights", _weight_bytes(rank)), ("KV cache", _kv_bytes(rank)), ("activations", _working_bytes(rank))]
    raise CompileError(
        "target",
        f"{which} does not fit the memory of a {name} device",
        found=f"{size(needed)} needed: "
        + ", ".join(f"{what} {size(count)}" for what, count in parts)
        + ", and the process or driver",
        expected=f"at most {size(memory)}",
        remedy=remedy,
    )


def _fits(ranks: int, memory: int, lowered: Callable[[int], Sequence[Lowered]]) -> bool:
    try:
        return max(map(required_bytes, lowered(ranks))) <= memory
    except CompileError:  # heads or channels that cannot be divided so
        return False


def _weight_bytes(lowered: Lowered) -> int:
    return sum(tensor_bytes(weight) for weight in lowered.weights)


def _working_bytes(lowered: Lowered) -> int:
    return lowered.program.arena_bytes + lowered.program.scratch_bytes


def _kv_bytes(lowered: Lowered) -> int:
    program = lowered.program
    return -(-min(SERVED_TOKENS, program.max_context) // program.block_size) * program.kv.block_bytes
