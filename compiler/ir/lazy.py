"""Weights that are computed only when they are read; each records the steps by which it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir import basis
from belle_compile.compiler.ir.quantized import QuantizedTensor
from belle_compile.compiler.ir.read_cache import Kind, ReadCache

Array = npt.NDArray[Any]
Rows = Callable[[int, int], Array]
_PIECES, _ROWS, _STEP, _QUANTIZED = "pieces", "rows", "step", "quantized"  # keys in a tensor's meta

# The bound has room for the largest result of the models compiled here, the INT8 table of BLOOM-7B with 1.03 GB, twice: once as
# a computed result, and once as the whole tensor that ranks take their parts of.
_READS = ReadCache(bound=2 << 30)


@dataclass(frozen=True)
class _Step:
    """How a tensor is computed: the step's `name` ("" where values are read unchanged), and its `sources`, which are tensors or
    text that names a place in a file."""

    name: str
    sources: tuple[ir.TensorProtocol | str, ...]


class WeightError(CompileError):
    """An error while a lazy tensor was computed. Its message ends with the steps: "w.int8 <- rotated <- w.safetensors: w"."""

    def __init__(self, error: CompileError, tensor: ir.TensorProtocol) -> None:
        super().__init__(
            error.stage, error.what, found=error.found, expected=error.expected, remedy=error.remedy, node=error.node
        )
        step = _step_of(tensor)
        earlier_steps: str = error.steps if isinstance(error, WeightError) else _steps_below(tensor)
        self.steps: str = " <- ".join(filter(None, [step.name, earlier_steps]))
        self.chain = " <- ".join(filter(None, [str(tensor.name), earlier_steps]))
        self.args = (f"{str(self).removesuffix('.')}; while computing {self.chain}.",)


def lazy(
    name: str,
    compute: Callable[[], Array],
    shape: Sequence[int],
    dtype: ir.DataType | npt.DTypeLike,
    rows: Rows | None = None,
    *,
    step: str = "",
    sources: Sequence[ir.TensorProtocol | str] = (),
    quantized: QuantizedTensor | None = None,
    basis_of: ir.TensorProtocol | None = None,
) -> ir.LazyTensor:
    """Make a tensor whose values `compute` returns at every read; they are kept in memory only inside of `keeping`.

    `rows(start, stop)`, where it is given, computes these rows alone; see `read_rows`. `step` names what `compute` does to its
    `sources`, which are tensors, or text that says where in a file the values lie: `describe` and errors show both. `quantized`
    is given where the values are exactly those of a checkpoint's integers.

    `basis_of` is the tensor whose changes of basis the new one has; without it, those of a tensor that is computed from
    others are not known until they are recorded (see `basis.changes_of`).

    A read raises CompileError where the result has another shape or dtype than announced. A CompileError of `compute` becomes a
    WeightError.
    """
    element = dtype if isinstance(dtype, ir.DataType) else ir.DataType.from_numpy(np.dtype(dtype))
    expected = f"{element.numpy()}{list(shape)}"
    key = object()

    def values() -> Array:
        array = compute()
        found = f"{array.dtype}{list(array.shape)}"
        if found != expected:
            raise CompileError("weights", f"tensor {name}", found=found, expected=expected)
        return np.ascontiguousarray(array)

    def read() -> ir.Tensor[Array]:
        with errors_about(tensor):
            (array,) = _READS.read(Kind.TENSOR, key, lambda: (values(),))
        return ir.Tensor(array, dtype=element, name=name)

    tensor = ir.LazyTensor(read, dtype=element, shape=ir.Shape(shape), name=name)
    tensor.meta[_STEP] = _Step(step, tuple(sources))
    if basis_of is not None or any(not isinstance(source, str) for source in sources):
        basis.record(tensor, None if basis_of is None else basis.changes_of(basis_of))
    if rows is not None:
        tensor.meta[_ROWS] = rows
    if quantized is not None:
        tensor.meta[_QUANTIZED] = quantized
    return tensor


def describe(tensor: ir.TensorProtocol) -> str:
    """The tensor's name and the steps by which it is computed, back to files.

    For example "q.weight.rotated.int8 <- rotated <- model-00001-of-00002.safetensors: q.weight". Several sources of a step
    stand in parentheses: "q+k.int8 <- (int8 <- model.safetensors: q; int8 <- model.safetensors: k)".
    """
    return " <- ".join(filter(None, [str(tensor.name), _steps_below(tensor)]))


def _steps_below(tensor: ir.TensorProtocol) -> str:
    texts = [source if isinstance(source, str) else _steps_from(source) for source in _step_of(tensor).sources]
    return f"({'; '.join(texts)})" if len(texts) > 1 else "".join(texts)


def _steps_from(tensor: ir.TensorProtocol) -> str:
    """A source as `describe` shows it: by its step, since its name stands at the chain's end; a constant by its name."""
    texts = [_step_of(tensor).name, _steps_below(tensor)]
    return " <- ".join(filter(None, texts)) or str(tensor.name)


