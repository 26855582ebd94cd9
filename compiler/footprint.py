"""Whether a target has the memory that the ranks of an engine need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from belle_compile.compiler.backends import Footprint, MemoryNeed
from belle_compile.compiler.devices import Target
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.units import size


def required_memory(ranks: Sequence[Footprint]) -> MemoryNeed:
    """The memory that each rank's host or device must have to serve one sequence: that of the rank that needs most."""
    return max((rank.memory() for rank in ranks), key=lambda need: need.total)


def check_memory(target: Target, footprints: Callable[[int], Sequence[Footprint]]) -> None:
    """Raise CompileError where a rank needs more memory than the target's devices have; the error names the smallest number of
    ranks that would fit. `footprints` maps a number of ranks to the footprint of each, and raises CompileError where the model
    cannot be divided among that many.

    Mapped weights count: a host that reads them from its disk in each step runs an engine, but nobody plans to serve with it.
    """
    memory, most = target.device.memory, target.device.max_ranks
    ranks = footprints(target.ranks)
    if not memory or required_memory(ranks).total <= memory:
        return
    number, need = max(enumerate(rank.memory() for rank in ranks), key=lambda entry: entry[1].total)
    fitting = next((count for count in range(target.ranks + 1, most + 1) if _fits(count, memory, footprints)), None)
    name = target.device.name
    which = f"rank {number} of {target.ranks}" if target.ranks > 1 else "the model"
    raise CompileError(
        "target",
        f"{which} does not fit the memory of a {name} device",
        found=f"{size(need.total)} needed: weights {size(need.weights)}, KV cache {size(need.kv_cache)}, "
        f"activations {size(need.activations)}, and the process or driver {size(need.reserve)}",
        expected=f"at most {size(memory)}",
        remedy=f"build for {fitting} ranks (--target {name}x{fitting})"
        if fitting
        else f"no number of ranks up to {most} will do",
    )


def _fits(ranks: int, memory: int, footprints: Callable[[int], Sequence[Footprint]]) -> bool:
    try:
        return required_memory(footprints(ranks)).total <= memory
    except CompileError:  # heads or channels are not divisible by this number
        return False
