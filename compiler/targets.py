"""What an engine is built for: the target's name, the instruction sets it carries kernels for, its ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compiler.errors import CompileError


@dataclass(frozen=True)
class Target:
    """A kind of host and how many ranks of it serve one engine.

    `name` is what the user typed in its shortest form ("cpu"), `arch` the machine of the serving host as `uname -m`
    prints it, `isas` the instruction sets the fat engine carries kernels for, best first,
    and `ranks` the processes that share one model.
    """

    name: str
    arch: str
    isas: tuple[str, ...]
    ranks: int
    description: str
    max_ranks: int = 8

    def carrying(self, isas: Sequence[str]) -> Target:
        """The same target with only some of its instruction sets; all of them for none named."""
        if unknown := [isa for isa in isas if isa not in self.isas]:
            what, known = f"instruction set of {self.name}", ", ".join(self.isas)
            raise CompileError("target", what, found=", ".join(unknown), expected=known)
        return replace(self, isas=tuple(isa for isa in self.isas if not isas or isa in isas))

    def with_ranks(self, ranks: int) -> Target:
        """The same kind of host for so many ranks: "cpux2" for two of "cpu"."""
        if ranks > self.max_ranks:
            expected = f"at most {self.max_ranks}"
            raise CompileError("target", f"ranks of {self.name}", found=str(ranks), expected=expected)
        return self if ranks == self.ranks else replace(self, name=f"{self.name}x{ranks}", ranks=ranks)


CPU = Target(
    name="cpu",
    arch="x86_64",
    isas=("amx", "avx512vnni", "avx2"),
    ranks=1,
    description="x86-64 with AVX2 or better; the runtime picks the best kernels the host can run",
)

SUPPORTED = (CPU,)

# Names of devices a target can be asked for by, so that a request for one is told from a typing error.
RECOGNISED = {
    "v100": "NVIDIA V100 (sm_70)",
    "t4": "NVIDIA T4 (sm_75)",
    "a100": "NVIDIA A100 (sm_80)",
    "a30": "NVIDIA A30 (sm_80)",
    "a10": "NVIDIA A10 (sm_86)",
    "l4": "NVIDIA L4 (sm_89)",
    "l40s": "NVIDIA L40S (sm_89)",
    "h100": "NVIDIA H100 (sm_90)",
    "h200": "NVIDIA H200 (sm_90)",
}

_NAME = re.compile(r"(?P<device>[a-z][a-z0-9-]*?)(?:x(?P<ranks>[1-9][0-9]*))?")


def parse(text: str) -> Target:
    """The target called `text`: a device, with `xN` behind it for N ranks ("cpu", "a100x4"); upper or lower case.

    Raises CompileError for a device or a number of ranks this release does not build for.
    """
    match = _NAME.fullmatch(text.strip().lower())
    device = match["device"] if match else ""
    ranks = int(match["ranks"] or 1) if match else 1
    names = ", ".join(target.name for target in SUPPORTED)
    for target in SUPPORTED:
        if device == target.name:
            return target.with_ranks(ranks)
    if device in RECOGNISED:
        raise CompileError(
            "target",
            f"{RECOGNISED[device]} is known but this release does not build for it yet",
            found=repr(text),
            expected=names,
            remedy=f"use --target {names}",
        )
    raise CompileError("target", "unknown target", found=repr(text), expected=names, remedy="see `belle-compile targets`")
