"""Causal attention over the paged cache: one kernel for tokens that are the only one of their sequence in a step (decoding),
whose context is split among programs, and one for runs of several tokens of one sequence (a prompt).

A step may hold tokens of both kinds; each kernel skips those of the other. Products are computed in float16 with float32 sums
where the cache is float16 or int8, and in float32 where it is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import Pointers, View, Workspace
from belle_compile.compiler.backends.triton.kernels.base import STEP, Start, power_of_two
from belle_compile.compiler.backends.triton.kernels.cache import (
    Cache,
    KeysValues,
    PagedKernel,
    append,
    read_tokens,
    tokens_of,
    turned,
)
from belle_compile.compiler.backends.triton.kernels.device import await_earlier, begin, let_next_start

_LEAST = 16  # the smallest number of rows, columns and summands of a product on tensor cores
_PROGRAMS = 1024  # programs that decoding is split into, if contexts allow
_MOST_SPLITS = 16  # the most parts of a context, since the last program to finish reads all of them
_ROWS = (1, 2, 4, 8, 16, 32, STEP.sequences)
_NONE = tl.constexpr(2147483647)  # stands for no sequence
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _is_alone(sequences_ptr, at, sequence, rows, inside):
    """Whether the tokens before and after belong to other sequences."""
    before = tl.load(sequences_ptr + at - 1, mask=(at > 0) & inside, other=-1)
    after = tl.load(sequences_ptr + at + 1, mask=(at + 1 < rows) & inside, other=-1)
    return (before != sequence) & (after != sequence)


class Queries(NamedTuple):
    """Query heads of some tokens: both rotated halves [rows, pairs] (`first`, `second`), the mask of the rows to compute
    (`mine`), the position of each row's token (`last`), and the ALiBi slope of its head or None."""

    first: Any
    second: Any
    mine: Any
    last: Any
    slopes: Any


class Softmax(NamedTuple):
    """The online softmax of each row: the highest score, and the sums of powers and of weighted values relative to it."""

    peak: Any
    total: Any
    sums: Any


@triton.jit
def _read(cache, sequence, head, tokens, there, SHAPE: tl.constexpr):
    """Read a tile of a sequence's tokens."""
    pairs, cols = tl.arange(0, SHAPE.pairs), tl.arange(0, SHAPE.columns)
    places, scales = tokens_of(cache.table, sequence, tokens, there, head, SHAPE)
    first = read_tokens(cache.k, places, scales, pairs, there, pairs < SHAPE.half, SHAPE.scales)
    second = read_tokens(cache.k, places + SHAPE.half, scales, pairs, there, pairs < SHAPE.half, SHAPE.scales)
    v = read_tokens(cache.v, places, scales, cols, there, cols < SHAPE.head_dim, SHAPE.scales)
    return KeysValues(first, second, v)


