"""A draft model: what it guesses, that no answer changes, how far it guesses, and which drafts are refused."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from belle_compile.runtime import Engine, EngineError, SamplingParams, artifact
from belle_compile.runtime.cli import main
from belle_compile.runtime.executors import EXECUTORS, Executor, ExecutorFactory, LoadRequest, register_executor
from belle_compile.runtime.serving.draft_lengths import Acceptance, Candidate, DraftLengths, Pace, StepTimes, allocate
from belle_compile.runtime.serving.draft_model import DraftModel
from belle_compile.runtime.serving.request import EngineIdentity
from belle_compile.runtime.serving.sampling import Sampler
from belle_compile.runtime.serving.scheduling import SchedulerOptions
from belle_compile.runtime.serving.streams import Stream
from tests.runtime.fakes import (
    EOS,
    VOCABULARY,
    CandidateExecutor,
    FakeExecutor,
    byte_tokenizer,
    hash_rule,
    make_directory,
    make_engine,
    make_request,
    sentencepiece_tokenizer,
)

IDENTITY = EngineIdentity("draft", "0", "kernels", 1)
GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=24, ignore_eos=True)
WAYS = [
    GREEDY,
    SamplingParams(temperature=0.8, top_p=1.0, top_k=0, repetition_penalty=1, seed=5, max_new_tokens=24),
    SamplingParams(temperature=1.2, top_k=9, top_p=0.9, repetition_penalty=1.3, seed=6, max_new_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0, frequency_penalty=0.5, max_new_tokens=17, min_tokens=9, logit_bias={7: 3.0}),
    SamplingParams(temperature=0.7, seed=8, max_new_tokens=21, logprobs=2, prompt_logprobs=0),
    SamplingParams(temperature=0.7, seed=9, max_new_tokens=30, prompt_lookup=3),
]


def sharp_rule(context: list[int]) -> NDArray[np.float32]:
    """A model that mostly agrees with `near_rule`; at times the end of the answer is likely."""
    logits = hash_rule(context[-3:])
    logits[EOS] = 4 if sum(context) % 17 == 0 else -20
    return logits


def near_rule(context: list[int]) -> NDArray[np.float32]:
    """Its draft: the same with some noise, and at times something else."""
    noise = np.random.default_rng(list(hashlib.sha256(bytes(str(context), "ascii")).digest())).normal(size=VOCABULARY)
    logits = sharp_rule(context) + noise.astype(np.float32) * 0.3
    return logits if sum(context) % 5 else np.roll(logits, 1)


def draft_model(rule: Any = near_rule, tokens: int | None = 4, prefix_cache: bool = True, **limits: int) -> DraftModel:
    return DraftModel(FakeExecutor(rule, **limits), IDENTITY, DraftLengths(tokens), prefix_cache=prefix_cache)


def answers(drafts: DraftModel | None, together: int, executor: FakeExecutor, prefix_cache: bool = True) -> list[Any]:
    """The answers to 48 requests, so many at a time."""
    random = np.random.default_rng(3)
    shared = [int(token) for token in random.integers(3, VOCABULARY, 18)]
    prompts = [shared[: 2 + n % 17] + [int(random.integers(3, VOCABULARY))] * (n % 4) for n in range(48)]
    params = [replace(WAYS[n % len(WAYS)], seed=n if n % 3 else WAYS[n % len(WAYS)].seed) for n in range(48)]
    options = SchedulerOptions(prefix_cache=prefix_cache)
    with make_engine(executor, scheduler=options, drafts=drafts) as engine:
        results = [
            result
            for first in range(0, 48, together)
            for result in engine.generate(prompts[first : first + together], params[first : first + together])
        ]
        stats = engine.stats()
    assert stats.drafted_tokens == sum(result.drafted for result in results)
    assert stats.accepted_tokens == sum(result.accepted for result in results)
    return results


PLAIN = {"max_blocks": 4, "num_blocks": 70, "max_rows": 50, "max_tokens": 60, "max_sequences": 16}


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return [result.token_ids for result in answers(None, 1, FakeExecutor(sharp_rule, **PLAIN))]


@pytest.mark.parametrize("together", [1, 4, 16])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("kind", [FakeExecutor, CandidateExecutor])
def test_no_answer_changes(plain: list[list[int]], together: int, prefix_cache: bool, kind: Any) -> None:
    drafts = draft_model(prefix_cache=prefix_cache, **PLAIN)
    results = answers(drafts, together, kind(sharp_rule, **PLAIN), prefix_cache)
    assert [result.token_ids for result in results] == plain
    drafted, accepted = sum(result.drafted for result in results), sum(result.accepted for result in results)
    assert drafted > 300 and 0.2 < accepted / drafted < 0.95
    assert isinstance(drafts.executor, FakeExecutor) and drafts.executor.closed


@pytest.mark.parametrize(
    "limits",
    [
        {"max_tokens": 7, "max_rows": 3, "max_sequences": 2, "num_blocks": 5},  # fewer answers, chunks, blocks
        {"max_blocks": 1},  # a shorter context
        {"num_blocks": 1},
    ],
)
def test_a_smaller_draft_changes_no_answer(plain: list[list[int]], limits: dict[str, int]) -> None:
    results = answers(draft_model(**PLAIN | limits), 16, FakeExecutor(sharp_rule, **PLAIN))
    assert [result.token_ids for result in results] == plain
    assert sum(result.accepted for result in results) > 0


def test_preempted_and_cancelled_answers_leave_nothing(plain: list[list[int]]) -> None:
    small = FakeExecutor(sharp_rule, **PLAIN | {"num_blocks": 6})
    drafts, long = draft_model(**PLAIN), replace(GREEDY, max_new_tokens=39)
    with make_engine(small, drafts=drafts) as engine:
        stream: Stream = engine.stream([9] * 8, long)
        next(stream)
        stream.close()
        results = engine.generate([[n] * 9 for n in range(5, 10)], long)
        assert engine.stats().preemptions > 0
        again = engine.generate([[n] * 9 for n in range(5, 10)], long)
    with make_engine(FakeExecutor(sharp_rule, **PLAIN)) as engine:
        expected = engine.generate([[n] * 9 for n in range(5, 10)], long)
    assert [r.token_ids for r in results] == [r.token_ids for r in again] == [r.token_ids for r in expected]


def test_an_equal_draft_is_always_right_also_where_tokens_are_sampled() -> None:
    params = [replace(way, max_new_tokens=31, ignore_eos=True) for way in WAYS[:4]]
    for way in params:
        executor = FakeExecutor(sharp_rule, **PLAIN)
        with make_engine(executor, drafts=draft_model(sharp_rule, **PLAIN)) as engine:
            (result,) = engine.generate([[5, 6, 7]], way)
        assert result.accepted == result.drafted > 20
        assert len(executor.steps) == 1 + 6  # of 1 + 6 * 5 tokens


def test_a_draft_that_fails_ends_the_requests_and_not_the_engine() -> None:
    drafts = draft_model(**PLAIN)
    assert isinstance(drafts.executor, FakeExecutor)
    with make_engine(FakeExecutor(sharp_rule, **PLAIN), drafts=drafts) as engine:
        expected = engine.generate([[5, 6]], GREEDY)[0].token_ids
        drafts.executor.failure = EngineError("cpu", "kernel x", found="y")
        with pytest.raises(EngineError, match=r"draft: the draft model failed: found kernel x \(y\)"):
            engine.generate([[5, 6]], GREEDY)
        assert engine.generate([[5, 6]], GREEDY)[0].token_ids == expected


def test_the_sampler_ahead_uses_the_numbers_that_the_answer_will() -> None:
    request = make_request([5, 6], SamplingParams(temperature=1, seed=3, frequency_penalty=1.0, max_new_tokens=9), eos=(EOS,))
    sampler, rows = Sampler(request), [hash_rule([n]) for n in range(6)]
    ahead = sampler.ahead()
    guesses = [ahead.sample(row.copy()) for row in rows]
    assert [sampler.sample(row.copy()) for row in rows[:4]] == guesses[:4]
    other = sampler.ahead()
    assert [other.sample(row.copy()) for row in rows[4:]] == [sampler.sample(row.copy()) for row in rows[4:]] == guesses[4:]
    assert sampler.ends(EOS) and not sampler.ends(5)


def test_as_many_are_guessed_as_pay() -> None:
    def flat(_: int) -> float:
        return 10.0

    assert allocate([0.9], [12], 1, 12, flat, lambda _: 1.0)[0] in range(5, 12)
    assert allocate([0.9], [12], 1, 12, flat, lambda _: 9.0) == [0] == allocate([0.05], [12], 1, 12, flat, lambda _: 1.0)
    assert allocate([0.9], [2], 1, 12, flat, lambda _: 1.0) == [2] and allocate([0.9], [12], 1, 3, flat, lambda _: 1.0) == [3]
    # A second token in a step costs, further ones do not.
    assert allocate([0.9], [12], 1, 12, lambda tokens: 10.0 if tokens == 1 else 18.0, lambda _: 1.0)[0] > 4
    # In a batch whose steps take as long as they have tokens, only what is nearly certain pays.
    counts = allocate([0.99, 0.3, 0.99], [4] * 3, 3, 12, lambda tokens: 10.0 + tokens, lambda _: 0.5)
    assert counts[1] < counts[0] == counts[2]
    assert allocate([0.9] * 3, [4] * 3, 3, 12, lambda tokens: 1.0 * tokens, lambda _: 0.5) == [0, 0, 0]


def test_lengths_follow_what_is_accepted_and_the_times() -> None:
    lengths, good, bad = DraftLengths(), Acceptance(), Acceptance()
    for _ in range(3):
        lengths.verify.add(2, 10.0)
        lengths.verify.add(10, 11.0)
        lengths.draft.add(1, 1.0)
        lengths.draft.add(2, 1.9)
        lengths.draft.add(500, 100.0)
    for _ in range(12):
        lengths.note(good, 4, 4)
        lengths.note(bad, 4, 0)
    counts = lengths.choose([Candidate(good, 12, 99, 1), Candidate(bad, 12, 99, 1)], 2, 20)
    assert counts[0] > 3 and counts[1] == 0
    # To catch up with a long prompt for the last tokens of an answer does not pay.
    late = [lengths.choose([Candidate(good, 12, left, 500)], 2, 20)[0] for left in (4, 900)]
    assert late[0] == 0 < late[1]
    assert [lengths.choose([Candidate(good, 12, 99, 1)], 2, 20)[0] for _ in range(64)].count(0) == 1  # to measure it
    assert DraftLengths(3).choose([Candidate(bad, 12, 99, 900), Candidate(bad, 2, 9, 1), Candidate(bad, 9, 9, 1)], 3, 6) == [
        3,
        2,
        1,
    ]


def test_step_times_are_means_between_known_sizes() -> None:
    times = StepTimes()
    assert times.seconds(3) == 0 and not times.knows(3)
    for size, seconds in ((1, 99.0), (1, 10.0), (5, 99.0), (5, 14.0)):
        times.add(size, seconds)
    assert [times.seconds(size) for size in (1, 3, 5, 9)] == [10, 12, 14, 18] and times.knows(1)
    times.add(64, 73.0)  # large steps count from the first one on
    assert times.seconds(64) == 73 and 14 < times.seconds(30) < 73
    times.add(64, 40.0)
    assert times.seconds(64) == 40
    for _ in range(2):
        times.add(2, 30.0)  # no step takes longer than a larger one: this one was interrupted
    assert times.seconds(2) == times.seconds(5) == 14
    times.add(1, 1000.0)
    assert 10 < times.seconds(1) < 11


def test_steps_that_were_not_run_follow_the_pace_of_those_that_were() -> None:
    pace = Pace()
    verify, draft = StepTimes(pace), StepTimes(pace)
    for _ in range(3):
        verify.add(1, 10.0)
        verify.add(4, 12.0)
        draft.add(1, 3.0)
    for _ in range(60):
        verify.add(1, 20.0)  # something else runs on the host
    assert verify.seconds(1) == pytest.approx(20, rel=0.01)
    assert 4.5 < draft.seconds(1) < 6 and 18 < verify.seconds(4) < 24


def test_nothing_is_guessed_before_steps_without_guesses_are_measured() -> None:
    lengths, acceptance = DraftLengths(), Acceptance()
    for _ in range(2):
        assert lengths.choose([Candidate(acceptance, 12, 99, 1)], 1, 20) == [0]
        lengths.verify.add(1, 10.0)
    assert lengths.choose([Candidate(acceptance, 12, 99, 1)], 1, 20)[0] > 0


def test_one_answer_tries_out_a_draft() -> None:
    lengths, answers = DraftLengths(), [Acceptance() for _ in range(4)]
    for _ in range(2):
        lengths.verify.add(4, 10.0)
        lengths.draft.add(1, 0.5)
    backlogs = 300, 30, 40, 50
    candidates = [Candidate(each, 12, 999, backlog) for each, backlog in zip(answers, backlogs, strict=True)]
    (count,) = filter(None, counts := lengths.choose(candidates, 4, 60))
    assert counts == [0, count, 0, 0]
    lengths.note(answers[1], 8, 8)
    assert sum(map(bool, lengths.choose(candidates, 4, 60))) > 1


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize(
    ("right", "draft_ms", "least", "most"),
    [
        (0.02, 3.0, 0.99, 1.03),  # never right
        (0.02, 0.3, 0.99, 1.03),
        (0.5, 3.0, 0.99, 1.03),  # too slow for what is right of it
        (0.9, 0.3, 0.3, 0.85),
    ],
)
def test_a_bad_draft_costs_little_and_a_good_one_saves(
    batch: int, right: float, draft_ms: float, least: float, most: float
) -> None:
    """In simulated time, in which the host's pace changes and steps are interrupted."""
    random, lengths, spent, plain, pace = np.random.default_rng(batch), DraftLengths(), 0.0, 0.0, 1.0

    def elapse(milliseconds: float, times: StepTimes, tokens: int) -> None:
        nonlocal spent
        taken = milliseconds * pace * random.lognormal(0, 0.1) + (random.random() < 0.02) * 5
        spent += milliseconds * pace  # what chance adds to some steps is the same for both
        times.add(tokens, taken)

    for _ in range(160 // batch):
        left, backlogs, acceptances = [96] * batch, [64] * batch, [Acceptance() for _ in range(batch)]
        while live := [i for i in range(batch) if left[i] > 0]:
            pace *= random.lognormal(0, 0.02) * pace**-0.01
            candidates = [Candidate(acceptances[i], min(12, left[i] - 1), left[i], backlogs[i]) for i in live]
            counts = dict(zip(live, lengths.choose(candidates, len(live), 200), strict=True))
            if first := sum(backlogs[i] for i in live if counts[i]):
                elapse(draft_ms * (1 + first / 8), lengths.draft, first)
            for place in range(2, max(counts.values()) + 1):
                elapse(draft_ms, lengths.draft, sum(count >= place for count in counts.values()))
            tokens = len(live) + sum(counts.values())
            elapse(4.7 + 0.2 * tokens, lengths.verify, tokens)
            for i, count in counts.items():
                accepted = int(np.argmin(np.append(random.random(count) < right, False)))
                if count:
                    lengths.note(acceptances[i], count, accepted)
                backlogs[i] = min(2, 1 + count) if count else backlogs[i] + 1
                gained = min(left[i], 1 + accepted)
                left[i] -= gained
                plain += gained * (4.7 + 0.2 * len(live)) * pace / len(live)
    assert least <= spent / plain < most


class Backend(ExecutorFactory):
    """Loads fakes; those of engines with `vocabulary` in their options have more logits."""

    def __init__(self) -> None:
        self.loaded: list[FakeExecutor] = []
        self.beside: list[Executor | None] = []

    def load(self, request: LoadRequest) -> Executor:
        executor = FakeExecutor(near_rule if request.kv_memory.share else sharp_rule, **PLAIN)
        executor.vocab_size += len(request.manifest.model.name) - len("tiny")
        executor.batch.answers_apart = request.manifest.target.name == "apart"
        self.loaded.append(executor)
        self.beside.append(request.beside)
        return executor


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr("belle_compile.runtime.executors.EXECUTORS", dict(EXECUTORS))
    register_executor("fake", made := Backend())
    return made


def directory_of(path: Path, *, tokenizer: str = "", target: str = "cpu", name: str = "tiny", backend: str = "fake",
                 ranks: int = 1, memory: int = 1 << 20, arch: str = "") -> Path:  # fmt: skip
    info = artifact.TargetInfo(target, backend, (), artifact.Requirements(arch, (), memory), ranks)
    model = artifact.ModelInfo("bloom", name, len(path.name), {}, {})
    text = tokenizer or byte_tokenizer().to_str()
    return make_directory(path, {"tokenizer.json": text.encode()}, target=info, model=model)


def test_an_engine_and_its_draft_are_loaded_and_closed(tmp_path: Path, backend: Backend) -> None:
    engine, draft = directory_of(tmp_path / "engine"), directory_of(tmp_path / "draft")
    draft = directory_of(tmp_path / "draft", tokenizer=byte_tokenizer().to_str(pretty=True))  # the same, written otherwise
    with Engine.load(engine, draft=draft, draft_tokens=3) as both, Engine.load(engine) as alone:
        guessed, plain = (each.generate([[5, 6, 7]], WAYS[1])[0] for each in (both, alone))
        assert guessed == replace(plain, timings=guessed.timings, drafted=guessed.drafted, accepted=guessed.accepted)
        assert guessed.accepted > 0 and both.draft_bytes > 1 << 20 and alone.draft_bytes == 0
        assert both.identity == alone.identity
    assert all(executor.closed for executor in backend.loaded)
    assert backend.beside == [None, backend.loaded[0], None]  # the engine may share the threads of its draft


@pytest.mark.parametrize(
    ("engine", "draft", "message"),
    [
        ({}, {"tokenizer": sentencepiece_tokenizer().to_str()},
         r"draft: the draft has another vocabulary: found 265 tokens, of which \d+ of the engine's 296 are missing"),
        ({}, {"name": "tiny+2"}, "the draft has another vocabulary: found 302 logits, expected 300"),
        ({}, {"ranks": 2}, "draft: ranks: found a draft of 2 ranks, expected one rank"),
        ({"ranks": 2}, {}, "draft: ranks: found an engine of 2 ranks, expected an engine of one rank"),
        ({}, {"backend": "vulkan"}, "draft: this runtime does not know the engine's backend: found vulkan"),
        ({"target": "apart"}, {}, "this engine cannot verify guesses"),
        ({}, {"memory": 1 << 50}, r"draft: this host cannot run the engine built for cpu: .* are for another engine"),
    ],
)  # fmt: skip
def test_drafts_that_do_not_fit_are_refused(
    tmp_path: Path, backend: Backend, engine: dict[str, Any], draft: dict[str, Any], message: str
) -> None:
    paths = directory_of(tmp_path / "engine", **engine), directory_of(tmp_path / "draft", **draft)
    with pytest.raises(EngineError, match=message):
        Engine.load(paths[0], draft=paths[1])
    assert all(executor.closed for executor in backend.loaded)


def test_an_engine_is_not_its_own_draft_and_lengths_are_numbers(tmp_path: Path, backend: Backend) -> None:
    engine = directory_of(tmp_path / "engine")
    with pytest.raises(EngineError, match=r"draft: the draft is the engine itself: found .*engine"):
        Engine.load(engine, draft=engine)
    with pytest.raises(EngineError, match=r"draft_tokens: found 0 \(int\), expected a whole number, 1 or more"):
        Engine.load(engine, draft=engine, draft_tokens=0)
    with pytest.raises(EngineError, match="draft: found int, expected a path"):
        Engine.load(engine, draft=3)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="draft_tokens: found no draft, expected draft too"):
        Engine.load(engine, draft_tokens=3)
    assert not backend.loaded


