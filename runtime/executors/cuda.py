"""Runs a program on a GPU: kernels of one archive, weights in its memory, a recorded step for each size of batch."""

from __future__ import annotations

import contextlib
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.adapted import NO_LINEARS, AdaptedRows, is_needed
from belle_compile.runtime.executors.batch import NO_ADAPTER, StepBatch
from belle_compile.runtime.executors.candidate_logits import CandidateLogits
from belle_compile.runtime.executors.choices import Choices, measure
from belle_compile.runtime.executors.cuda_adapters import DeviceAdapterMemory
from belle_compile.runtime.executors.cuda_device import STAGE, open_device
from belle_compile.runtime.executors.device import Device, Function, Recorded
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.host import GPU_ARCHS, GPU_RESERVE_BYTES
from belle_compile.runtime.memory import WeightsFile
from belle_compile.runtime.program import (
    ALIGNMENT,
    BLOCK_ROWS,
    BLOCK_SIZE,
    CUBIN,
    KV,
    WEIGHTS_NAME,
    Adapter,
    Arena,
    Arg,
    Call,
    Input,
    Program,
    Scratch,
    Weight,
    When,
)
from belle_compile.runtime.program_json import check_seal, read_program
from belle_compile.runtime.serving.candidates import Row

if TYPE_CHECKING:
    from belle_compile.runtime.distributed.collectives import Collectives
    from belle_compile.runtime.profiling import Recorder

_MEASURED_CONTEXT = 512  # tokens of a sequence that attention is measured with
_MAX_RECORDED = 64  # recorded steps that are kept

# What a step is recorded for: tokens and logit rows, rounded up; whether some tokens are the only ones of their sequence, and
# whether some are not; and the linears that adapters change.
StepKey = tuple[int, int, bool, bool, frozenset[str]]


