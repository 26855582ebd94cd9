"""Reuse of cached keys and values by sequences that begin with the same tokens.

The keys and values of a token depend on it and on the tokens before it. So a full block is identified by a chain of SHA-256
digests: of its tokens and of the digest of the block before it, which begins with the engine and the sequence's salt. Blocks
with equal digests hold equal bits, whoever computed them; no tokens are compared.

A further block may agree with a sequence in its first tokens only. It is copied, and the sequence goes on in the copy. Such a
block may be a full one, or the last one of a sequence that has ended or whose prompt is computed, which need not be full.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.kv_blocks import BlockPool, BlockTable
from belle_compile.runtime.serving.request import EngineIdentity, encode

CHAIN_VERSION = 2
_TOKEN_BYTES = 4


@dataclass(frozen=True)
class Prefix:
    """What the cache has for the beginning of a sequence of `known` tokens; to be adopted before blocks are taken.

    The first `tokens` tokens are cached: in the full `blocks`, and the rest of them at the beginning of block `source`, which
    is to be copied (-1 for none). `pending` is the number of tokens after them that sequences under way are about to compute:
    where it is not 0, a sequence that waits for a step or two computes fewer tokens itself.
    """

    known: int
    tokens: int
    blocks: tuple[int, ...]
    source: int
    pending: int


class Chain:
    """A sequence as the prefix cache sees it: its tokens, and the digests of its blocks as far as they were needed.

    It lives as long as its sequence, which may get blocks and lose them several times.
    """

    def __init__(self, tokens: NDArray[np.int32], root: bytes) -> None:
        self.tokens = tokens  # shared with the sequence, which adds to it
        self.digests = [root]  # of the blocks before block 0, 1, ...
        self.table: BlockTable | None = None
        self.published = 0  # blocks at the beginning of `table` that are in the cache
        self.copy: tuple[int, int] | None = None  # of the first step, until it has run
        self.started = False  # whether a step of this table has run
        self.announced: list[tuple[int, int]] = []  # (first token, end) of blocks that will be computed, the last one first
        self.known = self.found = 0  # tokens when the table was adopted, and those of them that came from the cache
        self.counted = False

    def block(self, index: int, end: int) -> bytes:
        """The tokens of a block, those from token `end` on left out."""
        return self.tokens[index * BLOCK_SIZE : min((index + 1) * BLOCK_SIZE, end)].tobytes()

    def digest(self, blocks: int) -> bytes:
        """The digest of the first `blocks` blocks, whose tokens are known."""
        for index in range(len(self.digests) - 1, blocks):
            self.digests.append(hashlib.sha256(self.digests[index] + self.block(index, (index + 1) * BLOCK_SIZE)).digest())
        return self.digests[blocks]


class _Siblings:
    """Blocks that continue the same chain, ordered by their tokens, so that the one with the most tokens in common with a
    sequence is one of two neighbors."""

    def __init__(self) -> None:
        self._ordered: list[bytes] = []
        self._counts: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return len(self._ordered)

    def add(self, tokens: bytes) -> None:
        """Add a block; the same tokens may be added several times."""
        self._counts[tokens] += 1
        if self._counts[tokens] == 1:
            insort(self._ordered, tokens)

    def remove(self, tokens: bytes) -> None:
        """Remove a block once."""
        self._counts[tokens] -= 1
        if not self._counts[tokens]:
            del self._counts[tokens]
            del self._ordered[bisect_left(self._ordered, tokens)]

    def neighbors(self, tokens: bytes) -> list[bytes]:
        """The blocks before and behind the place of `tokens` in the order; `tokens` itself is behind it."""
        at = bisect_left(self._ordered, tokens)
        return self._ordered[max(at - 1, 0) : at + 1]

    def best(self, tokens: bytes) -> tuple[bytes, int]:
        """The block with the most first tokens in common, and how many."""
        counted = [(neighbor, _in_common(neighbor, tokens)) for neighbor in self.neighbors(tokens)]
        return max(counted, key=lambda pair: pair[1], default=(b"", 0))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A block in the cache: the digest of the chain before it, its tokens, and its own digest; a block that is not full has
    none."""

    parent: bytes
    tokens: bytes
    digest: bytes | None


