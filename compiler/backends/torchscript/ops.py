"""The ops of a graph in torch, so that the bits of a row do not depend on the other rows of a step.

PyTorch's kernels decide what can be used (measured with 2.13 on a processor with AVX-512; tests compare the bits):
- Products of int8 matrices are exact, and so do not depend on how they are divided, on processors with VNNI. On others oneDNN
  adds pairs of products in 16 bits, which overflow.
- Products of floats have other bits for 1 to 3 rows than for more, hence `scripted.tiled_linear`.
- `exp`, `tanh`, `cos` and `sin` give an element the same bits wherever it lies in memory. `silu`, `gelu`, `sigmoid` and `pow`
  do not: the last elements of each thread's part are computed by other code.
- Norms and maxima are computed row by row.

The integers of an activation are [T, K]: uint8 with 128 added, which the kernels take, or int16. Its scales are float32
[T, 1], or [1, 1] for all tokens. NumPy's `meanings` are the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from belle_compile.compiler.backends.torchscript import scripted
from belle_compile.compiler.ir import meanings

Tensor = torch.Tensor
Quantized = tuple[Tensor, Tensor]

LINEAR_ROWS = 16  # rows of a product of floats
_LEAST_SCALE = 1e-30  # of a row of zeros


def gather(table: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table."""
    return table.index_select(0, indices)


