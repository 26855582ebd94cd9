"""The meaning of each op in NumPy: the oracle of every kernel and every pass.

Arithmetic is float32 throughout, one rounding per operation written; integer parts are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.ir.cache import Floats, Integers, PagedCache
from belle_compile.compiler.ir.constants import GROUP

Bytes = npt.NDArray[np.int8]
Quantized = npt.NDArray[np.int8] | npt.NDArray[np.int16]
Nibbles = npt.NDArray[Any]  # of ml_dtypes.int4, a type that NumPy does not have
Sums = npt.NDArray[np.int32] | npt.NDArray[np.int64]

# Integers of quantized activations lie within +- the limit. 16 bits end at 256*127 + 127, so that an integer is 256 * high +
# low with a high byte within +-127 and a low one from -128 on, which is what the kernels multiply.
LIMITS = {8: 127, 16: 32_639}
# By the bits of activations, the largest number of inputs whose products an int32 accumulator sums without overflow, whatever
# their values. With 8 bits, a product is that of an activation within +-127 and a weight from -128 on; with 16 bits, that of an
# activation's byte (within +-127, or from -128 on) and a weight within +-127.
MAX_INPUTS = {8: (2**31 - 1) // (127 * 128), 16: (2**31 - 1) // (128 * 127)}
_EXACT_INPUTS = 2**24 // 128**2  # products of two bytes whose sums, whatever they are, float32 represents


def gather(x: npt.NDArray[Any], indices: Integers) -> npt.NDArray[Any]:
    """Rows of x."""
    return x[indices]


def identity(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """x, unchanged."""
    return x


def split(x: npt.NDArray[Any], sizes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
    """Consecutive parts of the last axis."""
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=-1))


def add(x: Floats, r: Floats) -> Floats:
    """x + r."""
    return x + r


def layer_norm(x: Floats, scale: Floats, bias: Floats | None, *, epsilon: float) -> Floats:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis."""
    centred: Floats = x - x.mean(axis=-1, keepdims=True)
    variance: Floats = (centred * centred).mean(axis=-1, keepdims=True)
    normed: Floats = centred / np.sqrt(variance + np.float32(epsilon)) * scale
    return normed if bias is None else normed + bias


def rms_norm(x: Floats, scale: Floats, *, epsilon: float) -> Floats:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis."""
    mean_square: Floats = (x * x).mean(axis=-1, keepdims=True)
    normed: Floats = x / np.sqrt(mean_square + np.float32(epsilon))
    return normed * scale


def head_norm(x: Floats, scale: Floats, *, epsilon: float) -> Floats:
    """`rms_norm` of each head: of every len(scale) neighbours of a row."""
    return rms_norm(x.reshape(len(x), -1, len(scale)), scale, epsilon=epsilon).reshape(x.shape)


def norm(x: Floats, scale: Floats, bias: Floats | None, *, kind: str, epsilon: float) -> Floats:
    """The norm that `kind` names: "layer" or "rms" (which has no bias)."""
    return layer_norm(x, scale, bias, epsilon=epsilon) if kind == "layer" else rms_norm(x, scale, epsilon=epsilon)


def linear(x: Floats, weight: Floats, bias: Floats | None) -> Floats:
    """x @ weight.T + bias: ONNX Gemm with transB=1."""
    product: Floats = x @ weight.T
    return product if bias is None else product + bias


def gelu(x: Floats) -> Floats:
    """Gelu with the tanh approximation: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    bounded: Floats = np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x))
    result: Floats = np.float32(0.5) * x * (np.float32(1) + bounded)
    return result


def swiglu(gate: Floats, up: Floats) -> Floats:
    """silu(gate) * up."""
    with np.errstate(over="ignore"):  # exp(-gate) = inf for very negative gates gives the right limit, 0
        result: Floats = gate / (np.float32(1) + np.exp(-gate)) * up
    return result


def golay_signs(size: int) -> Floats:
    """float32 [size]: the first terms of the Golay-Rudin-Shapiro sequence of +1 and -1, for a `size` that is a power of two.

    No Walsh function is close to this sequence. Signs from it keep a row's mean, and any other such pattern, from gathering in
    one channel of the Hadamard transform that follows.
    """
    signs, complement = np.ones(1, np.float32), np.ones(1, np.float32)
    while len(signs) < size:
        signs, complement = np.concatenate([signs, complement]), np.concatenate([signs, -complement])
    return signs


