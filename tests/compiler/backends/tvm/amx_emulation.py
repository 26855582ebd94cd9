"""The AMX kernels in tests: with the real instructions where the host has them; elsewhere with AVX512-VNNI, and with calls to
amx_emulation.c in place of the tile instructions."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from belle_compile.compiler.backends.tvm.isa import AMX, Isa
from belle_compile.runtime.executors.cpu import allow_amx
from belle_compile.runtime.host import host_isas

AMX_EMULATED = Isa("amx-emulated", "cascadelake", "vnni", amx=True, emulate_amx=True)


def _load() -> tuple[Isa, ...]:
    if AMX.name in host_isas() and allow_amx():
        return (AMX,)
    if "avx512vnni" not in host_isas():
        return ()
    compiler = sysconfig.get_config_var("CC").split()[0]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "amx_emulation.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    return (AMX_EMULATED,)


AMX_TEST_ISAS = _load()