def norm(x: Tensor, scale: Tensor, bias: Tensor | None, *, kind: str, epsilon: float) -> Tensor:
    """The norm that `kind` names, of each row."""
    if kind == "layer":
        return torch.nn.functional.layer_norm(x, [scale.shape[0]], scale, bias, epsilon)
    return torch.nn.functional.rms_norm(x, [scale.shape[0]], scale, epsilon)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias."""
    product: Tensor = scripted.tiled_linear(x, weight, LINEAR_ROWS)
    return product if bias is None else product + bias


def gelu(x: Tensor) -> Tensor:
    """Gelu with the tanh approximation."""
    inner = (x * x).mul_(0.044715).add_(1.0).mul_(x).mul_(math.sqrt(2 / math.pi))
    return inner.tanh_().add_(1.0).mul_(x).mul_(0.5)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return (gate / torch.neg(gate).exp_().add_(1.0)).mul_(up)


def block_hadamard(x: Tensor, *, block: int) -> Tensor:
    """Multiply by the matrix of `meanings.block_hadamard`, which is the Kronecker product of two smaller Hadamard matrices."""
    rotated: Tensor = scripted.block_hadamard(x, *hadamard_factors(block))
    return rotated


@cache
def hadamard_factors(block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Signs [block], and two Hadamard matrices whose Kronecker product, normalized, is that of `block` rows."""
    inner = 1 << (block.bit_length() // 2)
    signs, normalized = torch.from_numpy(meanings.golay_signs(block)), _hadamard(inner) * block**-0.5
    return signs, _hadamard(block // inner), normalized


def _hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix, not normalized."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def quantize_tokens(x: Tensor, step: Tensor | None = None, *, bits: int = 8) -> Quantized:
    """Integers and their scales: one for each token, or `step` for all."""
    limit = float(meanings.LIMITS[bits])
    if step is None:
        scales = (x.abs().amax(-1, True) / limit).clamp_min_(_LEAST_SCALE)
        integers = (x / scales).round_()
    else:
        scales = step.view(1, 1)
        integers = (x / scales).round_().clamp_(-limit, limit)
    return integers.add_(128.0).to(torch.uint8) if bits == 8 else integers.to(torch.int16), scales


def rotate_quantize(x: Tensor, step: Tensor | None, bits: int, block: int) -> Quantized:
    """BlockHadamard of blocks of `block` channels (none if 0), then the integers."""
    return quantize_tokens(block_hadamard(x, block=block) if block else x, step, bits=bits)


def integer_linear(xq: Tensor, wq: Tensor) -> Tensor:
    """The integers times wq.T, exact: int32, or float64 for 16 bits, which are multiplied as a plane of high and one of low
    bytes."""
    if xq.dtype == torch.uint8:
        return torch._int_mm((xq ^ 128).to(torch.int8), wq.t())
    high = (xq + 128) >> 8
    planes = torch.cat([high, xq - high * 256]).to(torch.int8)
    sums = torch._int_mm(planes, wq.t()).to(torch.float64)
    upper, lower = sums.chunk(2)
    return upper * 256.0 + lower


def dequantize(acc: Tensor, xs: Tensor, ws: Tensor, bias: Tensor | None) -> Tensor:
    """(acc * ws[n]) * xs[t] + bias[n]."""
    scaled = acc.to(torch.float32).mul_(ws).mul_(xs)
    return scaled if bias is None else scaled.add_(bias)


def quantized_linear(xq: Tensor, xs: Tensor, wq: Tensor, ws: Tensor, bias: Tensor | None) -> Tensor:
    """The product of integers, scaled."""
    return dequantize(integer_linear(xq, wq), xs, ws, bias)


def packed_linear(xq: Tensor, packed: Tensor, xs: Tensor, ws: Tensor, bias: Tensor | None) -> Tensor:
    """`quantized_linear` of int8 activations and a weight that `onednn::qlinear_prepack` packed."""
    scaled = scripted.packed_linear(xq, packed, ws).mul_(xs)
    result: Tensor = scaled if bias is None else scaled.add_(bias)
    return result


def quantized_embedding(token_ids: Tensor, wq: Tensor, ws: Tensor, first: None) -> Tensor:
    """Rows of the table wq * ws, which is whole: it has no `first` token."""
    return gather(wq, token_ids).to(torch.float32) * gather(ws, token_ids).unsqueeze(-1)


def add_norm(x: Tensor, r: Tensor, scale: Tensor, bias: Tensor | None, *, kind: str, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + r, and the norm of this sum."""
    total = x + r
    return total, norm(total, scale, bias, kind=kind, epsilon=epsilon)


def norm_quantize(
    x: Tensor, scale: Tensor, bias: Tensor | None, step: Tensor | None, *, kind: str, epsilon: float, bits: int
) -> Quantized:
    """The norm, quantized."""
    return quantize_tokens(norm(x, scale, bias, kind=kind, epsilon=epsilon), step, bits=bits)


def add_norm_quantize(
    x: Tensor, r: Tensor, scale: Tensor, bias: Tensor | None, step: Tensor | None, *, kind: str, epsilon: float, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x + r, and the norm of this sum, quantized."""
    total, normed = add_norm(x, r, scale, bias, kind=kind, epsilon=epsilon)
    return total, *quantize_tokens(normed, step, bits=bits)


def rotary_table(
    positions: Tensor,
    lengths: Tensor,
    inv_freq: Tensor,
    *,
    attention_scaling: float,
    dynamic_factor: float,
    original_max: int,
    base: float,
) -> Tensor:
    """[T, D]: cosines and sines as `meanings.rotary_table` defines them. `lengths` are those of the sequences of the tokens at
    the end of the step. The frequencies of dynamic RoPE are computed in float64, by `exp` and `log`."""
    frequencies = inv_freq.unsqueeze(0)
    if dynamic_factor:
        dim = 2 * inv_freq.shape[0]
        long = lengths.unsqueeze(-1) > original_max
        stretch = lengths.unsqueeze(-1).to(torch.float64) * (dynamic_factor / original_max) - (dynamic_factor - 1)
        log_base = torch.log(stretch.clamp(min=1.0)) * (dim / (dim - 2)) + math.log(base)
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        grown = torch.exp(-log_base * exponents).to(torch.float32)
        frequencies = torch.where(long, grown, frequencies)
    angles = positions.unsqueeze(-1).to(torch.float32) * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1) * attention_scaling


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Half-rotation RoPE: x [T, heads, D] by the rows of cos_sin [T, D]."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, -1)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# By op type, called with a node's inputs in order (None for one left out) and its attributes that have a meaning.
OPS: Mapping[str, Callable[..., Any]] = {
    "Identity": lambda x: x,
    "Gather": gather,
    "Add": torch.add,
    "LayerNormalization": lambda x, scale, bias, *, epsilon: norm(x, scale, bias, kind="layer", epsilon=epsilon),
    "RMSNormalization": lambda x, scale, *, epsilon: norm(x, scale, None, kind="rms", epsilon=epsilon),
    "Gemm": linear,
    "Gelu": gelu,
    "SwiGLU": swiglu,
    "BlockHadamard": block_hadamard,
    "QuantizeTokens": quantize_tokens,
    "IntegerLinear": integer_linear,
    "Dequantize": dequantize,
    "QuantizedEmbedding": quantized_embedding,
    "QuantizedLinear": quantized_linear,
    "AddNorm": add_norm,
    "NormQuantize": norm_quantize,
    "AddNormQuantize": add_norm_quantize,
    "GeluQuantize": lambda x, step, *, bits, hadamard: rotate_quantize(gelu(x), step, bits, hadamard),
    "SwiGLUQuantize": lambda gate, up, step, *, bits, hadamard: rotate_quantize(swiglu(gate, up), step, bits, hadamard),
}