class CudaExecutor:
    """A program with its weights, arena and KV cache on one GPU.

    A step is recorded once for each power of two that its tokens and its logit rows fit, and for the sorts of tokens it has
    (`StepKey`). Kernels read the actual counts, so nothing is computed for rows that a batch lacks. Only those logits are
    copied to the host that the batch's `candidates` ask for.
    """

    threads = 1  # threads of the host, as a profile shows them

    def __init__(
        self,
        directory: Path,
        carried: Iterable[str],
        *,
        kv_memory: KvMemory | None = None,
        device: Device | None = None,
        number: int = 0,
        adapter_slots: int = 0,
    ) -> None:
        """Load `directory` (such as ENGINE/rank0) of an engine with kernels for the `carried` architectures, on `device`, by
        default the GPU with this number.

        The first load on a kind of GPU measures which kernels are fastest. A program of several ranks needs `join` before its
        first step. `adapter_slots` are for as many adapters, if the program takes any.
        """
        self.program = program = read_program(directory)
        if not program.launches or program.candidates is None:
            remedy = "rebuild the engine with belle-compile build"
            raise EngineError(STAGE, f"program of {directory}", found="one for CPUs", expected="one for GPUs", remedy=remedy)
        self._device = device or open_device(number)
        try:
            self._prepare(directory, tuple(carried), kv_memory or KvMemory(), adapter_slots)
        except BaseException:
            self._device.close()
            raise

    def _prepare(self, directory: Path, carried: tuple[str, ...], kv_memory: KvMemory, adapter_slots: int) -> None:
        program = self.program
        self.isa = choose_arch(carried, self._device)
        archive = directory / f"kernels-{self.isa}.zip"
        check_seal(directory, archive)
        self.vocab_size, self.kv_block_bytes = program.vocab_size, program.kv.block_bytes
        self.span, self.sums = (program.logits.first, program.logits.count), program.sums
        self._bandwidth = self._device.copy_bandwidth()  # now, while there is room for the copies
        weights = WeightsFile(directory / WEIGHTS_NAME)
        weights.require(program.weight_names(), program.weights_header)
        layout = program.adapters if adapter_slots else None
        adapter_bytes = adapter_slots * layout.slot_bytes if layout else 0
        self.num_blocks = kv_blocks(program, kv_memory, weights.total_bytes, self._device, adapter_bytes)

        self._weights = self._device.allocate(weights.total_bytes, "weights")
        self._device.upload(self._weights, weights.contents)
        self._places = {name: self._weights + weights.offset(name) for name in program.weight_names()}
        self._arena = self._device.allocate(program.arena_bytes, "activations")
        self._scratch = self._device.allocate(program.scratch_bytes, "activations")
        self._kv = self._device.allocate(self.num_blocks * program.kv.block_bytes, "the KV cache")
        self.adapters = DeviceAdapterMemory(layout, adapter_slots, self._device) if layout else None
        self._inputs = _Inputs(program, self._device)
        arrays = self._inputs.arrays
        self._adapted = AdaptedRows(self.adapters, arrays["adapted"]) if self.adapters else None
        self.batch = StepBatch(
            arrays["token_ids"], arrays["positions"], arrays["sequences"],
            arrays["block_table"].reshape(program.max_sequences, program.max_blocks),
            arrays["logit_rows"], arrays["candidates"], adapters=arrays["adapters"] if self.adapters else None,
        )  # fmt: skip
        self._candidates = CandidateLogits(program, self._device, self._arena)

        self._choices = Choices(directory, self._device)
        self._functions = self._load(archive)
        self._steps: OrderedDict[StepKey, Recorded] = OrderedDict()
        self._recorder: Recorder | None = None
        self._device.synchronize()
        measure(self._choices, program, self._device, self._functions.keys(), self._launch_as, self._pretend)
        self.kernels = f"{self.isa} choices {self._choices.digest}"

    def join(self, collectives: Collectives) -> None:
        """Connect to the GPUs of the other ranks."""
        self._device.enter()
        self._device.join(collectives)

    def step(self, batch: StepBatch) -> list[Row]:
        """Run `batch`; return the logits that its `candidates` request."""
        self._device.enter()  # engines run steps on a thread that did not load them
        tokens, rows = batch.tokens, batch.rows
        self._inputs.set_counts(tokens, rows)
        for source, destination in batch.copies:
            self._device.copy(self._block(destination), self._block(source), self.kv_block_bytes)
        changed = self._adapted.changed_linears(batch) if self._adapted else NO_LINEARS
        key = (bucket(tokens), bucket(rows), *_token_sorts(batch.sequences[:tokens]), changed)
        if self._recorder:
            self._run_timed(self._recorder, key)
        else:
            self._device.replay(self._recorded(key))
        self._device.synchronize()
        return self._candidates.read(rows)

    def record(self, recorder: Recorder | None) -> None:
        """Report every kernel call to `recorder` from the next step on; with None, stop. Steps that are timed are launched call
        by call, not replayed."""
        self._recorder = recorder

    def read_bandwidth(self) -> float:
        """Bytes a second that copies read and wrote when the engine was loaded."""
        return self._bandwidth

    def close(self) -> None:
        """Free the GPU's memory."""
        self._device.enter()
        self._steps.clear()
        self._functions.clear()
        for name in ("batch", "_inputs", "_candidates", "_adapted", "adapters"):  # arrays over memory that is freed now
            with contextlib.suppress(AttributeError):
                delattr(self, name)
        self._device.close()

    def _recorded(self, key: StepKey) -> Recorded:
        """The recorded step of these sizes. Of steps recorded earlier the `_MAX_RECORDED` that ran last are kept."""
        if key not in self._steps:
            if len(self._steps) >= _MAX_RECORDED:
                self._device.forget(self._steps.popitem(last=False)[1])
            self._steps[key] = self._device.record(lambda: self._enqueue_all(key))
        self._steps.move_to_end(key)
        return self._steps[key]

    def _load(self, path: Path) -> dict[str, Function]:
        """Load the kernels that steps run, by name, with all alternatives where it is not known yet which of them steps run.

        Nothing can be loaded while a step is recorded.
        """
        names = self.program.kernel_names()
        if self._choices.known(self.program):
            chosen = {self._choices.best(name, bound) for call in self.program.calls for bound, name in call.kernels()}
            names = tuple(sorted(chosen))
        # A kernel made for a GPU with more shared memory cannot run here, and is left out where it has an alternative.
        needed = {name for call in self.program.calls for _, name in call.kernels()}
        fitting = [name for name in names if self.program.launches[name].shared <= self._device.shared_bytes]
        if too_large := sorted(needed.intersection(names) - set(fitting)):
            shared = self.program.launches[too_large[0]].shared
            raise EngineError(
                STAGE, f"kernel {too_large[0]} on {self._device.name}",
                found=f"{self._device.shared_bytes} bytes of shared memory", expected=f"{shared}",
                remedy=f"rebuild the engine for {self._device.arch}",
            )  # fmt: skip
        with zipfile.ZipFile(path) as archive:
            return {name: self._device.load(name, archive.read(name + CUBIN), self.program.launches[name]) for name in fitting}

    def _enqueue(self, key: StepKey, mark: Callable[[], None]) -> list[int]:
        """Enqueue a step of these sizes, and call `mark` before its first kernel and after each; returns the calls' numbers in
        the program."""
        tokens, rows, alone, runs, changed = key
        counts, needed = {"T": tokens, "R": rows}, {"always": True, "adapted": True, "alone": alone, "runs": runs}
        self._inputs.upload(of_adapters=bool(changed))
        mark()
        numbers = []
        for number, call in enumerate(self.program.calls):
            if counts[call.rows] and needed[call.when] and is_needed(call, changed):
                self._launch(call, counts[call.rows])
                numbers.append(number)
                mark()
        if rows:
            self._candidates.download(rows)
        return numbers

    def _enqueue_all(self, key: StepKey) -> None:
        self._enqueue(key, lambda: None)

    def _run_timed(self, recorder: Recorder, key: StepKey) -> None:
        numbers: list[int] = []
        seconds = self._device.times(lambda mark: numbers.extend(self._enqueue(key, mark)))
        ends = np.cumsum([0.0, *seconds]) * 1e9
        recorder.walked(np.array(numbers), ends.astype(np.int64))

    def _pretend(self, when: When, rows: int) -> None:
        """Fill the inputs with `rows` tokens for kernels that are measured: one token each of many sequences for calls with
        when = "alone", else the tokens of one prompt. Keys and values are whatever the cache holds."""
        batch, tokens = self.batch, np.arange(rows, dtype=np.int32)
        alone = when == "alone"
        batch.positions[:rows] = min(_MEASURED_CONTEXT, batch.max_context) - 1 if alone else tokens % batch.max_context
        batch.sequences[:rows] = tokens % batch.max_sequences if alone else 0
        batch.block_table[:] = np.arange(batch.block_table.size).reshape(batch.block_table.shape) % self.num_blocks
        self._send_counts(rows, rows)

    def _send_counts(self, tokens: int, rows: int) -> None:
        self._inputs.set_counts(tokens, rows)
        self._inputs.upload()

    def _launch(self, call: Call, rows: int) -> None:
        if call.all_reduce:
            self._device.all_reduce(self._pointer(call.args[0]), rows * call.all_reduce.stride)
            return
        bound, name = next((bound, name) for bound, name in call.kernels() if bound is None or bound >= rows)
        self._launch_as(call, self._choices.best(name, bound), rows)

    def _launch_as(self, call: Call, name: str, rows: int) -> None:
        pointers = [self._pointer(arg) for arg in call.args]
        self._device.launch(self._functions[name], self.program.launches[name], rows, pointers)

    def _block(self, number: int) -> int:
        """The address of a block of the KV cache: keys and values of all layers side by side."""
        return self._kv + number * self.kv_block_bytes

    def _pointer(self, arg: Arg) -> int:
        match arg:
            case Arena(offset, _, _):
                return self._arena + offset
            case Weight(name):
                return self._places[name]
            case Input(name):
                return self._inputs.address(name)
            case Scratch(offset, _):
                return self._scratch + offset
            case KV():
                return self._kv + self.program.kv.part_offset(arg)
            case Adapter(target):
                assert self.adapters is not None, "no sequence has an adapter without slots"
                return self.adapters.address(target)


