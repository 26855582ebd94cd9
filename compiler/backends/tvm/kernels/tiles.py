"""AMX instructions, and the configuration of the eight tile registers of up to 16 rows of 64 bytes."""

from __future__ import annotations

from belle_compile.compiler.backends.tvm import tir
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.tir import Expr, T

TILES = 8
TILE = 16  # rows of a full tile
TILE_BYTES = TILE * 64
WEIGHTS = 6  # this tile and the next hold the right factors of products and always have all rows


def emit(isa: Isa, intrinsic: str, *args: Expr) -> None:
    """Emit one tile instruction, or a call of the C function that emulates it in tests (`tests/.../amx_emulation.c`)."""
    if isa.emulate_amx:
        T.evaluate(T.call_extern("int32", f"belle_emulated_{intrinsic}", *args))
    else:
        T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{intrinsic}", *args))


def configure(isa: Isa, rows: int = TILE) -> None:
    """Configure tiles 0 to 5 with `rows` rows, and 6 and 7 with all 16. The configuration is that of the calling thread."""
    config = tir.local(64, "uint8")
    counts = [rows] * WEIGHTS + [TILE] * (TILES - WEIGHTS)
    for i in range(64):
        value = 1 if i == 0 else 64 if 16 <= i < 32 and i % 2 == 0 else counts[i - 48] if 48 <= i < 56 else 0
        T.buffer_store(config, T.uint8(value), [tir.i64(i)])
    emit(isa, "ldtilecfg", T.address_of(config[tir.i64(0)]))