def block_hadamard(x: Floats, *, block: int) -> Floats:
    """Multiply each block of `block` neighbours of a row by diag(signs) H: Golay's signs and the normalized Hadamard matrix.

    The sums are butterflies, direct neighbours first, and are scaled at the end. The matrix is orthogonal, so that
    block_hadamard(x) @ block_hadamard(weight).T is x @ weight.T except for rounding.
    """
    y: Floats = x.reshape(-1, block) * golay_signs(block)
    stride = 1
    while stride < block:
        pairs = y.reshape(-1, 2, stride)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        stride *= 2
    scaled: Floats = y.reshape(x.shape) * np.float32(block**-0.5)
    return scaled


class LowRankChanges(Protocol):
    """The adapters of a step's sequences, in the basis of a graph's linears."""

    def factors(self, sequence: int, target: str) -> tuple[Floats, Floats, Floats] | None:
        """The factors a [r, inputs], addend [r] and b [outputs, r] of the change that a sequence's adapter makes to a linear:
        b @ (a @ x + addend). None where it makes none."""
        ...


def low_rank(
    y: Floats,
    x: Floats,
    sequences: Integers,
    sizes: Integers | None = None,
    *,
    targets: str,
    rank: int,
    adapters: LowRankChanges | None = None,
) -> Floats:
    """y [T, N], the results of the linears `targets` for x [T, K] side by side, plus what the adapter of each token's sequence
    adds to them; `sizes` and `targets` are those of `target_columns`."""
    result: Floats = y.copy()
    for token, sequence in enumerate(sequences):
        for target, columns in target_columns(targets, sizes, y.shape[1]).items():
            factors = adapters.factors(int(sequence), target) if adapters else None
            if factors is not None:
                a, addend, b = factors
                assert len(a) <= rank, f"an adapter of rank {len(a)} in {target}"
                result[token, columns] += b @ (a @ x[token] + addend)
    return result


def quantized_low_rank(
    y: Floats, xq: Quantized, xs: Floats, sequences: Integers, sizes: Integers | None = None, **keywords: Any
) -> Floats:
    """As `low_rank`, for an input that exists as integers and one scale per token only."""
    x: Floats = xq.astype(np.float32) * xs[:, None]
    return low_rank(y, x, sequences, sizes, **keywords)


def target_columns(targets: str, sizes: Integers | None, width: int) -> dict[str, slice]:
    """The columns of each linear in `targets`, names with commas between them, in a result of `width` columns.

    `sizes` counts the columns of each; without it, one linear has them all. An empty name stands for columns that no adapter
    changes."""
    names, counts = targets.split(","), [width] if sizes is None else [int(size) for size in sizes]
    ends = np.cumsum(counts).tolist()
    return {name: slice(end - count, end) for name, count, end in zip(names, counts, ends, strict=True) if name}


def quantize_tokens(x: Floats, step: Floats | None = None, *, bits: int = 8) -> tuple[Quantized, Floats]:
    """One scale per token (row): xs = absmax / limit, xq = x * (limit / absmax) rounded half to even; zeros for a zero row.

    With a `step` [1], this is the scale of every token, and values beyond limit steps are clipped.
    """
    limit = np.float32(LIMITS[bits])
    if step is not None:
        integers = np.clip(np.rint(x * (np.float32(1) / step)), -limit, limit)
        return integers.astype(np.int8 if bits == 8 else np.int16), np.repeat(step, len(x))
    absmax = np.abs(x).max(axis=-1)
    inverse = np.divide(limit, absmax, out=np.zeros_like(absmax), where=absmax > 0)
    return np.rint(x * inverse[:, None]).astype(np.int8 if bits == 8 else np.int16), absmax / limit


def integer_linear(xq: Quantized, wq: Bytes) -> Sums:
    """xq @ wq.T, exact: int32, or int64 for int16 xq.

    NumPy multiplies floats faster than integers. float64 represents every partial sum, and float32 those over
    `_EXACT_INPUTS` products of bytes.
    """
    if xq.dtype == np.int16:
        product: npt.NDArray[np.float64] = xq.astype(np.float64) @ wq.astype(np.float64).T
        return product.astype(np.int64)
    total = np.zeros((len(xq), len(wq)), np.int32)
    for start in range(0, xq.shape[1], _EXACT_INPUTS):
        inputs = slice(start, start + _EXACT_INPUTS)
        part: Floats = xq[:, inputs].astype(np.float32) @ wq[:, inputs].astype(np.float32).T
        total += part.astype(np.int32)
    return total


