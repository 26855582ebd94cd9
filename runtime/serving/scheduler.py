"""Continuous batching: which tokens of which sequences make up the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens

import numpy as np

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.serving.kv_blocks import BLOCK_SIZE, BlockAllocator, BlockTable, blocks_for
from belle_compile.runtime.serving.prompt_lookup import PromptLookup


class Sequence:
    """One request's tokens: `prompt`, then what was generated.

    `length` tokens are known, the keys and values of the first `computed` are cached. The sequence wants logits when all
    its tokens are in a step; `append` then adds the token chosen from them.

    With `prompt_lookup` a step may also take up to that many `drafted` tokens, guesses that lie in `tokens` behind the
    known ones. Each wants logits too, and `append` says whether it confirmed one. What the step left in the cache for
    guesses that were wrong stays there until the step that reaches their positions overwrites it, before it is read: a
    token attends to its own position and those below.
    """

    def __init__(self, prompt: Tokens[int], max_new_tokens: int, prompt_lookup: int = 0) -> None:
        self.prompt_length = len(prompt)
        self.max_length = len(prompt) + max_new_tokens
        self.tokens = np.empty(self.max_length, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.length = len(prompt)
        self.computed = 0
        self.scheduled = 0  # tokens in the step under way
        self.drafted = 0  # of them, guesses that are not confirmed
        self.lookup = PromptLookup(self.tokens, self.length, prompt_lookup) if prompt_lookup else None
        self.slot = -1  # row of the block table, while admitted
        self.blocks: BlockTable | None = None

    @property
    def generated(self) -> list[int]:
        """Tokens after the prompt."""
        return [int(token) for token in self.tokens[self.prompt_length : self.length]]

    def append(self, token: int) -> bool:
        """Add the next token. True if it was drafted: then it is computed, and the next row has the logits after it."""
        confirmed = self.drafted > 0 and bool(self.tokens[self.length] == token)
        self.tokens[self.length] = token
        self.length += 1
        if confirmed:
            assert self.lookup is not None, "a draft comes from it"
            self.lookup.accepted += 1
            self.computed += 1
            self.drafted -= 1
        else:
            self.drafted = 0
        return confirmed


class Scheduler:
    """Admits sequences in order of arrival, and mixes one token of each running answer with chunks of new prompts.

    A sequence is admitted when a row of the block table is free and its worst case (prompt and `max_new_tokens`) fits the
    cache beside those admitted before, so none is ever stopped for lack of blocks. Its KV cache has `num_blocks` blocks.
    """

    def __init__(self, batch: StepBatch, num_blocks: int) -> None:
        self.batch = batch
        self.allocator = BlockAllocator(num_blocks)
        # Every running answer has its token and its logits in each step; those that would not fit wait.
        most = min(batch.max_sequences, batch.max_rows, batch.max_tokens)
        self._free_slots = list(range(most - 1, -1, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.draft_until = batch.max_context  # length up to which a sequence may be guessed
        self._scheduled: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would have tokens."""
        return bool(self.running or self.waiting)

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence this cache can hold."""
        return min(self.batch.max_context, self.allocator.num_blocks * BLOCK_SIZE)

    def check_length(self, tokens: int, what: str) -> None:
        """Raise `EngineError` when a sequence of `tokens` tokens could never be admitted."""
        if tokens > self.batch.max_context:
            expected = f"at most {self.batch.max_context}, the engine's longest context"
            raise EngineError("request", what, found=f"{tokens} tokens", expected=expected, remedy="shorten it")
        if tokens > self.capacity:
            expected = f"at most {self.capacity}, the KV cache's capacity"
            raise EngineError("request", what, found=f"{tokens} tokens", expected=expected, remedy="load with more kv_tokens")

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises `EngineError` when it could never be admitted."""
        self.check_length(sequence.max_length, "prompt and answer are too long")
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and free what it holds; a second time does nothing."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self.release(sequence)

    def admit(self, sequence: Sequence) -> None:
        """Give a sequence its row and reserve its blocks; raises `EngineError` when there are none."""
        if not self._free_slots:
            raise EngineError("scheduler", "every sequence of the batch is in use", remedy="wait for other requests to end")
        row = self.batch.block_table[self._free_slots[-1]]
        sequence.blocks = BlockTable(self.allocator, row, sequence.max_length)
        sequence.slot = self._free_slots.pop()

    def release(self, sequence: Sequence) -> None:
        """Free an admitted sequence's row and blocks."""
        assert sequence.blocks is not None, "release() of a sequence that was not admitted"
        sequence.blocks.free()
        sequence.blocks, sequence.computed = None, 0
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def schedule(self) -> list[Sequence]:
        """Fill the batch; returns the sequences that get logits, in the order of the logit rows.

        Each has one row, and one more for each token it has `drafted`. Nothing counts as computed until `commit`.
        """
        self._scheduled.clear()
        wanting: list[Sequence] = []
        self.batch.tokens = self.batch.rows = 0
        for sequence in self.running:  # answers under way first: a long prompt must not make them wait
            if sequence.length - sequence.computed == 1:
                if sequence.lookup:
                    self._draft(sequence, sequence.lookup)
                self._put(sequence, 1 + sequence.drafted, wanting)
        for sequence in self.running:
            pending = sequence.length - sequence.computed
            if pending > 1:
                self._put(sequence, min(pending, self.batch.max_tokens - self.batch.tokens), wanting)
        while self.waiting and self._free_slots and self.batch.tokens < self.batch.max_tokens:
            first = self.waiting[0]
            if blocks_for(first.max_length) > self.allocator.available:
                break  # in order of arrival: a smaller one behind it would let it starve
            self.admit(first)
            self.running.append(self.waiting.popleft())
            self._put(first, min(first.length, self.batch.max_tokens - self.batch.tokens), wanting)
        return wanting

    def commit(self) -> None:
        """The step ran: its tokens' keys and values are cached."""
        for sequence in self._scheduled:
            sequence.computed += sequence.scheduled - sequence.drafted
        self._scheduled.clear()

    def _draft(self, sequence: Sequence, lookup: PromptLookup) -> None:
        """Let an answer guess ahead where that takes no token and no row from any sequence that is or may be in this step."""
        batch = self.batch
        others = len(self.running) - len(self._scheduled) + min(len(self.waiting), len(self._free_slots))
        room = min(batch.max_tokens - batch.tokens, batch.max_rows - batch.rows) - others
        # The step's last logits give one more token, which is never computed if it is the answer's last.
        end = min(sequence.max_length - 1, self.draft_until)
        sequence.drafted = lookup.draft(sequence.length, min(room, end - sequence.length))

    def _put(self, sequence: Sequence, count: int, wanting: list[Sequence]) -> None:
        """Add the next `count` tokens of a sequence to the batch."""
        if count == 0:
            return
        batch, start, first = self.batch, self.batch.tokens, sequence.computed
        assert sequence.blocks is not None, "a running sequence has blocks"
        sequence.blocks.grow(first + count)
        fill(batch, sequence, start, first, count)
        sequence.scheduled = count
        self._scheduled.append(sequence)
        batch.tokens = start + count
        rows = first + count - sequence.length + 1
        if rows == 1:
            batch.logit_rows[batch.rows] = start + count - 1
        elif rows > 1:
            batch.logit_rows[batch.rows : batch.rows + rows] = np.arange(start + count - rows, start + count, dtype=np.int32)
        if rows > 0:
            batch.rows += rows
            wanting.append(sequence)


def fill(batch: StepBatch, sequence: Sequence, start: int, first: int, count: int) -> None:
    """Write tokens `first` to `first + count` of a sequence to the batch from token `start` on."""
    if count == 1:
        batch.token_ids[start] = sequence.tokens[first]
        batch.positions[start] = first
        batch.sequences[start] = sequence.slot
        return
    stop = start + count
    batch.token_ids[start:stop] = sequence.tokens[first : first + count]
    batch.positions[start:stop] = np.arange(first, first + count, dtype=np.int32)
    batch.sequences[start:stop] = sequence.slot
