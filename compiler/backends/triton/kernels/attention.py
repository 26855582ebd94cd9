"""Causal attention over the paged cache: one kernel for tokens that are alone in their sequence's part of a step, as when
decoding, whose context is split among programs; one for runs of tokens of one sequence, as of a prompt.

Every step may hold both sorts of tokens; each kernel leaves the other's alone. Products are computed in float16 with float32
sums where the cache is float16 or int8, and in float32 where it is float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import triton
import triton.language as tl

from belle_compile.compiler.backends.program import kernels
from belle_compile.compiler.backends.program.kernel import Pointers, View, Workspace
from belle_compile.compiler.backends.triton.kernels.base import STEP, Kernel, Start, of_view, power_of_two
from belle_compile.compiler.backends.triton.kernels.cache import append, of_cache, read_tokens, tokens_of, turned
from belle_compile.compiler.backends.triton.kernels.device import await_earlier, begin, let_next_start

_LEAST = 16  # rows, columns and contraction of the smallest product that tensor cores compute
_PROGRAMS = 1024  # that decoding is to be split into
_MOST_SPLITS = 16  # of a context: the last program to be done reads all parts
_ROWS = (1, 2, 4, 8, 16, 32, STEP.sequences)
_NONE = tl.constexpr(2147483647)  # in place of a sequence
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _is_alone(sequences_ptr, at, sequence, rows, inside):
    """Whether the tokens before and after are of other sequences."""
    before = tl.load(sequences_ptr + at - 1, mask=(at > 0) & inside, other=-1)
    after = tl.load(sequences_ptr + at + 1, mask=(at + 1 < rows) & inside, other=-1)
    return (before != sequence) & (after != sequence)


@triton.jit
def _read(kcache_ptr, vcache_ptr, block_table_ptr, sequence, head, tokens, there, pairs, cols, HALF: tl.constexpr,
          HEAD_DIM: tl.constexpr, MAX_BLOCKS: tl.constexpr, BLOCK_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
          SCALES: tl.constexpr):  # fmt: skip
    """A head of some tokens of a sequence: both halves of keys, and values."""
    places, scales = tokens_of(block_table_ptr, sequence, tokens, there, head, HEAD_DIM, MAX_BLOCKS, BLOCK_STRIDE, HEAD_STRIDE,
                               SCALES)  # fmt: skip
    k_first = read_tokens(kcache_ptr, places, scales, pairs, there, pairs < HALF, SCALES)
    k_second = read_tokens(kcache_ptr, places + HALF, scales, pairs, there, pairs < HALF, SCALES)
    return k_first, k_second, read_tokens(vcache_ptr, places, scales, cols, there, cols < HEAD_DIM, SCALES)


@triton.jit
def _attend(first, second, most, total, values, slopes, last, tokens, there, mine, k_first, k_second, v, SCALE: tl.constexpr,
            ONE: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    """One tile of the context: online softmax of queries [rows, .] over tokens, in powers of two. `ONE` is for a single query:
    products without tensor cores. With `ALL` every query attends to every token."""
    if ONE:
        scores = tl.sum(k_first * first, axis=1)[None, :] + tl.sum(k_second * second, axis=1)[None, :]
    else:
        kind = k_first.dtype
        scores = tl.dot(first.to(kind), tl.trans(k_first), input_precision="ieee")
        scores = tl.dot(second.to(kind), tl.trans(k_second), scores, input_precision="ieee")
    scores = scores * (SCALE * _LOG2E)
    if slopes is not None:
        scores += (slopes * _LOG2E)[:, None] * tokens.to(tl.float32)[None, :]
    if ALL:
        peak = tl.maximum(most, tl.max(scores, axis=1))
        safe = peak
    else:
        scores = tl.where(mine[:, None] & there[None, :] & (tokens[None, :] <= last[:, None]), scores, float("-inf"))
        peak = tl.maximum(most, tl.max(scores, axis=1))
        # A row that has seen nothing yet has no peak; its sums are zeros, and its powers become zeros too.
        safe = tl.where(peak == float("-inf"), 0.0, peak)
    factor = tl.exp2(most - safe)
    powers = tl.exp2(scores - safe[:, None])
    if ONE:
        values = values * factor[:, None] + tl.sum(v.to(tl.float32) * tl.trans(powers), axis=0)[None, :]
    else:
        values = tl.dot(powers.to(v.dtype), v, values * factor[:, None], input_precision="ieee")
    return peak, total * factor + tl.sum(powers, axis=1), values


@triton.jit
def attend_alone(rows_ptr, q_ptr, k_ptr, v_ptr, positions_ptr, sequences_ptr, block_table_ptr, cos_sin_ptr, slopes_ptr,
                 kcache_ptr, vcache_ptr, out_ptr, parts_ptr, tickets_ptr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
                 BG: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
                 SPLITS: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, MAX_BLOCKS: tl.constexpr,
                 BLOCK_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, SCALES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
                 Q_STRIDE: tl.constexpr, Q_OFFSET: tl.constexpr, K_STRIDE: tl.constexpr, K_OFFSET: tl.constexpr,
                 V_STRIDE: tl.constexpr, V_OFFSET: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_OFFSET: tl.constexpr,
                 ONE: tl.constexpr, EARLY: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A program has the query heads of a key/value head of one token, and a part of its context; that of the last part has the
    token's own key and value, and appends them. The last one to be done puts the parts together."""
    let_next_start(OVERLAP)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # At once, since each takes as long as the way to memory is; there is room for all rows that are started.
    rows = tl.load(rows_ptr)
    sequence = tl.load(sequences_ptr + row)
    before = tl.load(sequences_ptr + tl.maximum(row - 1, 0))
    after = tl.load(sequences_ptr + tl.minimum(row + 1, tl.num_programs(0) - 1))
    position = tl.load(positions_ptr + row)
    tiles = tl.maximum((position + BT - 1) // BT, 1)
    each = (tiles + SPLITS - 1) // SPLITS
    parts = (tiles + each - 1) // each
    if (row >= rows) | ((row > 0) & (before == sequence)) | ((row + 1 < rows) & (after == sequence)) | (split >= parts):
        await_earlier(OVERLAP)
        return
    members, pairs, cols = tl.arange(0, BG), tl.arange(0, BH), tl.arange(0, BD)
    mine = members < GROUP
    at = row.to(tl.int64)
    heads = head * GROUP + members
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads, mask=mine, other=0.0)
    first_tile, last_tile = split * each, tl.minimum(split * each + each, tiles)
    tokens, end = first_tile * BT + tl.arange(0, BT), tl.minimum(position, last_tile * BT)
    if ONE:  # earlier steps wrote the keys and values of tokens before, so the first tile can be on its way already
        k_first, k_second, v = _read(kcache_ptr, vcache_ptr, block_table_ptr, sequence, head, tokens, tokens < end, pairs, cols,
                                     HALF, HEAD_DIM, MAX_BLOCKS, BLOCK_STRIDE, HEAD_STRIDE, SCALES)  # fmt: skip
    await_earlier(OVERLAP)
    first, second = turned(q_ptr, cos_sin_ptr, at * Q_STRIDE + Q_OFFSET + heads * HEAD_DIM,
                             at * TABLE_STRIDE + members * 0, mine, pairs, pairs < HALF, HALF)  # fmt: skip
    most = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    values = tl.zeros((BG, BD), tl.float32)
    if split == parts - 1:
        own = head + tl.arange(0, 1)
        place = at * TABLE_STRIDE + own * 0
        k_own = at * K_STRIDE + K_OFFSET + own * HEAD_DIM
        new_first, new_second = turned(k_ptr, cos_sin_ptr, k_own, place, own >= 0, pairs, pairs < HALF, HALF)
        new = tl.load(v_ptr + at * V_STRIDE + V_OFFSET + own[:, None] * HEAD_DIM + cols[None, :],
                      mask=(cols < HEAD_DIM)[None, :], other=0.0)  # fmt: skip
        new_first, new_second, new = append(kcache_ptr, vcache_ptr, block_table_ptr, new_first, new_second, new, sequence,
                                            position, own, pairs, cols, own >= 0, HEAD_DIM, HALF, MAX_BLOCKS, BLOCK_STRIDE,
                                            HEAD_STRIDE, SCALES)  # fmt: skip
        most = tl.sum(first * new_first + second * new_second, axis=1) * (SCALE * _LOG2E)
        if slopes is not None:
            most += slopes * _LOG2E * position.to(tl.float32)
        total = tl.full((BG,), 1.0, tl.float32)
        values = tl.broadcast_to(new, (BG, BD))
    last = position + members * 0
    for _ in range(first_tile, last_tile):
        if EARLY:
            coming = tokens + BT
            next_first, next_second, next_v = _read(
                kcache_ptr, vcache_ptr, block_table_ptr, sequence, head, coming, coming < end, pairs, cols, HALF, HEAD_DIM,
                MAX_BLOCKS, BLOCK_STRIDE, HEAD_STRIDE, SCALES)  # fmt: skip
        if not ONE:  # what is read for tensor cores is fetched some tiles ahead
            k_first, k_second, v = _read(kcache_ptr, vcache_ptr, block_table_ptr, sequence, head, tokens, tokens < end, pairs,
                                         cols, HALF, HEAD_DIM, MAX_BLOCKS, BLOCK_STRIDE, HEAD_STRIDE, SCALES)  # fmt: skip
        most, total, values = _attend(first, second, most, total, values, slopes, last, tokens, tokens < end, mine, k_first,
                                      k_second, v, SCALE, ONE, False)  # fmt: skip
        tokens += BT
        if EARLY:
            k_first, k_second, v = next_first, next_second, next_v
        elif ONE:
            k_first, k_second, v = _read(kcache_ptr, vcache_ptr, block_table_ptr, sequence, head, tokens, tokens < end, pairs,
                                         cols, HALF, HEAD_DIM, MAX_BLOCKS, BLOCK_STRIDE, HEAD_STRIDE, SCALES)  # fmt: skip
    out = out_ptr + at * OUT_STRIDE + OUT_OFFSET + heads[:, None] * HEAD_DIM + cols[None, :]
    written = mine[:, None] & (cols < HEAD_DIM)[None, :]
    if parts == 1:
        tl.store(out, tl.div_rn(values, tl.broadcast_to(tl.where(mine, total, 1.0)[:, None], (BG, BD))), mask=written)
        return
    # Parts: values [SPLITS, GROUP, BD] of a token and head, then peaks and totals.
    size: tl.constexpr = GROUP * (BD + 2)
    pair = row * KV_HEADS + head
    part = parts_ptr + (pair * SPLITS + split).to(tl.int64) * size
    tl.store(part + members[:, None] * BD + cols[None, :], values, mask=mine[:, None])
    tl.store(part + GROUP * BD + members, most, mask=mine)
    tl.store(part + GROUP * BD + GROUP + members, total, mask=mine)
    tl.debug_barrier()  # all threads have written before one of them says so
    ticket = tl.atomic_add(tickets_ptr + pair, 1, sem="acq_rel")
    if ticket == parts - 1:
        tl.store(tickets_ptr + pair, 0)
        most = tl.full((BG,), float("-inf"), tl.float32)
        total = tl.zeros((BG,), tl.float32)
        values = tl.zeros((BG, BD), tl.float32)
        for other in range(0, parts):
            part = parts_ptr + (pair * SPLITS + other).to(tl.int64) * size
            peak = tl.load(part + GROUP * BD + members, mask=mine, other=float("-inf"), cache_modifier=".cg")
            larger = tl.maximum(most, peak)
            safe = tl.where(larger == float("-inf"), 0.0, larger)
            old, new = tl.exp2(most - safe), tl.exp2(peak - safe)
            added = tl.load(part + GROUP * BD + GROUP + members, mask=mine, other=0.0, cache_modifier=".cg")
            total = total * old + added * new
            place = part + members[:, None] * BD + cols[None, :]
            found = tl.load(place, mask=mine[:, None], other=0.0, cache_modifier=".cg")
            values = values * old[:, None] + found * new[:, None]
            most = larger
        tl.store(out, tl.div_rn(values, tl.broadcast_to(tl.where(mine, total, 1.0)[:, None], (BG, BD))), mask=written)


