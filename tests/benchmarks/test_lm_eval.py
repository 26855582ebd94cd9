"""Engines under lm-evaluation-harness: requests in an engine's terms, the tasks' data, the harness where it is installed."""

from __future__ import annotations

import importlib.util
import json
import platform
import pydoc_data.topics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from belle_compile.runtime import Engine, EngineError, SamplingParams
from benchmarks.lm_eval import TASKS, __main__, make_tasks
from benchmarks.lm_eval.translate import (
    Window,
    answer_text,
    by_inputs,
    cut_left,
    sampling_params,
    score,
    score_windows,
    special_stops,
    window,
)
from tests.runtime.fakes import EOS, FakeExecutor, hash_rule, make_engine, script_rule, special_tokens

GREEDY = SamplingParams(
    min_p=0.0, min_tokens=0, temperature=0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=256, seed=1234
)


def log_probability(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A continuation token by token, the whole context anew for each."""
    total, greedy = 0.0, True
    for index, token in enumerate(continuation):
        logits = hash_rule(context + continuation[:index]).astype(np.float64)
        total += logits[token] - np.log(np.exp(logits).sum())
        greedy = greedy and int(logits.argmax()) == token
    return float(total), greedy


# Windows and scores


def test_window_reads_all_but_the_last_token() -> None:
    assert window([1, 2, 3], [4, 5], 100) == Window((1, 2, 3, 4), (4, 5))
    assert window([1, 2, 3], [4, 5], 100).start == 2
    assert window([1], [4], 1) == Window((1,), (4,))


def test_window_cuts_the_context_from_the_left() -> None:
    assert window([1, 2, 3], [4, 5], 4) == Window((1, 2, 3, 4), (4, 5))
    assert window([1, 2, 3], [4, 5], 3) == Window((2, 3, 4), (4, 5))
    assert window([1, 2, 3], [4, 5], 2) == Window((3, 4), (4, 5))


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([], [1], "a request: found 0 tokens of context and 1 to predict, expected one or more of each"),
        ([1], [], "found 1 tokens of context and 0 to predict"),
        ([1], [2, 3, 4], "a continuation is longer than the context: found 3 tokens, expected at most 2"),
    ],
)
def test_window_refuses(context: list[int], continuation: list[int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        window(context, continuation, 2)


def test_choices_of_one_token_are_one_pass() -> None:
    windows = [window([1, 2], [3], 9), window([5, 6, 7], [8], 9), window([1, 2], [4], 9), window([1], [2, 9], 9)]
    assert by_inputs(windows) == [[1], [0, 2, 3]]
    executor = FakeExecutor()
    with make_engine(executor) as engine:
        scores = score_windows(engine, [windows[index] for index in (0, 2, 3)])
    assert executor.steps == [(2, 2)]
    for found, (context, continuation) in zip(scores, [([1, 2], [3]), ([1, 2], [4]), ([1], [2, 9])], strict=True):
        assert found == pytest.approx(log_probability(context, continuation))


def test_score() -> None:
    targets = [int(token) for token in np.random.default_rng(0).integers(0, 300, 150)]
    logits = np.stack([hash_rule([index]) for index in range(150)])
    expected = sum(log_probability([index], [token])[0] for index, token in enumerate(targets))
    assert score(logits, targets) == (pytest.approx(expected, rel=1e-9), False)
    best = [int(row.argmax()) for row in logits]
    assert score(logits, best)[1] and not score(logits, [*best[:-1], (best[-1] + 1) % 300])[1]
    assert score(logits + 1e4, best)[0] == pytest.approx(score(logits, best)[0], rel=1e-4)  # no overflow
    with pytest.raises(EngineError, match="the model's logits are not finite"):
        score(logits * np.float32(np.nan), best)


def test_long_context_needs_no_logits_but_the_continuations() -> None:
    executor = FakeExecutor(max_tokens=10, max_rows=4)
    context, continuation = list(range(40, 65)), [7, 8, 9]
    with make_engine(executor) as engine:
        (found,) = score_windows(engine, [window(context, continuation, 128)])
    assert found == pytest.approx(log_probability(context, continuation))
    assert executor.steps == [(10, 0), (10, 0), (7, 3)]


# Answers


def test_settings_of_a_request() -> None:
    assert sampling_params({}, 256, 0) == GREEDY
    assert sampling_params({"until": ["\n", ""], "max_gen_toks": 5}, 256, 2).stop == ("\n",)
    assert sampling_params({"until": "end"}, 256, 0).stop == ("end",)
    assert sampling_params({"max_tokens": 3, "max_new_tokens": 7}, 256, 0).max_new_tokens == 7
    assert sampling_params({"do_sample": False, "temperature": 0.8, "num_beams": 1}, 256, 0) == GREEDY
    sampled = sampling_params({"do_sample": True, "top_p": 0.5, "top_k": None, "seed": 7}, 256, 3)
    assert (sampled.temperature, sampled.top_p, sampled.top_k, sampled.seed) == (1.0, 0.5, 0, 10)
    assert sampling_params({"temperature": 0.8}, 256, 0).temperature == 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "a generation setting: found num_beams=4, expected only until, do_sample, max_gen_toks, temp"),
        ({"min_p": 0.1, "num_beams": 1}, "found min_p=0.1, expected only"),
        ({"top_p": 2}, "top_p: found 2, expected above 0"),
    ],
)
def test_settings_that_would_change_answers_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        sampling_params(settings, 256, 0)


def test_prompts_are_cut_from_the_left() -> None:
    assert cut_left([1, 2, 3, 4], 10, 6) == [1, 2, 3, 4]
    assert cut_left([1, 2, 3, 4], 10, 8) == [3, 4]
    with pytest.raises(EngineError, match="max_gen_toks leaves no room for a prompt: found 10 of 10 tokens; lower it"):
        cut_left([1], 10, 10)


def test_stop_strings_that_are_special_tokens() -> None:
    with make_engine(special_tokens=special_tokens(eos=())) as engine:
        tokenizer = engine.tokenizer
        said = tokenizer.encode("ab")
    assert special_stops(tokenizer, ("</s>", "a", "ab")) == {EOS}
    with make_engine(FakeExecutor(script_rule(2, [*said, EOS, *said])), special_tokens=special_tokens(eos=())) as engine:
        (result,) = engine.generate([[5, 5]], SamplingParams(temperature=0, max_new_tokens=5))
    assert result.text == "abab"
    assert answer_text(tokenizer, result, frozenset({EOS})) == "ab" and answer_text(tokenizer, result, frozenset()) == "abab"


# Tasks


def test_data_are_made_alike_twice(tmp_path: Path) -> None:
    topics = pydoc_data.topics.topics
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        make_tasks.write(folder, topics)
    for made in sorted((tmp_path / "a").iterdir()):
        assert made.read_bytes() == (tmp_path / "b" / made.name).read_bytes()
        if platform.python_version() == "3.11.7":
            assert made.read_bytes() == (TASKS / made.name).read_bytes()


def test_committed_data() -> None:
    def items(name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len({item["id"] for item in found}) == len(found)
        return found

    endings, words, texts = items("endings"), items("last_word"), items("texts")
    assert (len(endings), len(words), len(texts)) == (make_tasks.ENDINGS, make_tasks.WORDS, make_tasks.TEXTS)
    assert all(len(set(item["endings"])) == make_tasks.CHOICES and 0 <= item["label"] < make_tasks.CHOICES for item in endings)
    assert all(item["word"] in make_tasks.words_of(item["context"]) for item in words)


# The command


def test_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BELLE_TRACEBACK", raising=False)

    def fails(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit:
            __main__.main(arguments)
        return int(exit.value.code or 0), capsys.readouterr().err

    status, said = fails(str(tmp_path), "--tasks", "python_docs")
    assert status == 1 and "is not an engine: found no manifest.json" in said and said.count("\n") == 1
    status, said = fails(str(tmp_path))
    assert status == 2 and "say after ENGINE what to run" in said
    if importlib.util.find_spec("lm_eval") is None:
        monkeypatch.setattr(__main__, "read_manifest", lambda _: None)
        status, said = fails(str(tmp_path), "--tasks", "python_docs")
        assert status == 1 and said.startswith("the Python package lm_eval is not installed; run `pip install")


# The harness' class


def model(engine: Engine, **options: Any) -> Any:
    pytest.importorskip("lm_eval")
    from benchmarks.lm_eval.model import BelleLM

    return BelleLM(engine, **options)


def asked(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_loglikelihood() -> None:
    with make_engine() as engine:
        lm = model(engine)
        hello, world, both = (engine.tokenizer.encode(text) for text in ("hello", " world", "hello world"))
        assert hello + world == both
        found = lm.loglikelihood([asked("hello ", "world"), asked("hello", " world"), asked("", "hello")], disable_tqdm=True)
        expected = pytest.approx(log_probability(hello, world))
        assert found[0] == expected and found[1] == expected  # the context's space goes to the continuation
        assert found[2] == pytest.approx(log_probability([1], hello))  # BOS stands for an empty context
        best = int(hash_rule(hello).argmax())
        assert lm._loglikelihood_tokens([(None, hello, [best])], disable_tqdm=True)[0][1]


def test_loglikelihood_of_long_contexts_and_texts() -> None:
    with make_engine() as engine:
        lm = model(engine, max_length=16)
        text = "hello 0123456789 0123456789"
        ids = engine.tokenizer.encode(text)
        assert len(ids) > 17
        (found,) = lm.loglikelihood([asked(text, "?!")], disable_tqdm=True)
        tail = engine.tokenizer.encode("?!")
        assert found == pytest.approx(log_probability(ids[-(17 - len(tail)) :], tail))
        # Rolling: the first 16 tokens after BOS, then the rest in a window that is full of context.
        (rolled,) = lm.loglikelihood_rolling([asked(text)], disable_tqdm=True)
        rest = len(ids) - 16
        first = log_probability([1], ids[:16])[0]
        assert rolled == pytest.approx(first + log_probability(ids[-17:-rest], ids[-rest:])[0])
        with pytest.raises(EngineError, match="max_length: found 4096, expected 1 to 128"):
            model(engine, max_length=4096)


def test_generate_until() -> None:
    with make_engine() as engine:
        answer = engine.tokenizer.encode("hello world, hello there")
    with make_engine(FakeExecutor(script_rule(5, answer))) as engine:
        lm = model(engine, max_length=25)
        assert len(answer) + 5 <= 25
        pairs = [("12345", [","]), ("0012345", []), ("12345", ["hell"])]
        requests = [asked(context, {"until": until, "max_gen_toks": 20}) for context, until in pairs]
        found = lm.generate_until(requests, disable_tqdm=True)
        assert found == ["hello world", "hello world, hello there", ""]  # the second lost its first two tokens


def test_bos_and_chats() -> None:
    with make_engine(special_tokens=special_tokens(add_bos=True)) as engine:
        lm = model(engine)
        assert lm.tok_encode("x")[0] == 1 and lm.tok_encode("x", add_special_tokens=False)[0] != 1
        assert model(engine, add_bos_token=False).tok_encode("x")[0] != 1
        assert lm.prefix_token_id == 1 and lm.eot_token_id == EOS
        chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " so"}]
        assert lm.apply_chat_template(chat[:1]) == "user: hi\nassistant:"
        assert lm.apply_chat_template(chat, add_generation_prompt=False) == "user: hi\nassistant:  so"
        assert "m.role" in lm.chat_template(True) and lm.chat_template(False) is None and lm.chat_template("tiny")
        with pytest.raises(EngineError, match="the prompt template: found other, expected tiny"):
            lm.chat_template("other")
        assert lm.tokenizer_name.startswith("belle-tiny-")


def test_the_harness_runs_the_committed_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.chdir(TASKS.parents[1])
    with make_engine(FakeExecutor(max_tokens=512, max_rows=64, max_blocks=128, num_blocks=512)) as engine:
        results = lm_eval.simple_evaluate(
            model=model(engine), tasks=["python_docs"], limit=1, bootstrap_iters=0,
            task_manager=TaskManager(include_path=TASKS, include_defaults=False),
        )  # fmt: skip
    assert set(results["results"]) >= {"python_docs_endings", "python_docs_last_word", "python_docs_last_word_generate"}
    assert results["results"]["python_docs_perplexity"]["byte_perplexity,none"] > 1
    assert results["config"]["model_name"] == "tiny"
