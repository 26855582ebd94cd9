"""The devices that engines are built for, with their instruction sets, memory and links, and targets of several devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from belle_compile.compiler.errors import CompileError

GB, GIB = 10**9, 1 << 30


@dataclass(frozen=True)
class Device:
    """A kind of device; each rank of an engine has one.

    `isas` are the instruction sets that kernels for the device can be compiled for, best first, and `arch` is the machine of
    its host as `uname -m` prints it (empty: any). Figures are 0 where they depend on the host: `memory` in bytes;
    `memory_bandwidth`, and `link_bandwidth` from one device to the others, one way, in bytes a second; `link_latency` of a sum
    of a few kB over ranks, in seconds; `int8` and `half` in dense operations a second on 8-bit integers and 16-bit floats.

    As with cloud providers, a name without a size is the model with the smaller memory, and a name without a form factor is the
    one with NVLink if it exists.
    """

    name: str
    description: str
    compute_capability: str = ""
    memory: int = 0
    memory_bandwidth: float = 0
    link_bandwidth: float = 0
    link_latency: float = 0
    int8: float = 0
    half: float = 0
    max_ranks: int = 8
    isas: tuple[str, ...] = ()
    arch: str = ""


@dataclass(frozen=True)
class Target:
    """A kind of host and how many ranks of it serve one engine.

    `name` is what the user typed in its shortest form ("cpu", "cpux2"), `isas` the instruction sets that the engine carries
    kernels for, best first, and `ranks` the processes that share one model, each on a device of its own.
    """

    name: str
    isas: tuple[str, ...]
    ranks: int
    device: Device

    def carrying(self, isas: Sequence[str]) -> Target:
        """This target restricted to the instruction sets `isas`, unchanged if that is empty; raises CompileError for an
        instruction set that the target does not have."""
        if unknown := [isa for isa in isas if isa not in self.isas]:
            what, known = f"instruction set of {self.name}", ", ".join(self.isas)
            raise CompileError("target", what, found=", ".join(unknown), expected=known)
        return replace(self, isas=tuple(isa for isa in self.isas if not isas or isa in isas))

    def with_ranks(self, ranks: int) -> Target:
        """This target with another number of ranks: "cpux2" is "cpu" with two. Raises CompileError where the device does not
        allow that many."""
        name, most = self.device.name, self.device.max_ranks
        if not 1 <= ranks <= most:
            raise CompileError("target", f"ranks of {name}", found=str(ranks), expected=f"1 to {most}")
        return self if ranks == self.ranks else replace(self, name=name if ranks == 1 else f"{name}x{ranks}", ranks=ranks)


def _gpu(
    name: str, description: str, compute_capability: str, memory: int, bandwidth: float, link: tuple[float, float], int8: float,
    half: float,
) -> Device:  # fmt: skip
    """An NVIDIA GPU. Its instruction set is named after its compute capability: sm_80 for 8.0. `link` is the link's bandwidth
    and latency."""
    isas = (f"sm_{compute_capability.replace('.', '')}",)
    return Device(name, description, compute_capability, memory, bandwidth, *link, int8, half, isas=isas)


# Links: bytes a second of one device one way, and the approximate latency in seconds of an NCCL all-reduce over eight devices.
_NVLINK_3, _NVLINK_4 = (300 * GB, 15e-6), (450 * GB, 15e-6)
_PCIE_5, _PCIE_4, _PCIE_3 = (64 * GB, 30e-6), (32 * GB, 30e-6), (16 * GB, 30e-6)

CPU = Device(
    "cpu", "x86-64 with AVX2 or better; the runtime picks the best kernels the host can run",
    isas=("amx", "avx512vnni", "avx2"), arch="x86_64",
)  # fmt: skip
ARM = Device("arm64", "64-bit Arm, such as Graviton and Ampere", max_ranks=1, isas=("neon",), arch="aarch64")
# Bandwidths are from NVIDIA's data sheets. Memory is what the driver reports, in whole GiB, which may be less than the data
# sheet gives.
_ALL = (
    CPU,
    ARM,
    _gpu("a100-40g", "NVIDIA A100 40 GB, SXM", "8.0", 40 * GIB, 1555 * GB, _NVLINK_3, 624e12, 312e12),
    _gpu("a100-80g", "NVIDIA A100 80 GB, SXM", "8.0", 80 * GIB, 2039 * GB, _NVLINK_3, 624e12, 312e12),
    _gpu("h100", "NVIDIA H100 80 GB, SXM", "9.0", 79 * GIB, 3350 * GB, _NVLINK_4, 1979e12, 989e12),
    _gpu("h200", "NVIDIA H200 141 GB, SXM", "9.0", 140 * GIB, 4800 * GB, _NVLINK_4, 1979e12, 989e12),
    _gpu("l40s", "NVIDIA L40S 48 GB", "8.9", 44 * GIB, 864 * GB, _PCIE_4, 733e12, 362e12),
    _gpu("rtx3090", "NVIDIA GeForce RTX 3090 24 GB", "8.6", 23 * GIB, 936 * GB, _PCIE_4, 284e12, 71e12),
    _gpu("rtx4090", "NVIDIA GeForce RTX 4090 24 GB", "8.9", 23 * GIB, 1008 * GB, _PCIE_4, 661e12, 165e12),
    _gpu("rtx5090", "NVIDIA GeForce RTX 5090 32 GB", "12.0", 31 * GIB, 1792 * GB, _PCIE_5, 838e12, 210e12),
    _gpu("t4", "NVIDIA T4 16 GB", "7.5", 15 * GIB, 320 * GB, _PCIE_3, 130e12, 65e12),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _ALL}
ALIASES: Mapping[str, str] = {"a100": "a100-40g"}
# Devices that are known by name only, so that the error for one of them differs from the error for a misspelt name
OTHERS: Mapping[str, str] = {
    "v100": "NVIDIA V100 (sm_70)",
    "a30": "NVIDIA A30 (sm_80)",
    "a10": "NVIDIA A10 (sm_86)",
    "l4": "NVIDIA L4 (sm_89)",
}


def known_as(name: str) -> str:
    """The description of a device for messages; empty if the name is unknown."""
    device = DEVICES.get(ALIASES.get(name, name))
    if device is None:
        return OTHERS.get(name, "")
    return device.description + (f" ({device.isas[0]})" if device.compute_capability else "")
