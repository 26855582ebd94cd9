"""Prompt lookup: what is drafted, what a step takes of it, and that no answer changes."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from belle_compile.runtime import EngineError, SamplingParams
from belle_compile.runtime.artifact import ModelInfo
from belle_compile.runtime.serving.generation import Generation
from belle_compile.runtime.serving.prompt_lookup import LONGEST_PAUSE, PromptLookup
from belle_compile.runtime.serving.sampling import Sampler
from belle_compile.runtime.serving.scheduler import Scheduler
from belle_compile.runtime.serving.sequence import Sequence
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import (
    EOS,
    VOCABULARY,
    FakeExecutor,
    byte_tokenizer,
    make_engine,
    make_request,
    script_rule,
    special_tokens,
)

LETTERS = byte_tokenizer().encode("abcd", add_special_tokens=False).ids
GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}


def quoting_rule(context: list[int]) -> NDArray[np.float32]:
    """Four letters, mostly chosen by the last two tokens, so that answers repeat themselves; at times by the whole context."""
    digest = hashlib.sha256(np.asarray(context, np.int32).tobytes()).digest()
    logits = np.full(VOCABULARY, -30, np.float32)
    seed = list(digest) if digest[0] < 25 else context[-2:]
    logits[LETTERS] = np.random.default_rng(seed).normal(size=len(LETTERS)).astype(np.float32) * 4
    logits[EOS] = 20 if digest[1] < 4 else -1
    return logits


def lookup(tokens: list[int], most: int, room: int = 100) -> tuple[PromptLookup, list[int]]:
    """A lookup over `tokens`, and its first draft."""
    buffer = np.full(len(tokens) + 200, -1, np.int32)
    buffer[: len(tokens)] = tokens
    drafter = PromptLookup(buffer, len(tokens), most)
    count = drafter.draft(len(tokens), room)
    return drafter, [int(token) for token in buffer[len(tokens) : len(tokens) + count]]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6]),
        ([1, 2, 3, 4, 7, 2, 3, 5, 8, 1, 2, 3], [4, 7, 2]),  # three tokens before a later match of two
        ([1, 2, 4, 9, 1, 2, 5, 8, 1, 2], [5, 8, 1]),  # the later of two places
        ([9, 1, 2, 1, 2], [1, 2, 1]),  # goes on with what it writes
        ([7, 7, 7], [7, 7, 7]),
        ([1, 2, 3, 4, 5], []),
        ([5, 1, 5], []),  # a single token is no match
        ([5], []),
        ([], []),
    ],
)
def test_draft_is_what_followed_the_last_occurrence(tokens: list[int], expected: list[int]) -> None:
    assert lookup(tokens, 3)[1] == expected
    assert lookup(tokens, 3, room=1)[1] == expected[:1]
    assert lookup(tokens, 3, room=0)[1] == lookup(tokens, 3, room=-2)[1] == []


def test_token_ids_up_to_two_million() -> None:
    high = 2**21 - 1
    assert lookup([high, high - 1, high, 5, 6, high, high - 1, high], 2)[1] == [5, 6]
    assert lookup([0, 1, 9, 1], 2)[1] == []  # (0, 1) is not (1)


@settings(max_examples=80, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), min_size=2, max_size=60), start=st.integers(1, 60), most=st.integers(1, 5))
def test_index_that_grows_finds_what_a_scan_finds(tokens: list[int], start: int, most: int) -> None:
    def scan(known: list[int]) -> list[int]:
        for n in (3, 2):
            for place in range(len(known) - 1, n - 1, -1):
                if known[place - n : place] == known[len(known) - n :]:
                    copied = list(known)
                    for i in range(most):
                        copied.append(copied[place + i])
                    return copied[len(known) :]
        return []

    buffer = np.zeros(len(tokens) + most, np.int32)
    start = min(start, len(tokens))
    buffer[:start] = tokens[:start]
    drafter = PromptLookup(buffer, start, most)
    for length in range(start, len(tokens)):
        count = drafter.draft(length, most)
        assert [int(token) for token in buffer[length : length + count]] == scan(tokens[:length])
        drafter.accepted += 1  # never rests
        buffer[length] = tokens[length]


def test_it_rests_while_drafts_fail_and_not_while_they_are_accepted() -> None:
    buffer = np.zeros(400, np.int32)
    drafter = PromptLookup(buffer, 10, 2)
    drafts = [length for length in range(10, 210) if drafter.draft(length, 9)]
    gaps = [b - a for a, b in pairwise(drafts)]
    assert gaps == [2, 3, 5, 9, 17, *[LONGEST_PAUSE + 1] * (len(gaps) - 5)] and len(gaps) > 6
    resumed = []
    for length in range(210 + LONGEST_PAUSE, 250):
        if drafter.draft(length, 9):
            resumed.append(length)
            drafter.accepted += len(resumed) < 4
    assert resumed == [242, 243, 244, 245, 247]  # three are accepted, then the pauses begin anew
    assert drafter.drafted == 2 * (len(drafts) + len(resumed))


def decoding(s: Scheduler, prompt: list[int], new: int, most: int) -> Sequence:
    """A sequence whose prompt is computed and answer begun, so that the next step decodes."""
    sequence = Sequence(prompt, new)
    s.add(sequence)
    while s.schedule() != [sequence]:
        s.commit()
    s.commit()
    assert not sequence.append(prompt[0])
    sequence.lookup = PromptLookup(sequence.tokens, sequence.length, most)
    return sequence


def test_step_takes_drafts_and_wants_their_logits() -> None:
    executor = FakeExecutor()
    s = Scheduler(executor.batch, executor.num_blocks)
    sequence = decoding(s, [5, 6, 7, 8, 9, 5, 6, 7], 12, 3)
    sequence.tokens[8] = 8
    assert s.schedule() == [sequence] and sequence.drafted == 3
    batch = s.batch
    assert (batch.tokens, batch.rows) == (4, 4)
    assert batch.token_ids[:4].tolist() == [8, 9, 5, 6] and batch.positions[:4].tolist() == [8, 9, 10, 11]
    assert batch.logit_rows[:4].tolist() == [0, 1, 2, 3]
    s.commit()
    assert sequence.append(9) and sequence.append(5) and not sequence.append(1)
    assert (sequence.length, sequence.computed, sequence.drafted) == (12, 11, 0)
    assert sequence.generated == [8, 9, 5, 1]
    assert sequence.lookup is not None and (sequence.lookup.drafted, sequence.lookup.accepted) == (3, 2)
    assert s.schedule() == [sequence] and batch.positions[: batch.tokens].tolist()[:1] == [11]


@pytest.mark.parametrize(
    ("limits", "new", "waiting", "drafted"),
    [
        ({}, 12, 0, 5),
        ({"max_tokens": 4}, 12, 0, 3),
        ({"max_rows": 3}, 12, 0, 2),
        ({"max_rows": 3}, 12, 1, 1),  # a sequence that may come in this step has its row
        ({"max_rows": 3, "max_sequences": 1}, 12, 1, 2),  # this one may not
        ({"max_rows": 3}, 12, 9, 0),
        ({}, 4, 0, 2),  # the answer's last token is never computed
        ({}, 2, 0, 0),
    ],
)
def test_drafts_take_what_is_left(limits: dict[str, int], new: int, waiting: int, drafted: int) -> None:
    executor = FakeExecutor(**limits)  # type: ignore[arg-type]
    s = Scheduler(executor.batch, executor.num_blocks)
    sequence = decoding(s, [7] * 9, new, 5)
    others = [Sequence([3], 2) for _ in range(waiting)]
    for other in others:
        s.add(other)
    needing_logits = s.schedule()
    assert sequence.drafted == drafted and needing_logits[0] is sequence
    assert s.batch.rows == drafted + len(needing_logits) <= s.batch.max_rows and s.batch.tokens <= s.batch.max_tokens


def test_drafts_leave_their_token_to_all_answers_under_way() -> None:
    executor = FakeExecutor(max_tokens=6, max_rows=6)
    s = Scheduler(executor.batch, executor.num_blocks)
    first = decoding(s, [7] * 4, 20, 9)
    second = Sequence([7], 20, 9)
    s.add(second)
    assert s.schedule() == [first, second]
    s.commit()
    while first.append(7):
        pass
    second.append(7)
    assert s.schedule() == [first, second]
    assert (first.drafted, second.drafted, s.batch.tokens, s.batch.rows) == (4, 0, 6, 6)


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], dict[str, Any]]:
    params: dict[str, Any] = {
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.5])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.1])),
        "top_p": draw(st.sampled_from([0.9, 1.0])),
        "top_k": 0,
        "seed": draw(st.integers(0, 3)),
        "max_new_tokens": draw(st.integers(1, 40)),
        "stop": draw(st.sampled_from([(), ("ab",), ("abca", "dd"), ("x", "cbd")])),
        "ignore_eos": draw(st.booleans()),
    }
    return draw(st.lists(st.sampled_from(LETTERS), min_size=1, max_size=24)), params


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(requests(), min_size=1, max_size=5),
    lookups=st.lists(st.integers(0, 9), min_size=5, max_size=5),
    limits=st.fixed_dictionaries({
        "max_tokens": st.integers(1, 30), "max_rows": st.integers(1, 12), "max_sequences": st.integers(1, 5),
        "num_blocks": st.integers(4, 16),
    }),
)  # fmt: skip
def test_answers_are_those_without_lookup(
    asked: list[tuple[list[int], dict[str, Any]]], lookups: list[int], limits: dict[str, int]
) -> None:
    prompts = [prompt for prompt, _ in asked]
    with make_engine(FakeExecutor(quoting_rule)) as engine:
        plain = [engine.generate([prompt], SamplingParams(**params))[0] for prompt, params in asked]
    with make_engine(FakeExecutor(quoting_rule, **limits)) as engine:  # type: ignore[arg-type]
        drafting = [SamplingParams(**params, prompt_lookup=n) for (_, params), n in zip(asked, lookups, strict=False)]
        drafted = engine.generate(prompts, drafting)
    for one, other in zip(drafted, plain, strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert other.drafted == other.accepted == 0 and one.accepted <= one.drafted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_are_accepted_and_sampled_from_once(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of them that the test above means something; the sampler is asked once for each token of the answer."""
    samples: list[int] = []
    sample = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, logits: samples.append(sample(self, logits)) or samples[-1])
    executor = FakeExecutor(quoting_rule)
    params = SamplingParams(
        temperature=temperature, repetition_penalty=1, seed=5, max_new_tokens=100, ignore_eos=True, prompt_lookup=4
    )
    with make_engine(executor) as engine:
        (result,) = engine.generate([LETTERS], params)
    assert samples == result.token_ids and len(samples) == 100
    assert 20 < result.accepted < result.drafted
    assert len(executor.steps) == 100 - result.accepted