class _Inputs:
    """The inputs of a step, in one piece of pinned host memory that is copied to one piece of device memory."""

    def __init__(self, program: Program, device: Device) -> None:
        sizes = dict.fromkeys(("token_ids", "positions", "sequences"), program.max_tokens) | {
            "block_table": program.max_sequences * program.max_blocks,
            **dict.fromkeys(("logit_rows", "candidates"), program.max_rows),
            **dict.fromkeys(("T", "R"), 1),
        }
        of_adapters = {"adapters": program.max_sequences, "adapted": 1 + BLOCK_ROWS * program.max_tokens}
        self._offsets, self._plain_bytes = _placed(sizes, 0)
        end = self._plain_bytes
        if program.adapters:
            places, end = _placed(of_adapters, end)
            self._offsets |= places
        self._memory, self._device = device.host_memory(end), device
        self._base = device.allocate(end, "activations")
        sizes |= of_adapters
        self.arrays = {
            name: self._memory[offset : offset + 4 * sizes[name]].view(np.int32) for name, offset in self._offsets.items()
        }
        if program.adapters:
            self.arrays["adapters"][:] = NO_ADAPTER

    def address(self, name: str) -> int:
        """The address of an input on the device."""
        return self._base + self._offsets[name]

    def set_counts(self, tokens: int, rows: int) -> None:
        """Set the counts that kernels read as the number of their rows, from the next upload on."""
        self.arrays["T"][0], self.arrays["R"][0] = tokens, rows

    def upload(self, *, of_adapters: bool = False) -> None:
        """Enqueue the copy of all inputs to the device; those of adapters only if asked to."""
        self._device.upload(self._base, self._memory if of_adapters else self._memory[: self._plain_bytes])