class PrefixCache:
    """The blocks of a pool that hold known tokens' keys and values, by these tokens; used by the step loop's thread alone.

    For each sequence: `chain` once, then `match`, `adopt`, `publish` after each of its steps, and `release`, which may be
    followed by `match` again. A sequence references all blocks of its chain, and `release` gives up the last one first, so that
    the pool evicts no block before those that continue it. A sequence whose keys depend on more than its tokens, as where
    dynamic RoPE scaling applies, must not get a chain.

    A block is published once its keys and values are computed from known tokens, and is not written to from then on. If another
    sequence has published the same tokens, its block replaces the new one, whose bits are the same: so the memory is used once,
    and the blocks of a chain are always those of the cache.
    """

    def __init__(self, pool: BlockPool, engine: EngineIdentity) -> None:
        self.hits = self.queries = 0  # tokens that sequences found here, and that they looked for
        self._pool = pool
        self._engine = astuple(engine)
        self.reset()
        pool.on_eviction(self._forget)

    def reset(self) -> None:
        """Forget all blocks and all sequences, as the pool does."""
        # Copies (source block, destination block) that the next step must make before its kernels run, in this order. The
        # scheduler clears them once the step has run or failed.
        self.copies: list[tuple[int, int]] = []
        self._entries: dict[int, _Entry] = {}  # by block
        self._blocks: dict[bytes, int] = {}  # full blocks by digest
        self._by_tokens: dict[tuple[bytes, bytes], int] = {}  # blocks by the digest before them and their tokens
        self._children: dict[bytes, _Siblings] = {}  # by digest
        self._announced: dict[bytes, _Siblings] = {}  # blocks that sequences under way will compute, likewise
        self._announced_digests: Counter[bytes] = Counter()

    def chain(self, tokens: NDArray[np.int32], salt: str = "", adapter: str = "") -> Chain:
        """The chain of a sequence whose known tokens are, or will be, the first ones of `tokens`.

        Sequences with different salts or adapters share nothing.
        """
        seed = encode(("belle-prefix", CHAIN_VERSION, BLOCK_SIZE, self._engine, salt, adapter))
        return Chain(tokens, hashlib.sha256(seed).digest())

    def match(self, chain: Chain, known: int, limit: int) -> Prefix:
        """Look up the first `known` tokens of a sequence, of which at most `limit` may come from the cache.

        The limit leaves out the tokens whose logits are needed, at least the last one.
        """
        assert limit < known, "the logits after the last token are always needed"
        whole = 0
        blocks: list[int] = []
        while whole < limit // BLOCK_SIZE and (block := self._blocks.get(chain.digest(whole + 1))) is not None:
            blocks.append(block)
            whole += 1
        rest, source = self._beginning(self._children, chain, whole, limit)
        expected = whole
        while expected < limit // BLOCK_SIZE and self._expects(chain.digest(expected + 1)):
            expected += 1
        more = max(self._beginning(kind, chain, expected, limit)[0] for kind in (self._children, self._announced))
        tokens = whole * BLOCK_SIZE + rest
        found = -1 if rest == 0 else self._by_tokens[chain.digests[whole], source]
        return Prefix(known, tokens, tuple(blocks), found, expected * BLOCK_SIZE + more - tokens)

    def adopt(self, chain: Chain, table: BlockTable, prefix: Prefix) -> bool:
        """Fill an empty table with what `match` found, and announce the tokens that the sequence will compute.

        The first `prefix.tokens` tokens of the sequence are then computed, provided that the next step makes the `copies`.
        Returns False, with the table empty again, where no block is available for the copy.
        """
        assert chain.table is None and not table.blocks, "a sequence has one table, which begins empty"
        pool, copy = self._pool, None
        for block in prefix.blocks:
            table.share(block)
        if prefix.source >= 0:
            pool.acquire(prefix.source)  # and released: it is the last one to be evicted now
            pool.release(prefix.source)
            if not table.grow(prefix.tokens):
                table.free()
                return False
            if table.blocks[-1] != prefix.source:  # it is where no other block was available; then nobody else needs it
                copy = (prefix.source, table.blocks[-1])
                self.copies.append(copy)
        chain.table, chain.published, chain.copy = table, len(prefix.blocks), copy
        chain.started, chain.known, chain.found = False, prefix.known, prefix.tokens
        self._announce(chain)
        return True

    def publish(self, chain: Chain, computed: int) -> None:
        """Take notice that a step has run, after which the first `computed` tokens are known and computed.

        Blocks that have become full are published; where all tokens that were known at first are computed, so is the last
        block as far as it is filled.
        """
        if not chain.started:
            self._start(chain)
        if computed // BLOCK_SIZE > chain.published:
            self._publish_full(chain, computed)
        if chain.announced and chain.known <= computed:
            self._withdraw(chain)
            self._publish_rest(chain, computed)

    def release(self, chain: Chain, computed: int) -> None:
        """Publish what a sequence has computed by its last step, and free its table. Nothing of a step that failed is kept."""
        table = chain.table
        assert table is not None, "a sequence is released that has no blocks"
        if chain.started:
            self._publish_full(chain, computed)
            self._publish_rest(chain, computed)
        elif chain.copy in self.copies:
            self.copies.remove(chain.copy)
        self._withdraw(chain)
        table.free()
        chain.table = None

    def _start(self, chain: Chain) -> None:
        chain.started = True
        if not chain.counted:  # it is not counted again when the sequence was preempted
            chain.counted = True
            self.queries += chain.known
            self.hits += chain.found

    def _beginning(self, kind: dict[bytes, _Siblings], chain: Chain, whole: int, limit: int) -> tuple[int, bytes]:
        """The number of tokens after `whole` full blocks, below `limit`, that a block of a kind begins with, and its tokens."""
        siblings = kind.get(chain.digest(whole))
        if siblings is None:
            return 0, b""
        tokens, count = siblings.best(chain.block(whole, limit))
        return count, tokens

    def _expects(self, digest: bytes) -> bool:
        return digest in self._blocks or digest in self._announced_digests

    def _announce(self, chain: Chain) -> None:
        starts = range(chain.published * BLOCK_SIZE, chain.known, BLOCK_SIZE)
        chain.announced = [(start, min(start + BLOCK_SIZE, chain.known)) for start in reversed(starts)]
        for start, end in chain.announced:
            index = start // BLOCK_SIZE
            self._announced.setdefault(chain.digest(index), _Siblings()).add(chain.block(index, end))
            if end - start == BLOCK_SIZE:
                self._announced_digests[chain.digest(index + 1)] += 1

    def _withdraw(self, chain: Chain, blocks: int | None = None) -> None:
        """Withdraw announcements: all, or those of the first `blocks` blocks."""
        while chain.announced and (blocks is None or chain.announced[-1][0] < blocks * BLOCK_SIZE):
            start, end = chain.announced.pop()
            index = start // BLOCK_SIZE
            siblings = self._announced[chain.digest(index)]
            siblings.remove(chain.block(index, end))
            if not siblings:
                del self._announced[chain.digest(index)]
            if end - start == BLOCK_SIZE:
                self._announced_digests[digest := chain.digest(index + 1)] -= 1
                if not self._announced_digests[digest]:
                    del self._announced_digests[digest]

    def _publish_full(self, chain: Chain, computed: int) -> None:
        table = chain.table
        assert table is not None, "blocks are published that a sequence does not have"
        while chain.published < computed // BLOCK_SIZE:
            index, block = chain.published, table.blocks[chain.published]
            parent, digest = chain.digest(index), chain.digest(index + 1)
            if block in self._entries:  # its first tokens were published
                self._drop(block)
            if (published := self._blocks.get(digest)) is not None:
                table.replace(index, published)
            else:
                self._add(block, _Entry(parent, chain.block(index, computed), digest))
            chain.published += 1
        self._withdraw(chain, chain.published)

    def _publish_rest(self, chain: Chain, computed: int) -> None:
        """Publish the computed tokens of a block that is not full."""
        table, index = chain.table, chain.published
        tokens = chain.block(index, computed)
        assert table is not None, "blocks are published that a sequence does not have"
        if tokens:
            block = table.blocks[index]
            if block in self._entries:
                self._drop(block)
            self._add(block, _Entry(chain.digest(index), tokens, None))

    def _add(self, block: int, entry: _Entry) -> None:
        """Add a block, in place of one that is a beginning of it, unless it is a beginning of another itself."""
        siblings = self._children.setdefault(entry.parent, _Siblings())
        for other in siblings.neighbors(entry.tokens):
            if other.startswith(entry.tokens):
                return
            if entry.tokens.startswith(other):
                self._drop(self._by_tokens[entry.parent, other])
        siblings = self._children.setdefault(entry.parent, _Siblings())  # which is removed with the last one of them
        siblings.add(entry.tokens)
        self._entries[block] = entry
        self._by_tokens[entry.parent, entry.tokens] = block
        if entry.digest is not None:
            self._blocks[entry.digest] = block
        self._pool.keep(block)

    def _drop(self, block: int) -> None:
        """Remove a block, which is not kept any more."""
        self._forget(block)
        self._pool.discard(block)

    def _forget(self, block: int) -> None:
        """Remove a block that the pool does not keep any more."""
        entry = self._entries.pop(block)
        siblings = self._children[entry.parent]
        siblings.remove(entry.tokens)
        if not siblings:
            del self._children[entry.parent]
        del self._by_tokens[entry.parent, entry.tokens]
        if entry.digest is not None:
            del self._blocks[entry.digest]


def _in_common(first: bytes, second: bytes) -> int:
    """The number of first tokens that two blocks have in common."""
    count = 0
    while count < min(len(first), len(second)) and first[count : count + _TOKEN_BYTES] == second[count : count + _TOKEN_BYTES]:
        count += _TOKEN_BYTES
    return count // _TOKEN_BYTES
