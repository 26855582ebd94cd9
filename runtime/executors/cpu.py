"""Runs a program on the CPU: kernels of one shared library over mapped weights."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime import host
from belle_compile.runtime.adapters.factors import AdapterMemory, AdapterSlots
from belle_compile.runtime.distributed.collectives import Collectives
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.adapted import NO_LINEARS, AdaptedRows, is_needed
from belle_compile.runtime.executors.base import Executor
from belle_compile.runtime.executors.batch import NO_ADAPTER, StepBatch
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.executors.native import CallList, FailedCall, KernelLibrary, ThreadPool
from belle_compile.runtime.executors.summed import Sum, SummedLists
from belle_compile.runtime.memory import WeightsFile, anonymous
from belle_compile.runtime.profiling import Recorder, read_bandwidth
from belle_compile.runtime.program import (
    ALIGNMENT,
    BLOCK_ROWS,
    KV,
    WEIGHTS_NAME,
    Adapter,
    AllReduce,
    Arena,
    Arg,
    Call,
    Input,
    Program,
    Scratch,
    Weight,
)
from belle_compile.runtime.program_json import check_seal, read_program

_Key = tuple[int, int, frozenset[str]]  # of a list of calls: the variants for its row counts, and the linears that are changed
_PREFETCH_BYTES = 64 * 1024  # a call that reads fewer bytes of weights is not prefetched


def kernels_path(directory: Path, isa: str) -> Path:
    """The kernel library for an instruction set: one tuned for this processor if the engine has it, else the general one."""
    tuned = directory / f"kernels-{isa}-{host.processor()}.so"
    return tuned if tuned.is_file() else directory / f"kernels-{isa}.so"


class CpuExecutor:
    """One rank's program with its weights, arena and KV cache.

    A step walks a list of kernel calls with the addresses of their arguments. Which list depends on the row counts, since a
    kernel may have variants by rows; a list is made at the first step that needs it.
    """

    def __init__(
        self,
        directory: Path,
        carried: Iterable[str],
        *,
        threads: int | None = None,
        isa: str | None = None,
        kv_memory: KvMemory | None = None,
        collectives: Collectives | None = None,
        adapter_slots: int = 0,
        beside: Executor | None = None,
    ) -> None:
        """Map the weights in `directory` (such as ENGINE/rank0) of an engine with kernels for the `carried` instruction sets.

        `threads` defaults to the usable cores, `isa` to the best that host and engine share, `kv_memory` to half of the memory
        beside the weights. A program of several ranks needs `collectives` for its sums. `adapter_slots` are for as many
        adapters, if the program takes any. The executor `beside` never runs at the same time: its threads are used, if they are
        as many.
        """
        self.isa = choose_isa(tuple(carried), isa)
        self.program = program = read_program(directory)
        path = kernels_path(directory, self.isa)
        check_seal(directory, path)
        self.vocab_size, self.kv_block_bytes = program.vocab_size, program.kv.block_bytes
        self.span, self.sums = (program.logits.first, program.logits.count), program.sums
        self._weights = WeightsFile(directory / WEIGHTS_NAME)
        self._weights.require(program.weight_names(), program.weights_header)
        self._collectives = collectives
        _check_rank(program, directory, collectives)
        ranks_here = collectives.ranks_here if collectives else 1
        self.adapters: AdapterSlots | None = None
        adapter_bytes = adapter_slots * program.adapters.slot_bytes if program.adapters else 0
        if program.adapters and adapter_slots:
            self.adapters = AdapterMemory(program.adapters, anonymous(adapter_bytes))
        taken = self._weights.total_bytes + adapter_bytes
        self.num_blocks = kv_blocks(program, kv_memory or KvMemory(), taken, ranks_here)
        self.kernels = path.stem  # a tuned library may add in another order than the general one
        library = KernelLibrary(path)
        self._kernels = {name: library.address(name) for name in program.kernel_names()}
        self._shared_sum = library.sum_address() if collectives and collectives.shared else 0

        self._arena = anonymous(program.arena_bytes)
        self._scratch = anonymous(program.scratch_bytes)
        self._kv = anonymous(self.num_blocks * program.kv.block_bytes)
        self._kv_blocks = self._kv.reshape(self.num_blocks, -1)  # keys and values of all layers side by side
        self._inputs = allocate_inputs(program)
        self._tokens, self._rows = self._inputs["T"], self._inputs["R"]
        table = self._inputs["block_table"].reshape(program.max_sequences, program.max_blocks)
        token_ids, positions, sequences = (self._inputs[name] for name in ("token_ids", "positions", "sequences"))
        slots = self._inputs["adapters"] if self.adapters else None
        self.batch = StepBatch(token_ids, positions, sequences, table, self._inputs["logit_rows"], adapters=slots)
        self._logits = self._logits_in_arena()

        self._bounds = {rows: _row_bounds(program.calls, rows) for rows in ("T", "R")}
        self._lists: dict[_Key, tuple[CallList | SummedLists, NDArray[np.int64]]] = {}
        self._recorder: Recorder | None = None
        count = threads if threads is not None else len(host.usable_cores())
        self._pool: ThreadPool = ThreadPool(library, count, beside._pool if isinstance(beside, CpuExecutor) else None)
        self.threads = self._pool.threads
        self._adapted = AdaptedRows(self.adapters, self._inputs["adapted"], self.threads) if self.adapters else None

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        """Run `batch`; return float32 logits [rows, tokens of `span`] in the arena, valid until the next step."""
        tokens, rows = batch.tokens, batch.rows
        self._tokens[0], self._rows[0] = tokens, rows
        for source, destination in batch.copies:
            self._kv_blocks[destination] = self._kv_blocks[source]
        # Where no logits are requested, as in the first chunks of a long prompt, everything after the last layer is left out.
        variant = bisect_left(self._bounds["T"], tokens), bisect_left(self._bounds["R"], rows) if rows else -1
        key = *variant, self._adapted.changed_linears(batch) if self._adapted else NO_LINEARS
        calls, numbers = self._lists.get(key) or self._bind(key, tokens, rows)
        try:
            if self._recorder is None:
                calls.run()
            else:
                self._recorder.walked(numbers, calls.run_timed())
        except FailedCall as failed:
            call = self.program.calls[numbers[failed.number]]
            raise EngineError("cpu", f"kernel {call.kind} of {call.node}", found=failed.message) from None
        return self._logits[:rows]

    def join(self, collectives: Collectives) -> None:
        """Move the arena to the memory in which ranks sum fastest."""
        self._arena = collectives.memory(self.program.arena_bytes)
        self._logits = self._logits_in_arena()

    def record(self, recorder: Recorder | None) -> None:
        """Report every kernel call to `recorder` from the next step on; with None, stop."""
        self._recorder = recorder

    def read_bandwidth(self) -> float:
        """Bytes a second that this executor's threads read from memory."""
        return read_bandwidth(self.threads)

    def close(self) -> None:
        """End the threads, drop weights and buffers. Memory is unmapped with the last array over it."""
        self._pool.close()
        self._lists.clear()
        for name in ("_arena", "_scratch", "_kv", "_kv_blocks", "_logits", "_weights", "_inputs", "_tokens", "_rows", "batch",
                     "adapters", "_adapted"):  # fmt: skip
            with contextlib.suppress(AttributeError):
                delattr(self, name)

    def _logits_in_arena(self) -> NDArray[np.float32]:
        logits, most = self.program.logits, self.program.max_rows
        floats = self._arena[logits.offset : logits.offset + 4 * logits.stride * most].view(np.float32)
        return floats.reshape(most, logits.stride)[:, : logits.count]

    def _bind(self, key: _Key, tokens: int, rows: int) -> tuple[CallList | SummedLists, NDArray[np.int64]]:
        """The list of calls for these row counts, and the number of each in the program."""
        started = time.perf_counter()
        counts = {"T": tokens, "R": rows}
        numbers = [
            number for number, call in enumerate(self.program.calls) if counts[call.rows] > 0 and is_needed(call, key[2])
        ]
        calls = [self.program.calls[number] for number in numbers]
        if self._collectives is None or self._collectives.shared:
            addresses = [self._addresses(call, counts[call.rows]) for call in calls]
            call_list: CallList | SummedLists = CallList(self._pool, addresses, self._prefetches(calls))
        else:
            calls_and_sums = [
                self._sum(call, call.all_reduce) if call.all_reduce else self._addresses(call, counts[call.rows])
                for call in calls
            ]
            call_list = SummedLists(self._pool, calls_and_sums, self._collectives)
        self._lists[key] = call_list, np.array(numbers)
        if self._recorder:
            self._recorder.leave_out(time.perf_counter() - started)
        return self._lists[key]

    def _addresses(self, call: Call, rows: int) -> tuple[int, list[int]]:
        """The address of a call's function and those of its arguments."""
        if call.all_reduce:
            assert self._collectives and self._collectives.shared, "sums by messages are no calls"
            values, summed = self._pointer(call.args[0]), call.all_reduce
            count = self._inputs[call.rows].ctypes.data
            return self._shared_sum, [self._collectives.shared.address, values, count, summed.width, summed.stride]
        return self._kernels[call.kernel_for(rows)], [self._pointer(arg) for arg in call.args]

    def _prefetches(self, calls: list[Call]) -> list[tuple[int, int]]:
        """For each call the address and size of the weights to be fetched while it runs; size 0 for none."""
        sizes = self._weights.sizes
        return [(self._weights.address(name), sizes[name]) if name else (0, 0) for name in next_weights(calls, sizes)]

    def _sum(self, call: Call, summed: AllReduce) -> Sum:
        (argument,) = call.args
        assert isinstance(argument, Arena), "checked when the program was read"
        most = self.program.max_tokens if call.rows == "T" else self.program.max_rows
        memory = self._arena[argument.offset : argument.offset + 4 * summed.stride * most].view(np.float32)
        return Sum(memory.reshape(most, summed.stride), summed.width, self._inputs[call.rows])

    def _pointer(self, arg: Arg) -> int:
        match arg:
            case Arena(offset, _, _):
                return int(self._arena.ctypes.data) + offset
            case Weight(name):
                return self._weights.address(name)
            case Input(name):
                return int(self._inputs[name].ctypes.data)
            case KV():
                return int(self._kv.ctypes.data) + self.program.kv.part_offset(arg)
            case Scratch(offset, _):
                return int(self._scratch.ctypes.data) + offset
            case Adapter(target):
                assert self.adapters is not None, "no sequence has an adapter without slots"
                return self.adapters.address(target)