def _step_of(tensor: ir.TensorProtocol) -> _Step:
    step: _Step = tensor.meta.get(_STEP, _Step("", ()))
    pieces = tuple(piece.tensor for piece in pieces_of(tensor))
    return step if step.sources or not pieces else _Step(step.name, pieces)


@contextmanager
def errors_about(tensor: ir.TensorProtocol) -> Iterator[None]:
    """Errors raised inside become WeightErrors, which say by which steps this tensor was computed."""
    try:
        yield
    except CompileError as error:
        raise WeightError(error, tensor) from error


def quantized_source(value: ir.Value) -> QuantizedTensor | None:
    """The integers that a checkpoint holds for an initializer, with scales, zero points and offsets.

    None where the checkpoint holds floats, and where a step (a rotation, a permutation) computed other values from integers.
    None also for a part or a stack of tensors, whose `pieces_of` may have integers.
    """
    tensor = value.const_value
    quantized: QuantizedTensor | None = None if tensor is None else tensor.meta.get(_QUANTIZED)
    return quantized


def has_integers(tensor: ir.TensorProtocol) -> bool:
    """Whether a checkpoint holds integers for a tensor, or for one that it is computed from."""
    sources = (source for source in _step_of(tensor).sources if not isinstance(source, str))
    return _QUANTIZED in tensor.meta or any(map(has_integers, sources))


def has_rows(tensor: ir.TensorProtocol) -> bool:
    """Whether rows of a tensor can be read without computing all of it."""
    return _ROWS in tensor.meta


def read_rows(tensor: ir.TensorProtocol, start: int, stop: int) -> Array:
    """Rows start..stop of a tensor that `has_rows`, in an array that the caller may write to.

    Tables are the largest tensors of a model; a reader that takes them row by row never holds a whole one in float32.
    """
    rows: Rows = tensor.meta[_ROWS]
    with errors_about(tensor):
        array = rows(start, stop)
    return array if array.flags.writeable and array.flags.owndata else np.array(array)


def keeping(most: int) -> AbstractContextManager[None]:
    """Keep the values of the lazy tensors read last, up to `most` bytes and read-only, while a `with` block runs.

    Tensors that are computed from the same sources then compute these once.
    """
    return _READS.keeping(Kind.TENSOR, most)


def part_of(whole: ir.TensorProtocol, ranges: Sequence[tuple[int, int]], axis: int, name: str) -> ir.LazyTensor:
    """Make the tensor that holds the rows (axis 0) or columns (axis 1) `ranges` of another one, range after range.

    Inside of `wholes_kept` the whole tensor is read once for all of its parts.
    """
    shape = list(whole.shape.numpy())
    shape[axis] = sum(stop - start for start, stop in ranges)

    def take() -> Array:
        (array,) = _READS.read(Kind.WHOLE, _Identity(whole), lambda: (whole.numpy(),))
        parts = [array[start:stop] if axis == 0 else array[:, start:stop] for start, stop in ranges]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)

    places = "+".join(f"{start}:{stop}" for start, stop in ranges)
    part = lazy(name, take, shape, whole.dtype, step=f"{('rows', 'columns')[axis]} {places}", sources=[whole])
    part.meta[_PIECES] = [Piece(whole, tuple(ranges), axis)]
    return part


class _Identity:
    """A cache key for a tensor: keys are equal where they hold the same object, which they keep alive."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self._tensor = tensor

    def __hash__(self) -> int:
        return id(self._tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._tensor is other._tensor


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that comes from another one: the rows (`axis` 0) or columns (1) `ranges` of `tensor`, in turn, which
    begin at row `at` of the result."""

    tensor: ir.TensorProtocol
    ranges: tuple[tuple[int, int], ...]
    axis: int = 0
    at: int = 0


def made_of(tensor: ir.LazyTensor, parts: Sequence[ir.TensorProtocol]) -> ir.LazyTensor:
    """Record that a tensor is `parts` stacked along axis 0; return the tensor."""
    pieces, at = [], 0
    for part in parts:
        rows = part.shape.numpy()[0]
        pieces.append(Piece(part, ((0, rows),), at=at))
        at += rows
    tensor.meta[_PIECES] = pieces
    return tensor


def pieces_of(tensor: ir.TensorProtocol) -> list[Piece]:
    """The pieces of a tensor that `part_of` or `made_of` made; an empty list for any other tensor."""
    pieces: list[Piece] = tensor.meta.get(_PIECES, [])
    return pieces


def wholes_kept() -> AbstractContextManager[None]:
    """Keep the tensors that `part_of` takes parts of, once they are read, while a `with` block runs.

    Ranks that read their parts of the same tensors in turn then compute these once. The read cache has room for few of them:
    beyond its bound, those used least recently are computed again.
    """
    return _READS.keeping(Kind.WHOLE)


class Shared:
    """Arrays that one computation returns together, such as a weight's integers and their scales; `shared[i]` is the i-th.

    Of all `Shared` objects, only the result of the one that was read last is kept: reading a model's weights in order computes
    each result once and holds one at a time.
    """

    def __init__(self, compute: Callable[[], tuple[Array, ...]]) -> None:
        self._compute = compute

    def __getitem__(self, index: int) -> Array:
        return _READS.read(Kind.RESULT, self, self._compute)[index]
