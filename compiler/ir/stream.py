"""Runs many sequences through a graph segment by segment, with one segment's weights in memory and activations on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.activation_files import ActivationFiles
from belle_compile.compiler.ir.meanings import LIMITS
from belle_compile.compiler.ir.ops import attributes_of, is_float_linear, operand, spec_of
from belle_compile.compiler.ir.segments import Segment, cut
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.ir.torch_meanings import MEANINGS, coarse_linear, multiplies_bfloat16, unsupported
from belle_compile.compiler.ir.workers import T, in_order

Tensor = torch.Tensor
Weights = Mapping[ir.Value, Tensor]
# Callback invoked before each float linear with (node, its input [tokens, inputs]); returns the input that the linear reads.
OnLinear = Callable[[ir.Node, Tensor], Tensor]
# Callback invoked after each float linear with (node, its input [tokens, inputs], its output [tokens, outputs]).
OnOutput = Callable[[ir.Node, Tensor, Tensor], None]
# Callback invoked with the number of a sequence and its logits, float32 [tokens, vocabulary].
OnLogits = Callable[[int, Tensor], None]

BATCH_TOKENS = 2048
_AT_ONCE_BYTES = 1 << 30  # for batches that run at the same time


@dataclass(frozen=True)
class Batch:
    """Whole sequences that run together: their numbers and lengths, and the step inputs that they make."""

    numbers: tuple[int, ...]
    lengths: tuple[int, ...]
    token_ids: Tensor
    positions: Tensor
    sequences: Tensor

    @classmethod
    def of(cls, numbers: Sequence[int], sequences: Sequence[Sequence[int]]) -> Batch:
        """The batch of the sequences with these numbers."""
        lengths = tuple(len(sequences[number]) for number in numbers)
        ids = torch.tensor([token for number in numbers for token in sequences[number]], dtype=torch.int32)
        positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
        rows = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
        return cls(tuple(numbers), lengths, ids, positions, rows)

    def inputs(self, device: torch.device) -> dict[str, Tensor | None]:
        """The step inputs by name; logits are computed for all tokens."""
        rows = torch.arange(len(self.token_ids), dtype=torch.int32)
        given = {"token_ids": self.token_ids, "positions": self.positions, "sequences": self.sequences, "logit_rows": rows}
        return {name: tensor.to(device) for name, tensor in given.items()} | {"block_table": None}


def batches(sequences: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS) -> tuple[Batch, ...]:
    """Group sequences of similar length into batches of at most `batch_tokens` tokens; a longer sequence has its own batch."""
    order = sorted(range(len(sequences)), key=lambda number: (len(sequences[number]), number))
    groups: list[list[int]] = []
    room = 0
    for number in order:
        if not groups or len(sequences[number]) > room:
            groups.append([])
            room = batch_tokens
        groups[-1].append(number)
        room -= len(sequences[number])
    return tuple(Batch.of(group, sequences) for group in groups)


class ActivationStream:
    """Runs sequences through a graph. The values that cross from one segment into later ones are files in `folder`.

    `forward(n, weights)` runs all batches through segment n, with the weights of `load(n)`, or with others in their place, and
    writes the values that the segment computes for later ones. Segments are those of `cut`, unless others are given. It
    computes on a CUDA device where torch finds one, else on the `cores` of the CPU that torch uses. Raises CompileError for a
    graph with ops that `torch_meanings` does not have, and for an empty sequence or none.
    """

    def __init__(
        self,
        model: ir.Model,
        sequences: Sequence[Sequence[int]],
        folder: Path,
        batch_tokens: int = BATCH_TOKENS,
        segments: list[Segment] | None = None,
    ) -> None:
        if unknown := unsupported([node.op_type for node in model.graph]):
            raise CompileError("calibrate", "the graph", found=f"op {', '.join(unknown)}", expected="a graph of float32 ops")
        if not sequences or not all(map(len, sequences)):
            raise CompileError("calibrate", "the sequences", found="none, or an empty one", expected="tokens in each")
        self.segments = cut(model.graph) if segments is None else segments
        crossing = dict.fromkeys(value for segment in self.segments[:-1] for value in segment.gives)
        self._numbers = {value: number for number, value in enumerate(crossing)}
        self.batches = batches(sequences, batch_tokens)
        self.tokens = sum(map(len, sequences))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cores = torch.get_num_threads()
        self._files = ActivationFiles(folder)
        self._ahead: dict[int, Future[dict[ir.Value, Tensor]]] = {}

    def branch(self, folder: Path) -> ActivationStream:
        """Return a stream that writes values to `folder`, and reads those missing in it from the folder of this stream."""
        branched = copy(self)
        branched._files = ActivationFiles(folder, self._files)
        return branched

    def load(self, number: int) -> dict[ir.Value, Tensor]:
        """Read or compute the weights of a segment, as tensors on the stream's device."""
        ahead = self._ahead.pop(number, None)
        return self._load(number) if ahead is None else ahead.result()

    def _load(self, number: int) -> dict[ir.Value, Tensor]:
        return {value: _tensor(value).to(self.device) for value in self.segments[number].weights}

    def load_ahead(self, number: int) -> None:
        """Begin to read the weights that `load` returns next on another thread, if there is such a segment."""
        if number < len(self.segments):
            with_one = ThreadPoolExecutor(1)
            self._ahead[number] = with_one.submit(self._load, number)
            with_one.shutdown(wait=False)

    def forward(
        self,
        number: int,
        weights: Weights,
        *,
        on_linear: OnLinear | None = None,
        on_output: OnOutput | None = None,
        on_logits: OnLogits | None = None,
    ) -> None:
        """Run all batches through a segment, and write what it gives; the last segment calls `on_logits` instead.

        `on_linear` and `on_logits` are called batch by batch on this thread. Without `on_linear`, segments before the last run
        several batches at a time, each of which calls `on_output` on its own thread."""
        segment = self.segments[number]
        last = number + 1 == len(self.segments)

        def run_batch(index: int) -> dict[ir.Value, Tensor]:
            inputs, taken = self.batches[index].inputs(self.device), self._read(number, index)
            values = run(segment, weights, inputs, taken, on_linear, on_output=on_output)
            if not last:
                self._write(index, {value: tensor for value, tensor in values.items() if value not in segment.takes})
            return values if last else {}

        if not last and on_linear is None:
            deque(self._each_batch(number, weights, run_batch), maxlen=0)
            return
        for index, batch in enumerate(self.batches):
            values = run_batch(index)
            if last and on_logits is not None:
                rows = torch.split(values[segment.gives[0]].cpu(), list(batch.lengths))
                for sequence, logits in zip(batch.numbers, rows, strict=True):
                    on_logits(sequence, logits)

    def observe(self, number: int, weights: Weights, linear: ir.Node, observation: Callable[[Tensor], T]) -> Iterator[T]:
        """Run all batches through a segment as far as a linear; yields the `observation` of what it reads [tokens, inputs] for
        each batch, in order. Observations are made on several threads at a time. Nothing is written."""

        def run_batch(index: int) -> T:
            inputs, taken = self.batches[index].inputs(self.device), self._read(number, index)
            (x,) = run(self.segments[number], weights, inputs, taken, until=linear).values()
            with torch.inference_mode():
                return observation(x)

        return self._each_batch(number, weights, run_batch)

    def _each_batch(self, number: int, weights: Weights, run_batch: Callable[[int], T]) -> Iterator[T]:
        """Yield `run_batch` of the number of each batch, in order; on a CPU, as many run at once as `_AT_ONCE_BYTES` allow."""
        width = _width(self.segments[number], weights)
        needed = 16 * width * max(len(batch.token_ids) for batch in self.batches) + 4 * width * width
        workers = min(self.cores, max(1, _AT_ONCE_BYTES // needed)) if self.device.type == "cpu" else 1
        return in_order(run_batch, len(self.batches), workers, self.cores)

    def coarse(self, number: int, weights: Weights) -> Weights:
        """The weights with those of linears rounded to bfloat16, where the device multiplies these faster than float32. Such
        products are precise enough to observe activations by, and to compute what a model predicts they are not."""
        if not multiplies_bfloat16(self.device):
            return weights
        rounded = {operand(node, Role.WEIGHT) for node in linears(self.segments[number])}
        return {value: tensor.bfloat16() if value in rounded else tensor for value, tensor in weights.items()}

    def logits(self, sequence: int, weights: Weights, on_linear: OnLinear | None = None) -> Tensor:
        """float32 [tokens, vocabulary]: the logits of the sequence with this number, from what the last segment takes,
        whose `weights` these are."""
        last = len(self.segments) - 1
        index, batch = next((index, batch) for index, batch in enumerate(self.batches) if sequence in batch.numbers)
        values = run(self.segments[last], weights, batch.inputs(self.device), self._read(last, index), on_linear)
        rows = torch.split(values[self.segments[last].gives[0]].cpu(), list(batch.lengths))
        return rows[batch.numbers.index(sequence)]

    def drop(self, number: int) -> None:
        """Remove the values that this segment takes and none after it. Their files are kept for values that are written later,
        until the last segment is dropped."""
        segment = self.segments[number]
        for value in segment.takes:
            if value not in segment.gives:
                for index in range(len(self.batches)):
                    self._files.release(self._name(value, index))
        if number + 1 == len(self.segments):
            self._files.remove_released()

    def _name(self, value: ir.Value, index: int) -> str:
        return f"value-{self._numbers[value]:05d}-{index:05d}"

    def _read(self, number: int, index: int) -> dict[ir.Value, Tensor]:
        takes = self.segments[number].takes
        return {value: self._files.read(self._name(value, index)).to(self.device) for value in takes}

    def _write(self, index: int, values: Mapping[ir.Value, Tensor]) -> None:
        for value, tensor in values.items():
            self._files.write(self._name(value, index), tensor.cpu())


@torch.inference_mode()
def run(
    segment: Segment,
    weights: Weights,
    inputs: Mapping[str, Tensor | None],
    taken: Mapping[ir.Value, Tensor],
    on_linear: OnLinear | None = None,
    *,
    on_output: OnOutput | None = None,
    until: ir.Node | None = None,
) -> dict[ir.Value, Tensor]:
    """The values that a segment gives for a batch, from the step's `inputs` and the values `taken` from earlier segments.

    With `until`, a linear, the run ends before it is computed, with the one value that it reads. Linears with bfloat16 weights
    are coarse.
    """
    values: dict[ir.Value, Tensor] = dict(taken)
    last_use = {value: i for i, node in enumerate(segment.nodes) for value in node.inputs if value is not None}

    def read(value: ir.Value | None) -> Tensor | None:
        if value is None:
            return None
        if value in weights:
            return weights[value]
        return inputs[str(value.name)] if value.is_graph_input() else values[value]

    for i, node in enumerate(segment.nodes):
        spec = spec_of(node)
        arguments = [read(value) for value in node.inputs]
        arguments += [None] * (len(spec.inputs) - len(arguments))
        if node is until:
            assert node.inputs[0] is not None and arguments[0] is not None
            return {node.inputs[0]: arguments[0]}
        if on_linear is not None and spec.is_float_linear:
            assert arguments[0] is not None
            arguments[0] = on_linear(node, arguments[0])
        produced = _meaning(node, arguments)(*arguments, **_options(node))
        if on_output is not None and spec.is_float_linear:
            assert arguments[0] is not None
            on_output(node, arguments[0], produced)
        values.update(zip(node.outputs, produced if isinstance(produced, tuple) else (produced,), strict=True))
        for value in {value for value in node.inputs if value in values}:
            if last_use[value] == i and value not in segment.gives:
                del values[value]
    return {value: values[value] for value in segment.gives}


def _width(segment: Segment, weights: Weights) -> int:
    """The inputs and outputs of the widest linear of a segment."""
    return max((sum(weights[value].shape) for node in linears(segment) if (value := operand(node, Role.WEIGHT))), default=0)


def _meaning(node: ir.Node, arguments: Sequence[Tensor | None]) -> Callable[..., Any]:
    """The function that computes a node; for a linear with a bfloat16 weight, the coarse one."""
    coarse = is_float_linear(node) and any(tensor is not None and tensor.dtype == torch.bfloat16 for tensor in arguments)
    return coarse_linear if coarse else MEANINGS[node.op_type]


def _options(node: ir.Node) -> dict[str, Any]:
    meaningful = spec_of(node).meaningful
    return {name: value for name, value in attributes_of(node).items() if name in meaningful}


def quantized(x: Tensor, bits: int) -> Tensor:
    """x [rows, width] after rounding to integers of `bits` bits with one scale per row, as float32."""
    limit = LIMITS[bits]
    absmax = x.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(absmax > 0, limit / absmax, 0.0)
    return torch.round(x * inverse) * (absmax / limit)


def rounded_blocks(x: Tensor, block: int) -> Tensor:
    """x [rows, width] after rounding each `block` of neighbours to INT8 with a float16 scale, as float32; a last block may be
    shorter. llama.cpp rounds activations so."""
    width = x.shape[1]
    blocks = torch.nn.functional.pad(x, (0, -width % block)).view(len(x), -1, block)
    scales = (blocks.abs().amax(dim=-1, keepdim=True) / LIMITS[8]).half().float()
    integers = torch.round(blocks / torch.where(scales > 0, scales, 1))
    return (integers * scales).view(len(x), -1)[:, :width]


def linears(segment: Segment) -> Iterator[ir.Node]:
    """The float linears of a segment whose weights are known."""
    for node in segment.nodes:
        weight = operand(node, Role.WEIGHT) if is_float_linear(node) else None
        if weight is not None and weight.is_initializer():
            yield node


def _tensor(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    array = value.const_value.numpy()
    return torch.from_numpy(array if array.flags.writeable else array.copy())