def next_weights(calls: Sequence[Call], sizes: Mapping[str, int]) -> list[str]:
    """For each call the tensor to fetch while it runs: the largest one read by the first of the later calls that reads at least
    `_PREFETCH_BYTES`. The calls of the next step follow the last one. "" for every call where no call reads that much."""
    largest = ["" if call.bytes < _PREFETCH_BYTES else _largest(call, sizes) for call in calls]
    following, names = next(filter(None, largest), ""), []
    for name in reversed(largest):
        names.append(following)
        following = name or following
    return names[::-1]


def _largest(call: Call, sizes: Mapping[str, int]) -> str:
    return max((arg.name for arg in call.args if isinstance(arg, Weight)), key=sizes.__getitem__)


def choose_isa(carried: tuple[str, ...], wanted: str | None = None) -> str:
    """The best instruction set that engine and host share, or `wanted` (else the environment's BELLE_ISA) if both have it.

    Raises an `EngineError` that says which of the two lacks it. AMX also needs Linux's permission, which is requested here.
    """
    wanted = wanted or os.environ.get("BELLE_ISA") or None
    offered = host.host_isas()
    if wanted is None:
        for isa in host.ISA_FLAGS:
            if isa in carried and isa in offered and (isa != "amx" or allow_amx()):
                return isa
        found = ", ".join(offered) or "none"
        expected = f"one of {', '.join(carried)}"
        raise EngineError("cpu", "this host has no instruction set of the engine", found=found, expected=expected)
    if wanted not in host.ISA_FLAGS:
        raise EngineError("cpu", "instruction set", found=wanted, expected=f"one of {', '.join(host.ISA_FLAGS)}")
    if wanted not in carried:
        remedy = "choose one of these or rebuild the engine"
        raise EngineError("cpu", f"the engine has no kernels for {wanted}", found=", ".join(carried), remedy=remedy)
    if wanted not in offered:
        missing = ", ".join(host.missing_flags(wanted))
        raise EngineError("cpu", f"this host lacks {wanted}", found=f"no {missing} among its CPU flags")
    if wanted == "amx" and not allow_amx():
        raise EngineError("cpu", "the operating system refuses AMX", remedy="use Linux 5.16 or newer, or isa avx512vnni")
    return wanted


