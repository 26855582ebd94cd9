"""Runs many sequences through a graph segment by segment, with one segment's weights in memory and activations on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import load_file, save_file

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.meanings import LIMITS
from belle_compile.compiler.ir.ops import attributes_of, is_float_linear, operand, spec_of
from belle_compile.compiler.ir.segments import Segment, cut
from belle_compile.compiler.ir.signature import Role
from belle_compile.compiler.ir.torch_meanings import MEANINGS, unsupported

Tensor = torch.Tensor
Weights = Mapping[ir.Value, Tensor]
# Callback invoked before each float linear with (node, its input [tokens, inputs]); returns the input that the linear reads.
OnLinear = Callable[[ir.Node, Tensor], Tensor]
# Callback invoked with the number of a sequence and its logits, float32 [tokens, vocabulary].
OnLogits = Callable[[int, Tensor], None]

BATCH_TOKENS = 2048


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
    """Runs sequences through a graph. Seam n is the values that cross from segment n - 1 into segment n, as files in `folder`.

    `forward(n, weights)` runs all batches through segment n, from seam n to seam n + 1, with the weights of `load(n)`, or with
    others in their place. It computes on a CUDA device where torch finds one, else on the CPU. Raises CompileError for a graph
    with ops that `torch_meanings` does not have, and for an empty sequence or none.
    """

    def __init__(
        self, model: ir.Model, sequences: Sequence[Sequence[int]], folder: Path, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        if unknown := unsupported([node.op_type for node in model.graph]):
            raise CompileError("calibrate", "the graph", found=f"op {', '.join(unknown)}", expected="a graph of float32 ops")
        if not sequences or not all(map(len, sequences)):
            raise CompileError("calibrate", "the sequences", found="none, or an empty one", expected="tokens in each")
        self.segments = cut(model.graph)
        self.batches = batches(sequences, batch_tokens)
        self.tokens = sum(map(len, sequences))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._folder, self._base = folder, folder

    def branch(self, folder: Path) -> ActivationStream:
        """Return a stream that writes seams to `folder`, and reads seams missing in it from the folder of this stream."""
        branched = copy(self)
        branched._folder = folder
        return branched

    def load(self, number: int) -> dict[ir.Value, Tensor]:
        """Read or compute the weights of a segment, as tensors on the stream's device."""
        return {value: _tensor(value).to(self.device) for value in self.segments[number].weights}

    def forward(
        self,
        number: int,
        weights: Weights,
        *,
        on_linear: OnLinear | None = None,
        on_logits: OnLogits | None = None,
        keep: bool = True,
    ) -> None:
        """Run all batches through a segment. With `keep` the next seam is written; the last segment calls `on_logits`."""
        segment = self.segments[number]
        last = number + 1 == len(self.segments)
        for index, batch in enumerate(self.batches):
            values = run(segment, weights, batch.inputs(self.device), self._read(number, index), on_linear)
            if last and on_logits is not None:
                rows = torch.split(values[segment.gives[0]].cpu(), list(batch.lengths))
                for sequence, logits in zip(batch.numbers, rows, strict=True):
                    on_logits(sequence, logits)
            elif keep and not last:
                self._write(number + 1, index, values)

    def logits(self, sequence: int, weights: Weights, on_linear: OnLinear | None = None) -> Tensor:
        """float32 [tokens, vocabulary]: the logits of the sequence with this number, from the seam of the last segment, whose
        `weights` these are."""
        last = len(self.segments) - 1
        index, batch = next((index, batch) for index, batch in enumerate(self.batches) if sequence in batch.numbers)
        values = run(self.segments[last], weights, batch.inputs(self.device), self._read(last, index), on_linear)
        rows = torch.split(values[self.segments[last].gives[0]].cpu(), list(batch.lengths))
        return rows[batch.numbers.index(sequence)]

    def drop(self, number: int) -> None:
        """Remove the files of a seam."""
        shutil.rmtree(self._seam(number), ignore_errors=True)

    def _seam(self, number: int) -> Path:
        return self._folder / f"seam-{number:04d}"

    def _read(self, number: int, index: int) -> dict[ir.Value, Tensor]:
        takes = self.segments[number].takes
        if not takes:
            return {}
        path = self._seam(number) / f"{index:05d}.safetensors"
        named = load_file(path if path.exists() else self._base / path.relative_to(self._folder))
        return {value: named[str(value.name)].to(self.device) for value in takes}

    def _write(self, number: int, index: int, values: Mapping[ir.Value, Tensor]) -> None:
        folder = self._seam(number)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {str(value.name): tensor.contiguous().cpu() for value, tensor in values.items()},
            folder / f"{index:05d}.safetensors",
        )


@torch.inference_mode()
def run(
    segment: Segment,
    weights: Weights,
    inputs: Mapping[str, Tensor | None],
    taken: Mapping[ir.Value, Tensor],
    on_linear: OnLinear | None = None,
) -> dict[ir.Value, Tensor]:
    """The values that a segment gives for a batch, from the step's `inputs` and the values `taken` from earlier segments."""
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
        if on_linear is not None and spec.is_float_linear:
            assert arguments[0] is not None
            arguments[0] = on_linear(node, arguments[0])
        options = {name: value for name, value in attributes_of(node).items() if name in spec.meaningful}
        produced = MEANINGS[node.op_type](*arguments, **options)
        values.update(zip(node.outputs, produced if isinstance(produced, tuple) else (produced,), strict=True))
        for value in {value for value in node.inputs if value in values}:
            if last_use[value] == i and value not in segment.gives:
                del values[value]
    return {value: values[value] for value in segment.gives}


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