def _placed(sizes: Mapping[str, int], start: int) -> tuple[dict[str, int], int]:
    """The byte at which each of some arrays of int32 begins, one after the other from `start` on, and where they end."""
    offsets = {}
    for name, size in sizes.items():
        offsets[name] = start
        start += -(-4 * size // ALIGNMENT) * ALIGNMENT
    return offsets, start


def bucket(count: int) -> int:
    """The least power of two that is at least `count`; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def _token_sorts(sequences: NDArray[np.int32]) -> tuple[bool, bool]:
    """Whether some tokens are the only ones of their sequence, and whether some are not; `sequences` [tokens]."""
    together = np.zeros(len(sequences) + 1, bool)  # whether token i is of the same sequence as the one before it
    together[1:-1] = sequences[1:] == sequences[:-1]
    in_runs = together[:-1] | together[1:]
    return not in_runs.all(), bool(in_runs.any())


def choose_arch(carried: tuple[str, ...], device: Device) -> str:
    """The newest architecture among those `carried` whose code the device runs: its own, or an older one of the same major
    version. Raises `EngineError` where there is none."""
    needed = device.arch
    fitting = [arch for arch in carried if arch in GPU_ARCHS and arch[:-1] == needed[:-1] and arch[-1] <= needed[-1]]
    if not fitting:
        expected, remedy = f"code for {needed}", f"rebuild the engine for this GPU ({device.name})"
        raise EngineError(STAGE, f"kernels for {device.name}", found=", ".join(carried), expected=expected, remedy=remedy)
    return max(fitting)


def kv_blocks(program: Program, kv_memory: KvMemory, weight_bytes: int, device: Device, adapter_bytes: int = 0) -> int:
    """The number of blocks of the KV cache, by default what the rest of the device's memory holds beside weights, slots of
    adapters and activations.

    Raises `EngineError` where the cache does not fit.
    """
    activations, block_bytes = program.arena_bytes + program.scratch_bytes, program.kv.block_bytes
    free = device.memory_bytes - weight_bytes - adapter_bytes - activations - GPU_RESERVE_BYTES
    if kv_memory == KvMemory():
        if free >= block_bytes:
            return min(free // block_bytes, program.max_sequences * program.max_blocks)
        kv_memory = KvMemory(tokens=BLOCK_SIZE)  # the least
    adapters = f", adapters ({adapter_bytes / 2**30:.2f} GiB)" if adapter_bytes else ""
    sizes = f"weights ({weight_bytes / 2**30:.2f} GiB){adapters} and activations ({activations / 2**30:.2f} GiB)"
    blocks = kv_memory.blocks(STAGE, free, f"{sizes} on {device.name}", block_bytes)
    assert blocks is not None, "a size is asked for"
    return blocks
