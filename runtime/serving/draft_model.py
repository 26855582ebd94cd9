"""A small model that guesses the next tokens of answers, which the engine's model verifies in one step.

Speculative decoding after Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (ICML 2023), except
that the answer's tokens are always those that the engine's model chooses with the request's own random numbers: a guess is
right where it is that token. So the answer is the one without guesses, token for token. A guess is sampled from the draft
model's logits with the same parameters and the same random number, which makes it right more often than the likeliest token
would be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import Executor
from belle_compile.runtime.serving.draft_lengths import MOST_DRAFTED, Candidate, DraftLengths
from belle_compile.runtime.serving.kv_blocks import BlockPool, BlockTable, blocks_for
from belle_compile.runtime.serving.prefix_cache import Chain, PrefixCache
from belle_compile.runtime.serving.request import EngineIdentity
from belle_compile.runtime.serving.sampling import Sampler
from belle_compile.runtime.serving.sequence import Sequence


@dataclass(frozen=True)
class Wish:
    """An answer that may be guessed ahead by up to `most` tokens in the next step."""

    sequence: Sequence
    most: int


@dataclass(eq=False)
class _Follower:
    """An answer in the draft model's cache: the keys and values of its first `computed` tokens are cached."""

    sequence: Sequence
    slot: int
    table: BlockTable
    chain: Chain | None
    computed: int
    guesses: list[int] = field(default_factory=list)  # of the last step, behind its first `length` tokens
    length: int = 0
    cached_guesses: int = 0  # of them, those whose keys and values are cached


class _Part(NamedTuple):
    """Tokens of an answer in a step of the draft model, from the position `first` on, and what guesses the token after them."""

    follower: _Follower
    first: int
    tokens: NDArray[np.integer[Any]]
    sampler: Sampler | None