@triton.jit
def attend_runs(rows_ptr, q_ptr, positions_ptr, sequences_ptr, block_table_ptr, cos_sin_ptr, slopes_ptr, kcache_ptr,
                vcache_ptr, out_ptr, GROUP: tl.constexpr, BM: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr,
                BD: tl.constexpr, BT: tl.constexpr, SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, MAX_BLOCKS: tl.constexpr,
                BLOCK_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, SCALES: tl.constexpr, TABLE_STRIDE: tl.constexpr,
                Q_STRIDE: tl.constexpr, Q_OFFSET: tl.constexpr, OUT_STRIDE: tl.constexpr,
                OUT_OFFSET: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """A program has one query head of BM neighbouring tokens, and takes the sequences among them one after the other."""
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
    pairs, cols = tl.arange(0, BH), tl.arange(0, BD)
    place = at.to(tl.int64) * Q_STRIDE + Q_OFFSET + head * HEAD_DIM
    first, second = turned(q_ptr, cos_sin_ptr, place, at.to(tl.int64) * TABLE_STRIDE, inside, pairs, pairs < HALF, HALF)
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + head) + tl.zeros((BM,), tl.float32)
    out = out_ptr + at.to(tl.int64)[:, None] * OUT_STRIDE + OUT_OFFSET + head * HEAD_DIM + cols[None, :]
    sequence = tl.min(tl.where(todo, sequences, _NONE), axis=0)
    while sequence < _NONE:
        mine = todo & (sequences == sequence)
        length = tl.max(tl.where(mine, positions, -1), axis=0) + 1
        most = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        values = tl.zeros((BM, BD), tl.float32)
        # Tiles that all queries attend to as a whole come first, then those that have the queries' own tokens.
        first_own = tl.min(tl.where(mine, positions, -1), axis=0) + 1
        whole = first_own // BT * BT
        for at_token in range(0, whole, BT):
            tokens = at_token + tl.arange(0, BT)
            k_first, k_second, v = _read(kcache_ptr, vcache_ptr, block_table_ptr, sequence, head // GROUP, tokens, tokens >= 0,
                                         pairs, cols, HALF, HEAD_DIM, MAX_BLOCKS, BLOCK_STRIDE, HEAD_STRIDE,
                                         SCALES)  # fmt: skip
            most, total, values = _attend(first, second, most, total, values, slopes, positions, tokens, tokens >= 0, mine,
                                          k_first, k_second, v, SCALE, False, True)  # fmt: skip
        for at_token in range(whole, length, BT):
            tokens = at_token + tl.arange(0, BT)
            there = tokens < length
            k_first, k_second, v = _read(kcache_ptr, vcache_ptr, block_table_ptr, sequence, head // GROUP, tokens, there, pairs,
                                         cols, HALF, HEAD_DIM, MAX_BLOCKS, BLOCK_STRIDE, HEAD_STRIDE, SCALES)  # fmt: skip
            most, total, values = _attend(first, second, most, total, values, slopes, positions, tokens, there, mine, k_first,
                                          k_second, v, SCALE, False, False)  # fmt: skip
        divisor = tl.broadcast_to(tl.where(mine, total, 1.0)[:, None], (BM, BD))
        tl.store(out, tl.div_rn(values, divisor), mask=mine[:, None] & (cols < HEAD_DIM)[None, :])
        sequence = tl.min(tl.where(todo & (sequences > sequence), sequences, _NONE), axis=0)


