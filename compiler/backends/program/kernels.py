"""The kernels that every program backend has: what each computes, its fields and its pointers.

A backend's class of the same name derives from the one here and adds how the kernel is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from belle_compile.compiler.backends.program.kernel import Kernel, Pointers, View, optional

_ROWS = ("rows", "int32")
_X = ("x", "float32")
_OUT = ("out", "float32")
# The position and the sequence of each token of a step, and the cache blocks of each sequence
_STEP = (("positions", "int32"), ("sequences", "int32"), ("block_table", "int32"))


@dataclass(frozen=True)
class Norm(Kernel):
    """out = norm(x + r) * scale + bias; the sum x + r is written to `total`.

    `norm` is "layer" (mean, then centred variance, as torch computes it) or "rms" (no mean). Without `r`, x is normalized.
    `total` is None when no other kernel reads the sum; it may be the memory of x or r. With `quantize`, the result has 8 bits
    for each of `planes`, and one scale per token, or with `step` the same given scale for all tokens.
    """

    kind: ClassVar[str] = "norm"
    norm: str
    width: int
    epsilon: float
    bias: bool
    quantize: bool
    x: View
    r: View | None
    total: View | None
    out: View
    planes: int = 1
    step: bool = False

    def pointers(self) -> Pointers:
        operands = (_X, *optional(self.r, "r"), ("scale", "float32"), *optional(self.bias, "bias"))
        out = (("xq", self.byte), ("xs", "float32")) if self.quantize else (_OUT,)
        return (_ROWS, *operands, *optional(self.total, "total"), *optional(self.step, "step"), *out)


@dataclass(frozen=True)
class HeadNorm(Kernel):
    """out = x / sqrt(mean(x^2) + epsilon) * scale for each head of `head_dim` channels of a row."""

    kind: ClassVar[str] = "head_norm"
    width: int
    head_dim: int
    epsilon: float
    x: View
    out: View

    def pointers(self) -> Pointers:
        return (_ROWS, _X, ("scale", "float32"), _OUT)


@dataclass(frozen=True)
class Activation(Kernel):
    """out = gelu(x) (`activation` "gelu", tanh form), or silu(x) * up ("swiglu", with the view `up`).

    With `hadamard`, blocks of that many channels are transformed next. `quantize`, `planes` and `step` are as in `Norm`.
    """

    kind: ClassVar[str] = "activation"
    activation: str
    width: int
    quantize: bool
    x: View
    up: View | None
    out: View
    planes: int = 1
    hadamard: int | None = None
    step: bool = False

    def pointers(self) -> Pointers:
        out = (("xq", self.byte), ("xs", "float32")) if self.quantize else (_OUT,)
        return (_ROWS, _X, *optional(self.up, "up"), *optional(self.step, "step"), *out)


@dataclass(frozen=True)
class BlockHadamard(Kernel):
    """out = x with each block of `block` neighbouring channels transformed: the op belle::BlockHadamard."""

    kind: ClassVar[str] = "hadamard"
    width: int
    block: int
    x: View
    out: View

    def pointers(self) -> Pointers:
        return (_ROWS, _X, _OUT)


@dataclass(frozen=True)
class QuantizeTokens(Kernel):
    """xs[t] = absmax(x[t]) / limit, xq[t] = rint(x[t] * limit / absmax(x[t])), 8 bits for each of `planes`;
    with `step`, xs is given."""

    kind: ClassVar[str] = "quantize"
    width: int
    x: View
    out: View
    planes: int = 1
    step: bool = False

    def pointers(self) -> Pointers:
        return (_ROWS, _X, *optional(self.step, "step"), ("xq", self.byte), ("xs", "float32"))


@dataclass(frozen=True)
class RotaryTable(Kernel):
    """cos_sin[t] = cos(positions[t] * inv_freq), then sin, both times `attention_scaling`.

    With `dynamic_factor` (dynamic NTK), a sequence longer than `original_max` in this step uses a larger base, as in
    meanings.rotary_table.
    """

    kind: ClassVar[str] = "rotary"
    head_dim: int
    attention_scaling: float
    dynamic_factor: float
    original_max: int
    base: float

    def pointers(self) -> Pointers:
        return (_ROWS, ("positions", "int32"), ("sequences", "int32"), ("inv_freq", "float32"), ("cos_sin", "float32"))


@dataclass(frozen=True)
class GatherRows(Kernel):
    """out[i] = x[indices[i]]: selects the rows whose logits are needed."""

    kind: ClassVar[str] = "gather"
    width: int
    x: View
    out: View

    def pointers(self) -> Pointers:
        return (_ROWS, ("indices", "int32"), _X, _OUT)


@dataclass(frozen=True)
class Add(Kernel):
    """out = x + r"""

    kind: ClassVar[str] = "add"
    width: int
    x: View
    r: View
    out: View

    def pointers(self) -> Pointers:
        return (_ROWS, _X, ("r", "float32"), _OUT)


@dataclass(frozen=True)
class Embedding(Kernel):
    """out[t] = table[token_ids[t]].

    A `partial` table holds a range of the vocabulary: out[t] = table[token_ids[t] - first], or zeros for a token outside of it.
    `first` is an operand, so that ranks with tables of the same length share a kernel.
    """

    table: ClassVar[str]  # dtype of the table
    vocab: int
    width: int
    out: View
    partial: bool = False

    def pointers(self) -> Pointers:
        scales, first = optional(self.table == "int8", "scales"), optional(self.partial, "first", "int32")
        return (_ROWS, ("token_ids", "int32"), ("table", self.table), *scales, *first, _OUT)


@dataclass(frozen=True)
class FloatEmbedding(Embedding):
    """An `Embedding` whose table is float32."""

    kind: ClassVar[str] = "embedding"
    table: ClassVar[str] = "float32"


@dataclass(frozen=True)
class QuantizedEmbedding(Embedding):
    """An `Embedding` whose table is int8 with one float32 scale per token of the vocabulary."""

    kind: ClassVar[str] = "qembedding"
    table: ClassVar[str] = "int8"


@dataclass(frozen=True)
class FloatLinear(Kernel):
    """out[t, n] = sum_k x[t, k] * w[n, k] + bias[n] in float32, for layers that are not quantized."""

    kind: ClassVar[str] = "linear"
    outputs: int
    inputs: int
    bias: bool
    x: View
    out: View

    def pointers(self) -> Pointers:
        return (_ROWS, _X, ("weight", "float32"), *optional(self.bias, "bias"), _OUT)


@dataclass(frozen=True)
class QuantizedLinear(Kernel):
    """out[t, n] = (sum_k a[t, k] * w[n, k]) * ws[n] * xs[t] + bias[n]; the sum over int8 products is exact.

    Activations have one or two `planes` of 8 bits; `ws` has one scale per output, `xs` one per token.
    """

    kind: ClassVar[str] = "qlinear"
    activations: ClassVar[str]  # dtype in which the kernel reads activations
    corrections: ClassVar[Pointers] = ()  # further operands that a backend stores with the weights and their scales
    outputs: int
    inputs: int
    bias: bool
    x: View
    out: View
    planes: int = 1

    def pointers(self) -> Pointers:
        weight = (("weight", "int8"), ("scale", "float32"), *self.corrections, *optional(self.bias, "bias"))
        return (_ROWS, ("xq", self.activations), ("xs", "float32"), *weight, _OUT)


@dataclass(frozen=True)
class Columns:
    """Parts of a row, as (first column, number of columns)."""

    parts: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return "_".join(f"{count}" + (f"at{first}" if first else "") for first, count in self.parts)


@dataclass(frozen=True)
class LowRank(Kernel):
    """out[:, part] += b @ (scale * (a @ x) + addend) for the parts of every row whose sequence has an adapter, in place. Each
    part has its own a, b, scale and addend.

    `adapted` is the number of blocks of such rows, followed by the rows of each, as `adapter_blocks` makes them. The adapter
    slot of a sequence is `adapters[sequences[row]]`; a slot has `slot` bytes, and `factors0`, `factors1`, ... point to the
    regions of the parts in the first one, laid out for `rank` as in `AdapterRegion`, with a and b of type `factors`. x is
    float32, or integers in one or two `planes` of 8 bits with a scale per token.
    """

    kind: ClassVar[str] = "low_rank"
    columns: Columns
    inputs: int
    rank: int
    slot: int
    factors: str
    x: View
    out: View
    planes: int = 0

    def pointers(self) -> Pointers:
        x = (("xq", self.byte), ("xs", "float32")) if self.planes else (_X,)
        where = (("adapted", "int32"), ("sequences", "int32"), ("adapters", "int32"))
        regions = ((f"factors{number}", "float32") for number in range(len(self.columns.parts)))
        return (_ROWS, *x, *where, *regions, _OUT)


@dataclass(frozen=True)
class AppendKV(Kernel):
    """Write k and v of every row to the slot of its position in the paged cache.

    With `rotary`, keys are rotated first. In an int8 cache each head of a token has a float32 scale, absmax / 127.
    """

    kind: ClassVar[str] = "append_kv"
    num_layers: int
    num_kv_heads: int
    head_dim: int
    k: View
    v: View
    max_blocks: int
    cache_dtype: str
    rotary: bool

    def pointers(self) -> Pointers:
        operands = (("k", "float32"), ("v", "float32"), *_STEP, *optional(self.rotary, "cos_sin"))
        return (_ROWS, *operands, *_caches(self.cache_dtype))


@dataclass(frozen=True)
class Attention(Kernel):
    """out[t] = softmax(scale * q[t] . K (+ slope * position of the key)) V over positions 0..positions[t] of its sequence, or
    over the last `window` of these."""

    initials: ClassVar[Mapping[str, str]] = {"window": "window"}
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    q: View
    out: View
    max_blocks: int
    cache_dtype: str
    rotary: bool
    alibi: bool
    window: int | None = field(default=None, kw_only=True)

    @property
    def group(self) -> int:
        """The number of query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    def pointers(self) -> Pointers:
        tables = (*optional(self.rotary, "cos_sin"), *optional(self.alibi, "slopes"))
        return (_ROWS, ("q", "float32"), *_STEP, *tables, *_caches(self.cache_dtype), _OUT)


def _caches(dtype: str) -> Pointers:
    """The pointers to keys and values of a layer. bfloat16 is passed as uint16, since NumPy does not have the type."""
    element = "uint16" if dtype == "bfloat16" else dtype
    return (("kcache", element), ("vcache", element))
