"""Prefix cache against a simple model: what it finds, what it never confuses, and what is evicted when."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from belle_compile.runtime.program import BLOCK_SIZE
from belle_compile.runtime.serving.kv_blocks import BlockPool, BlockTable, blocks_for
from belle_compile.runtime.serving.prefix_cache import Prefix, PrefixCache
from belle_compile.runtime.serving.request import EngineIdentity
from tests.runtime.fakes import VOCABULARY, FakeExecutor, hash_rule

ENGINE = EngineIdentity("digest", "1.0", "kernels-avx2", 1)
LONGEST = 6 * BLOCK_SIZE
SALTS = ("", "tenant")
Context = tuple[str, tuple[int, ...]]  # what keys and values depend on: the salt stands for the engine, and tokens


class Run:
    """A sequence: its tokens, of which some are known and of these some computed."""

    def __init__(self, cache: Cache, tokens: list[int], salt: str = "") -> None:
        self.salt = salt
        self.tokens = np.full(LONGEST, -1, np.int32)
        self.tokens[: len(tokens)] = tokens
        self.known, self.computed = len(tokens), 0
        self.chain = cache.prefixes.chain(self.tokens, salt)
        self.row = np.full(LONGEST // BLOCK_SIZE, -1, np.int32)
        self.table = BlockTable(cache.pool, self.row)
        self.started = False  # whether a step has run since it was admitted
        self.visible = 0  # tokens that others may find
        self.announced = 0  # tokens that others may wait for: those known when it was admitted, until they are computed

    def context(self, position: int) -> Context:
        return self.salt, tuple(self.tokens[: position + 1].tolist())


class Cache:
    """Blocks that hold the contexts of tokens in place of keys and values, and steps that write them."""

    def __init__(self, blocks: int) -> None:
        self.pool = BlockPool(blocks)
        self.prefixes = PrefixCache(self.pool, ENGINE)
        self.cells: list[list[Context | None]] = [[None] * BLOCK_SIZE for _ in range(blocks)]
        self.computed = 0  # tokens of all steps

    def match(self, run: Run, limit: int | None = None) -> Prefix:
        return self.prefixes.match(run.chain, run.known, run.known - 1 if limit is None else limit)

    def admit(self, run: Run, limit: int | None = None) -> bool:
        prefix = self.match(run, limit)
        if not self.prefixes.adopt(run.chain, run.table, prefix):
            assert not run.table.blocks and not self.pool.available
            return False
        run.computed, run.announced, run.started = prefix.tokens, run.known, False
        return True

    def step(self, run: Run, count: int, guesses: tuple[int, ...] = ()) -> bool:
        """Compute the next tokens, and guesses behind them that turn out to be wrong; False where blocks run out."""
        end = run.computed + count
        if not run.table.grow(end + len(guesses)):
            return False
        for source, destination in self.prefixes.copies:
            self.cells[destination] = list(self.cells[source])
        self.prefixes.copies.clear()
        for position in range(run.computed, end):
            self.write(run, position, run.context(position))
        for position, guess in enumerate(guesses, end):
            self.write(run, position, ("guess", (guess,)))
        for position in range(end):
            assert self.cells[run.row[position // BLOCK_SIZE]][position % BLOCK_SIZE] == run.context(position)
        run.computed = end
        self.computed += count
        self.prefixes.publish(run.chain, end)
        run.started, run.visible = True, max(run.visible, end // BLOCK_SIZE * BLOCK_SIZE)
        if 0 < run.announced <= end:
            run.announced, run.visible = 0, max(run.visible, end)
        return True

    def write(self, run: Run, position: int, context: Context) -> None:
        block = int(run.row[position // BLOCK_SIZE])
        assert self.pool.references(block) == 1, "a shared block is written to"
        self.cells[block][position % BLOCK_SIZE] = context

    def release(self, run: Run) -> None:
        self.prefixes.release(run.chain, run.computed)
        if run.started:
            run.visible = max(run.visible, run.computed)
        run.computed = run.announced = 0

    def finish(self, tokens: list[int], salt: str = "", known: int | None = None) -> int:
        """Compute a sequence from the first to the last token, and release it; returns how many tokens came from the cache."""
        run = Run(self, tokens, salt)
        assert self.admit(run)
        found = run.computed
        assert self.step(run, len(tokens) - found)
        self.release(run)
        return found


def ids(count: int, seed: int = 0) -> list[int]:
    generated: list[int] = np.random.default_rng(seed).integers(0, 1 << 30, count).tolist()
    return generated


def test_full_blocks_are_shared_and_a_further_one_is_copied() -> None:
    cache, prompt = Cache(8), ids(40)
    first, second = (Run(cache, prompt[:37] + tail) for tail in (ids(3, 1), ids(3, 2)))
    assert cache.admit(first) and first.computed == 0 and cache.match(second).pending == 37
    assert cache.step(first, 40)
    prefix = cache.match(second)
    assert (prefix.tokens, prefix.blocks, prefix.source, prefix.pending) == (37, (0, 1), 2, 0)
    assert cache.admit(second) and second.table.blocks == [0, 1, 3] and cache.prefixes.copies == [(2, 3)]
    assert cache.step(second, 3) and cache.computed == 43
    assert (cache.prefixes.hits, cache.prefixes.queries) == (37, 80)
    assert [cache.pool.references(block) for block in range(4)] == [2, 2, 1, 1]


def test_the_last_token_is_always_computed_and_no_full_block_written_to_again() -> None:
    cache, prompt = Cache(8), ids(32)
    assert cache.finish(prompt) == 0
    again = Run(cache, prompt)
    assert cache.admit(again) and again.computed == 31 and again.table.blocks == [0, 2]
    assert cache.prefixes.copies == [(1, 2)]
    assert cache.step(again, 1)
    assert again.table.blocks == [0, 1] and list(again.row[:2]) == [0, 1], "the published block replaces its copy"
    cache.release(again)
    assert cache.pool.cached == 2


def test_logits_over_reused_blocks_are_those_of_all_tokens() -> None:
    executor, cache = FakeExecutor(num_blocks=8, max_tokens=64), Cache(8)
    batch, prompt = executor.batch, [token % VOCABULARY for token in ids(40)]
    batch.copies = cache.prefixes.copies
    for slot, tokens in enumerate((prompt, prompt, [*prompt[:36], 5, 6, 7])):
        run = Run(cache, tokens)
        run.table = BlockTable(cache.pool, batch.block_table[slot])
        assert cache.admit(run) and run.computed == (0, 39, 36)[slot] and run.table.grow(run.known)
        count = run.known - run.computed
        batch.token_ids[:count], batch.positions[:count] = tokens[run.computed :], range(run.computed, run.known)
        batch.sequences[:count], batch.logit_rows[0], batch.tokens, batch.rows = slot, count - 1, count, 1
        np.testing.assert_array_equal(executor.step(batch)[0], hash_rule(tokens))
        cache.prefixes.copies.clear()
        cache.prefixes.publish(run.chain, run.known)
    assert cache.pool.used == 2 + 3


@pytest.mark.parametrize(("limit", "tokens"), [(0, 0), (5, 5), (16, 16), (17, 17), (39, 39)])
def test_the_limit_leaves_out_tokens_whose_logits_are_needed(limit: int, tokens: int) -> None:
    cache, prompt = Cache(8), ids(40)
    cache.finish(prompt)
    prefix = cache.match(Run(cache, prompt), limit)
    assert (prefix.tokens, len(prefix.blocks), prefix.source >= 0) == (tokens, tokens // 16, tokens % 16 > 0)


def test_the_next_turn_of_a_chat_computes_what_is_new() -> None:
    cache, chat = Cache(16), ids(10)
    for turn in range(1, 5):
        run = Run(cache, chat)
        assert cache.admit(run)
        assert run.computed == (len(chat) - 3 if turn > 1 else 0), "all but the last token of the answer and the question"
        assert cache.step(run, run.known - run.computed)
        for token in ids(11, turn):  # an answer, whose last token is never computed
            run.tokens[run.known] = token
            run.known += 1
            if run.known < len(chat) + 11:
                assert cache.step(run, 1)
        cache.release(run)
        chat = [*run.tokens[: run.known].tolist(), *ids(2, 100 + turn)]
    assert cache.pool.used == 0 and cache.pool.cached == blocks_for(len(chat) - 3), "continued blocks are not kept twice"


def test_several_answers_to_a_prompt_compute_it_once() -> None:
    cache, prompt = Cache(16), ids(20)
    runs = [Run(cache, prompt) for _ in range(4)]
    assert cache.admit(runs[0])
    assert [cache.match(run).pending for run in runs[1:]] == [19] * 3
    assert cache.step(runs[0], 20)
    for number, run in enumerate(runs[1:]):
        assert cache.admit(run) and run.computed == 19 and cache.step(run, 1)
        run.tokens[20] = number
        run.known += 1
        assert cache.step(run, 1)
    assert cache.computed == 20 + 3 * (1 + 1) and [run.table.blocks for run in runs] == [[0, 1], [0, 2], [0, 3], [0, 4]]


def test_blocks_computed_at_the_same_time_are_merged() -> None:
    cache, prompt = Cache(8), ids(33)
    runs = [Run(cache, prompt) for _ in range(2)]
    for run in runs:
        assert cache.admit(run) and run.computed == 0 and run.table.grow(33)
    assert runs[1].table.blocks == [3, 4, 5]
    for run in runs:
        assert cache.step(run, 33)
    assert runs[1].table.blocks == [0, 1, 5] and cache.pool.used == 4
    for run in runs:
        cache.release(run)
    assert (cache.pool.used, cache.pool.cached) == (0, 3)


def test_guesses_that_were_wrong_are_not_cached() -> None:
    cache, prompt = Cache(8), ids(12)
    run = Run(cache, prompt)
    assert cache.admit(run)
    assert cache.step(run, 12, guesses=tuple(ids(8, 2)))
    other = Run(cache, [*prompt, *ids(8, 2)])
    assert cache.match(other).tokens == 12
    run.tokens[12:20], run.known = ids(8, 1), 20
    assert cache.step(run, 8)
    cache.release(run)
    assert cache.match(other).tokens == 12 and cache.match(Run(cache, [*prompt, *ids(9, 1)])).tokens == 20


def test_nothing_is_kept_of_a_first_step_that_failed() -> None:
    cache, prompt = Cache(8), ids(24)
    cache.finish(prompt)
    run = Run(cache, [*prompt[:20], 1, 2])
    assert cache.admit(run) and run.computed == 20 and cache.prefixes.copies
    cache.release(run)
    assert cache.prefixes.copies == [] and cache.pool.used == 0 and cache.pool.cached == 2
    assert cache.prefixes.queries == 24, "what was not computed is not counted"


def test_the_last_available_block_is_not_copied_but_taken() -> None:
    cache, prompt = Cache(2), ids(24)
    cache.finish(prompt)
    run = Run(cache, [*prompt[:20], 1, 2])
    assert cache.admit(run)
    assert (run.computed, run.table.blocks, cache.prefixes.copies, cache.pool.evictions) == (20, [0, 1], [], 1)
    assert cache.step(run, 2)


def test_a_copy_without_a_block_to_copy_to_is_refused() -> None:
    cache, prompt = Cache(2), ids(24)
    runs = [Run(cache, [*prompt[:20], last]) for last in (1, 2)]
    assert cache.admit(runs[0]) and cache.step(runs[0], 21)
    assert not cache.admit(runs[1]) and cache.prefixes.copies == []
    cache.release(runs[0])
    assert cache.admit(runs[1])


def test_chains_are_evicted_from_their_ends_and_the_least_recently_used_first() -> None:
    cache = Cache(8)
    old, new = ids(64, 1), ids(64, 2)
    cache.finish(old)
    cache.finish(new)
    run = Run(cache, ids(32, 3))
    assert cache.admit(run) and cache.step(run, 32) and cache.pool.evictions == 2
    assert cache.match(Run(cache, [*old, 1])).tokens == 32 and cache.match(Run(cache, [*new, 1])).tokens == 64
    reader = Run(cache, [*old[:20], 1])
    assert cache.admit(reader) and reader.computed == 20  # which evicts a block of the other
    cache.release(reader)
    assert cache.match(Run(cache, [*new, 1])).tokens == 48
    assert run.table.grow(64)  # by the block that the reader freed, and another one
    assert [cache.match(Run(cache, [*tokens, 1])).tokens for tokens in (old, new)] == [32, 32]


def test_salts_and_engines_share_nothing() -> None:
    cache, prompt = Cache(8), ids(40)
    cache.finish(prompt)
    assert cache.finish(prompt, "tenant") == 0 and cache.finish(prompt, "tenant") == 39
    roots = set()
    for name in ("digest", "runtime_version", "kernels", "ranks"):
        changed = dataclasses.replace(ENGINE, **{name: 2 if name == "ranks" else "other"})
        roots.add(PrefixCache(BlockPool(1), changed).chain(np.zeros(1, np.int32)).digest(0))
    roots |= {PrefixCache(BlockPool(1), ENGINE).chain(np.zeros(1, np.int32), salt).digest(0) for salt in ("", "a", "b")}
    assert len(roots) == 7


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=2, max_size=LONGEST), st.data())
def test_tokens_that_differ_in_one_place_match_up_to_it(tokens: list[int], data: st.DataObject) -> None:
    cache = Cache(12)
    cache.finish(tokens)
    place = data.draw(st.integers(0, len(tokens) - 1))
    # Values that differ in any one byte, and token ids whose bytes are those of two others in another division.
    other = tokens[place] ^ 1 << data.draw(st.integers(0, 30))
    changed = [*tokens[:place], other, *tokens[place + 1 :]]
    assert cache.match(Run(cache, changed)).tokens == min(place, len(tokens) - 1)


def common(first: list[int], second: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=LONGEST - 20)


class CacheMachine(RuleBasedStateMachine):
    """Sequences of few different tokens come, compute, are preempted and go, in any order."""

    blocks = 200  # so many that nothing is evicted

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache(self.blocks)
        self.waiting: list[Run] = []
        self.running: list[Run] = []
        self.seen: list[tuple[str, list[int]]] = []  # all tokens that were ever visible

    def note(self, run: Run) -> None:
        self.seen.append((run.salt, run.tokens[: run.visible].tolist()))

    def draw(self, data: st.DataObject, runs: list[Run]) -> Run:
        return runs[data.draw(st.integers(0, len(runs) - 1))]

    def expected(self, run: Run, limit: int, *, announced: bool) -> int:
        tokens = run.tokens[:limit].tolist()
        visible = [seen for salt, seen in self.seen if salt == run.salt]
        if announced:
            visible += [other.tokens[: other.announced].tolist() for other in self.running if other.salt == run.salt]
        return max((common(tokens, seen) for seen in visible), default=0)

    @rule(tokens=TOKENS, zeros=st.integers(0, 40), salt=st.sampled_from(SALTS))
    def arrive(self, tokens: list[int], zeros: int, salt: str) -> None:
        self.waiting.append(Run(self.cache, ([0] * zeros + tokens)[: LONGEST - 20], salt))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        run = self.draw(data, self.waiting)
        limit = data.draw(st.integers(0, run.known - 1) | st.just(run.known - 1))
        prefix = self.cache.match(run, limit)
        self.check(prefix, run, limit)
        assert len(prefix.blocks) == prefix.tokens // BLOCK_SIZE and (prefix.source >= 0) == (prefix.tokens % BLOCK_SIZE > 0)
        available = self.cache.pool.available
        if self.cache.admit(run, limit):
            self.waiting.remove(run)
            self.running.append(run)
        else:
            assert self.cache.pool.available == available

    def check(self, prefix: Prefix, run: Run, limit: int) -> None:
        assert prefix.tokens == self.expected(run, limit, announced=False)
        assert prefix.tokens + prefix.pending == self.expected(run, limit, announced=True)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 40), guesses=st.lists(st.integers(0, 1), max_size=20))
    def step(self, data: st.DataObject, count: int, guesses: list[int]) -> None:
        run = self.draw(data, self.running)
        if run.computed < run.known:
            self.computed(run, min(count, run.known - run.computed), tuple(guesses))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(0, 1), count=st.integers(1, 20))
    def generate(self, data: st.DataObject, token: int, count: int) -> None:
        run = self.draw(data, self.running)
        if run.computed == run.known:
            for _ in range(min(count, LONGEST - run.known)):
                run.tokens[run.known] = token
                run.known += 1
                if not self.computed(run, 1, ()):
                    break

    def computed(self, run: Run, count: int, guesses: tuple[int, ...]) -> bool:
        guesses = guesses[: LONGEST - run.computed - count]
        if done := self.cache.step(run, count, guesses):
            self.note(run)
        else:
            self.preempt_run(run)
        return done

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.preempt_run(self.draw(data, self.running))

    def preempt_run(self, run: Run) -> None:
        self.running.remove(run)
        self.cache.release(run)
        self.note(run)
        self.waiting.append(run)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.waiting.remove(self.draw(data, self.waiting))

    @invariant()
    def blocks_are_free_or_used_or_cached(self) -> None:
        pool = self.cache.pool
        used = {block for run in self.running for block in run.table.blocks}
        assert pool.used == len(used) and pool.available + pool.used == self.blocks
        for run in self.running:
            assert list(run.row[: len(run.table.blocks)]) == run.table.blocks

    def teardown(self) -> None:
        for run in self.running:
            self.cache.release(run)
        for _ in range(self.blocks):
            self.cache.pool.take()
        probe = Run(self.cache, [0] * 40)
        prefix = self.cache.match(probe)
        assert (prefix.tokens, prefix.pending) == (0, 0), "something is found in a cache whose blocks are all gone"


class SmallCacheMachine(CacheMachine):
    """The same where blocks run out: what is found is right, though it need not be all that was ever computed."""

    blocks = 9

    def check(self, prefix: Prefix, run: Run, limit: int) -> None:
        assert prefix.tokens <= self.expected(run, limit, announced=False)
        assert prefix.tokens + prefix.pending <= self.expected(run, limit, announced=True)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(deadline=None, max_examples=40, stateful_step_count=30)
TestSmallCache = SmallCacheMachine.TestCase
TestSmallCache.settings = settings(deadline=None, max_examples=40, stateful_step_count=40)