def dequantize(acc: Sums, xs: Floats, ws: Floats, bias: Floats | None) -> Floats:
    """(acc * ws[n]) * xs[t] + bias[n]."""
    scaled = acc.astype(np.float32) * ws * xs[:, None]
    return scaled if bias is None else scaled + bias


def group_linear(
    xq: Bytes,
    xs: Floats,
    wq: Nibbles,
    ws: npt.NDArray[np.float16],
    bias: Floats | None,
    zero_point: Bytes | None = None,
    *,
    group: int = GROUP,
) -> Floats:
    """total * xs[t] + bias[n], where total is the sum over groups g of ws[n, g] * sum(xq * (wq - zero_point[n, g])).

    The sum within a group is exact. Groups are added in the order of the inputs, starting from 0, each with one rounding of
    product and sum (a fused multiply-add), and the bias likewise. float64 stands in for the fused step: it represents the
    products exactly, and the sums except for a bit far below float32's last.
    """
    total: Floats = np.zeros((len(xq), len(wq)), np.float32)
    for index in range(ws.shape[1]):
        inputs = slice(index * group, (index + 1) * group)
        weights = wq[:, inputs].astype(np.float64)
        if zero_point is not None:
            weights -= zero_point[:, index, None]
        sums: npt.NDArray[np.float64] = xq[:, inputs].astype(np.float64) @ weights.T
        total = (sums * ws[:, index].astype(np.float64) + total).astype(np.float32)
    scaled: npt.NDArray[np.float64] = total.astype(np.float64) * xs[:, None]
    return (scaled if bias is None else scaled + bias).astype(np.float32)


def embedding(token_ids: Integers, table: Floats, first: Integers) -> Floats:
    """Rows of a table whose first row belongs to the token `first`; zeros for tokens outside of the table."""
    rows, known = _rows_of(token_ids, len(table), first)
    return np.where(known[:, None], table[rows], np.float32(0))


def quantized_embedding(token_ids: Integers, wq: Bytes, ws: Floats, first: Integers | None = None) -> Floats:
    """Rows of the table wq * ws, with `first` as in `embedding`."""
    if first is None:
        return wq[token_ids].astype(np.float32) * ws[token_ids, None]
    rows, known = _rows_of(token_ids, len(wq), first)
    return wq[rows].astype(np.float32) * np.where(known, ws[rows], np.float32(0))[:, None]


