"""Machine code for every architecture, made where there is no GPU."""

from __future__ import annotations

import io
import zipfile

import pytest

pytest.importorskip("triton")

from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.program.kernels import Columns
from belle_compile.compiler.backends.triton.compile import archive, compile_kernels, toolchain
from belle_compile.compiler.backends.triton.kernels.activation import Activation, BlockHadamard, QuantizeTokens
from belle_compile.compiler.backends.triton.kernels.attention import AttendAlone, AttendRuns
from belle_compile.compiler.backends.triton.kernels.base import Kernel
from belle_compile.compiler.backends.triton.kernels.cache import AppendKV
from belle_compile.compiler.backends.triton.kernels.candidates import ChunkMaxima, Collect
from belle_compile.compiler.backends.triton.kernels.linear import FloatLinear, QuantizedLinear, Tile
from belle_compile.compiler.backends.triton.kernels.low_rank import Shrink
from belle_compile.compiler.backends.triton.kernels.norm import HeadNorm, Norm
from belle_compile.compiler.backends.triton.kernels.rotary import RotaryTable
from belle_compile.compiler.backends.triton.kernels.rows import Add, FloatEmbedding, GatherRows, QuantizedEmbedding
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.host import GPU_ARCHS
from belle_compile.runtime.program_json import seal

WIDE = View(12288)
ADAPTERS = (
    Shrink(Columns(((0, 4096), (4096, 1024), (5120, 1024))), 4096, 16, 1 << 27, "float16", View(4096), View(6144), 1),
    Shrink(Columns(((0, 11008), (11008, 11008))), 4096, 512, 1 << 30, "float32", View(4096), View(22016)),
)
KERNELS: tuple[Kernel, ...] = (
    Activation("swiglu", 11008, True, View(22016), View(22016, 11008), View(11008), 1, 256),
    AttendAlone(32, 32, 32, 128, 0.088, WIDE, View(4096), 128, "float16", True, False, WIDE, WIDE),
    AttendRuns(30, 32, 32, 128, 0.088, WIDE, View(4096), 128, "float16", False, True),
    QuantizedLinear(12288, 4096, False, View(4096), WIDE, 1, Tile(1, 8, 1024, dots=True, stages=3)),
    QuantizedLinear(4096, 4096, True, View(4096), View(4096), 1, Tile(16, 32, 256, 4)),
    QuantizedLinear(4096, 4096, True, View(8192), View(4096), 2, Tile(64, 64, 128, 1, 4, 3)),
    *(kernel for first in ADAPTERS for kernel in (first, first.expand())),
)


OTHERS: tuple[Kernel, ...] = (
    Add(4096, View(4096), View(4096), View(4096)),
    GatherRows(4096, View(4096), View(4096)),
    QuantizedEmbedding(32000, 4096, View(4096), True),
    FloatEmbedding(32000, 4096, View(4096)),
    Norm("layer", 4096, 1e-5, True, True, View(4096), View(4096), View(4096), View(8192), 2),
    Norm("rms", 4096, 1e-5, False, False, View(4096), None, None, View(4096), step=False),
    HeadNorm(4096, 128, 1e-6, View(6144), View(4096)),
    Activation("gelu", 16384, True, View(16384), None, View(16384), 1, 512, True),
    BlockHadamard(4096, 256, View(4096), View(4096)),
    QuantizeTokens(4096, View(4096), View(4096)),
    RotaryTable(128, 1.0, 2.0, 2048, 10000.0),
    AppendKV(32, 32, 128, View(12288, 4096), View(12288, 8192), 128, "int8", True),
    AttendAlone(32, 32, 8, 128, 0.088, WIDE, View(4096), 128, "int8", True, False, WIDE, WIDE, most_rows=256, window=4096),
    AttendRuns(32, 32, 8, 128, 0.088, WIDE, View(4096), 128, "float32", True, False),
    AttendRuns(5, 6, 6, 32, 0.177, View(576), View(192), 128, "float16", False, True, window=1024),
    ChunkMaxima(250880, View(250880)),
    Collect(250880, View(250880)),
    FloatLinear(4096, 4096, True, View(4096), View(4096)),
    Shrink(Columns(((0, 4096),)), 16384, 64, 1 << 27, "float16", View(32768), View(4096), 2),
    Shrink(Columns(((3, 107),)), 72, 6, 1 << 20, "float32", View(128, 7), View(192)).expand(),
)

SEAL = seal("a program")


def test_every_kind_of_kernel_compiles() -> None:
    """The interpreter takes more than the compiler does."""
    assert len(compile_kernels(OTHERS, "sm_80")) == len(OTHERS)
    kinds = {kernel.kind for kernel in (*KERNELS, *OTHERS)}
    assert kinds == {kind.kind for kind in _kinds(Kernel)}


def _kinds(base: type[Kernel]) -> set[type[Kernel]]:
    """The classes of kernels, without those that others derive from."""
    below = {one for sub in base.__subclasses__() for one in _kinds(sub)}
    return below or {base}


@pytest.mark.parametrize("arch", GPU_ARCHS)
def test_kernels_compile_without_a_gpu(arch: str) -> None:
    compiled = compile_kernels(KERNELS, arch)
    assert list(compiled) == sorted(kernel.name for kernel in KERNELS)
    for kernel in KERNELS:
        code, launch = compiled[kernel.name]
        assert code[:4] == b"\x7fELF" and launch.symbol.encode() in code
        assert 0 < launch.registers <= 255 and launch.local == 0
        assert bool(launch.tensor_cores) == kernel.tensor_cores(), (kernel.name, launch.tensor_cores)
        assert launch.threads == 32 * kernel.start().warps


def test_the_same_kernels_give_the_same_bytes() -> None:
    first, second = (compile_kernels(KERNELS[3:5], "sm_80") for _ in range(2))
    assert first == second
    assert archive({name: code for name, (code, _) in first.items()}, SEAL) == archive(
        {name: code for name, (code, _) in reversed(second.items())}, SEAL
    )
    with zipfile.ZipFile(io.BytesIO(archive({"b": b"2", "a": b"1"}, SEAL))) as file:
        assert file.namelist() == ["a.cubin", "b.cubin"] and file.read("a.cubin") == b"1"
    assert archive({"a": b"1"}, SEAL).endswith(SEAL), "where a host looks for it"


def test_registers_that_spill_are_refused() -> None:
    spilling = QuantizedLinear(4096, 4096, False, View(4096), View(4096), 1, Tile(128, 256, 64, 1, 4, 3))
    with pytest.raises(CompileError, match=r"found \d+ bytes of local memory on sm_80, expected 0: registers spill"):
        compile_kernels([spilling], "sm_80")
    assert list(compile_kernels(KERNELS[4:5], "sm_80", [spilling])) == [KERNELS[4].name], "one that need not be there"


def test_the_toolchain_is_named() -> None:
    assert toolchain().keys() == {"triton", "ptxas"} and "cuda" in toolchain()["ptxas"]
