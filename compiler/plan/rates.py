"""How fast a device reads, computes and exchanges with our kernels, as far as it has been measured."""

from __future__ import annotations

from dataclasses import dataclass

from belle_compile.compiler.devices import Device
from belle_compile.compiler.plan.predict import Rates
from belle_compile.runtime import host
from belle_compile.runtime.profiling import read_bandwidth


@dataclass(frozen=True)
class _Reached:
    """Shares of a device's rates that kernels reach in whole steps (`several`: of `read`, in products of several rows), and
    what a call costs beside; `source` says how that is known."""

    read: float
    several: float
    integer: float
    floating: float
    call_s: float
    source: str


# Two cores of a Zen 4 (benchmarks/results/README.md, SCALING.md) and of a Xeon with AMX (ranks.json), all shapes as near as
# these few numbers get (PLAN.md): LLaMA-1.1B decodes at 0.94 of the read bandwidth, and of a step of SmolLM2 0.75 ms are left
# for 306 calls.
_CPU = _Reached(
    read=0.94, several=0.92, integer=0.85, floating=0.5, call_s=2.4e-6, source="measured on hosts with Zen 4 and with AMX"
)
# BLOOM-7B's shape on an H200 (benchmarks/results/gpu-check.json): the head's weights come at 0.95 of the maker's bandwidth, a
# token is 0.33 ms longer than all weights take, of 307 calls; batches of 8; a prompt of 2,048 tokens, with its norms and
# activations in what products are said to reach, and attention by itself.
_GPU = _Reached(
    read=0.93, several=0.58, integer=0.4, floating=0.16, call_s=1.1e-6,
    source="measured on an H200; other GPUs are taken to reach the same shares of their figures",
)  # fmt: skip

# Operations a second of one core by the best instructions for bytes (benchmarks/int8_rate.py on that host; AMX: a register-only
# loop on a Sapphire Rapids), and of float32 ones.
_INTEGER_OF_A_CORE = {"amx": 13.3e12 / 2, "avx512vnni": 0.47e12, "avx2": 0.236e12}
_FLOAT_OF_A_CORE = 0.1e12
_LATENCY_S, _LINK = 0.5e-6, 16e9  # of ranks on one host (benchmarks/results/collectives.json)


def host_bandwidth(device: Device) -> float:
    """Bytes a second that this host reads, measured now, where the device is a CPU without a bandwidth of its own; else 0."""
    here = not device.compute_capability and not device.memory_bandwidth
    return read_bandwidth(len(host.usable_cores())) if here else 0.0


def rates_of(device: Device, ranks: int, isas: tuple[str, ...], bandwidth: float) -> tuple[Rates, str]:
    """Of each of `ranks`, with how they are known. A CPU without a bandwidth of its own is this host: the ranks share its
    memory, of the `bandwidth` measured, and its cores."""
    if device.compute_capability:
        reached = _GPU
        read, integer, floating = device.memory_bandwidth, device.int8, device.half
        latency, link = device.link_latency, device.link_bandwidth
        source = reached.source
    else:
        reached, cores = _CPU, len(host.usable_cores())
        isa = next((isa for isa in host.ISA_FLAGS if isa in host.host_isas() and isa in (isas or host.ISA_FLAGS)), "avx2")
        read = device.memory_bandwidth or bandwidth / ranks
        integer = device.int8 or _INTEGER_OF_A_CORE[isa] * cores / ranks
        floating = _FLOAT_OF_A_CORE * cores / ranks
        latency, link = device.link_latency or _LATENCY_S, device.link_bandwidth or _LINK
        memory = "given" if device.memory_bandwidth else f"{bandwidth / 1e9:.0f} GB/s, read by {cores} cores of this host now"
        source = f"{reached.source}; memory {memory}"
    integer, floating = integer * reached.integer, floating * reached.floating
    return Rates(read * reached.read, reached.several, integer, floating, reached.call_s, latency, link), source