def _rows_of(token_ids: Integers, size: int, first: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Each token's row in a table of `size` tokens from `first` on (0 if the table lacks it), and which tokens it has."""
    rows = token_ids - first[0]
    known = (rows >= 0) & (rows < size)
    return np.where(known, rows, 0), known


def all_reduce(addends: Sequence[Floats]) -> Floats:
    """The sum of the ranks' addends, in the order of the ranks."""
    total = addends[0]
    for addend in addends[1:]:
        total = total + addend
    return total


def quantized_linear(xq: Quantized, xs: Floats, wq: Bytes, ws: Floats, bias: Floats | None) -> Floats:
    """IntegerLinear, then Dequantize."""
    return dequantize(integer_linear(xq, wq), xs, ws, bias)


def add_norm(x: Floats, r: Floats, scale: Floats, bias: Floats | None, *, kind: str, epsilon: float) -> tuple[Floats, Floats]:
    """x + r, and the norm of this sum."""
    total = x + r
    return total, norm(total, scale, bias, kind=kind, epsilon=epsilon)


def norm_quantize(
    x: Floats, scale: Floats, bias: Floats | None, step: Floats | None = None, *, kind: str, epsilon: float, bits: int = 8
) -> tuple[Quantized, Floats]:
    """The norm, quantized."""
    return quantize_tokens(norm(x, scale, bias, kind=kind, epsilon=epsilon), step, bits=bits)


def add_norm_quantize(
    x: Floats,
    r: Floats,
    scale: Floats,
    bias: Floats | None,
    step: Floats | None = None,
    *,
    kind: str,
    epsilon: float,
    bits: int = 8,
) -> tuple[Floats, Quantized, Floats]:
    """x + r, and the norm of this sum, quantized."""
    total, normed = add_norm(x, r, scale, bias, kind=kind, epsilon=epsilon)
    return total, *quantize_tokens(normed, step, bits=bits)


def gelu_quantize(x: Floats, step: Floats | None = None, *, bits: int = 8, hadamard: int = 0) -> tuple[Quantized, Floats]:
    """Gelu, then BlockHadamard of blocks of `hadamard` channels (none if 0), quantized."""
    return _rotate_quantize(gelu(x), step, bits, hadamard)


def swiglu_quantize(
    gate: Floats, up: Floats, step: Floats | None = None, *, bits: int = 8, hadamard: int = 0
) -> tuple[Quantized, Floats]:
    """SwiGLU, then BlockHadamard of blocks of `hadamard` channels (none if 0), quantized."""
    return _rotate_quantize(swiglu(gate, up), step, bits, hadamard)


def _rotate_quantize(x: Floats, step: Floats | None, bits: int, hadamard: int) -> tuple[Quantized, Floats]:
    return quantize_tokens(block_hadamard(x, block=hadamard) if hadamard else x, step, bits=bits)


def rotary_table(
    positions: Integers,
    sequences: Integers,
    inv_freq: Floats,
    *,
    attention_scaling: float,
    dynamic_factor: float,
    original_max: int,
    base: float,
) -> Floats:
    """[T, D]: cos(position * inv_freq) in the first half of a row, sin in the second, both times attention_scaling.

    With a dynamic factor (dynamic NTK, `_compute_dynamic_ntk_parameters` of Transformers), a sequence longer than original_max
    gets the frequencies of a base that grows with the length, which is 1 + the largest position of the sequence in this step.
    """
    frequencies = np.broadcast_to(inv_freq, (len(positions), len(inv_freq))).copy()
    if dynamic_factor:
        dim = 2 * len(inv_freq)
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        for row, sequence in enumerate(sequences):
            length = 1 + positions[sequences == sequence].max()
            if length > original_max:
                stretch = np.float32(dynamic_factor * length) / np.float32(original_max) - np.float32(dynamic_factor - 1)
                grown = np.float32(base) * stretch ** np.float32(dim / (dim - 2))
                frequencies[row] = np.float32(1) / grown**exponents
    angles = positions.astype(np.float32)[:, None] * frequencies
    scaling = np.float32(attention_scaling)
    return np.concatenate([np.cos(angles) * scaling, np.sin(angles) * scaling], axis=-1)


def rotate(x: Floats, cos_sin: Floats) -> Floats:
    """Half-rotation RoPE as in Transformers' LLaMA: x [T, heads, D] by the rows of cos_sin [T, D]."""
    half = x.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Floats) -> Floats:
    """exp(x) / sum(exp(x)) over the last axis."""
    powers: Floats = np.exp(x - x.max(axis=-1, keepdims=True))
    total: Floats = powers.sum(axis=-1, keepdims=True)
    return powers / total


def attention(
    q: Floats,
    k: Floats,
    v: Floats,
    positions: Integers,
    sequences: Integers,
    block_table: Integers,
    cos_sin: Floats | None,
    slopes: Floats | None,
    *,
    cache: PagedCache,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
) -> Floats:
    """Causal attention of each token over its own sequence, after the step's k and v were written to the cache.

    With a window, a token attends to the last `window` tokens, itself among them.

    RoPE is applied to q and k where cos_sin is given. `slopes` (ALiBi) add slope * position of the key, as in Transformers'
    BLOOM. Query head h reads key/value head h // (num_heads / num_kv_heads).
    """
    q = q.reshape(-1, num_heads, head_dim)
    k, v = k.reshape(-1, num_kv_heads, head_dim), v.reshape(-1, num_kv_heads, head_dim)
    if cos_sin is not None:
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
    for token, (position, sequence) in enumerate(zip(positions, sequences, strict=True)):
        cache.write(layer, block_table[sequence], int(position), k[token], v[token])
    result = np.empty_like(q)
    for token, (position, sequence) in enumerate(zip(positions, sequences, strict=True)):
        length = int(position) + 1
        first = max(0, length - window) if window else 0
        keys, values = (x[:, first:] for x in cache.read(layer, block_table[sequence], length))
        grouped = q[token].reshape(num_kv_heads, -1, head_dim)  # the query heads of each key/value head
        scores = (grouped @ keys.transpose(0, 2, 1) * np.float32(scale)).reshape(num_heads, length - first)
        if slopes is not None:
            scores = scores + slopes[:, None] * np.arange(first, length, dtype=np.float32)
        weights = softmax(scores).reshape(num_kv_heads, -1, length - first)
        result[token] = (weights @ values).reshape(num_heads, head_dim)
    return result.reshape(-1, num_heads * head_dim)
