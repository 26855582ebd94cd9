"""The rates at which our kernels read, compute and exchange on a device, as far as they have been measured."""

from __future__ import annotations

from collections.abc import Sequence

from belle_compile.compiler.backends.base import Reached
from belle_compile.compiler.devices import Device
from belle_compile.compiler.plan.predict import Rates
from belle_compile.runtime import host
from belle_compile.runtime.profiling import read_bandwidth

# Operations a second of one core: with the best instructions for bytes (from benchmarks/int8_rate.py; AMX: from a register-only
# loop on a Sapphire Rapids), and with those for float32.
_INTEGER_OF_A_CORE = {"amx": 13.3e12 / 2, "avx512vnni": 0.47e12, "avx2": 0.236e12}
_FLOAT_OF_A_CORE = 0.1e12
_LATENCY_S, _LINK = 0.5e-6, 16e9  # between ranks on one host (benchmarks/results/collectives.json)


def host_bandwidth(device: Device) -> float:
    """Bytes a second that this host reads, measured now; 0 for a device whose own bandwidth is known, which needs none."""
    return 0.0 if device.memory_bandwidth else read_bandwidth(len(host.usable_cores()))


def rates_of(reached: Reached, device: Device, ranks: int, isas: Sequence[str], bandwidth: float) -> tuple[Rates, str]:
    """The rates of each rank with kernels that reach the shares `reached` of a device's rates, and a phrase about their source.

    Rates that depend on the host are those of this one, of which the ranks share the cores and the measured `bandwidth` in
    bytes a second."""
    cores = len(host.usable_cores())
    read = device.memory_bandwidth or bandwidth / ranks
    integer = device.int8 or _INTEGER_OF_A_CORE[_best_isa(isas)] * cores / ranks
    floating = device.half or _FLOAT_OF_A_CORE * cores / ranks
    latency, link = device.link_latency or _LATENCY_S, device.link_bandwidth or _LINK
    given = "given" if device.memory_bandwidth else f"{bandwidth / 1e9:.0f} GB/s, read by {cores} cores of this host now"
    rates = Rates(
        read * reached.read,
        reached.several,
        integer * reached.integer,
        floating * reached.floating,
        reached.call_s,
        latency,
        link,
    )
    return rates, f"{reached.source}; memory {given}"


def _best_isa(isas: Sequence[str]) -> str:
    """The best instruction set of this host among `isas`, or among all if that is empty."""
    return next((isa for isa in host.host_isas() if isa in (isas or host.ISA_FLAGS)), "avx2")
