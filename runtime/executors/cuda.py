"""Runs a Program on a GPU: kernels of one archive, weights in its memory, a recorded step for each size of batch."""

from __future__ import annotations

import contextlib
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.base import StepBatch
from belle_compile.runtime.executors.choices import Choices, measure
from belle_compile.runtime.executors.cuda_device import STAGE, open_device
from belle_compile.runtime.executors.device import Device, Function, Recorded
from belle_compile.runtime.executors.found import FoundLogits
from belle_compile.runtime.host import GPU_ARCHS, GPU_RESERVE_BYTES
from belle_compile.runtime.memory import WeightsFile
from belle_compile.runtime.program import (
    ALIGNMENT,
    CUBIN,
    KV,
    Arena,
    Arg,
    Call,
    Input,
    Program,
    Scratch,
    Weight,
    When,
    read_program,
)
from belle_compile.runtime.serving.candidates import Row
from belle_compile.runtime.serving.kv_blocks import blocks_for

if TYPE_CHECKING:
    from belle_compile.runtime.distributed.collectives import Collectives
    from belle_compile.runtime.profiling import Recorder

WEIGHTS_NAME = "weights.safetensors"
_SPARE = GPU_RESERVE_BYTES  # of a GPU's memory, left to the driver, the code and recorded steps
_CONTEXT = 512  # tokens of a sequence that attention is measured with
_STEPS = 64  # recorded at the same time