@pytest.mark.parametrize(
    ("answer", "changes", "kept", "reason"),
    [
        ("abcabcabcab", {}, "abcabcabcab", "stop"),  # the end of sequence where a draft goes on with c
        ("abcabcabcabcabcabc", {"max_new_tokens": 8}, "abcabcab", "length"),
        ("abcabcabcabcabcabc", {"stop": ("bcabca",)}, "a", "stop"),
        ("abcabcabcabdabcab", {"stop": ("d",)}, "abcabcabcab", "stop"),
    ],
)
def test_answer_that_ends_among_its_drafts(answer: str, changes: dict[str, Any], kept: str, reason: str) -> None:
    ids = byte_tokenizer().encode(answer, add_special_tokens=False).ids
    results = {}
    for most in (0, 5):
        executor = FakeExecutor(script_rule(3, ids))
        with make_engine(executor) as engine:
            params = {**GREEDY, "max_new_tokens": 30, "prompt_lookup": most, **changes}
            stream = engine.stream([9, 8, 7], SamplingParams(**params))
            pieces = list(stream)
        results[most] = pieces, stream.result.token_ids, stream.result.finish_reason
        assert "".join(pieces) == kept and stream.result.finish_reason == reason
    assert results[0] == results[5] and stream.result.accepted > 0


