"""Weights replaced by functions of themselves, computed when they are read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.ir.build import make_initializer
from belle_compile.compiler.ir.lazy import has_rows, lazy, read_rows

Floats = npt.NDArray[np.float32]


def replace_weight(
    node: ir.Node,
    index: int,
    change: Callable[[Floats], Floats],
    graph: ir.Graph,
    suffix: str = "rotated",
    *,
    by_rows: bool = False,
) -> None:
    """Let `node` read change(weight) as input `index`, under the weight's name with the suffix behind it. `by_rows` says that a
    row of the result depends on that row of the weight only.

    `change` may overwrite its argument, which is its own: embedding tables are the largest tensors of a model, and a
    chain of changes holds one of them.

    Where another reader has taken that name for another change (a tied table), the node's own name is used.
    """
    weight = node.inputs[index]
    assert weight is not None and weight.const_value is not None
    source = weight.const_value
    name = f"{weight.name}.{suffix}"
    if name in graph.initializers:
        name = f"{node.name}.weight.{suffix}"
    rows = (lambda start, stop: change(read_rows(source, start, stop))) if by_rows and has_rows(source) else None
    shape = source.shape.numpy()
    tensor = lazy(name, lambda: change(own(source)), shape, ir.DataType.FLOAT, rows, step=suffix, sources=[source])
    value = make_initializer(tensor)
    graph.register_initializer(value)
    node.replace_input_with(index, value)
    if not weight.uses():
        del graph.initializers[str(weight.name)]


def own(source: ir.TensorProtocol) -> Floats:
    """A tensor's values in an array that nobody else has."""
    array: Floats = source.numpy()
    fresh = isinstance(source, ir.LazyTensor) and array.flags.writeable and array.flags.c_contiguous
    return array if fresh else np.array(array)