@pytest.mark.parametrize("command", [["{}", "hi"], ["serve", "{}", "--port", "0"], ["benchmark", "{}"],
                                     ["batch", "{}", "{requests}", "-o", "{out}"]])  # fmt: skip
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere is not an engine: found nothing there; give the directory that belle-compile build wrote."),
        ("checkpoint", "checkpoint is not an engine: found no manifest.json; give the directory"),
        ("file", "file is not an engine: found no manifest.json; give the directory"),
        ("engine", "the draft is the engine itself: found .*; give a smaller engine of the same vocabulary"),
        ("changed", r"tokenizer\.json"),
        ("arm", "this host cannot run the engine built for arm64: found Linux .*, expected Linux riscv64"),
        ("other", "the draft has another vocabulary: found 265 tokens, .*; give a draft of the same model family"),
    ],
)
def test_a_draft_that_cannot_be_used_ends_a_command(
    tmp_path: Path, backend: Backend, command: list[str], name: str, message: str
) -> None:
    directory_of(tmp_path / "engine")
    directory_of(tmp_path / "other", tokenizer=sentencepiece_tokenizer().to_str())
    directory_of(tmp_path / "arm", target="arm64", arch="riscv64")
    (directory_of(tmp_path / "changed") / "tokenizer.json").write_text("{}")
    (tmp_path / "checkpoint").mkdir()
    for file, text in (("checkpoint/config.json", "{}"), ("file", "text"), ("requests.jsonl", '{"prompt": "hi"}\n')):
        (tmp_path / file).write_text(text)
    words = {"{}": "engine", "{requests}": "requests.jsonl", "{out}": "out.jsonl"}
    arguments = [str(tmp_path / words[word]) if word in words else word for word in command]
    result = CliRunner().invoke(main, [*arguments, "--draft", str(tmp_path / name)])
    assert result.exit_code == 1 and not backend.loaded and not (tmp_path / "out.jsonl").exists()
    assert re.search(rf"^belle-run: draft: .*{message}", result.stderr) and result.stderr.count("\n") == 1