def test_context_end() -> None:
    with make_engine(FakeExecutor(lambda _: np.eye(VOCABULARY, dtype=np.float32)[7], max_blocks=2)) as engine:
        results = [engine.generate([[7] * 21], SamplingParams(**GREEDY, prompt_lookup=n))[0] for n in (0, 4, 30)]
    assert [result.token_ids for result in results] == [[7] * 11] * 3
    assert [result.accepted for result in results] == [0, 8, 8]


def test_nothing_is_guessed_beyond_the_length_where_rope_grows() -> None:
    executor = FakeExecutor(lambda _: np.eye(VOCABULARY, dtype=np.float32)[7])
    model = ModelInfo("llama", "tiny", 1, {"dynamic_rope_from": 16}, {})
    with make_engine(executor, model=model) as engine:
        (result,) = engine.generate([[7] * 6], SamplingParams(**GREEDY, max_new_tokens=20, prompt_lookup=4))
    assert result.token_ids == [7] * 20
    # Positions 0-5, 6-10, 11-15, then one by one.
    assert executor.steps == [(6, 1), (5, 5), (5, 5), *[(1, 1)] * 9]


def test_off_is_off() -> None:
    executor = FakeExecutor(quoting_rule)
    with make_engine(executor) as engine:
        (result,) = engine.generate([LETTERS * 3], SamplingParams(**GREEDY, max_new_tokens=9, ignore_eos=True))
    assert (result.drafted, result.accepted) == (0, 0) and executor.steps == [(12, 1), *[(1, 1)] * 8]
    assert Sequence([1], 2).lookup is None
    with pytest.raises(EngineError, match=r"prompt_lookup: found -1, expected 0 \(off\) or more"):
        SamplingParams(prompt_lookup=-1)


