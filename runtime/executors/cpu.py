"""Runs a Program on the CPU: kernels of one shared library over mapped weights, through tvm_ffi."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import host
from runtime.errors import EngineError
from runtime.executors import StepBatch
from runtime.kv_cache import blocks_for
from runtime.memory import WeightsFile, anonymous
from runtime.profiling import Recorder
from runtime.program import ALIGNMENT, KV, Arena, Arg, Call, Input, Program, Weight, read_program

WEIGHTS_NAME = "weights.safetensors"
LIBRARY_NAME = "libtvm_runtime.so"
_COPY_AGAIN = "copy the engine again or rebuild it"
Bound = Callable[[], object]


def kernels_name(isa: str) -> str:
    """File name of the kernel library of an instruction set."""
    return f"kernels-{isa}.so"


class CpuExecutor:
    """One rank's program with its weights, arena and KV cache.

    Every call is bound to its addresses at load; a step is a walk over a list of bound calls. The list depends on the
    row counts, since a kernel may have variants by rows, and is made at the first step that needs it.
    """

    def __init__(
        self,
        directory: Path,
        carried: Iterable[str],
        *,
        threads: int | None = None,
        isa: str | None = None,
        kv_tokens: int | None = None,
    ) -> None:
        """Map and bind `directory` (rank0) whose engine carries kernels for the `carried` instruction sets."""
        self.isa = choose_isa(tuple(carried), isa)
        self.program = program = read_program(directory)
        self.vocab_size = program.vocab_size
        self.threads = _thread_count(threads)
        self._configured_thread = 0
        self._weights = WeightsFile(directory / WEIGHTS_NAME)
        self._weights.require(program.weight_names())
        self.num_blocks = _kv_blocks(program, kv_tokens, self._weights.total_bytes)
        self._ffi = _load_tvm(directory / LIBRARY_NAME)
        self._kernels = self._load_kernels(directory / kernels_name(self.isa))

        self._arena = anonymous(program.arena_bytes)
        self._kv = anonymous(self.num_blocks * program.kv.block_bytes)
        self._inputs = _allocate_inputs(program)
        self._inputs["kv_blocks"][0] = self.num_blocks
        self._tokens, self._rows = self._inputs["T"], self._inputs["R"]
        table = self._inputs["block_table"].reshape(program.max_sequences, program.max_blocks)
        token_ids, positions, sequences = (self._inputs[name] for name in ("token_ids", "positions", "sequences"))
        self.batch = StepBatch(token_ids, positions, sequences, table, self._inputs["logit_rows"])
        start, stride = program.logits.offset, program.logits.stride
        floats = self._arena[start : start + 4 * stride * program.max_rows].view(np.float32)
        self._logits = floats.reshape(program.max_rows, stride)[:, : program.vocab_size]

        self._bounds = {rows: _row_bounds(program.calls, rows) for rows in ("T", "R")}
        self._lists: dict[tuple[int, int], tuple[Bound, ...]] = {}
        self._recorder: Recorder | None = None

    def step(self) -> NDArray[np.float32]:
        """Run the batch; float32 logits [rows, vocab_size] in the arena, valid until the next step."""
        if self._configured_thread != threading.get_ident():
            self._configure_threads()
        tokens, rows = self.batch.tokens, self.batch.rows
        self._tokens[0], self._rows[0] = tokens, rows
        # Without a row wanted, as in the first chunks of a long prompt, everything behind the last layer is left out.
        key = (bisect_left(self._bounds["T"], tokens), bisect_left(self._bounds["R"], rows) if rows else -1)
        calls = self._lists.get(key)
        if calls is None:
            calls = self._lists[key] = self._bind(tokens, rows)
        for call in calls:
            call()
        return self._logits[:rows]

    def record(self, recorder: Recorder | None) -> None:
        """Time every kernel call from the next step on, or stop doing so: lists of calls are bound anew."""
        self._recorder = recorder
        self._lists.clear()

    def close(self) -> None:
        """Drop kernels, weights and buffers; their memory is unmapped with the last array that shows it."""
        self._lists.clear()
        self._kernels.clear()
        for name in ("_arena", "_kv", "_logits", "_weights", "_inputs", "_tokens", "_rows", "batch"):
            with contextlib.suppress(AttributeError):
                delattr(self, name)

    def _bind(self, tokens: int, rows: int) -> tuple[Bound, ...]:
        counts = {"T": tokens, "R": rows}
        bound = (
            (number, partial(self._kernels[call.kernel_for(counts[call.rows])], *map(self._pointer, call.args)))
            for number, call in enumerate(self.program.calls)
            if counts[call.rows] > 0
        )
        return self._recorder.timed(bound) if self._recorder else tuple(call for _, call in bound)

    def _pointer(self, arg: Arg) -> ctypes.c_void_p:
        match arg:
            case Arena(offset):
                return ctypes.c_void_p(self._arena.ctypes.data + offset)
            case Weight(name):
                return ctypes.c_void_p(self._weights.address(name))
            case Input(name):
                return ctypes.c_void_p(self._inputs[name].ctypes.data)
            case KV(layer, part):
                index = 2 * layer + (part == "v")
                offset = index * self.num_blocks * self.program.kv.part_block_bytes
                return ctypes.c_void_p(self._kv.ctypes.data + offset)

    def _load_kernels(self, path: Path) -> dict[str, Callable[..., object]]:
        if not path.is_file():
            raise EngineError("engine", f"file {path} is missing", remedy=_COPY_AGAIN)
        module = self._ffi.load_module(str(path))
        kernels: dict[str, Callable[..., object]] = {}
        for name in self.program.kernel_names():
            try:
                kernels[name] = module[name]
            except (AttributeError, KeyError, RuntimeError):
                raise EngineError("engine", f"kernel {name} is missing from {path}", remedy=_COPY_AGAIN) from None
        return kernels

    def _configure_threads(self) -> None:
        """Size TVM's worker pool, of which each calling thread has its own, before its first use on this thread.

        The length of the CPU list is what sizes the pool and overrides TVM_NUM_THREADS and TVM's default of half of the
        cores. Threads are not bound to these CPUs: two engines on a host would be bound to the same ones.
        """
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        # Workers spin (yielding) this often for the next kernel before they sleep: about a millisecond, more than lies between
        # the kernels of a step. TVM's default of 300,000 uses up their share of a core that others want too.
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "3000")
        cores = host.usable_cores()
        one_core_per_thread = -2  # takes effect with TVM_BIND_THREADS=1 only
        cpus = [str(cores[i % len(cores)]) for i in range(self.threads)]
        self._ffi.get_global_func("runtime.config_threadpool")(one_core_per_thread, self.threads, cpus)
        self._configured_thread = threading.get_ident()


def choose_isa(carried: tuple[str, ...], wanted: str | None = None) -> str:
    """The best instruction set that engine and host share, or `wanted` (else env BELLE_ISA) if both have it.

    Raises `EngineError` saying which of the two lacks it. AMX also needs the kernel's permission, asked for here.
    """
    wanted = wanted or os.environ.get("BELLE_ISA") or None
    have = host.host_isas()
    if wanted is None:
        for isa in host.ISA_FLAGS:
            if isa in carried and isa in have and (isa != "amx" or _allow_amx()):
                return isa
        found = ", ".join(have) or "none"
        expected = f"one of {', '.join(carried)}"
        raise EngineError("cpu", "this host has no instruction set of the engine", found=found, expected=expected)
    if wanted not in host.ISA_FLAGS:
        raise EngineError("cpu", "instruction set", found=wanted, expected=f"one of {', '.join(host.ISA_FLAGS)}")
    if wanted not in carried:
        remedy = "choose one of these or rebuild the engine"
        raise EngineError("cpu", f"the engine has no kernels for {wanted}", found=", ".join(carried), remedy=remedy)
    if wanted not in have:
        missing = ", ".join(host.missing_flags(wanted))
        raise EngineError("cpu", f"this host lacks {wanted}", found=f"no {missing} among its CPU flags")
    if wanted == "amx" and not _allow_amx():
        raise EngineError("cpu", "the operating system refuses AMX", remedy="use Linux 5.16 or newer, or isa avx512vnni")
    return wanted


def _allow_amx() -> bool:
    """Ask Linux for the tile registers (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA); threads made later inherit it."""
    sys_arch_prctl, arch_req_xcomp_perm, xtiledata = 158, 0x1023, 18
    return int(ctypes.CDLL(None).syscall(sys_arch_prctl, arch_req_xcomp_perm, xtiledata)) == 0


def _thread_count(threads: int | None) -> int:
    """Threads of the kernels' pool: as asked, else every usable core."""
    if threads is not None and threads < 1:
        raise EngineError("cpu", "threads", found=str(threads), expected="1 or more")
    return threads or len(host.usable_cores())