class DraftModel:
    """Guesses ahead for answers with an executor of its own, all in one batch; used by the step loop's thread alone.

    Its cache holds the answers' tokens like that of the engine's model, and reuses prefixes like it. What it cached for guesses
    that were wrong is overwritten. An answer for which there is no row or no block is not guessed; one that is preempted or has
    ended gives up both. Where guesses do not pay, none are made, and the cache is not kept up with the answer.
    """

    def __init__(
        self,
        executor: Executor,
        identity: EngineIdentity,
        lengths: DraftLengths | None = None,
        *,
        prefix_cache: bool = True,
        memory_bytes: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`identity` is the draft engine's, for the digests of its prefix cache. `memory_bytes` is what it takes in all."""
        self.executor, self.memory_bytes = executor, memory_bytes
        self.lengths = lengths or DraftLengths()
        self._clock = clock
        batch, blocks = executor.batch, executor.num_blocks
        self._pool = BlockPool(blocks, blocks if batch.blocks_per_row else None)
        self._prefixes = PrefixCache(self._pool, identity) if prefix_cache else None
        self._most_rows = min(batch.max_sequences, batch.max_rows, batch.max_tokens)
        self._forget()

    def reset(self) -> None:
        """Forget all answers and all that is cached: an error has left it open what is."""
        self._pool.reset()
        if self._prefixes:
            self._prefixes.reset()
        self._forget()

    def _forget(self) -> None:
        self._followers: dict[Sequence, _Follower] = {}
        self._free_slots = list(range(self._most_rows - 1, -1, -1))
        self.executor.batch.copies = self._prefixes.copies if self._prefixes else []

    def release(self, sequence: Sequence) -> None:
        """Give up the row and the blocks of an answer, if it has any."""
        follower = self._followers.pop(sequence, None)
        if follower is None:
            return
        self._settle(follower)
        if self._prefixes and follower.chain:
            self._prefixes.release(follower.chain, follower.computed)
        else:
            follower.table.free()
        self._free_slots.append(follower.slot)
        sequence.guesses = []

    def close(self) -> None:
        """Free the memory."""
        self.executor.close()

    def guess(self, wishes: Iterable[Wish], answers: int, room: int) -> None:
        """Leave guesses in `Sequence.guesses` of the answers for which they pay, at most `room` together.

        `answers` is the number of tokens that the step has without guesses. Raises `EngineError` where the draft model fails.
        """
        followed: list[tuple[Wish, Candidate]] = []
        for wish in wishes:
            sequence = wish.sequence
            sequence.guesses = []
            follower = self._followers.get(sequence)
            if follower:
                self._settle(follower)
            most = min(wish.most, MOST_DRAFTED, self.executor.batch.max_context - sequence.length)
            backlog = sequence.length - (follower.computed if follower else 0)
            left = sequence.max_length - sequence.length
            followed.append((wish, Candidate(sequence.draft_acceptance, max(0, most), left, backlog)))
        counts = self.lengths.choose([candidate for _, candidate in followed], answers, room)
        chosen = [
            (follower, count)
            for (wish, _), count in zip(followed, counts, strict=True)
            if count and (follower := self._follow(wish.sequence, count))
        ]
        if not chosen:
            return
        try:
            self._guess_all(self._catch_up(chosen))
        except EngineError as error:
            found = f"{error.what} ({error.found})" if error.found else error.what
            raise EngineError(
                "draft", "the draft model failed", found=found, remedy="load the engine without --draft"
            ) from error
        for follower, _ in chosen:
            follower.sequence.guesses = follower.guesses

    def _settle(self, follower: _Follower) -> None:
        """Look up which of the last guesses the answer has taken. The cache holds those of its tokens that were guessed."""
        sequence = follower.sequence
        if not follower.guesses:
            return
        tokens = sequence.tokens[follower.length : sequence.length].tolist()
        right = 0
        while right < min(len(tokens), len(follower.guesses)) and tokens[right] == follower.guesses[right]:
            right += 1
        follower.computed = min(follower.length + min(right, follower.cached_guesses), sequence.length - 1)
        tried = min(len(follower.guesses), len(tokens))  # as many as there was room for, and until the answer ended
        if tried:
            self.lengths.note(sequence.draft_acceptance, tried, right)
        follower.guesses, follower.cached_guesses = [], 0

    def _follow(self, sequence: Sequence, count: int) -> _Follower | None:
        """Let the cache have room for an answer and for its guesses; returns None where there is none."""
        follower, needed = self._followers.get(sequence), sequence.length + count
        if follower is None:
            follower = self._begin(sequence, needed)
        if follower is None or follower.table.grow(needed):
            return follower
        self.release(sequence)  # others can go on in its blocks
        return None

    def _begin(self, sequence: Sequence, needed: int) -> _Follower | None:
        if not self._free_slots:
            return None
        slot, batch = self._free_slots[-1], self.executor.batch
        if blocks_for(needed) > self._pool.references_left:
            return None
        table, chain, found = BlockTable(self._pool, batch.block_table[slot]), None, 0
        if self._prefixes:
            chain = self._prefixes.chain(sequence.tokens, sequence.salt)
            prefix = self._prefixes.match(chain, sequence.length, sequence.length - 1)
            if not self._prefixes.adopt(chain, table, prefix):
                return None
            found = prefix.tokens
        self._free_slots.pop()
        batch.prompt_lengths[slot] = batch.max_context  # so that several tokens of an answer may be in one step
        follower = _Follower(sequence, slot, table, chain, found)
        self._followers[sequence] = follower
        return follower

    def _catch_up(self, chosen: List[tuple[_Follower, int]]) -> list[tuple[_Follower, int, Sampler]]:
        """Compute what the cache lacks of the answers, as much as a step takes; make the first guess of those that are known
        then. Returns those with further guesses to make."""
        batch, room = self.executor.batch, self.executor.batch.max_tokens
        parts: list[_Part] = []
        guessing: list[tuple[_Follower, int, Sampler]] = []
        for follower, count in chosen:
            sequence, first = follower.sequence, follower.computed
            stop = min(sequence.length, first + room)
            sampler = None
            if stop == sequence.length and sequence.sampler_ahead:
                sampler = sequence.sampler_ahead()
                guessing.append((follower, count, sampler))
            if stop > first:
                parts.append(_Part(follower, first, sequence.tokens[first:stop], sampler))
                room -= stop - first
            follower.length = sequence.length
        self._run(parts)
        batch.copies.clear()
        for part in parts:
            follower = part.follower
            follower.computed += len(part.tokens)
            if self._prefixes and follower.chain:
                self._prefixes.publish(follower.chain, follower.computed)
        return guessing

    def _guess_all(self, guessing: list[tuple[_Follower, int, Sampler]]) -> None:
        """Make the guesses after the first one of each answer."""
        while guessing := [
            (follower, count, sampler)
            for follower, count, sampler in guessing
            if len(follower.guesses) < count and not sampler.ends(follower.guesses[-1])
        ]:
            self._run(
                [
                    _Part(follower, follower.length + len(follower.guesses) - 1, np.array(follower.guesses[-1:]), sampler)
                    for follower, _, sampler in guessing
                ]
            )
            for follower, _, _ in guessing:
                follower.cached_guesses += 1

    def _run(self, parts: List[_Part]) -> None:
        """Run a step of the draft model, and guess the token after each part that has a sampler."""
        batch, started = self.executor.batch, self._clock()
        batch.tokens = batch.rows = 0
        for follower, first, tokens, sampler in parts:
            start, stop = batch.tokens, batch.tokens + len(tokens)
            batch.token_ids[start:stop] = tokens
            batch.positions[start:stop] = np.arange(first, first + len(tokens))
            batch.sequences[start:stop] = follower.slot
            batch.tokens = stop
            if sampler:
                batch.logit_rows[batch.rows] = stop - 1
                if batch.candidates is not None:
                    batch.candidates[batch.rows] = sampler.candidates()
                batch.rows += 1
        logits = self.executor.step(batch)
        guessing = [part for part in parts if part.sampler]
        for part, row in zip(guessing, logits, strict=False):
            assert part.sampler is not None, "chosen above"
            part.follower.guesses.append(part.sampler.sample(row))
        self.lengths.draft.add(batch.tokens, self._clock() - started)