def test_logits_that_are_not_finite_behind_a_wrong_draft_do_not_matter() -> None:
    def rule(context: list[int]) -> NDArray[np.float32]:
        if context[-6:] == [5, 6, 7, 8, 9, 9]:  # a draft that is not the answer
            return np.full(VOCABULARY, np.nan, np.float32)
        return script_rule(9, [7, 8, 3, 4])(context)

    with make_engine(FakeExecutor(rule)) as engine:
        (result,) = engine.generate([[5, 6, 7, 8, 9, 9, 1, 5, 6]], SamplingParams(**GREEDY, max_new_tokens=9, prompt_lookup=3))
    assert result.token_ids == [7, 8, 3, 4, EOS] and result.drafted > 0


def test_generation_takes_only_rows_that_count() -> None:
    """Rows behind the end of an answer are left alone, drafted or not."""
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=3, prompt_lookup=4)
    generation = Generation(make_request([7] * 4, params, eos=(EOS,)), Tokenizer(byte_tokenizer(), special_tokens()))
    sequence = generation.sequence
    sequence.drafted, sequence.tokens[4:7] = 2, [7, EOS, 7]
    rows = np.full((3, VOCABULARY), np.nan, np.float32)
    rows[0], rows[1] = np.eye(VOCABULARY)[7], np.eye(VOCABULARY)[EOS]
    generation.accept(rows)
    assert generation.result().token_ids == [7, EOS] and generation.result().finish_reason == "stop"
