"""The parts of a module whose shapes or loops depend on a step, as TorchScript functions.

A trace records shapes that Python computes as constants; a scripted function keeps their computation. Python compiles these
functions once, when this file is imported, and a module carries those that its graph calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def script(function: Callable[..., Any]) -> Any:
    """Compile a function, without the warning that torch.jit is deprecated, which module.py answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(function)


@script
def tiled_linear(x: Tensor, weight: Tensor, tile: int) -> Tensor:
    """x @ weight.T in products of `tile` rows each: kernels add in another order for fewer rows."""
    rows, width = x.size(0), x.size(1)
    tiles = (rows + tile - 1) // tile
    padded = torch.constant_pad_nd(x, [0, 0, 0, tiles * tile - rows])
    factors = weight.t().unsqueeze(0).expand(tiles, width, weight.size(0))
    return torch.bmm(padded.view(tiles, tile, width), factors).view(tiles * tile, weight.size(0)).narrow(0, 0, rows)


@script
def packed_linear(xq: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """(xq - 128) @ weight.T in integers, times the scale of each output; xq is uint8, and the weight packed by
    `onednn::qlinear_prepack`."""
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        xq, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@script
def block_hadamard(x: Tensor, signs: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ (signs * block) @ right for each block of x, as a matrix [left's rows, right's columns]."""
    outer, inner = left.size(0), right.size(0)
    blocks = (x.view(-1, outer * inner) * signs).view(-1, outer, inner)
    count = blocks.size(0)
    half = torch.bmm(left.unsqueeze(0).expand(count, outer, outer), blocks)
    return torch.bmm(half, right.unsqueeze(0).expand(count, inner, inner)).view(x.size(0), x.size(1))


@script
def append(pool: Tensor, scales: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """Write rows x [T, heads, head_dim] to a pool [blocks, tokens, heads, head_dim] in place, rounded to its type, and return
    the pool; an int8 pool has a scale per token and head. Values beyond those of float16 become its largest: infinity would
    spoil later sequences in the same block, whose masked keys have the weight 0."""
    rows = pool.view(-1, pool.size(2), pool.size(3))
    if pool.dtype == torch.int8:
        absmax = x.abs().amax(-1, True)
        inverse = (127.0 / absmax).masked_fill(absmax == 0, 0.0)
        rows.index_copy_(0, slots, (x * inverse).round().to(torch.int8))
        scales.view(-1, pool.size(2), 1).index_copy_(0, slots, absmax / 127.0)
    elif pool.dtype == torch.float16:
        rows.index_copy_(0, slots, x.clamp(-65504.0, 65504.0).to(torch.float16))
    else:
        rows.index_copy_(0, slots, x.to(pool.dtype))
    return pool


@script
def read(pool: Tensor, scales: Tensor, blocks: Tensor, sequences: int, keys: int) -> Tensor:
    """The first `keys` tokens of sequences in a pool as float32 [sequences, heads, keys, head_dim]."""
    found = pool.index_select(0, blocks).to(torch.float32)
    if pool.dtype == torch.int8:
        found = found * scales.index_select(0, blocks).unsqueeze(-1)
    return found.view(sequences, keys, pool.size(2), pool.size(3)).transpose(1, 2)


@script
def masks(cell_positions: Tensor, groups: Tensor, slopes: Tensor | None, kv_heads: int, per_kv_head: int, tile: int) -> Tensor:
    """What is added to the scores of all groups, one group after the other in one row: minus infinity for later keys, for
    others 0, or with ALiBi slope * (key - position), which softmax makes the same as slope * key."""
    parts: list[Tensor] = []
    plan: list[int] = groups.view(-1).tolist()
    cell = 0
    for group in range(groups.size(0)):
        tiles, keys = plan[3 * group], plan[3 * group + 2]
        positions = cell_positions.narrow(0, cell, tiles * tile).view(tiles, 1, 1, tile, 1)
        distances = torch.arange(keys).view(1, 1, 1, 1, keys) - positions
        later = distances > 0
        if slopes is not None:
            bias = slopes.view(1, kv_heads, per_kv_head, 1, 1) * distances.to(torch.float32)
            parts.append(bias.masked_fill(later, -float("inf")).view(-1))
        else:
            zeros = torch.zeros([tiles, 1, 1, tile, keys], dtype=torch.float32)
            parts.append(zeros.masked_fill(later, -float("inf")).expand(tiles, 1, per_kv_head, tile, keys).reshape(-1))
        cell += tiles * tile
    return torch.cat(parts)


@script
def attend(
    q: Tensor,
    keys_pool: Tensor,
    values_pool: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    cells: Tensor,
    cell_of: Tensor,
    groups: Tensor,
    blocks: Tensor,
    mask: Tensor,
    mask_heads: int,
    tile: int,
    scale: float,
) -> Tensor:
    """Attention of queries [T, heads, head_dim] to the pools of a layer, group by group; returns [T, heads * head_dim]."""
    heads, head_dim, kv_heads = q.size(1), q.size(2), keys_pool.size(2)
    rows = heads // kv_heads * tile
    parts: list[Tensor] = []
    plan: list[int] = groups.view(-1).tolist()
    cell, block, masked = 0, 0, 0
    for group in range(groups.size(0)):
        tiles, sequences, keys = plan[3 * group], plan[3 * group + 1], plan[3 * group + 2]
        queries = q.index_select(0, cells.narrow(0, cell, tiles * tile)).view(tiles, tile, kv_heads, -1, head_dim)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(tiles, kv_heads, rows, head_dim)
        used = blocks.narrow(0, block, sequences * (keys // keys_pool.size(1)))
        k = read(keys_pool, key_scales, used, sequences, keys).expand(tiles, kv_heads, keys, head_dim)
        v = read(values_pool, value_scales, used, sequences, keys).expand(tiles, kv_heads, keys, head_dim)
        count = tiles * mask_heads * rows * keys
        bias = mask.narrow(0, masked, count).view(tiles, mask_heads, rows, keys)
        attended = torch.nn.functional.scaled_dot_product_attention(queries, k, v, bias, 0.0, False, scale=scale)
        attended = attended.reshape(tiles, kv_heads, -1, tile, head_dim).permute(0, 3, 1, 2, 4)
        parts.append(attended.reshape(tiles * tile, heads * head_dim))
        cell += tiles * tile
        block += used.size(0)
        masked += count
    return torch.cat(parts).index_select(0, cell_of)
