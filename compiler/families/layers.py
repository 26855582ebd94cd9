"""Graph nodes that hold a checkpoint's weights: what architectures share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.build import GraphBuilder
from belle_compile.compiler.ir.lazy import lazy

if TYPE_CHECKING:
    from belle_compile.compiler.checkpoint import Checkpoint, LazyTensor

HEAD = "lm_head.weight"
COMPARED_BYTES = 1 << 25  # read at once of each of two tables compared
# Buffers of old releases that are recomputed from the config: rotary frequencies, causal masks.
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)(attention|attn|self_attention)\.(masked_)?bias$")

Reorder = Callable[["LazyTensor"], npt.NDArray[np.float32]]


class Layers:
    """Appends layers to a graph and keeps account of the tensors they take.

    A layer has the name of its module in Transformers, its tensors those of the checkpoint: `h.0.mlp.dense_h_to_4h` has
    `h.0.mlp.dense_h_to_4h.weight`. Tensors stay on disk until they are read.
    """

    def __init__(self, checkpoint: Checkpoint, builder: GraphBuilder) -> None:
        self.checkpoint, self.builder = checkpoint, builder
        self._taken: set[str] = set()

    def weight(self, name: str, shape: tuple[int, ...], reorder: Reorder | None = None) -> ir.Value:
        """The float32 initializer that reads a tensor of the checkpoint, through `reorder` where given."""
        tensor = self.checkpoint.tensor(name, shape)
        self._taken.add(name)
        read = tensor.read if reorder is None else lambda: reorder(tensor)
        return self.builder.weight(name, lazy(name, read, shape, np.float32, tensor.rows if reorder is None else None))

    def linear(self, x: ir.Value, name: str, sizes: tuple[int, int], *, bias: bool, reorder: Reorder | None = None) -> ir.Value:
        """x @ weight.T + bias; sizes are (outputs, inputs), as the weight's."""
        weight = self.weight(f"{name}.weight", sizes, reorder)
        added = self.weight(f"{name}.bias", sizes[:1], reorder) if bias else None
        return self.builder.op("Gemm", x, weight, added, name=name, transB=1)

    def layer_norm(self, x: ir.Value, name: str, size: int, epsilon: float) -> ir.Value:
        """LayerNormalization with scale and bias."""
        scale, bias = self.weight(f"{name}.weight", (size,)), self.weight(f"{name}.bias", (size,))
        return self.builder.op("LayerNormalization", x, scale, bias, name=name, axis=-1, epsilon=epsilon)

    def rms_norm(self, x: ir.Value, name: str, size: int, epsilon: float) -> ir.Value:
        """RMSNormalization with a scale."""
        scale = self.weight(f"{name}.weight", (size,))
        return self.builder.op("RMSNormalization", x, scale, name=name, axis=-1, epsilon=epsilon)

    def embedding_and_head(self, name: str, shape: tuple[int, int], *, tied: bool) -> tuple[ir.Value, ir.Value]:
        """The embedding table and the head's weight, both [vocabulary, hidden]; one and the same when tied.

        A tied head may be in the file beside the table (pickles, some converters) or in its place. Where both are there
        and differ, Transformers 4 ties them and 5 does not, so that is an error; it needs both to be read.
        """
        table, tensors = f"{name}.weight", self.checkpoint.tensors
        if not tied:
            if HEAD not in tensors:
                expected = f"one of shape {list(shape)}, as tie_word_embeddings is false"
                remedy = "set tie_word_embeddings to true in config.json if the head is the embedding"
                raise self._error(f"tensor {HEAD}", "no such tensor", expected, remedy)
            return self.weight(table, shape), self.weight(HEAD, shape)
        if HEAD in tensors and table in tensors:
            if not _equal(self.checkpoint.tensor(table, shape), self.checkpoint.tensor(HEAD, shape)):
                expected = "the same, as tie_word_embeddings is true"
                remedy = f"set tie_word_embeddings to false in config.json to use it, or remove {HEAD}"
                raise self._error(f"tensor {HEAD}", f"other values than in {table}", expected, remedy)
            self._taken.add(HEAD)
        shared = self.weight(HEAD if HEAD in tensors and table not in tensors else table, shape)
        return shared, shared

    def check_all_taken(self) -> None:
        """Raise CompileError if the checkpoint has a tensor that no layer took."""
        left = sorted(name for name in self.checkpoint.tensors.keys() - self._taken if not BUFFERS.search(name))
        if left:
            listed = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
            remedy = "the weights do not belong to this config.json, or are of another architecture"
            raise self._error(
                "tensors", f"{listed}, which the graph does not use", "only tensors that config.json implies", remedy
            )

    def _error(self, what: str, found: str, expected: str, remedy: str) -> CompileError:
        return CompileError("frontend", f"{what} of {self.checkpoint.path}", found=found, expected=expected, remedy=remedy)


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    count, width = a.shape
    step = max(1, COMPARED_BYTES // (4 * width))
    parts = ((start, min(start + step, count)) for start in range(0, count, step))
    return all(np.array_equal(a.rows(*part), b.rows(*part), equal_nan=True) for part in parts)
