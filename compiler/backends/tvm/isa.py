"""The instruction sets that a CPU engine can have kernels for, best last, and the LLVM target of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """An instruction set that kernels are compiled for.

    `mcpu` is the oldest processor that must run the kernels. `dot` names the int8 product: "maddubs" (AVX2, exact because both
    operands stay within +-127) or "vnni" (vpdpbusd, unsigned activations and a correction per column). `amx` adds tile products
    for many rows. `emulate_amx` replaces the tile instructions by calls to C functions, for tests on hosts without AMX.
    """

    name: str
    mcpu: str
    dot: str
    amx: bool = False
    emulate_amx: bool = False

    @property
    def registers(self) -> int:
        """Vector registers, of 16 float32 where there are 32."""
        return 16 if self.dot == "maddubs" else 32

    def target(self) -> dict[str, str]:
        """The LLVM target in the form that `tvm.target.Target` accepts."""
        return {"kind": "llvm", "mcpu": self.mcpu, "mtriple": "x86_64-linux-gnu"}


AVX2 = Isa("avx2", "haswell", "maddubs")
AVX512VNNI = Isa("avx512vnni", "cascadelake", "vnni")
AMX = Isa("amx", "sapphirerapids", "vnni", amx=True)

ISAS: dict[str, Isa] = {isa.name: isa for isa in (AVX2, AVX512VNNI, AMX)}
