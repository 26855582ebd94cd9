"""Continuous batching: chooses which tokens of which sequences make up the next step."""

from __future__ import annotations

from bisect import insort

import numpy as np

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import StepBatch
from belle_compile.runtime.executors.batch import NO_ADAPTER
from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.draft_model import DraftModel, Wish
from belle_compile.runtime.serving.kv_blocks import BlockPool, BlockTable, blocks_for
from belle_compile.runtime.serving.prefix_cache import Prefix, PrefixCache
from belle_compile.runtime.serving.request import EngineIdentity, Limits
from belle_compile.runtime.serving.scheduling import SchedulerOptions
from belle_compile.runtime.serving.sequence import Sequence
from belle_compile.runtime.serving.waiting import WaitingQueue


class Scheduler:
    """Fills steps with one token of each running answer, and with chunks of prompts; admits sequences, and preempts them.

    A sequence whose known tokens are all computed has not taken its logits yet. It is in no step, and keeps its row and blocks.

    A sequence is admitted when a row of the block table is free and its known tokens fit into the cache, with one block left
    for each running sequence. `WaitingQueue` says which one is next; no other overtakes it, or large ones would starve. It
    takes the blocks for its known tokens at once, so that only answers that grow ask for more. Where none is available, the
    running sequence that is last in order (of the highest priority number, and of those the latest arrival) is preempted: its
    blocks are freed, and it is computed anew later. What it has computed stays in the prefix cache while there is room.

    Everything ends. Of the sequences that run, the first in order is never preempted: only the last is, and where it is itself
    the last, it is alone and has all blocks, which are enough for the longest sequence (`limits`). So with every step that it
    is in, it comes closer to its end, which comes after finitely many steps; then another one is the first. A preempted
    sequence is ahead of all others of its priority that were not admitted yet, so it runs again as soon as those before it in
    order have ended or left room. Two sequences cannot preempt each other in turn, since one is before the other in order for
    good.

    With the prefix cache, a sequence whose next tokens are just being computed by others waits for these, at most one step for
    each of the tokens; then it computes them itself.
    """

    def __init__(
        self,
        batch: StepBatch,
        num_blocks: int,
        options: SchedulerOptions | None = None,
        dynamic_rope_from: int | None = None,
        identity: EngineIdentity | None = None,
        drafts: DraftModel | None = None,
    ) -> None:
        """`batch` is filled in place, `num_blocks` is the size of the KV cache.

        In sequences longer than `dynamic_rope_from`, the keys and values of a token depend on the last position of its sequence
        that is in the same step. So no token is guessed there, and their steps are divided by their own length alone.
        `identity` belongs to the digests of the prefix cache; without it there is none. `drafts` guesses ahead for answers.
        """
        options = options or SchedulerOptions()
        self.batch = batch
        self.pool = BlockPool(num_blocks, num_blocks if batch.blocks_per_row else None)
        self.prefixes = PrefixCache(self.pool, identity) if identity and options.prefix_cache else None
        self.limits = Limits(batch.max_context, num_blocks * BLOCK_SIZE)
        self.adapters: dict[str, int] = {}  # the slots of loaded adapters, by digest
        self.prompt_tokens = 0  # tokens in the step of the last call of `schedule` that are not the next ones of answers
        self.preemptions = self.recomputed_tokens = self.drafted_tokens = 0
        self.drafts = drafts
        self._dynamic_rope_from = batch.max_context if dynamic_rope_from is None else dynamic_rope_from
        # Each step has room for one token of every running answer and for its logits; sequences beyond that wait.
        most = min(batch.max_sequences, batch.max_rows, batch.max_tokens)
        # A chunk of this size has room in a step beside one token of each of the other sequences that can run at all.
        self._fixed_chunk = batch.max_tokens - most + 1
        if options.max_num_seqs is not None:
            if options.max_num_seqs > most:
                expected = f"at most {most}, which the engine was built for"
                raise EngineError("engine", "max_num_seqs", found=str(options.max_num_seqs), expected=expected)
            most = options.max_num_seqs
        self.most_sequences = most  # that run at the same time
        self._arrivals = 0
        self._steps = 0
        self._reserved = 0  # tokens of this step that the next fixed chunk needs beyond one
        self._forget_sequences()

    def reset(self) -> None:
        """Forget all sequences, and all that is cached: an error has left it open which blocks and rows are in use. Counters go
        on, and adapters stay loaded."""
        self.pool.reset()
        if self.prefixes:
            self.prefixes.reset()
        if self.drafts:
            self.drafts.reset()
        if self.batch.adapters is not None:
            self.batch.adapters[:] = NO_ADAPTER
        self._forget_sequences()

    def _forget_sequences(self) -> None:
        self.waiting = WaitingQueue()
        self.held: list[Sequence] = []  # sequences that wait for others to compute their prefix
        self.running: list[Sequence] = []  # in order
        self.begun: list[Sequence] = []  # sequences whose first step is the one of the last call of `schedule`
        self.picked: list[Sequence] = []  # those that this call took out of the queue for the first time
        self._free_slots = list(range(self.most_sequences - 1, -1, -1))
        self._blocked: tuple[Sequence, int] | None = None  # who did not fit, and how many blocks were available
        self._stopped = False  # whether a sequence has stopped since those that wait for a prefix were looked at
        self._scheduled: list[Sequence] = []
        self._needing_logits: list[Sequence] = []
        if self.prefixes:
            self.batch.copies = self.prefixes.copies

    @property
    def has_work(self) -> bool:
        """Whether there are sequences."""
        return bool(self.running or self.waiting or self.held)

    @property
    def free_slots(self) -> int:
        """Sequences that could run in addition, as far as rows of the block table go."""
        return len(self._free_slots)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises `EngineError` when it can never be admitted."""
        self.limits.check(sequence.max_length, "prompt and answer are too long")
        if sequence.adapter and sequence.adapter not in self.adapters:
            raise EngineError("request", "its adapter was unloaded before its first step", remedy="name one that is loaded")
        self._arrivals += 1
        sequence.rank = (sequence.scheduling.priority, self._arrivals)
        rope_from = self._dynamic_rope_from
        long_prompt = sequence.prompt_length > rope_from
        sequence.exact_length = rope_from // self._fixed_chunk * self._fixed_chunk if long_prompt else rope_from
        if self.batch.answers_apart:
            sequence.exact_length = min(sequence.exact_length, sequence.prompt_length)
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and free its row and blocks. A second call does nothing."""
        if sequence.slot >= 0:
            self.waiting.charge((sequence,))
            self._stop(sequence)
        elif sequence in self.held:
            self.held.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Sequence]:
        """Fill the batch; returns the sequences needing logits, in the order of the logit rows.

        Each has `logit_rows` rows. Nothing counts as computed until `commit`. Where all running sequences have to take their
        logits first and no other one fits, the batch has no tokens and must not be run.
        """
        batch, preemptions = self.batch, self.preemptions
        batch.tokens = batch.rows = 0
        self._steps += 1
        self._scheduled, self._needing_logits, self.begun, self.picked = [], [], [], []
        self._reserved = self._next_fixed_chunk()
        if self.drafts:
            self._guess(self.drafts)
        for sequence in tuple(self.running):  # answers under way first: a long prompt must not make them wait
            if sequence.length - sequence.computed == 1 and (table := sequence.blocks):  # None: it was preempted just now
                if sequence.length <= BLOCK_SIZE * len(table.blocks) or self._take_block(sequence, table):
                    if sequence.lookup or sequence.guesses:
                        self._draft(sequence)
                    self._schedule_tokens(sequence, 1 + sequence.drafted)
        answers = batch.tokens
        for sequence in self.running:
            if sequence.length - sequence.computed > 1:
                self._schedule_tokens(sequence, *self._chunk(sequence))
        if (preemptions == self.preemptions or not batch.tokens) and self._free_slots and (self.waiting or self.held):
            self._admit()
        self.prompt_tokens = batch.tokens - answers
        assert batch.tokens or self.running, "a step without tokens"
        return self._needing_logits

    def commit(self) -> None:
        """Mark the tokens of the step as computed: it ran, and their keys and values are cached."""
        for sequence in self._scheduled:
            sequence.computed += sequence.scheduled - sequence.drafted
            if sequence.computed >= sequence.publish_at and sequence.chain:
                self._publish(sequence)
        self._scheduled = []
        self.batch.copies.clear()

    def discard(self) -> None:
        """Forget the step: it failed. The sequences in it must be removed."""
        self._scheduled = []
        self.batch.copies.clear()

    def _take_block(self, sequence: Sequence, table: BlockTable) -> bool:
        """Take a block for the next token of an answer, and preempt others, or else the sequence itself, where there is none.
        Returns whether the sequence still runs.

        Sequences are asked in order, so whoever is preempted for one of them is not in the step yet.
        """
        while not table.grow(sequence.length):
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        sequence.lost = sequence.computed
        self.waiting.charge((sequence,))
        self._stop(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Free the row and the blocks of a running sequence."""
        self.running.remove(sequence)
        assert sequence.blocks is not None, "a running sequence has blocks"
        if self.drafts:
            self.drafts.release(sequence)
        if sequence.chain and self.prefixes:
            self.prefixes.release(sequence.chain, min(sequence.computed, sequence.exact_length))
        else:
            sequence.blocks.free()
        sequence.blocks, sequence.computed, sequence.drafted = None, 0, 0
        if self.batch.adapters is not None:
            self.batch.adapters[sequence.slot] = NO_ADAPTER
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        self._blocked, self._stopped = None, True

    def _admit(self) -> None:
        """Admit sequences while the step has room for their tokens, and let those wait that others compute a prefix for: also
        where there is no room, since later less of the prefix is left to be waited for."""
        batch = self.batch
        if batch.tokens < batch.max_tokens:
            self._release_held()
        self.waiting.charge(self.running)
        while self._free_slots and (sequence := self.waiting.first()):
            if self._blocked == (sequence, self.pool.available):
                break  # nothing has changed since it did not fit
            prefix = self._match(sequence)
            if prefix and self._waits_for(sequence, prefix):
                self._take(sequence)
                self.held.append(sequence)
            elif batch.tokens < batch.max_tokens and self._place(sequence, prefix):
                self._schedule_tokens(sequence, *self._chunk(sequence))
            else:
                self._blocked = (sequence, self.pool.available) if batch.tokens < batch.max_tokens else None
                break

    def _match(self, sequence: Sequence) -> Prefix | None:
        """Look up the known tokens of a sequence in the prefix cache, if it may use any: not those whose logits are needed."""
        known = min(sequence.length, sequence.exact_length)
        limit = min(known - 1, sequence.logits_from)
        if self.prefixes is None or known < 2:
            return None
        if sequence.chain is None:
            sequence.chain = self.prefixes.chain(sequence.tokens, sequence.salt, sequence.adapter)
        return self.prefixes.match(sequence.chain, known, limit)

    def _waits_for(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Whether a sequence waits for others that compute its next tokens: a block of them at least when it begins to wait,
        then all of them, for as many steps as there are tokens."""
        if sequence.held_until is None and prefix.pending >= BLOCK_SIZE:
            sequence.held_until = self._steps + prefix.pending
        sequence.look_again_at = self._steps + max(1, prefix.pending // self.batch.max_tokens)
        return prefix.pending > 0 and self._steps < (sequence.held_until or 0)

    def _release_held(self) -> None:
        """Put those back into the queue whose prefix is computed, or is not being computed any more."""
        held, self.held = self.held, []
        for sequence in held:
            if self._steps < sequence.look_again_at and not self._stopped:
                self.held.append(sequence)
                continue
            prefix = self._match(sequence)
            if prefix and self._waits_for(sequence, prefix):
                self.held.append(sequence)
            else:
                self.waiting.add(sequence)
        self._stopped = False

    def _take(self, sequence: Sequence) -> None:
        if not sequence.picked:
            self.picked.append(sequence)
        self.waiting.take(sequence)

    def _place(self, sequence: Sequence, prefix: Prefix | None) -> bool:
        """Let a sequence run if its known tokens fit into the cache; returns whether they do."""
        slot, found = self._free_slots[-1], 0
        table = BlockTable(self.pool, self.batch.block_table[slot])
        if prefix and self.prefixes and sequence.chain:
            needed = blocks_for(sequence.length)
            if needed - len(prefix.blocks) > self.pool.available or needed > self.pool.references_left:
                return False
            if not self.prefixes.adopt(sequence.chain, table, prefix):
                return False
            found = prefix.tokens
        if not table.grow(sequence.length) or self.pool.available < len(self.running):
            if prefix and self.prefixes and sequence.chain:
                self.prefixes.release(sequence.chain, found)
            else:
                table.free()
            return False
        self._take(sequence)
        self._free_slots.pop()
        sequence.slot, sequence.blocks, sequence.computed, sequence.publish_at = slot, table, found, 0
        self.batch.prompt_lengths[slot] = sequence.prompt_length
        if sequence.adapter:
            assert self.batch.adapters is not None, "adapters are loaded into slots of the executor"
            self.batch.adapters[slot] = self.adapters[sequence.adapter]
        insort(self.running, sequence, key=lambda other: other.rank)
        if sequence.preemptions:
            self.recomputed_tokens += max(0, sequence.lost - found)
        else:
            sequence.cached_tokens = found
            self.begun.append(sequence)
        return True

    def _publish(self, sequence: Sequence) -> None:
        """Pass on to the prefix cache what is computed, after each step of a prompt and whenever a block is full."""
        assert self.prefixes is not None and sequence.chain is not None, "a chain belongs to the prefix cache"
        computed = min(sequence.computed, sequence.exact_length)
        self.prefixes.publish(sequence.chain, computed)
        if sequence.computed >= sequence.exact_length:
            sequence.publish_at = sequence.max_length + 1
        elif sequence.computed >= sequence.length - 1:
            sequence.publish_at = computed // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE

    def _guess(self, drafts: DraftModel) -> None:
        """Let the draft model guess ahead for the answers that prompt lookup does not, as far as the step will have room."""
        batch, answers, wishes = self.batch, 0, []
        for sequence in self.running:
            if sequence.length - sequence.computed == 1:
                answers += 1
                if sequence.sampler_ahead and not (sequence.lookup and sequence.lookup.finds(sequence.length)):
                    wishes.append(Wish(sequence, self._draft_end(sequence) - sequence.length))
        waiting = min(len(self.waiting) + len(self.held), len(self._free_slots))
        room = min(batch.max_tokens - self._reserved, batch.max_rows) - len(self.running) - waiting
        if wishes and room > 0:
            drafts.guess(wishes, answers, room)

    def _draft_end(self, sequence: Sequence) -> int:
        """The number of tokens up to which an answer may be guessed ahead. The step's last logits give one more token, which is
        never computed if it is the answer's last."""
        return 0 if self.batch.answers_apart else min(sequence.max_length - 1, self._dynamic_rope_from)

    def _draft(self, sequence: Sequence) -> None:
        """Let an answer guess ahead as far as the step has room that no other sequence may need, and as far as there are free
        blocks."""
        batch, table = self.batch, sequence.blocks
        assert table is not None, "a running sequence has blocks"
        tokens, rows = batch.max_tokens - batch.tokens - self._reserved, batch.max_rows - batch.rows
        room = min(tokens, rows) - self._unscheduled()
        lookup, guesses, length = sequence.lookup, sequence.guesses, sequence.length
        most = max(lookup.most if lookup else 0, len(guesses))
        count = min(room, self._draft_end(sequence) - length)
        if length + count > table.capacity and count > 0 and not table.grow(length + min(count, most)):
            count = table.capacity - length
        sequence.drafted = lookup.draft(length, count) if lookup else 0
        sequence.drafted_by = lookup
        if not sequence.drafted and guesses and count > 0:
            sequence.drafted, sequence.drafted_by = min(count, len(guesses)), sequence.draft_acceptance
            sequence.tokens[length : length + sequence.drafted] = guesses[: sequence.drafted]
        sequence.guesses = []
        sequence.guessed_tokens += sequence.drafted
        self.drafted_tokens += sequence.drafted

    def _chunk(self, sequence: Sequence) -> tuple[int, int | None]:
        """Return how many tokens of a prompt this step takes, and of them the number of rows of logits, None for all that are
        needed.

        It takes as many as fit into the batch, and need no more rows than one and those that no other sequence may need.
        """
        batch, first = self.batch, sequence.computed
        room = batch.max_tokens - batch.tokens
        rows = 1 + batch.max_rows - batch.rows - self._unscheduled()
        if batch.answers_apart:  # an answer that was preempted is computed anew as it was computed first
            room = min(room, max(1, sequence.prompt_length - first))
        if sequence.length > self._dynamic_rope_from:
            if first >= sequence.exact_length:
                count = self._fixed_end(sequence) - first
                return (count, rows) if count <= room else (0, None)
            count = min(sequence.exact_length - first, room)
        else:
            count = min(sequence.length - first, room)
        if sequence.logits_from == sequence.length - 1:
            return count, None
        return min(count, max(0, sequence.logits_from - first) + rows), None

    def _fixed_end(self, sequence: Sequence) -> int:
        """The end of the chunk that begins after the computed tokens, where its end decides about the keys and values in it.

        Chunks of a prompt end at multiples of one length and at its end, and those of an answer after each token: as if nothing
        was in the cache and no other sequence ran.
        """
        first = sequence.computed
        if first >= sequence.prompt_length:
            return first + 1
        return min(first - first % self._fixed_chunk + self._fixed_chunk, sequence.prompt_length)

    def _next_fixed_chunk(self) -> int:
        """Tokens, less one, of the first fixed chunk that waits for room: guesses must leave it to it."""
        for sequence in self.running:
            if sequence.length > self._dynamic_rope_from and sequence.length - sequence.computed > 1:
                return self._fixed_end(sequence) - sequence.computed - 1 if sequence.computed >= sequence.exact_length else 0
        return 0

    def _unscheduled(self) -> int:
        """Number of sequences that may still come into this step with one token and one row each."""
        waiting = len(self.waiting) + len(self.held)
        return len(self.running) - len(self._scheduled) + min(waiting, len(self._free_slots))

    def _schedule_tokens(self, sequence: Sequence, count: int, most_rows: int | None = None) -> None:
        """Add the next `count` tokens of a sequence to the batch. Where they need more than `most_rows` rows of logits, the
        step returns the first of these, and the same tokens are computed again for the others."""
        if count == 0:
            return
        batch, start, first = self.batch, self.batch.tokens, sequence.computed
        stop, scored = start + count, sequence.logits_from
        if scored < first:
            scored = first
        rows = first + count - scored
        sequence.scheduled = count
        if most_rows is not None and rows > most_rows:
            rows, sequence.scheduled = most_rows, 0
        if count == 1:  # most steps; NumPy takes several times as long for a slice
            batch.token_ids[start] = sequence.tokens[first]
            batch.positions[start] = first
            batch.sequences[start] = sequence.slot
        else:
            batch.token_ids[start:stop] = sequence.tokens[first : first + count]
            batch.positions[start:stop] = np.arange(first, first + count, dtype=np.int32)
            batch.sequences[start:stop] = sequence.slot
        batch.tokens, sequence.logit_rows = stop, rows if rows > 0 else 0
        self._scheduled.append(sequence)
        if rows > 0:
            row = start + scored - first
            if rows == 1:
                batch.logit_rows[batch.rows] = row
            else:
                batch.logit_rows[batch.rows : batch.rows + rows] = np.arange(row, row + rows, dtype=np.int32)
            batch.rows += rows
            self._needing_logits.append(sequence)
