"""How fast int8 products can be made here: the roofline of prefill, in loops that touch registers only."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import ISAS, Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel
from belle_compile.compiler.backends.tvm.tir import Buffer, Expr, T
from benchmarks.bandwidth import load_kernel

STEPS = 1 << 19
VNNI_SUMS, MADDUBS_SUMS, TILE_SUMS = 24, 12, 4  # enough to hide the latency of the product, few enough for the registers


@dataclass(frozen=True)
class Int8Products(Kernel):
    """`STEPS` rounds of products into independent sums on each of `threads` threads; nothing is read or written meanwhile."""

    kind: ClassVar[str] = "products"
    threads: int

    def pointers(self) -> tuple[tuple[str, str], ...]:
        return (("data", "int32"), ("sums", "int32"))

    def body(self, isa: Isa, *buffers: Buffer) -> None:
        loop = _tiles if isa.amx else _vnni if isa.dot == "vnni" else _maddubs
        data, sums = buffers
        tir.parallel(self.threads, lambda task: loop(data, sums, task))


def operations(isa: Isa, threads: int) -> int:
    """Multiplications and additions of one call, those of the int8 product only."""
    if isa.amx:
        return threads * STEPS * TILE_SUMS * 2 * 16 * 16 * 64
    return threads * STEPS * 2 * (VNNI_SUMS * 64 if isa.dot == "vnni" else MADDUBS_SUMS * 32)


def _vnni(data: Buffer, sums: Buffer, task: Expr) -> None:
    a, b = (tir.bind(T.reinterpret("int8x64", tir.load(data, 16 * i))) for i in range(2))
    acc = tir.Registers(VNNI_SUMS, tir.I16, tir.splat_i32(0))

    def step(_: Expr) -> None:
        for i in range(VNNI_SUMS):
            acc[i] = tir.pure(tir.I16, "llvm.x86.avx512.vpdpbusd.512", acc[i], a, b)

    tir.for_range(STEPS, step)
    total = acc[0]
    for i in range(1, VNNI_SUMS):
        total = total + acc[i]
    tir.store(sums, task * 16, total)


def _maddubs(data: Buffer, sums: Buffer, task: Expr) -> None:
    """Each product's left side is its sum so far: with the same operands LLVM would take it out of the loop."""
    lanes = 8
    b = tir.bind(T.reinterpret("int8x32", tir.load(data, 16, lanes)))
    ones = T.broadcast(T.int16(1), 16)
    acc = tir.Registers(MADDUBS_SUMS, "int32x8", tir.load(data, 0, lanes))

    def step(_: Expr) -> None:
        for i in range(MADDUBS_SUMS):
            product = tir.pure("int16x16", "llvm.x86.avx2.pmadd.ub.sw", T.reinterpret("int8x32", acc[i]), b)
            acc[i] = acc[i] + tir.pure("int32x8", "llvm.x86.avx2.pmadd.wd", product, ones)

    tir.for_range(STEPS, step)
    total = acc[0]
    for i in range(1, MADDUBS_SUMS):
        total = total + acc[i]
    tir.store(sums, task * 16, total, lanes)


def _tiles(data: Buffer, sums: Buffer, task: Expr) -> None:
    """Sums in tiles 0 to 3, tokens in 4 and 5, weights in 6 and 7."""

    def emit(intrinsic: str, *args: Expr) -> None:
        T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{intrinsic}", *args))

    config = tir.local(64, "uint8")
    for i in range(64):
        value = 1 if i == 0 else 64 if 16 <= i < 32 and i % 2 == 0 else 16 if 48 <= i < 56 else 0
        T.buffer_store(config, T.uint8(value), [tir.i64(i)])
    emit("ldtilecfg", T.address_of(config[tir.i64(0)]))
    for tile in range(8):
        if tile < 4:
            emit("tilezero", T.int8(tile))
        else:
            emit("tileloadd64", T.int8(tile), T.address_of(data[tir.i64(0)]), tir.i64(64))

    def step(_: Expr) -> None:
        for half in range(2):
            for p in range(2):
                emit("tdpbusd", T.int8(half * 2 + p), T.int8(4 + half), T.int8(6 + p))

    tir.for_range(STEPS, step)
    emit("tilestored64", T.int8(0), T.address_of(sums[task * 256]), tir.i64(64))
    emit("tilerelease")


class Int8Rate:
    """The rate of an instruction set's int8 products with `threads` threads; AMX needs the permission an engine asks for."""

    def __init__(self, isa: str, threads: int) -> None:
        self._operations = operations(ISAS[isa], threads)
        self._data = np.ones(4096, np.int32)
        self._sums = np.zeros(256 * threads + 4096, np.int32)
        arguments = [-(-array.ctypes.data // 64) * 64 for array in (self._data, self._sums)]
        (self._run,) = load_kernel(Int8Products(threads), ISAS[isa], threads, arguments)
        self._run()

    def measure(self, repeats: int = 5) -> float:
        """Tera-operations a second, the best of `repeats` loops."""
        return max(self._once() for _ in range(repeats))

    def _once(self) -> float:
        start = time.perf_counter()
        self._run()
        return self._operations / (time.perf_counter() - start) / 1e12


class CoreRate(Int8Rate):
    """The rate of one core, measured from a thread of its own, which goes there."""

    def __init__(self, isa: str, core: int) -> None:
        super().__init__(isa, 1)
        self._core = core

    def measure(self, repeats: int = 5) -> float:
        """Tera-operations a second, the mean of `repeats` loops, as what else runs there leaves them."""
        os.sched_setaffinity(0, {self._core})  # of this thread
        return repeats / sum(1 / self._once() for _ in range(repeats))
