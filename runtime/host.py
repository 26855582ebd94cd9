"""What the serving host offers: instruction sets, cores, memory."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from pathlib import Path

from belle_compile.runtime import cgroups

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512VNNI = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}

# Instruction sets that kernels are compiled for, best first, with the CPU flags (as in /proc/cpuinfo) that each one needs.
ISA_FLAGS: dict[str, frozenset[str]] = {
    "amx": _AVX512VNNI | {"amx_tile", "amx_int8", "amx_bf16", "avx512_bf16"},
    "avx512vnni": _AVX512VNNI,
    "avx2": _AVX2,
}

# Architectures of GPUs that engines are built for, with the bytes of shared memory that a block of threads can have. Code for
# one of them runs on GPUs of the same major version (the first digit) and the same or a later minor version.
SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}
GPU_ARCHS = tuple(SHARED_BYTES)
GPU_RESERVE_BYTES = 512 << 20  # of a GPU's memory, left to the driver, the code and recorded steps

# Microarchitectures that kernels are tuned for: vendor, family and models, as in /proc/cpuinfo.
PROCESSORS: dict[str, tuple[str, int, frozenset[int]]] = {
    "znver5": ("AuthenticAMD", 26, frozenset(range(256))),
    "znver4": ("AuthenticAMD", 25, frozenset({*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)})),
    "sapphirerapids": ("GenuineIntel", 6, frozenset({143})),
    "emeraldrapids": ("GenuineIntel", 6, frozenset({207})),
    "icelake-server": ("GenuineIntel", 6, frozenset({106, 108})),
    "cascadelake": ("GenuineIntel", 6, frozenset({85})),
}


def cpu_flags() -> frozenset[str]:
    """Feature flags of the first CPU in /proc/cpuinfo; empty where the file or the line is missing."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def host_isas() -> tuple[str, ...]:
    """Names of the instruction sets of `ISA_FLAGS` that this CPU has, best first."""
    flags = cpu_flags()
    return tuple(isa for isa, needed in ISA_FLAGS.items() if needed <= flags)


def processor() -> str:
    """LLVM's name of the CPU's microarchitecture, such as "znver4"; empty for one that is not in `PROCESSORS`."""
    first = _first_processor()
    vendor, family, model = (first.get(key, "") for key in ("vendor_id", "cpu family", "model"))
    if not (family.isdecimal() and model.isdecimal()):
        return ""
    return next(
        (name for name, (v, f, models) in PROCESSORS.items() if (v, f) == (vendor, int(family)) and int(model) in models), ""
    )


def processor_name() -> str:
    """The name, family and model of the first CPU, as /proc/cpuinfo has them."""
    first = _first_processor()
    name = first.get("model name", platform.processor() or "unknown processor")
    return f"{name} (family {first.get('cpu family', '?')}, model {first.get('model', '?')})"


def _first_processor() -> dict[str, str]:
    """The fields of the first CPU in /proc/cpuinfo; empty where the file is missing."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    first: dict[str, str] = {}
    for key, colon, value in (line.partition(":") for line in lines):
        if colon:
            first.setdefault(key.strip(), value.strip())
    return first


def missing_flags(isa: str) -> list[str]:
    """CPU flags that `isa` needs and this host lacks, sorted."""
    return sorted(ISA_FLAGS[isa] - cpu_flags())


def host_arch() -> tuple[str, str]:
    """(operating system, machine), such as ("Linux", "x86_64")."""
    return platform.system(), platform.machine()


def usable_cores() -> list[int]:
    """CPUs that this process may run on; only as many as the container's CPU quota allows, where it is smaller."""
    cores = sorted(os.sched_getaffinity(0))
    limit = cgroups.processors()
    return cores if limit is None else cores[: max(1, math.ceil(limit))]


def memory_bytes() -> int:
    """The most memory that this process could get: the machine's, or the container's limit where that is smaller.

    The memory that is free now says little: weights are mapped, so that the system can reclaim their pages.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroups.memory_bytes()
    return total if limit is None else min(total, limit)


def cache_bytes() -> list[int]:
    """Sizes in bytes of the caches of the first CPU, smallest first; empty where the system does not report them."""
    sizes = []
    for file in CACHES.glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return sorted(sizes)


def last_level_cache_bytes() -> int:
    """Size in bytes of the largest cache of the first CPU; 0 where the system does not report it."""
    return max(cache_bytes(), default=0)