def allow_amx() -> bool:
    """Request the tile registers from Linux (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA); return whether it grants them. Threads
    that are started later inherit the permission."""
    sys_arch_prctl, arch_req_xcomp_perm, xtiledata = 158, 0x1023, 18
    return int(ctypes.CDLL(None).syscall(sys_arch_prctl, arch_req_xcomp_perm, xtiledata)) == 0


def kv_blocks(program: Program, kv_memory: KvMemory, weight_bytes: int, ranks_here: int) -> int:
    """The number of blocks of the KV cache, by default what half of the memory beside the weights holds.

    The `ranks_here` ranks of this host share its memory evenly. Raises `EngineError` where the cache does not fit.
    """
    memory, most = host.memory_bytes() // ranks_here, program.max_sequences * program.max_blocks
    return kv_memory.blocks_beside_weights(
        "cpu", memory, weight_bytes, program.kv.block_bytes, context=program.max_context, most=most
    )


def _check_rank(program: Program, directory: Path, collectives: Collectives | None) -> None:
    """Raise `EngineError` where a program belongs to another rank than this process."""
    found, expected = (collectives.rank, collectives.ranks) if collectives else (0, 1), (program.rank, program.ranks)
    if found != expected:
        ranks = [f"rank {rank} of {count}" for rank, count in (found, expected)]
        raise EngineError("engine", f"program of {directory}", found=f"this process is {ranks[0]}", expected=ranks[1])


def allocate_inputs(program: Program) -> dict[str, NDArray[np.int32]]:
    """Int32 buffers for every input, 64-byte aligned, in one mapping."""
    sizes = dict.fromkeys(("token_ids", "positions", "sequences"), program.max_tokens) | {
        "block_table": program.max_sequences * program.max_blocks,
        "adapters": program.max_sequences,
        "adapted": 1 + BLOCK_ROWS * program.max_tokens,
        "logit_rows": program.max_rows,
        "T": 1,
        "R": 1,
    }
    padded = {name: -(-4 * size // ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}
    memory, offset = anonymous(sum(padded.values())), 0
    inputs: dict[str, NDArray[np.int32]] = {}
    for name, size in sizes.items():
        inputs[name] = memory[offset : offset + 4 * size].view(np.int32)
        offset += padded[name]
    inputs["adapters"][:] = NO_ADAPTER
    return inputs


def _row_bounds(calls: tuple[Call, ...], rows: str) -> list[int]:
    """The largest row count of each variant of a kernel, ascending, of calls over one kind of rows ("T" or "R")."""
    return sorted({bound for call in calls if call.rows == rows for bound, _ in call.kernels() if bound is not None})
