"""What a result must say about where it was measured."""

from __future__ import annotations

import os
import platform
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from belle_compile.runtime import host

PACKAGES = (
    "belle-compile", "apache-tvm", "apache-tvm-ffi", "numpy", "rensa", "tokenizers", "torch", "transformers", "lm_eval",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Processor, memory, system, versions, date and command of this run."""
    cpu = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in cpu.items()}
    flags = set(cpu.get("flags", "").split())
    name, family, model = cpu.get("model name", platform.processor()), cpu.get("cpu family", "?"), cpu.get("model", "?")
    return {
        "processor": f"{name} (family {family}, model {model})",
        "cores": len(host.usable_cores()),
        "instruction_sets": [name for name in ("avx2", "avx512_vnni", "amx_int8") if name in flags],
        "last_level_cache_mib": round(host.last_level_cache_bytes() / 2**20, 1),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "date": date.today().isoformat(),
        "command": " ".join([Path(sys.orig_argv[0]).name, *map(_portable, sys.orig_argv[1:])]),
    }


def _portable(argument: str) -> str:
    """An argument without the folders of an absolute path: they mean nothing on another machine."""
    return Path(argument).name if os.path.isabs(argument) else argument


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
