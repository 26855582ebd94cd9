"""A small engine of several ranks with real kernels, the same as one rank, and processes that run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.compiler.backends.tvm import library
from belle_compile.compiler.backends.tvm.isa import AVX2
from belle_compile.runtime import artifact
from belle_compile.runtime.artifact import GenerationDefaults
from belle_compile.runtime.program import (
    AllReduce,
    Arena,
    Call,
    FusionCalls,
    Input,
    KVLayout,
    Logits,
    Program,
    Weight,
)
from tests.runtime.fakes import EOS, VOCABULARY, byte_tokenizer, make_directory
from tests.runtime.rank_files import write_rank

ROOT = Path(__file__).parents[2]
HIDDEN, WIDTH, STRIDE = 64, 60, 320  # of a row of activations, its part that is summed, of logits
MAX_TOKENS, MAX_ROWS = 24, 8
X, LOGITS = 0, MAX_TOKENS * HIDDEN * 4


def program(rank: int, ranks: int) -> Program:
    """x = the sum over ranks of table[token], logits = x times this rank's part of the head."""
    count = VOCABULARY // ranks
    x, logits = Arena(X, 4 * HIDDEN, "T"), Arena(LOGITS, 4 * STRIDE, "R")
    summed = (Call("all-reduce", "embed", "T", (x,), all_reduce=AllReduce(WIDTH, HIDDEN)),) if ranks > 1 else ()
    return Program(
        max_tokens=MAX_TOKENS, max_rows=MAX_ROWS, max_sequences=3, max_blocks=4096,
        arena_bytes=LOGITS + MAX_ROWS * STRIDE * 4, vocab_size=VOCABULARY,
        logits=Logits(LOGITS, STRIDE, rank * count, count), kv=KVLayout(1, 1, 16, "float32"),
        calls=(
            Call("embedding", "embed", "T", (Input("T"), Input("token_ids"), Weight("table"), x), kernel="lookup"),
            *summed,
            Call("linear", "head", "R", (Input("R"), Input("logit_rows"), x, Weight("head"), logits),
                 kernel="head"),
        ),
        kernel_calls=FusionCalls(2, 2), rank=rank, ranks=ranks,
    )  # fmt: skip


