"""Golden answers: what selftest.json may hold, and the test of a host by them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from belle_compile.runtime import Engine, EngineError, ResultCacheOptions
from belle_compile.runtime.artifact import FileRecord
from belle_compile.runtime.cli import main
from belle_compile.runtime.selftest import (
    SELF_TEST_NAME,
    GoldenAnswer,
    GoldenAnswers,
    SelfTest,
    greedy,
    read_golden_answers,
    self_test_schema,
)
from tests.runtime.fakes import EOS, FakeExecutor, make_directory, make_engine, manifest, script_rule

PROMPTS = ((5, 6, 7), (9, 8, 7, 6, 5), (250,))
LISTED = {SELF_TEST_NAME: FileRecord("0" * 64, 1)}


def golden(lengths: tuple[int, ...] = (4, 1, 7)) -> GoldenAnswers:
    """What the fake engine answers."""
    with make_engine() as engine:
        answers = [engine.generate([list(prompt)], greedy(length))[0] for prompt, length in zip(PROMPTS, lengths, strict=True)]
    return GoldenAnswers(0.5, tuple(GoldenAnswer(tuple(a.prompt_token_ids), tuple(a.token_ids)) for a in answers))


def engine_with(directory: Path, answers: GoldenAnswers | None, executor: FakeExecutor | None = None, **options: Any) -> Engine:
    """A fake engine whose directory has these answers, or was built before there were any."""
    engine = make_engine(executor, files=LISTED if answers else {}, **options)
    if answers:
        (directory / SELF_TEST_NAME).write_text(answers.to_text(), encoding="utf-8")
    engine.directory = directory
    return engine


def test_an_engine_that_answers_as_built_passes(tmp_path: Path) -> None:
    with engine_with(tmp_path, golden()) as engine:
        result = engine.self_test()
        assert (result.prompts, result.tokens, result.reason) == (3, 12, "") and result.seconds > 0
        assert len(engine.executor.steps) == 7  # type: ignore[attr-defined]  # all together


def test_the_result_cache_has_no_part_in_it(tmp_path: Path) -> None:
    with engine_with(tmp_path, golden(), result_cache=ResultCacheOptions()) as engine:
        for _ in range(2):
            engine.self_test()
        assert len(engine.executor.steps) == 2 * 7  # type: ignore[attr-defined]
        assert engine.result_cache is not None and engine.result_cache.stats().stores == 0


def test_the_first_other_token_is_named(tmp_path: Path) -> None:
    right = golden()
    tokens = right.answers[2].tokens
    wrong = replace(right.answers[2], tokens=(*tokens[:4], tokens[4] + 1, *tokens[5:]))
    with engine_with(tmp_path, replace(right, answers=(*right.answers[:2], wrong))) as engine:
        with pytest.raises(EngineError) as error:
            engine.self_test()
    assert str(error.value) == (
        f"self-test: token 5 of 7 of the answer to prompt 3 of 3 is not the one of the build: found token {tokens[4]}, "
        f"expected token {tokens[4] + 1}; check the files with --verify or copy the engine again; if they are whole, "
        "this host computes wrongly."
    )


def test_end_of_sequence_tokens_are_tokens_like_others(tmp_path: Path) -> None:
    answers = GoldenAnswers(0.5, (GoldenAnswer((5, 6), (7, EOS, EOS)),))
    with engine_with(tmp_path, answers, FakeExecutor(script_rule(2, [7]))) as engine:
        assert engine.self_test().tokens == 3


def test_engines_without_golden_answers_say_why(tmp_path: Path) -> None:
    with engine_with(tmp_path, None) as engine:
        assert engine.self_test() == SelfTest(0, 0, 0.0, "the engine has no selftest.json: it was built before builds made one")
    with engine_with(tmp_path, GoldenAnswers(0.5, (), "the model is random")) as engine:
        assert engine.self_test() == SelfTest(0, 0, 0.0, "the model is random")


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    answers = golden()
    (tmp_path / SELF_TEST_NAME).write_text(answers.to_text(), encoding="utf-8")
    assert read_golden_answers(tmp_path, manifest(LISTED)) == answers
    assert set(self_test_schema()["required"]) == set(json.loads(answers.to_text()))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format_version": 2}, r"format version of .*: found 2, expected 1; install the runtime that belongs to the engine"),
        ({"answers": 3}, "field answers does not fit: found 3, expected a list"),
        ({"answers": [{"prompt": [1], "tokens": []}]}, r"field answers\[0\]\.tokens does not fit: found no tokens"),
        ({"answers": [{"prompt": [-1], "tokens": [1]}]}, r"field answers\[0\]\.prompt does not fit: found a negative id"),
        ({"answers": [{"prompt": [1.5], "tokens": [1]}]}, r"field answers\[0\]\.prompt\[0\] does not fit: found 1.5"),
        ({"answers": [], "reason": ""}, "field reason does not fit: found nothing"),
        ({"isa": "avx2"}, "field isa does not fit: found an unknown field"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    plain = json.loads(golden().to_text()) | changes
    (tmp_path / SELF_TEST_NAME).write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(EngineError, match=f"^self-test: .*{sentence}"):
        read_golden_answers(tmp_path, manifest(LISTED))


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^self-test: .*selftest\.json cannot be read: found .*No such file"):
        read_golden_answers(tmp_path, manifest(LISTED))
    (tmp_path / SELF_TEST_NAME).write_bytes(b"\xff")
    with pytest.raises(EngineError, match=r"^self-test: .*selftest\.json cannot be read: found .*utf-8.*; rebuild the engine"):
        read_golden_answers(tmp_path, manifest(LISTED))


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_directory(tmp_path / "engine", {"tokenizer.json": b"{}"})

    def belle_run(answers: GoldenAnswers | None, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(Engine, "load", lambda directory, **options: engine_with(tmp_path, answers))
        result = CliRunner().invoke(main, [str(directory), "--self-test", *arguments])
        return result.exit_code, result.stdout, result.stderr

    assert belle_run(golden()) == (0, "self-test: 3 prompts, 12 tokens, as built\n", "")
    code, out, err = belle_run(golden((4, 1, 6)), "你好")
    assert (code, out) == (2, "") and "give no PROMPT" in err
    other = replace(golden(), answers=(GoldenAnswer((5, 6, 7), (299, 299)),))
    code, out, err = belle_run(other)
    assert (code, out) == (1, "") and err.startswith("belle-run: self-test: token 1 of 2 of the answer to prompt 1 of 1 is not")
    code, out, err = belle_run(None)
    assert (code, out) == (1, "")
    assert err == (
        "belle-run: self-test: nothing was tested: found the engine has no selftest.json: it was built before builds made one, "
        "expected golden answers; rebuild the engine with belle-compile build, or send it requests of your own.\n"
    )
