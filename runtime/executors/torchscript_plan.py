"""The plan of a step's attention: which queries are computed together, and over which blocks of the KV cache.

Every token belongs to a tile: the positions of its sequence from a multiple of the tile's size on. All rows of a tile are
computed, also those whose tokens are not in the step and whose results are dropped, over a number of keys that depends on the
tile alone. So each product has one shape, and the bits of a token do not depend on what else is in a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.executors.batch import StepBatch
from belle_compile.runtime.program import BLOCK_SIZE

Indices = NDArray[np.int64]

_FINE, _COARSE = 64, 256  # keys of sequences of up to 512, and of longer ones, are padded to multiples of these
GATHERED_BYTES = 2 << 20  # of keys of several sequences that are read together: more would leave the processor's cache


@dataclass(frozen=True)
class StepPlan:
    """The inputs of a module beside those of the graph, all int64.

    `slots` [T]: the place of each token in the KV cache, block * BLOCK_SIZE + offset. `lengths` [T]: the length of its sequence
    at the end of the step. A cell is a position of a tile: `cells` [C] is the token in it, or any other one where it has none;
    `cell_positions` [C] its position, and `cell_of` [T] the cell of each token. `groups` [G, 3]: for each group the numbers of
    its tiles, sequences (1, or one for each tile) and keys; cells are in the order of groups, and so are `blocks`, which are
    those of each sequence of each group.
    """

    slots: Indices
    lengths: Indices
    cells: Indices
    cell_positions: Indices
    cell_of: Indices
    groups: Indices
    blocks: Indices

    def arrays(self) -> tuple[Indices, ...]:
        """The inputs in the order in which a module takes them."""
        return self.slots, self.lengths, self.cells, self.cell_positions, self.cell_of, self.groups, self.blocks


def padded_keys(positions: int) -> int:
    """The number of keys that are read for a tile of which `positions` is the last position plus 1."""
    step = _FINE if positions <= 2 * _COARSE else _COARSE
    return -(-positions // step) * step


def plan_step(batch: StepBatch, tile: int, kv_heads: int, head_dim: int) -> StepPlan:
    """Plan the attention of a step; `tile` is the number of positions of a tile."""
    tokens = batch.tokens
    positions = batch.positions[:tokens].astype(np.int64)
    sequences = batch.sequences[:tokens].astype(np.int64)
    numbers = positions // tile
    new_tile = np.ones(tokens, np.bool_)
    new_tile[1:] = (numbers[1:] != numbers[:-1]) | (sequences[1:] != sequences[:-1])
    firsts = np.flatnonzero(new_tile)  # the first token of each tile
    tile_of = np.cumsum(new_tile) - 1

    order: list[int] = []  # tiles in the order of cells
    groups: list[tuple[int, int, int]] = []
    blocks: list[Indices] = []
    last = np.zeros(batch.max_sequences, np.int64)
    np.maximum.at(last, sequences, positions)
    for tiles, shared, keys in _groups(sequences[firsts].tolist(), numbers[firsts].tolist(), tile, 4 * kv_heads * head_dim):
        # PyTorch divides the products of a group among threads, but a product that is alone would be divided in itself, with
        # other bits: it is computed twice.
        members = tiles * 2 if len(tiles) * kv_heads == 1 else tiles
        order += members
        rows = [int(sequences[firsts[one]]) for one in (members[:1] if shared else members)]
        groups.append((len(members), len(rows), keys))
        blocks += [_blocks_of(batch, row, int(last[row]), keys) for row in rows]

    place_of = np.zeros(len(firsts), np.int64)
    place_of[order] = np.arange(len(order))  # of a tile that is computed twice, the second one
    tile_firsts = firsts[order]
    cell_positions = (numbers[tile_firsts, None] * tile + np.arange(tile)).reshape(-1)
    cell_of = place_of[tile_of] * tile + positions % tile
    cells = np.repeat(tile_firsts, tile)
    cells[cell_of] = np.arange(tokens)
    table = batch.block_table[sequences, positions // BLOCK_SIZE].astype(np.int64)
    return StepPlan(
        slots=table * BLOCK_SIZE + positions % BLOCK_SIZE,
        lengths=last[sequences] + 1,
        cells=cells,
        cell_positions=cell_positions,
        cell_of=cell_of,
        groups=np.asarray(groups, np.int64),
        blocks=np.concatenate(blocks),
    )


def _groups(
    sequences: Sequence[int], numbers: Sequence[int], tile: int, key_bytes: int
) -> Iterator[tuple[list[int], bool, int]]:
    """Divide tiles, each given by its sequence and its number there, into groups that read the same number of keys. Yields the
    indices of a group's tiles, whether they are several of one sequence, which share its keys, and the number of keys."""
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (sequence, number) in enumerate(zip(sequences, numbers, strict=True)):
        alike[padded_keys((number + 1) * tile), sequence].append(index)
    alone: dict[int, list[int]] = defaultdict(list)
    for (keys, _), tiles in alike.items():
        if len(tiles) > 1:
            yield tiles, True, keys
        else:
            alone[keys] += tiles
    for keys, tiles in alone.items():
        most = max(1, GATHERED_BYTES // (keys * key_bytes))
        for start in range(0, len(tiles), most):
            yield tiles[start : start + most], False, keys


def _blocks_of(batch: StepBatch, row: int, last: int, keys: int) -> Indices:
    """The blocks of the first `keys` positions of a sequence. Blocks behind its `last` position, whose keys are masked, are
    replaced by its first one."""
    used = min(last // BLOCK_SIZE + 1, keys // BLOCK_SIZE)
    blocks = np.full(keys // BLOCK_SIZE, batch.block_table[row, 0], np.int64)
    blocks[:used] = batch.block_table[row, :used]
    return blocks