def _load_tvm(library: Path) -> Any:
    """tvm_ffi with TVM's runtime library, which finds libtvm_ffi.so only when tvm_ffi was imported before."""
    try:
        with _torch_hidden():
            import tvm_ffi
    except ImportError:
        raise EngineError("cpu", "the package apache-tvm-ffi is missing", remedy="pip install apache-tvm-ffi") from None
    # A second copy in one process would register its functions twice: the first engine's, or the compiler's, serves all.
    if tvm_ffi.get_global_func("runtime.config_threadpool", True) is None:
        if not library.is_file():
            raise EngineError("engine", f"file {library} is missing", remedy=_COPY_AGAIN)
        try:
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except OSError as error:
            remedy = "install the apache-tvm-ffi version of the manifest's toolchain"
            raise EngineError("cpu", f"{library} does not load", found=str(error), remedy=remedy) from None
    return tvm_ffi


@contextlib.contextmanager
def _torch_hidden() -> Iterator[None]:
    """tvm_ffi imports torch where it is installed, to exchange tensors: seconds and 200 MB that kernels by address waste."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` an ImportError
    try:
        yield
    finally:
        del sys.modules["torch"]


def _kv_blocks(program: Program, kv_tokens: int | None, weight_bytes: int) -> int:
    """Blocks of the KV cache: for `kv_tokens`, else what half of the memory beside the weights holds."""
    memory = host.memory_bytes()
    if kv_tokens is not None:
        blocks = blocks_for(kv_tokens)
        needed = blocks * program.kv.block_bytes
        if kv_tokens < 1 or needed > memory:
            found = f"{kv_tokens} tokens, {needed / 2**30:.1f} GiB"
            raise EngineError("cpu", "kv_tokens", found=found, expected=f"1 token to {memory / 2**30:.1f} GiB")
        return blocks
    affordable = max(memory - weight_bytes, 0) // 2 // program.kv.block_bytes
    return max(1, min(affordable, program.max_sequences * program.max_blocks))


def _allocate_inputs(program: Program) -> dict[str, NDArray[np.int32]]:
    """Int32 buffers for every input, 64-byte aligned, in one map."""
    sizes = dict.fromkeys(("token_ids", "positions", "sequences"), program.max_tokens) | {
        "block_table": program.max_sequences * program.max_blocks,
        "logit_rows": program.max_rows,
        "T": 1,
        "R": 1,
        "kv_blocks": 1,
    }
    padded = {name: -(-4 * size // ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}
    memory, offset = anonymous(sum(padded.values())), 0
    inputs: dict[str, NDArray[np.int32]] = {}
    for name, size in sizes.items():
        inputs[name] = memory[offset : offset + 4 * size].view(np.int32)
        offset += padded[name]
    return inputs


def _row_bounds(calls: tuple[Call, ...], rows: str) -> list[int]:
    """Row counts, ascending, at which some call changes its kernel."""
    return sorted({bound for call in calls if call.rows == rows for bound, _ in call.kernels() if bound is not None})