@triton.jit
def _nothing_seen(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    return Softmax(peak, total, tl.zeros((ROWS, COLUMNS), tl.float32))


@triton.jit
def _attend(softmax, queries, tile, tokens, there, SHAPE: tl.constexpr, ALL: tl.constexpr):
    """The softmax after a tile of the context, in powers of two. With `ALL`, every query attends to every token of the tile."""
    if SHAPE.one:  # a single query: products without tensor cores
        scores = tl.sum(tile.first * queries.first, axis=1)[None, :] + tl.sum(tile.second * queries.second, axis=1)[None, :]
    else:
        kind = tile.first.dtype
        scores = tl.dot(queries.first.to(kind), tl.trans(tile.first), input_precision="ieee")
        scores = tl.dot(queries.second.to(kind), tl.trans(tile.second), scores, input_precision="ieee")
    scores = scores * (SHAPE.scale * _LOG2E)
    if queries.slopes is not None:
        scores += (queries.slopes * _LOG2E)[:, None] * tokens.to(tl.float32)[None, :]
    if ALL:
        peak = tl.maximum(softmax.peak, tl.max(scores, axis=1))
        safe = peak
    else:
        seen = queries.mine[:, None] & there[None, :] & (tokens[None, :] <= queries.last[:, None])
        if SHAPE.window is not None:
            seen &= tokens[None, :] > queries.last[:, None] - SHAPE.window
        scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(softmax.peak, tl.max(scores, axis=1))
        # A row that has not attended to any token yet has no peak; its sums are zeros, and its powers become zeros too.
        safe = tl.where(peak == float("-inf"), 0.0, peak)
    factor = tl.exp2(softmax.peak - safe)
    powers = tl.exp2(scores - safe[:, None])
    if SHAPE.one:
        sums = softmax.sums * factor[:, None] + tl.sum(tile.v.to(tl.float32) * tl.trans(powers), axis=0)[None, :]
    else:
        sums = tl.dot(powers.to(tile.v.dtype), tile.v, softmax.sums * factor[:, None], input_precision="ieee")
    return Softmax(peak, softmax.total * factor + tl.sum(powers, axis=1), sums)


@triton.jit
def _write(out, mine, softmax, ROWS: tl.constexpr, SHAPE: tl.constexpr):
    """Write the results of the rows in the mask `mine`; the other rows, whose totals are zero, are divided by one."""
    COLUMNS: tl.constexpr = SHAPE.columns
    written = mine[:, None] & (tl.arange(0, COLUMNS) < SHAPE.head_dim)[None, :]
    divisor = tl.broadcast_to(tl.where(mine, softmax.total, 1.0)[:, None], (ROWS, COLUMNS))
    tl.store(out, tl.div_rn(softmax.sums, divisor), mask=written)


class Step(NamedTuple):
    """Pointers to the values that a step has computed for its tokens: keys, values, and the rotary table or None."""

    k: Any
    v: Any
    cos_sin: Any


@triton.jit
def _own_token(step, cache, queries, at, sequence, position, head, SHAPE: tl.constexpr):
    """Append the key and value of the token itself; returns the softmax over this token alone."""
    pairs, cols = tl.arange(0, SHAPE.pairs), tl.arange(0, SHAPE.columns)
    own = head + tl.arange(0, 1)
    place = at * SHAPE.table_stride + own * 0
    k_own = at * SHAPE.k.stride + SHAPE.k.offset + own * SHAPE.head_dim
    first, second = turned(step.k, step.cos_sin, k_own, place, own >= 0, pairs, SHAPE.half)
    v = tl.load(step.v + at * SHAPE.v.stride + SHAPE.v.offset + own[:, None] * SHAPE.head_dim + cols[None, :],
                mask=(cols < SHAPE.head_dim)[None, :], other=0.0)  # fmt: skip
    stored = append(cache, KeysValues(first, second, v), sequence, position, own, own >= 0, SHAPE)
    peak = tl.sum(queries.first * stored.first + queries.second * stored.second, axis=1) * (SHAPE.scale * _LOG2E)
    if queries.slopes is not None:
        peak += queries.slopes * _LOG2E * position.to(tl.float32)
    total = tl.full((SHAPE.members,), 1.0, tl.float32)
    return Softmax(peak, total, tl.broadcast_to(stored.v, (SHAPE.members, SHAPE.columns)))


@triton.jit
def _save_part(part, softmax, mine, SHAPE: tl.constexpr):
    """Write a part of a token and head: sums [group, columns], then peaks and totals."""
    members, cols = tl.arange(0, SHAPE.members), tl.arange(0, SHAPE.columns)
    tl.store(part + members[:, None] * SHAPE.columns + cols[None, :], softmax.sums, mask=mine[:, None])
    tl.store(part + SHAPE.group * SHAPE.columns + members, softmax.peak, mask=mine)
    tl.store(part + SHAPE.group * SHAPE.columns + SHAPE.group + members, softmax.total, mask=mine)


@triton.jit
def _add_part(softmax, part, mine, SHAPE: tl.constexpr):
    """The softmax after a part that another program saved."""
    members, cols = tl.arange(0, SHAPE.members), tl.arange(0, SHAPE.columns)
    peak = tl.load(part + SHAPE.group * SHAPE.columns + members, mask=mine, other=float("-inf"), cache_modifier=".cg")
    larger = tl.maximum(softmax.peak, peak)
    safe = tl.where(larger == float("-inf"), 0.0, larger)
    old, new = tl.exp2(softmax.peak - safe), tl.exp2(peak - safe)
    added = tl.load(part + SHAPE.group * SHAPE.columns + SHAPE.group + members, mask=mine, other=0.0, cache_modifier=".cg")
    total = softmax.total * old + added * new
    place = part + members[:, None] * SHAPE.columns + cols[None, :]
    sums = tl.load(place, mask=mine[:, None], other=0.0, cache_modifier=".cg")
    return Softmax(larger, total, softmax.sums * old[:, None] + sums * new[:, None])


@triton.jit
def _put_together(parts_ptr, tickets_ptr, pair, split, parts, softmax, out, SHAPE: tl.constexpr):
    """Save a part; the last of the `parts` programs to finish adds all parts up and writes the results."""
    size: tl.constexpr = SHAPE.group * (SHAPE.columns + 2)
    mine = tl.arange(0, SHAPE.members) < SHAPE.group
    _save_part(parts_ptr + (pair * SHAPE.splits + split).to(tl.int64) * size, softmax, mine, SHAPE)
    tl.debug_barrier()  # all threads must have written before one of them takes the ticket
    ticket = tl.atomic_add(tickets_ptr + pair, 1, sem="acq_rel")
    if ticket == parts - 1:
        tl.store(tickets_ptr + pair, 0)
        softmax = _nothing_seen(SHAPE.members, SHAPE.columns)
        for other in range(0, parts):
            softmax = _add_part(softmax, parts_ptr + (pair * SHAPE.splits + other).to(tl.int64) * size, mine, SHAPE)
        _write(out, mine, softmax, SHAPE.members, SHAPE)


@triton.jit
def _tiles_before(position, SHAPE: tl.constexpr):
    """The first tile of a token's context, and the number of tiles from there up to the token, at least one. Tiles before the
    window are left out."""
    BT: tl.constexpr = SHAPE.tokens
    first = 0
    if SHAPE.window is not None:
        first = tl.maximum(position + 1 - SHAPE.window, 0) // BT
    return first, tl.maximum((position + BT - 1) // BT - first, 1)


@triton.jit
def attend_alone(rows_ptr, q_ptr, k_ptr, v_ptr, positions_ptr, sequences_ptr, block_table_ptr, cos_sin_ptr, slopes_ptr,
                 kcache_ptr, vcache_ptr, out_ptr, parts_ptr, tickets_ptr, SHAPE: tl.constexpr,
                 OVERLAP: tl.constexpr):  # fmt: skip
    """Each program computes one token, the query heads of one key/value head, and one part of the context. The program of the
    last part also appends the token's own key and value and attends to them. The last program to finish combines the parts."""
    let_next_start(OVERLAP)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # All loads are issued at once, since each takes a full memory latency; buffers have room for all rows that are started.
    rows = tl.load(rows_ptr)
    sequence = tl.load(sequences_ptr + row)
    before = tl.load(sequences_ptr + tl.maximum(row - 1, 0))
    after = tl.load(sequences_ptr + tl.minimum(row + 1, tl.num_programs(0) - 1))
    position = tl.load(positions_ptr + row)
    BT: tl.constexpr = SHAPE.tokens
    SPLITS: tl.constexpr = SHAPE.splits
    skipped, tiles = _tiles_before(position, SHAPE)
    each = (tiles + SPLITS - 1) // SPLITS
    parts = (tiles + each - 1) // each
    if (row >= rows) | ((row > 0) & (before == sequence)) | ((row + 1 < rows) & (after == sequence)) | (split >= parts):
        await_earlier(OVERLAP)
        return
    members, pairs, cols = tl.arange(0, SHAPE.members), tl.arange(0, SHAPE.pairs), tl.arange(0, SHAPE.columns)
    mine = members < SHAPE.group
    at = row.to(tl.int64)
    heads = head * SHAPE.group + members
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads, mask=mine, other=0.0)
    first_tile, last_tile = skipped + split * each, skipped + tl.minimum(split * each + each, tiles)
    tokens, end = first_tile * BT + tl.arange(0, BT), tl.minimum(position, last_tile * BT)
    cache = Cache(kcache_ptr, vcache_ptr, block_table_ptr)
    if SHAPE.one:  # earlier steps wrote the keys and values of earlier tokens, so the first tile may be read already
        tile = _read(cache, sequence, head, tokens, tokens < end, SHAPE)
    await_earlier(OVERLAP)
    first, second = turned(q_ptr, cos_sin_ptr, at * SHAPE.q.stride + SHAPE.q.offset + heads * SHAPE.head_dim,
                           at * SHAPE.table_stride + members * 0, mine, pairs, SHAPE.half)  # fmt: skip
    queries = Queries(first, second, mine, position + members * 0, slopes)
    softmax = _nothing_seen(SHAPE.members, SHAPE.columns)
    step = Step(k_ptr, v_ptr, cos_sin_ptr)
    if split == parts - 1:
        softmax = _own_token(step, cache, queries, at, sequence, position, head, SHAPE)
    for _ in range(first_tile, last_tile):
        if SHAPE.short:
            coming = _read(cache, sequence, head, tokens + BT, tokens + BT < end, SHAPE)
        if not SHAPE.one:  # Triton prefetches the operands of tensor cores some tiles ahead
            tile = _read(cache, sequence, head, tokens, tokens < end, SHAPE)
        softmax = _attend(softmax, queries, tile, tokens, tokens < end, SHAPE, False)
        tokens += BT
        if SHAPE.short:
            tile = coming
        elif SHAPE.one:
            tile = _read(cache, sequence, head, tokens, tokens < end, SHAPE)
    out = out_ptr + at * SHAPE.out.stride + SHAPE.out.offset + heads[:, None] * SHAPE.head_dim + cols[None, :]
    if parts == 1:
        _write(out, mine, softmax, SHAPE.members, SHAPE)
        return
    pair = row * SHAPE.num_kv_heads + head
    _put_together(parts_ptr, tickets_ptr, pair, split, parts, softmax, out, SHAPE)


@triton.jit
def attend_runs(rows_ptr, q_ptr, positions_ptr, sequences_ptr, block_table_ptr, cos_sin_ptr, slopes_ptr, kcache_ptr,
                vcache_ptr, out_ptr, SHAPE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """Each program computes one query head of a tile of neighbouring tokens, one sequence among them after another."""
    BM: tl.constexpr = SHAPE.rows
    BT: tl.constexpr = SHAPE.tokens
    rows = begin(rows_ptr, OVERLAP)
    start = tl.program_id(0) * BM
    if start >= rows:
        return
    head = tl.program_id(1)
    at = start + tl.arange(0, BM)
    inside = at < rows
    sequences = tl.load(sequences_ptr + at, mask=inside, other=-1)
    positions = tl.load(positions_ptr + at, mask=inside, other=-1)
    todo = inside & (_is_alone(sequences_ptr, at, sequences, rows, inside) == 0)
    pairs, cols = tl.arange(0, SHAPE.pairs), tl.arange(0, SHAPE.columns)
    place = at.to(tl.int64) * SHAPE.q.stride + SHAPE.q.offset + head * SHAPE.head_dim
    first, second = turned(q_ptr, cos_sin_ptr, place, at.to(tl.int64) * SHAPE.table_stride, inside, pairs, SHAPE.half)
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + head) + tl.zeros((BM,), tl.float32)
    cache = Cache(kcache_ptr, vcache_ptr, block_table_ptr)
    out = out_ptr + at.to(tl.int64)[:, None] * SHAPE.out.stride + SHAPE.out.offset + head * SHAPE.head_dim + cols[None, :]
    sequence = tl.min(tl.where(todo, sequences, _NONE), axis=0)
    while sequence < _NONE:
        mine = todo & (sequences == sequence)
        queries = Queries(first, second, mine, positions, slopes)
        length = tl.max(tl.where(mine, positions, -1), axis=0) + 1
        softmax = _nothing_seen(BM, SHAPE.columns)
        # First come the tiles in which windows begin, then those that all queries attend to as a whole, then those that contain
        # the queries' own tokens.
        first_own = tl.min(tl.where(mine, positions, -1), axis=0) + 1
        whole, seen_by_all = first_own // BT * BT, 0
        if SHAPE.window is not None:
            earliest = tl.min(tl.where(mine, positions, _NONE), axis=0) + 1 - SHAPE.window
            begin_at = tl.maximum(earliest, 0) // BT * BT
            whole = tl.maximum(whole, begin_at)
            seen_by_all = tl.minimum((tl.maximum(length - SHAPE.window, 0) + BT - 1) // BT * BT, whole)
            for at_token in range(begin_at, seen_by_all, BT):
                tokens = at_token + tl.arange(0, BT)
                tile = _read(cache, sequence, head // SHAPE.group, tokens, tokens >= 0, SHAPE)
                softmax = _attend(softmax, queries, tile, tokens, tokens >= 0, SHAPE, False)
        for at_token in range(seen_by_all, whole, BT):
            tokens = at_token + tl.arange(0, BT)
            tile = _read(cache, sequence, head // SHAPE.group, tokens, tokens >= 0, SHAPE)
            softmax = _attend(softmax, queries, tile, tokens, tokens >= 0, SHAPE, True)
        for at_token in range(whole, length, BT):
            tokens = at_token + tl.arange(0, BT)
            there = tokens < length
            tile = _read(cache, sequence, head // SHAPE.group, tokens, there, SHAPE)
            softmax = _attend(softmax, queries, tile, tokens, there, SHAPE, False)
        _write(out, mine, softmax, BM, SHAPE)
        sequence = tl.min(tl.where(todo & (sequences > sequence), sequences, _NONE), axis=0)


@dataclass(frozen=True)
class _Attention(PagedKernel, kernels.Attention):
    """The sizes that both kernels share."""

    @property
    def tokens(self) -> int:
        """Tokens of a tile of the context; with more than 32 of a type other than float16, registers would spill."""
        return 64 if self.cache_dtype == "float16" else 32

    @property
    def one(self) -> bool:
        """Whether a program has one query and computes without tensor cores."""
        return False

    @property
    def pairs(self) -> int:
        """Pairs of a head that a program holds, padded to a size that its products allow."""
        return max(power_of_two(self.half), _LEAST)

    @property
    def columns(self) -> int:
        """Elements of a value that a program holds, padded likewise."""
        return max(power_of_two(self.head_dim), _LEAST)


@dataclass(frozen=True)
class AttendAlone(_Attention):
    """Attention for tokens that are the only ones of their sequence in a step; also appends their keys and values."""

    kind: ClassVar[str] = "attention_alone"
    k: View
    v: View
    products: bool = False  # uses tensor cores even for one query head
    warps: int = 4
    short: bool = False  # tiles of half as many tokens; the next is read while one is computed
    most_rows: int = 1  # the most rows of a step that the variant is for: the more rows, the fewer parts of a context

    function = attend_alone

    @property
    def splits(self) -> int:
        """The most parts of a context."""
        each = _PROGRAMS // (self.num_kv_heads * self.most_rows)
        return 1 if self.most_rows == STEP.sequences or not each else min(_MOST_SPLITS, 1 << each.bit_length() - 1)

    def alternatives(self) -> tuple[AttendAlone, ...]:
        if self.products or self.warps != 4 or self.short:
            return ()
        others = [replace(self, warps=8)]
        if self.one:
            others += [replace(self, products=True), replace(self, short=True)]
        return tuple(others)

    @property
    def tokens(self) -> int:
        spills = self.cache_dtype == "float32" and not self.one
        return super().tokens // (2 if self.short or spills else 1)

    def variants(self) -> Sequence[tuple[int | None, AttendAlone]]:
        """One variant for each number of parts."""
        kernels = {kernel.splits: kernel for kernel in (replace(self, most_rows=rows) for rows in _ROWS)}
        *bounded, last = sorted(kernels.values(), key=lambda kernel: kernel.most_rows)
        return [*((kernel.most_rows, kernel) for kernel in bounded), (None, last)]

    @property
    def members(self) -> int:
        """Query heads that a program holds."""
        return 1 if self.one else max(power_of_two(self.group), _LEAST)

    @property
    def one(self) -> bool:
        return self.group == 1 and not self.products

    def pointers(self) -> Pointers:
        rows, q, *others = super().pointers()
        return (rows, q, ("k", "float32"), ("v", "float32"), *others, ("parts", "float32"), ("tickets", "int32"))

    def workspaces(self) -> tuple[Workspace, ...]:
        size = self.group * (self.columns + 2)
        split = [kernel for _, kernel in self.variants() if kernel.splits > 1]
        parts = max((kernel.splits * kernel.most_rows for kernel in split), default=1)
        rows = max((kernel.most_rows for kernel in split), default=1)
        return Workspace(4 * self.num_kv_heads * parts * size, False), Workspace(4 * self.num_kv_heads * rows, True)

    def start(self) -> Start:
        return Start((1, self.num_kv_heads, self.splits), 1, self.warps, 2)


@dataclass(frozen=True)
class AttendRuns(_Attention):
    """Attention for tokens of sequences that have several tokens in a step."""

    kind: ClassVar[str] = "attention_runs"
    function = attend_runs

    large: bool = False  # twice as many queries, for which some architectures lack registers

    @property
    def rows(self) -> int:
        """Rows of a tile of queries; in float32, more would spill registers."""
        return (64 if self.cache_dtype != "float32" else 16) * (2 if self.large else 1)

    def alternatives(self) -> tuple[AttendRuns, ...]:
        return (replace(self, large=True),) if self.tensor_cores() and not self.large else ()

    def tensor_cores(self) -> bool:
        return self.cache_dtype != "float32"

    def start(self) -> Start:
        warps = 8 if self.tensor_cores() and self.head_dim >= 32 else 4 if self.head_dim >= 64 else 2  # others spill registers
        return Start((1, self.num_heads, 1), self.rows, warps, 2)
