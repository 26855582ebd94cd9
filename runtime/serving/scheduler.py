"""Continuous batching: chooses which tokens of which sequences make up the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens

import numpy as np

from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.kv_blocks import BlockPool, BlockTable, blocks_for
from belle_compile.runtime.serving.prompt_lookup import PromptLookup
from belle_compile.runtime.serving.request import Limits


class Sequence:
    """The tokens of one request: those of `prompt`, followed by those generated.

    `length` tokens are known; the keys and values of the first `computed` are cached. The sequence needs the logits after its
    tokens from index `logits_from` on: an answer needs those after its last token, from which the token for `append` is chosen;
    a prompt that is scored needs those after many of its tokens.

    With `prompt_lookup`, a step may also hold up to that many `drafted` tokens: guesses, stored in `tokens` after the known
    ones. Each needs logits too, and `append` returns whether it confirms one. Keys and values that a step cached for wrong
    guesses stay in the cache until the step that reaches their positions overwrites them. No token reads them before, since
    a token attends only to its own position and lower ones.
    """

    def __init__(
        self, prompt: Tokens[int], max_new_tokens: int, prompt_lookup: int = 0, *, logits_from: int | None = None
    ) -> None:
        self.prompt_length = len(prompt)
        self.max_length = len(prompt) + max_new_tokens
        self.tokens = np.empty(self.max_length, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.length = len(prompt)
        self.logits_from = self.length - 1 if logits_from is None else logits_from
        self.computed = 0
        self.scheduled = 0  # tokens in the step under way
        self.logit_rows = 0  # of them, tokens whose logits are needed: the last ones
        self.drafted = 0  # of those, guesses that are not confirmed
        self.lookup = PromptLookup(self.tokens, self.length, prompt_lookup) if prompt_lookup else None
        self.slot = -1  # row of the block table while the sequence is running
        self.blocks: BlockTable | None = None

    @property
    def generated(self) -> list[int]:
        """Tokens after the prompt."""
        tokens: list[int] = self.tokens[self.prompt_length : self.length].tolist()
        return tokens

    def append(self, token: int) -> bool:
        """Add the next token. Returns True if it was drafted: then it is computed, and the next row has the logits after it."""
        confirmed = self.drafted > 0 and bool(self.tokens[self.length] == token)
        self.tokens[self.length] = token
        self.logits_from = self.length
        self.length += 1
        if confirmed:
            assert self.lookup is not None, "a draft comes from a lookup"
            self.lookup.accepted += 1
            self.computed += 1
            self.drafted -= 1
        else:
            self.drafted = 0
        return confirmed


class Scheduler:
    """Admits sequences in order of arrival, and fills steps with one token of each running answer and chunks of prompts.

    A sequence is admitted when a row of the block table is free and its worst case (prompt and `max_new_tokens`) fits into the
    cache beside the worst cases of those admitted before, so that none is ever stopped for lack of blocks.
    """

    def __init__(self, batch: StepBatch, num_blocks: int, draft_until: int | None = None) -> None:
        """`batch` is filled in place, `num_blocks` is the size of the KV cache. No token is guessed beyond `draft_until` tokens
        of a sequence; None is the longest context."""
        self.batch = batch
        self.pool = BlockPool(num_blocks)
        self.limits = Limits(batch.max_context, num_blocks * BLOCK_SIZE)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.admitted: list[Sequence] = []  # sequences that the last call of `schedule` admitted
        self._draft_until = batch.max_context if draft_until is None else draft_until
        # Each step has room for one token of every running answer and for its logits; sequences beyond that wait.
        slots = min(batch.max_sequences, batch.max_rows, batch.max_tokens)
        self._free_slots = list(range(slots - 1, -1, -1))
        self._scheduled: list[Sequence] = []
        self._needing_logits: list[Sequence] = []
        self._promised = 0  # blocks that the running sequences need at most

    @property
    def has_work(self) -> bool:
        """Whether a step would have tokens."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises `EngineError` when it can never be admitted."""
        self.limits.check(sequence.max_length, "prompt and answer are too long")
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and free its row and blocks. A second call does nothing."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            assert sequence.blocks is not None, "a running sequence has blocks"
            sequence.blocks.free()
            self._promised -= blocks_for(sequence.max_length)
            sequence.blocks, sequence.computed = None, 0
            self._free_slots.append(sequence.slot)
            sequence.slot = -1

    def schedule(self) -> list[Sequence]:
        """Fill the batch; returns the sequences needing logits, in the order of the logit rows.

        Each has `logit_rows` rows. Nothing counts as computed until `commit`.
        """
        batch = self.batch
        batch.tokens = batch.rows = 0
        self._scheduled, self._needing_logits, self.admitted = [], [], []
        for sequence in self.running:  # answers under way first: a long prompt must not make them wait
            if sequence.length - sequence.computed == 1:
                if sequence.lookup:
                    self._draft(sequence, sequence.lookup)
                self._schedule_tokens(sequence, 1 + sequence.drafted)
        for sequence in self.running:
            if sequence.length - sequence.computed > 1:
                self._schedule_tokens(sequence, self._chunk(sequence))
        while self.waiting and self._free_slots and batch.tokens < batch.max_tokens:
            if blocks_for(self.waiting[0].max_length) > self.pool.num_blocks - self._promised:
                break  # a smaller sequence behind it must not overtake it, or it would starve
            sequence = self._admit(self.waiting.popleft())
            self._schedule_tokens(sequence, self._chunk(sequence))
        return self._needing_logits

    def commit(self) -> None:
        """Mark the tokens of the step as computed: it ran, and their keys and values are cached."""
        for sequence in self._scheduled:
            sequence.computed += sequence.scheduled - sequence.drafted
        self._scheduled = []

    def _admit(self, sequence: Sequence) -> Sequence:
        slot = self._free_slots.pop()
        sequence.blocks = BlockTable(self.pool, self.batch.block_table[slot])
        self._promised += blocks_for(sequence.max_length)
        sequence.slot = slot
        self.running.append(sequence)
        self.admitted.append(sequence)
        return sequence

    def _draft(self, sequence: Sequence, lookup: PromptLookup) -> None:
        """Let an answer guess ahead as far as the step has room that no other sequence may need."""
        batch = self.batch
        room = min(batch.max_tokens - batch.tokens, batch.max_rows - batch.rows) - self._unscheduled()
        # The step's last logits give one more token, which is never computed if it is the answer's last.
        end = min(sequence.max_length - 1, self._draft_until)
        sequence.drafted = lookup.draft(sequence.length, min(room, end - sequence.length))

    def _chunk(self, sequence: Sequence) -> int:
        """Return how many tokens of a prompt this step takes: as many as fit into the batch, and need no more rows of logits
        than one and those that no other sequence may need."""
        batch = self.batch
        count = min(sequence.length - sequence.computed, batch.max_tokens - batch.tokens)
        if sequence.logits_from == sequence.length - 1:
            return count
        rows = 1 + batch.max_rows - batch.rows - self._unscheduled()
        return min(count, max(0, sequence.logits_from - sequence.computed) + rows)

    def _unscheduled(self) -> int:
        """Number of sequences that may still come into this step with one token and one row each."""
        return len(self.running) - len(self._scheduled) + min(len(self.waiting), len(self._free_slots))

    def _schedule_tokens(self, sequence: Sequence, count: int) -> None:
        """Add the next `count` tokens of a sequence to the batch."""
        if count == 0:
            return
        batch, start, first = self.batch, self.batch.tokens, sequence.computed
        stop, rows = start + count, first + count - max(first, sequence.logits_from)
        assert sequence.blocks is not None, "a running sequence has blocks"
        grown = sequence.blocks.grow(first + count)
        assert grown, "a sequence is admitted only where its worst case fits"
        if count == 1:  # most steps; NumPy takes several times as long for a slice
            batch.token_ids[start] = sequence.tokens[first]
            batch.positions[start] = first
            batch.sequences[start] = sequence.slot
        else:
            batch.token_ids[start:stop] = sequence.tokens[first : first + count]
            batch.positions[start:stop] = np.arange(first, first + count, dtype=np.int32)
            batch.sequences[start:stop] = sequence.slot
        batch.tokens, sequence.scheduled, sequence.logit_rows = stop, count, max(0, rows)
        self._scheduled.append(sequence)
        if rows > 0:
            if rows == 1:
                batch.logit_rows[batch.rows] = stop - 1
            else:
                batch.logit_rows[batch.rows : batch.rows + rows] = np.arange(stop - rows, stop, dtype=np.int32)
            batch.rows += rows
            self._needing_logits.append(sequence)
