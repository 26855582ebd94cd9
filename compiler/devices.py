"""What engines run on: memory, bandwidths and links of the devices that a target can name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GB, GIB = 10**9, 1 << 30


@dataclass(frozen=True)
class Device:
    """A kind of device; each rank of an engine has one.

    `memory` in bytes, `memory_bandwidth` and `link_bandwidth` (from one device to the others, one way) in bytes a second,
    `link_latency` (of a sum over ranks of a few kB) in seconds, `int8` and `half` in dense operations a second on 8-bit
    integers and 16-bit floats; 0 where that depends on the host. Names without a size or form are the smaller memory of the
    kind, as clouds call them, and the form with NVLink where there is one.
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


_NVLINK_3, _NVLINK_4, _PCIE_4, _PCIE_3 = 300 * GB, 450 * GB, 32 * GB, 16 * GB  # one way, of a device
_SWITCHED, _OVER_PCIE = 15e-6, 30e-6  # latencies that NCCL comes to on eight devices, roughly

CPU = Device("cpu", "x86-64 with AVX2 or better; the runtime picks the best kernels the host can run")
# Bandwidths are those of NVIDIA's data sheets, memory is what drivers show of it in whole GiB, which may be less.
_ALL = (
    CPU,
    Device("a100-40g", "NVIDIA A100 40 GB, SXM", "8.0", 40 * GIB, 1555 * GB, _NVLINK_3, _SWITCHED, 624e12, 312e12),
    Device("a100-80g", "NVIDIA A100 80 GB, SXM", "8.0", 80 * GIB, 2039 * GB, _NVLINK_3, _SWITCHED, 624e12, 312e12),
    Device("h100", "NVIDIA H100 80 GB, SXM", "9.0", 79 * GIB, 3350 * GB, _NVLINK_4, _SWITCHED, 1979e12, 989e12),
    Device("h200", "NVIDIA H200 141 GB, SXM", "9.0", 140 * GIB, 4800 * GB, _NVLINK_4, _SWITCHED, 1979e12, 989e12),
    Device("l40s", "NVIDIA L40S 48 GB", "8.9", 44 * GIB, 864 * GB, _PCIE_4, _OVER_PCIE, 733e12, 362e12),
    Device("rtx4090", "NVIDIA GeForce RTX 4090 24 GB", "8.9", 23 * GIB, 1008 * GB, _PCIE_4, _OVER_PCIE, 661e12, 165e12),
    Device("t4", "NVIDIA T4 16 GB", "7.5", 15 * GIB, 320 * GB, _PCIE_3, _OVER_PCIE, 130e12, 65e12),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _ALL}
ALIASES: Mapping[str, str] = {"a100": "a100-40g"}
# Known by name only, so that a request for one is told from a typing error
OTHERS: Mapping[str, str] = {
    "v100": "NVIDIA V100 (sm_70)",
    "a30": "NVIDIA A30 (sm_80)",
    "a10": "NVIDIA A10 (sm_86)",
    "l4": "NVIDIA L4 (sm_89)",
}


def architecture(device: Device) -> str:
    """Of a GPU, as its compilers name it: "sm_80"; empty for a processor."""
    return f"sm_{device.compute_capability.replace('.', '')}" if device.compute_capability else ""


def known_as(name: str) -> str:
    """What a device is called in messages, empty for one that is not known."""
    device = DEVICES.get(ALIASES.get(name, name))
    if device is None:
        return OTHERS.get(name, "")
    return device.description + (f" ({architecture(device)})" if device.compute_capability else "")
