"""Search the best tilings for the reference models' shapes on this host and write the tables that builds read.

    python -m belle_compile.compiler.backends.tvm.tuning                every shape below, for the host's best instruction set
    python -m belle_compile.compiler.backends.tvm.tuning --planes 2     only for activations of 16 bits
    python -m belle_compile.compiler.backends.tvm.tuning --isa avx2     for another instruction set that the host has
    python -m belle_compile.compiler.backends.tvm.tuning --own          a table for this processor alone
    python -m belle_compile.compiler.backends.tvm.tuning --shape 2048x5632 --out /tmp/tables    one shape, into another folder

Entries for shapes that are not searched stay in the table if they were measured on the same machine.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from belle_compile.compiler.backends.tvm.isa import ISAS
from belle_compile.compiler.backends.tvm.tuning.search import search
from belle_compile.compiler.backends.tvm.tuning.table import TABLES, Shape, TilingTable, read_table, table_path
from belle_compile.compiler.tables import table as as_text
from belle_compile.compiler.tilings import tiling_rows
from belle_compile.runtime import host
from belle_compile.runtime.executors.cpu import choose_isa

MAX_TOKENS, MAX_ROWS = 512, 64  # the most rows of a step, for a layer and for the head
# (outputs, inputs, most rows) of query-key-value, attention output, gate and up (or up), down, and head.
MODELS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "llama-1b": ((2560, 2048, MAX_TOKENS), (2048, 2048, MAX_TOKENS), (11264, 2048, MAX_TOKENS), (2048, 5632, MAX_TOKENS),
                 (32000, 2048, MAX_ROWS)),
    "smollm2-135m": ((960, 576, MAX_TOKENS), (576, 576, MAX_TOKENS), (3072, 576, MAX_TOKENS), (576, 1536, MAX_TOKENS),
                     (49152, 576, MAX_ROWS)),
    "bloom-1b1": ((4608, 1536, MAX_TOKENS), (1536, 1536, MAX_TOKENS), (6144, 1536, MAX_TOKENS), (1536, 6144, MAX_TOKENS),
                  (250880, 1536, MAX_ROWS)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=ISAS, default=None, help="default: the best of this host")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this model's shapes; repeatable")
    parser.add_argument("--shape", action="append", metavar="OUTPUTSxINPUTS", help="only this shape; repeatable")
    parser.add_argument("--planes", type=int, choices=(1, 2), action="append", help="1: int8; 2: int8-accurate; default: both")
    parser.add_argument("--threads", type=int, default=None, help="default: one for each usable core")
    parser.add_argument("--own", action="store_true", help="write a table for this processor alone, not the common one")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the tables")
    arguments = parser.parse_args()
    isa = choose_isa(tuple(ISAS), arguments.isa)
    processor = host.processor() if arguments.own else ""
    if arguments.own and not processor:
        parser.error("this processor has no name in runtime/host.py: add it to PROCESSORS")
    sizes = {(n, k): most for name in arguments.model or MODELS for n, k, most in MODELS[name]}
    if arguments.shape:
        chosen = [(int(n), int(k)) for n, _, k in (text.partition("x") for text in arguments.shape)]
        sizes = {size: sizes.get(size, MAX_TOKENS) for size in chosen}
    shapes = {Shape(*size, planes): most for size, most in sizes.items() for planes in arguments.planes or (1, 2)}

    started = time.perf_counter()

    def progress(done: int, total: int) -> None:
        print(f"{isa}: {done} of {total} shapes after {time.perf_counter() - started:.0f} s", flush=True)

    measured = search(dict(sorted(shapes.items())), ISAS[isa], threads=arguments.threads, progress=progress)
    table = joined(measured, read_table(isa, processor, arguments.out))
    arguments.out.mkdir(parents=True, exist_ok=True)
    table_path(isa, processor, arguments.out).write_text(table.to_json(), encoding="utf-8")
    print(as_text(tiling_rows(measured.to_plain()["entries"])))


def joined(measured: TilingTable, before: TilingTable) -> TilingTable:
    """The entries measured now and, if `before` was measured on the same machine, its entries for other shapes."""
    if before.machine != measured.machine:
        return measured
    searched = {entry.shape for entry in measured.entries}
    kept = tuple(entry for entry in before.entries if entry.shape not in searched)
    return replace(measured, entries=tuple(sorted((*measured.entries, *kept), key=lambda entry: entry.shape)))


if __name__ == "__main__":
    main()
