"""The meanings of the float ops in torch, fast enough to calibrate with many sequences; NumPy's `meanings` are their oracle.

A batch is ragged: the tokens of several whole sequences, one after the other, each from its first position on. There is no
paged cache: a token attends to its own sequence in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from belle_compile.compiler.ir import meanings

Tensor = torch.Tensor


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


def block_hadamard(x: Tensor, *, block: int) -> Tensor:
    """Golay's signs, then the normalized Walsh-Hadamard matrix, for each `block` neighbours of a row."""
    y = x.reshape(-1, block) * torch.from_numpy(meanings.golay_signs(block)).to(x.device)
    stride = 1
    while stride < block:
        pairs = y.view(-1, 2, stride)
        y = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1)
        stride *= 2
    scaled: Tensor = y.reshape(x.shape) * block**-0.5
    return scaled


def rotary_table(positions: Tensor, sequences: Tensor, inv_freq: Tensor, **options: float) -> Tensor:
    """The table that the NumPy meaning computes; it is small enough to be computed on the CPU."""
    arrays = (tensor.cpu().numpy() for tensor in (positions, sequences, inv_freq))
    return torch.from_numpy(meanings.rotary_table(*arrays, **options)).to(inv_freq.device)  # type: ignore[arg-type]


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Half-rotation RoPE: x [T, heads, D] by the rows of cos_sin [T, D]."""
    half = x.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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
        start += length
    return result.reshape(-1, num_heads * head_dim)


MEANINGS: Mapping[str, Callable[..., Any]] = {
    "Identity": lambda x: x,
    "Gather": gather,
    "Split": split,
    "Add": torch.add,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "HeadNorm": head_norm,
    "Gemm": torch.nn.functional.linear,
    "Gelu": gelu,
    "SwiGLU": swiglu,
    "BlockHadamard": block_hadamard,
    "RotaryTable": rotary_table,
    "Attention": attention,
}


def unsupported(ops: Sequence[str]) -> list[str]:
    """The ops among `ops` that have no meaning in torch, sorted."""
    return sorted(set(ops) - MEANINGS.keys())