def weights(ranks: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Of each rank: small integers, whose sums are exact in any order and often equal, so that there are ties."""
    random = np.random.default_rng(seed)
    parts = random.integers(-1, 2, (12, VOCABULARY, HIDDEN)).astype(np.float32)
    parts[..., WIDTH:] = 0
    head = random.integers(-1, 2, (VOCABULARY, HIDDEN)).astype(np.float32)
    head[EOS] = 0
    tables = parts.reshape(ranks, 12 // ranks, VOCABULARY, HIDDEN).sum(axis=1)
    count = VOCABULARY // ranks
    return [{"table": tables[rank], "head": head[rank * count : (rank + 1) * count]} for rank in range(ranks)]


def _lookup() -> Any:
    """x[t, :] = table[token_ids[t], :]"""

    def body(T: Any, count: Any, ids: Any, table: Any, x: Any) -> None:
        with T.serial(0, count[0]) as t, T.serial(0, HIDDEN) as i:
            T.buffer_store(x, table[ids[t] * HIDDEN + i], [t * HIDDEN + i])

    return _kernel("lookup", ["int32", "int32", "float32", "float32"], body)


def _head(count: int) -> Any:
    """logits[r, v] = sum of x[logit_rows[r], :] * head[v, :]"""

    def body(T: Any, n: Any, rows: Any, x: Any, w: Any, logits: Any) -> None:
        with T.serial(0, n[0]) as r, T.serial(0, count) as v:
            T.buffer_store(logits, T.float32(0), [r * STRIDE + v])
            with T.serial(0, HIDDEN) as i:
                product = x[rows[r] * HIDDEN + i] * w[v * HIDDEN + i]
                T.buffer_store(logits, logits[r * STRIDE + v] + product, [r * STRIDE + v])

    return _kernel("head", ["int32", "int32", "float32", "float32", "float32"], body)


def _kernel(name: str, dtypes: list[str], body: Callable[..., None]) -> Any:
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            pointers = [T.arg(f"p{i}", T.ptr(dtype)) for i, dtype in enumerate(dtypes)]
            buffers = [T.decl_buffer((1 << 20,), dtype, data=p) for p, dtype in zip(pointers, dtypes, strict=True)]
            body(T, *buffers)
    return builder.get()


def build(path: Path, ranks: int, seed: int = 0) -> Path:
    """The engine's directory."""
    contents = {"tokenizer.json": byte_tokenizer().to_str().encode()}
    kernels = library.compile_functions({"lookup": _lookup(), "head": _head(VOCABULARY // ranks)}, AVX2)
    for rank, tensors in enumerate(weights(ranks, seed)):
        part = path.parent / f"{path.name}-rank{rank}"
        write_rank(part, program(rank, ranks), {"kernels-avx2.so": kernels}, tensors)
        contents |= {f"rank{rank}/{file.name}": file.read_bytes() for file in part.iterdir()}
        shutil.rmtree(part)
    requires = artifact.Requirements("x86_64", ("avx2",), 1 << 20)
    target = artifact.TargetInfo("cpu" if ranks == 1 else f"cpux{ranks}", "tvm", ("avx2",), requires, ranks)
    return make_directory(path, contents, target=target, generation=GenerationDefaults(max_new_tokens=12))


# What ranks do before they are belle-run; `rank` is the number of each.
SCRIPT = """
import os, signal, sys, time
rank = int(os.environ.get("PMI_RANK", -1))
{change}
from belle_compile.runtime.cli import main
main(prog_name="belle-run")
"""


@dataclass
class Run:
    """belle-run under way."""

    process: subprocess.Popen[str]
    mark: str = ""
    started: float = field(default_factory=time.monotonic)

    def end(self, timeout: float = 30) -> tuple[int, str, str]:
        """Exit code, output and errors; no process of the run is left."""
        try:
            out, errors = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for process in self.left():
                os.kill(process, 9)
            out, errors = self.process.communicate()
            raise AssertionError(f"hangs; output {out[-2000:]!r}, errors {errors[-2000:]!r}") from None
        deadline = time.monotonic() + 2  # of MPI's own helpers
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not self.left()
        return self.process.returncode, out, errors

    def left(self) -> list[int]:
        """Processes of the run that are still there."""
        return [process for process, environment in _processes() if self.mark.encode() in environment]

    def rank(self, number: int) -> int:
        """The process of a rank (the child of its parent, which has the same environment), once there is one."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for process, environment in _processes():
                if {self.mark.encode(), f"PMI_RANK={number}".encode()} <= environment and not is_parent(process):
                    return process
            time.sleep(0.02)
        raise AssertionError(f"no rank {number}")


def belle_run(directory: Path, *arguments: object, change: str = "", before: tuple[str, ...] = (), **more: Any) -> Run:
    """Start it in a process of its own, where each rank first runs the Python code `change`, the command after `before`."""
    mark = f"BELLE_TEST={uuid.uuid4()}"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        mark.partition("=")[0]: mark.partition("=")[2],
    }
    environment.pop("BELLE_RANK_TIMEOUT", None)
    program = ["-c", SCRIPT.format(change=change)] if change else ["-m", "belle_compile.runtime"]
    command = [*before, sys.executable, *program, str(directory), *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # `answering` may stop to read in the middle of a character
    return Run(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, errors="replace", **{**pipes, **more}), mark)


def is_parent(process: int) -> bool:
    """Whether a process is the parent of a rank (runtime/distributed/rank_parent.py)."""
    try:
        return b"rank_parent.py" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def _processes() -> list[tuple[int, set[bytes]]]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                found.append((int(entry.name), set(Path(entry.path, "environ").read_bytes().split(b"\0"))))
            except OSError:
                continue
    return found