class CudaExecutor:
    """A program with its weights, arena and KV cache on one GPU.

    A step is recorded once for each power of two that its tokens and rows of logits fit, for the sorts of tokens it has:
    kernels read the real counts, so nothing is computed for what a batch lacks. Those logits come back that sampling asks for.
    """

    threads = 1

    def __init__(
        self,
        directory: Path,
        carried: Iterable[str],
        *,
        kv_tokens: int | None = None,
        device: Device | None = None,
        number: int = 0,
    ) -> None:
        """Load `directory` (rank0), whose engine carries kernels for the `carried` architectures, on `device`, by default the
        GPU of that number. The first load on a kind of GPU measures which kernels are the fastest. A program of several ranks
        needs `join` before its first step."""
        self.program = program = read_program(directory)
        if not program.launches or program.candidates is None:
            remedy = "rebuild the engine with belle-compile build"
            raise EngineError(STAGE, f"program of {directory}", found="one for CPUs", expected="one for GPUs", remedy=remedy)
        self._device = device or open_device(number)
        try:
            self._prepare(directory, tuple(carried), kv_tokens)
        except BaseException:
            self._device.close()
            raise

    def _prepare(self, directory: Path, carried: tuple[str, ...], kv_tokens: int | None) -> None:
        program = self.program
        self.isa = choose_arch(carried, self._device)
        self.vocab_size, self.kv_block_bytes = program.vocab_size, program.kv.block_bytes
        self.span, self.sums = (program.logits.first, program.logits.count), program.sums
        self._bandwidth = self._device.copy_bandwidth()  # now, while there is room for the copies
        weights = WeightsFile(directory / WEIGHTS_NAME)
        weights.require(program.weight_names())
        self.num_blocks = _kv_blocks(program, kv_tokens, weights.total_bytes, self._device)

        self._weights = self._device.allocate(weights.total_bytes, "weights")
        self._device.upload(self._weights, weights.contents)
        self._places = {name: self._weights + weights.offset(name) for name in program.weight_names()}
        self._arena = self._device.allocate(program.arena_bytes, "activations")
        self._scratch = self._device.allocate(program.scratch_bytes, "activations")
        self._kv = self._device.allocate(self.num_blocks * program.kv.block_bytes, "the KV cache")
        self._inputs = _Inputs(program, self._device)
        named = self._inputs.arrays
        self.batch = StepBatch(
            named["token_ids"], named["positions"], named["sequences"],
            named["block_table"].reshape(program.max_sequences, program.max_blocks), named["logit_rows"], named["candidates"],
        )  # fmt: skip
        self._found = FoundLogits(program, self._device, self._arena)

        self._choices = Choices(directory, self._device)
        self._functions = self._load(directory / f"kernels-{self.isa}.zip")
        self._steps: OrderedDict[tuple[int, int, bool, bool], Recorded] = OrderedDict()
        self._recorder: Recorder | None = None
        self._device.synchronize()
        measure(self._choices, program, self._device, self._functions.keys(), self._launch_as, self._pretend)

    def join(self, collectives: Collectives) -> None:
        """Find the GPUs of the other ranks; all ranks call it."""
        self._device.enter()
        self._device.join(collectives)

    def step(self, batch: StepBatch) -> list[Row]:
        """Run `batch`; the logits that its `candidates` ask for."""
        self._device.enter()  # engines run steps on a thread that did not load them
        tokens, rows = batch.tokens, batch.rows
        self._inputs.set_counts(tokens, rows)
        key = (bucket(tokens), bucket(rows), *_sorts(batch.sequences[:tokens]))
        if self._recorder:
            self._run_timed(self._recorder, key)
        else:
            self._device.replay(self._recorded(key))
        self._device.synchronize()
        return self._found.read(rows)

    def record(self, recorder: Recorder | None) -> None:
        """Time every kernel call from the next step on, or stop doing so. Steps that are timed are not replayed as one."""
        self._recorder = recorder

    def seconds_of(self, calls: Sequence[Call], rows: int, times: int = 5) -> float:
        """The least time of calls one after the other for so many rows, by the device's clock; what they write is garbage."""
        counts = {"T": min(rows, self.program.max_tokens), "R": min(rows, self.program.max_rows)}
        self._device.enter()
        self._send_counts(counts["T"], counts["R"])

        def launch() -> None:
            for call in calls:
                self._launch(call, counts[call.rows])

        recorded = self._device.record(launch)

        def run(mark: Callable[[], None]) -> None:
            for _ in range(times):
                mark()
                self._device.replay(recorded)
            mark()

        seconds = min(self._device.times(run))
        self._device.forget(recorded)
        return seconds

    def overlap(self, allowed: bool) -> None:
        """Whether kernels may start before those before them have ended, from the next step on: for whoever measures it."""
        self._device.enter()
        for recorded in self._steps.values():
            self._device.forget(recorded)
        self._steps.clear()
        self._device.overlap = allowed

    def read_bandwidth(self) -> float:
        """Bytes a second that memory gave when the engine was loaded: read and written by copies."""
        return self._bandwidth

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._device.enter()
        self._steps.clear()
        self._functions.clear()
        for name in ("batch", "_inputs", "_found"):  # what shows memory that goes now
            with contextlib.suppress(AttributeError):
                delattr(self, name)
        self._device.close()

    def _recorded(self, key: tuple[int, int, bool, bool]) -> Recorded:
        """The step of these sizes, recorded where it is not among those run last."""
        if key not in self._steps:
            if len(self._steps) >= _STEPS:
                self._device.forget(self._steps.popitem(last=False)[1])
            self._steps[key] = self._device.record(lambda: self._ask(key))
        self._steps.move_to_end(key)
        return self._steps[key]

    def _load(self, path: Path) -> dict[str, Function]:
        """The kernels that steps run; all of them where it is to be measured which these are. Nothing is loaded while a step is
        recorded."""
        names = self.program.kernel_names()
        if self._choices.known(self.program):
            chosen = {self._choices.best(name, bound) for call in self.program.calls for bound, name in call.kernels()}
            names = tuple(sorted(chosen))
        # Made for a GPU of more shared memory, what cannot run here is left out where there is another choice.
        needed = {name for call in self.program.calls for _, name in call.kernels()}
        fitting = [name for name in names if self.program.launches[name].shared <= self._device.shared_bytes]
        if lacking := sorted(needed.intersection(names) - set(fitting)):
            shared = self.program.launches[lacking[0]].shared
            raise EngineError(
                STAGE, f"kernel {lacking[0]} on {self._device.name}",
                found=f"{self._device.shared_bytes} bytes of shared memory", expected=f"{shared}",
                remedy=f"rebuild the engine for {self._device.arch}",
            )  # fmt: skip
        with zipfile.ZipFile(path) as archive:
            return {name: self._device.load(name, archive.read(name + CUBIN), self.program.launches[name]) for name in fitting}

    def _run(self, key: tuple[int, int, bool, bool], mark: Callable[[], None]) -> list[int]:
        """Ask the device for a step of these sizes, and call `mark` before the first kernel and after each; returns the numbers
        of the calls."""
        tokens, rows, alone, runs = key
        counts, wanted = {"T": tokens, "R": rows}, {"always": True, "alone": alone, "runs": runs}
        self._inputs.upload()
        mark()
        numbers = []
        for number, call in enumerate(self.program.calls):
            if counts[call.rows] and wanted[call.when]:
                self._launch(call, counts[call.rows])
                numbers.append(number)
                mark()
        if rows:
            self._found.download(rows)
        return numbers

    def _ask(self, key: tuple[int, int, bool, bool]) -> None:
        self._run(key, lambda: None)

    def _run_timed(self, recorder: Recorder, key: tuple[int, int, bool, bool]) -> None:
        numbers: list[int] = []
        seconds = self._device.times(lambda mark: numbers.extend(self._run(key, mark)))
        ends = np.cumsum([0.0, *seconds]) * 1e9
        recorder.walked(np.array(numbers), ends.astype(np.int64))

    def _pretend(self, when: When, rows: int) -> None:
        """So many rows for kernels that are measured: a prompt for attention, or one token of each of many sequences. Keys and
        values are what the cache holds."""
        batch, tokens = self.batch, np.arange(rows, dtype=np.int32)
        alone = when == "alone"
        batch.positions[:rows] = min(_CONTEXT, batch.max_context) - 1 if alone else tokens % batch.max_context
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

    def _pointer(self, arg: Arg) -> int:
        match arg:
            case Arena(offset):
                return self._arena + offset
            case Weight(name):
                return self._places[name]
            case Input(name):
                return self._inputs.address(name)
            case Scratch(offset):
                return self._scratch + offset
            case KV():
                return self._kv + self.program.kv.part_offset(arg)


