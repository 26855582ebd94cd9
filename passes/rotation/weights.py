"""Replaces weights by functions of them, which are computed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir import basis
from belle_compile.compiler.ir.build import make_initializer
from belle_compile.compiler.ir.lazy import has_rows, lazy, read_rows
from belle_compile.compiler.ir.ops import operand, spec_of
from belle_compile.compiler.ir.signature import Role

Floats = npt.NDArray[np.float32]


def replace_weight(
    node: ir.Node,
    role: Role,
    change: Callable[[Floats], Floats],
    graph: ir.Graph,
    suffix: str = "rotated",
    *,
    by_rows: bool = False,
    changes: Sequence[basis.Change] | None = None,
) -> None:
    """Let a node read change(weight) in place of its weight of that role; does nothing where the node has none.

    The new weight is named after the old one, with the suffix at the end, or after the node where that name is taken: two
    readers of a tied table may change it differently. With `by_rows`, a row of the result depends only on the same row of the
    weight. `change` may overwrite its argument, an array that nothing else refers to: embedding tables are the largest tensors
    of a model, and a chain of changes needs the memory of one.

    `changes` say what it is to the inputs or outputs of a linear, so that adapters of it can follow; a linear whose weight was
    changed without them takes no adapter.
    """
    index, weight = spec_of(node).index(role), operand(node, role)
    if index is None or weight is None:
        return
    assert weight.const_value is not None
    source = weight.const_value
    name = f"{weight.name}.{suffix}"
    if name in graph.initializers:
        name = f"{node.name}.weight.{suffix}"
    rows = (lambda start, stop: change(read_rows(source, start, stop))) if by_rows and has_rows(source) else None
    shape = source.shape.numpy()
    tensor = lazy(name, lambda: change(own(source)), shape, ir.DataType.FLOAT, rows, step=suffix, sources=[source])
    basis.record(tensor, basis.changed(source, changes))
    value = make_initializer(tensor)
    graph.register_initializer(value)
    node.replace_input_with(index, value)
    if not weight.uses():
        del graph.initializers[str(weight.name)]


def own(source: ir.TensorProtocol) -> Floats:
    """A tensor's float32 values in an array that the caller may overwrite: nothing else refers to it."""
    array: Floats = source.numpy()
    fresh = isinstance(source, ir.LazyTensor) and array.flags.writeable and array.flags.c_contiguous
    return array if fresh else np.array(array)
