"""The meanings of the float ops in torch, fast enough to calibrate with many sequences; NumPy's `meanings` are their oracle.

A batch is ragged: the tokens of several whole sequences, one after the other, each from its first position on. There is no
paged cache: a token attends to its own sequence in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from belle_compile.compiler.ir import meanings

Tensor = torch.Tensor

_QUERIES = 128  # tokens whose queries are multiplied at once, in sequences of more than that


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x."""
    return x[indices.long()]


def split(x: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    """Consecutive parts of the last axis."""
    return torch.split(x, sizes.tolist(), dim=-1)


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None, *, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, epsilon)


def rms_norm(x: Tensor, scale: Tensor, *, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * scale."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], scale, epsilon)


def head_norm(x: Tensor, scale: Tensor, *, epsilon: float) -> Tensor:
    """`rms_norm` of each head."""
    return rms_norm(x.reshape(len(x), -1, len(scale)), scale, epsilon=epsilon).reshape(x.shape)


def gelu(x: Tensor) -> Tensor:
    """Gelu with the tanh approximation."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] @ weight [N, K].T + bias [N], all of one float type.

    On a CPU, oneDNN multiplies where torch has it: its float32 kernels use AVX-512 on every processor that has that. Those of
    MKL, torch's default, stay at AVX2 on some of them, at less than half the rate.
    """
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        # Of operands that are not contiguous, oneDNN computes the product element by element.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def coarse_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of a float32 x and a bfloat16 weight, with x and the result rounded to bfloat16; sums are float32."""
    product = linear(x.bfloat16(), weight).float()
    return product if bias is None else product.add_(bias)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than those of float32 on this device: with AVX512-BF16 or AMX."""
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def block_hadamard(x: Tensor, *, block: int) -> Tensor:
    """Golay's signs, then the normalized Walsh-Hadamard matrix, for each `block` neighbours of a row.

    The matrix is the Kronecker product of two smaller ones, so that two small products take the place of one large one.
    """
    size = 1 << (block.bit_length() // 2)
    signs, left, right = (each.to(x.device) for each in _hadamard_factors(block, block // size, size))
    y = linear((x.reshape(-1, block) * signs).view(-1, size), right)
    return torch.matmul(left, y.view(-1, block // size, size)).view(x.shape)


@cache
def _hadamard_factors(block: int, left: int, right: int) -> tuple[Tensor, Tensor, Tensor]:
    """Golay's signs [block], the Hadamard matrix of size `left`, and that of size `right`, scaled for both."""
    with torch.inference_mode(False):
        signs = torch.from_numpy(meanings.golay_signs(block))
        return signs, _hadamard(left), _hadamard(right) * block**-0.5


def _hadamard(size: int) -> Tensor:
    """The Hadamard matrix of Sylvester's construction, [size, size] of 1 and -1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def rotary_table(positions: Tensor, sequences: Tensor, inv_freq: Tensor, **options: float) -> Tensor:
    """The table that the NumPy meaning computes; it is small enough to be computed on the CPU."""
    arrays = (tensor.cpu().numpy() for tensor in (positions, sequences, inv_freq))
    return torch.from_numpy(meanings.rotary_table(*arrays, **options)).to(inv_freq.device)  # type: ignore[arg-type]


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Half-rotation RoPE: x [T, heads, D] by the rows of cos_sin [T, D]."""
    half = x.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    first, second, rotated = x[..., :half], x[..., half:], torch.empty_like(x)
    torch.mul(first, cos, out=rotated[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=rotated[..., half:]).addcmul_(first, sin)
    return rotated


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    sequences: Tensor,
    block_table: Tensor | None,
    cos_sin: Tensor | None,
    slopes: Tensor | None,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Causal attention of each token over its own sequence, with float32 keys and values instead of a cache."""
    q, k, v = q.view(-1, num_heads, head_dim), k.view(-1, num_kv_heads, head_dim), v.view(-1, num_kv_heads, head_dim)
    if cos_sin is not None:
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
    result, start = torch.empty_like(q), 0
    for length in torch.unique_consecutive(sequences, return_counts=True)[1].tolist():
        rows = slice(start, start + length)
        start += length
        if num_heads > num_kv_heads and length > _QUERIES and slopes is None and not window and q.device.type == "cpu":
            result[rows] = _grouped_attention(q[rows], k[rows], v[rows], scale)
            continue
        queries, keys, values = (x[rows].transpose(0, 1)[None] for x in (q, k, v))
        mask = None
        if slopes is not None or window:
            everything = torch.full((length, length), -torch.inf, device=q.device)
            hidden = everything.triu(1) + everything.tril(-window) if window else everything.triu(1)
            positions = torch.arange(length, dtype=torch.float32, device=q.device)
            mask = hidden if slopes is None else (slopes[:, None, None] * positions + hidden)[None]
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=num_heads != num_kv_heads
        )
        result[rows] = attended[0].transpose(0, 1)
    return result.reshape(-1, num_heads * head_dim)


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention [T, heads, D] of one sequence whose heads share keys and values [T, kv_heads, D].

    The queries of some tokens for all heads that share keys are the rows of one product, over the keys up to the last of these
    tokens. Torch's own takes twice the time for 400 tokens.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    queries = (q * scale).view(tokens, kv_heads, heads // kv_heads, head_dim)
    keys, values = k.transpose(0, 1).contiguous(), v.permute(1, 2, 0).contiguous()
    result, hidden = torch.empty_like(queries), torch.full((_QUERIES, _QUERIES), -torch.inf).triu(1)
    for start in range(0, tokens, _QUERIES):
        end = min(start + _QUERIES, tokens)
        rows = end - start
        for head in range(kv_heads):
            scores = linear(queries[start:end, head].reshape(-1, head_dim), keys[head, :end])
            scores.view(rows, -1, end)[:, :, start:] += hidden[:rows, None, :rows]
            attended = linear(torch.softmax(scores, -1), values[head, :, :end])
            result[start:end, head] = attended.view(rows, -1, head_dim)
    return result.view(q.shape)


MEANINGS: Mapping[str, Callable[..., Any]] = {
    "Identity": lambda x: x,
    "Gather": gather,
    "Split": split,
    "Add": torch.add,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "HeadNorm": head_norm,
    "Gemm": linear,
    "Gelu": gelu,
    "SwiGLU": swiglu,
    "BlockHadamard": block_hadamard,
    "RotaryTable": rotary_table,
    "Attention": attention,
}


def unsupported(ops: Sequence[str]) -> list[str]:
    """The ops among `ops` that have no meaning in torch, sorted."""
    return sorted(set(ops) - MEANINGS.keys())