class _Inputs:
    """The inputs of a step: one piece of pinned memory, and one of the device that it is copied to."""

    def __init__(self, program: Program, device: Device) -> None:
        sizes = dict.fromkeys(("token_ids", "positions", "sequences"), program.max_tokens) | {
            "block_table": program.max_sequences * program.max_blocks,
            **dict.fromkeys(("logit_rows", "candidates"), program.max_rows),
            **dict.fromkeys(("T", "R"), 1),
        }
        self._offsets: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self._offsets[name] = end
            end += -(-4 * size // ALIGNMENT) * ALIGNMENT
        self._memory, self._device = device.host_memory(end), device
        self._base = device.allocate(end, "activations")
        self.arrays = {
            name: self._memory[offset : offset + 4 * sizes[name]].view(np.int32) for name, offset in self._offsets.items()
        }

    def address(self, name: str) -> int:
        """Where an input lies on the device."""
        return self._base + self._offsets[name]

    def set_counts(self, tokens: int, rows: int) -> None:
        """What kernels read as the number of their rows, from the next upload on."""
        self.arrays["T"][0], self.arrays["R"][0] = tokens, rows

    def upload(self) -> None:
        """Copy all inputs."""
        self._device.upload(self._base, self._memory)


def bucket(count: int) -> int:
    """The least power of two that holds `count`; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def _sorts(sequences: NDArray[np.int32]) -> tuple[bool, bool]:
    """Whether there are tokens without, and with, a neighbour of their own sequence."""
    together = np.zeros(len(sequences) + 1, bool)  # whether token i goes with the one before
    together[1:-1] = sequences[1:] == sequences[:-1]
    in_runs = together[:-1] | together[1:]
    return not in_runs.all(), bool(in_runs.any())


def choose_arch(carried: tuple[str, ...], device: Device) -> str:
    """The architecture of the engine whose code the device runs: its own, or an older one of the same major version."""
    own = device.arch
    fitting = [arch for arch in carried if arch in GPU_ARCHS and arch[:-1] == own[:-1] and arch[-1] <= own[-1]]
    if not fitting:
        expected, remedy = f"code for {own}", f"rebuild the engine for this GPU ({device.name})"
        raise EngineError(STAGE, f"kernels for {device.name}", found=", ".join(carried), expected=expected, remedy=remedy)
    return max(fitting)


def _kv_blocks(program: Program, kv_tokens: int | None, weight_bytes: int, device: Device) -> int:
    """Blocks of the KV cache: for `kv_tokens`, else what is left of the device's memory."""
    left = device.memory_bytes - weight_bytes - program.arena_bytes - program.scratch_bytes - _SPARE
    most = left // program.kv.block_bytes
    wanted = blocks_for(kv_tokens) if kv_tokens is not None else min(most, program.max_sequences * program.max_blocks)
    if (kv_tokens is not None and kv_tokens < 1) or wanted > most or most < 1:
        parts = {"weights": weight_bytes, "activations": program.arena_bytes + program.scratch_bytes}
        needed = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in parts.items())
        found = f"{device.memory_bytes / 2**30:.2f} GiB free"
        what = f"memory of {device.name} for {kv_tokens if kv_tokens is not None else 16} tokens"
        block = program.kv.block_bytes / 2**20
        raise EngineError(
            STAGE, what, found=found, expected=f"{needed}, and {block:.2f} MiB for every 16 tokens",
            remedy="load with fewer kv_tokens, or use a larger GPU",
        )  # fmt: skip
    return wanted