@dataclass(frozen=True)
class _Attention(Kernel, kernels.Attention):
    """What both kernels share: tiles of the context, and constants."""

    @property
    def tokens(self) -> int:
        """Of a tile of the context; more of another type than float16 spill registers."""
        return 64 if self.cache_dtype == "float16" else 32

    def constants(self) -> Mapping[str, Any]:
        half = self.head_dim // 2
        cache = of_cache(self.num_layers, self.num_kv_heads, self.head_dim, self.cache_dtype)
        return {
            "cos_sin_ptr": None, "slopes_ptr": None, **cache, "GROUP": self.group, "HALF": half,
            "BH": max(power_of_two(half), _LEAST), "BD": max(power_of_two(self.head_dim), _LEAST), "BT": self.tokens,
            "SCALE": self.scale, "MAX_BLOCKS": self.max_blocks, "TABLE_STRIDE": View.of_width(self.head_dim).stride,
            **of_view("Q", self.q), **of_view("OUT", self.out),
        }  # fmt: skip


@dataclass(frozen=True)
class AttendAlone(_Attention):
    """For tokens that are the only ones of their sequence in a step; their keys and values are appended too."""

    kind: ClassVar[str] = "attention_alone"
    k: View
    v: View
    products: bool = False  # by tensor cores even where there is one query head
    warps: int = 4
    short: bool = False  # tiles of half as many tokens, of which the next is on its way while one is worked on
    most_rows: int = 1  # that it is for: with more of them, contexts are split in fewer parts

    function = attend_alone

    @property
    def splits(self) -> int:
        """Parts of the longest context."""
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
        """One for each number of parts."""
        kernels = {kernel.splits: kernel for kernel in (replace(self, most_rows=rows) for rows in _ROWS)}
        *bounded, last = sorted(kernels.values(), key=lambda kernel: kernel.most_rows)
        return [*((kernel.most_rows, kernel) for kernel in bounded), (None, last)]

    @property
    def members(self) -> int:
        """Query heads of a program."""
        return 1 if self.one else max(power_of_two(self.group), _LEAST)

    @property
    def one(self) -> bool:
        """Whether it computes without tensor cores."""
        return self.group == 1 and not self.products

    def pointers(self) -> Pointers:
        rows, q, *others = super().pointers()
        return (rows, q, ("k", "float32"), ("v", "float32"), *others, ("parts", "float32"), ("tickets", "int32"))

    def workspaces(self) -> tuple[Workspace, ...]:
        size = self.group * (max(power_of_two(self.head_dim), _LEAST) + 2)
        split = [kernel for _, kernel in self.variants() if kernel.splits > 1]
        parts = max((kernel.splits * kernel.most_rows for kernel in split), default=1)
        rows = max((kernel.most_rows for kernel in split), default=1)
        return Workspace(4 * self.num_kv_heads * parts * size, False), Workspace(4 * self.num_kv_heads * rows, True)

    def start(self) -> Start:
        return Start((1, self.num_kv_heads, self.splits), 1, self.warps, 2)

    def constants(self) -> Mapping[str, Any]:
        own = {"KV_HEADS": self.num_kv_heads, "BG": self.members, "SPLITS": self.splits, "ONE": self.one, "EARLY": self.short}
        return {**super().constants(), **own, **of_view("K", self.k), **of_view("V", self.v)}


@dataclass(frozen=True)
class AttendRuns(_Attention):
    """For tokens of which a step has several of one sequence."""

    kind: ClassVar[str] = "attention_runs"
    function = attend_runs

    large: bool = False  # a tile of more queries, which some architectures have no registers for

    @property
    def rows(self) -> int:
        """Of a tile of queries; more in float32 spill registers."""
        return (64 if self.cache_dtype != "float32" else 16) * (2 if self.large else 1)

    def alternatives(self) -> tuple[AttendRuns, ...]:
        return (replace(self, large=True),) if self.tensor_cores() and not self.large else ()

    def tensor_cores(self) -> bool:
        return self.cache_dtype != "float32"

    def start(self) -> Start:
        warps = 8 if self.tensor_cores() and self.head_dim >= 32 else 4 if self.head_dim >= 64 else 2  # others spill registers
        return Start((1, self.num_heads, 1), self.rows, warps, 2)

    def constants(self) -> Mapping[str, Any]:
        return {**super().constants(), "BM": self.rows}
