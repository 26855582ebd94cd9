"""POST /v1/completions: prompts of all kinds, echo, log probabilities as lm-evaluation-harness reads them, and streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from belle_compile.runtime import SamplingParams
from belle_compile.runtime.server.service import Service
from tests.runtime.fakes import byte_tokenizer
from tests.runtime.server.serving import complete, serving, stream
from tests.runtime.server.strict import check

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def texts(answer: Any) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def test_a_completion_is_openais_object(service: Service) -> None:
    answer = complete(service, seed=4, max_tokens=5, logprobs=1)
    check(answer)
    assert answer["id"].startswith("cmpl-") and answer["usage"]["completion_tokens"] == 5
    (result,) = service.engine.generate(["hello"], SamplingParams(seed=4, max_new_tokens=5), raw=True)
    assert texts(answer) == [result.text]


def test_kinds_of_prompts(service: Service) -> None:
    first, second = (byte_tokenizer().encode(text).ids for text in ("hello", "hello world"))
    separate = [texts(complete(service, prompt=prompt, seed=4))[0] for prompt in ("hello", "hello world")]
    assert texts(complete(service, prompt=["hello", "hello world"], seed=4)) == separate
    assert texts(complete(service, prompt=first, seed=4)) == separate[:1]
    both = complete(service, prompt=[first, second], seed=4)
    assert texts(both) == separate and both["usage"]["prompt_tokens"] == len(first) + len(second)


def test_choices_of_several_prompts_lie_side_by_side(service: Service) -> None:
    answer = complete(service, prompt=["hello", "world"], n=2, seed=4, best_of=2)
    pairs = [texts(complete(service, prompt=prompt, n=2, seed=4)) for prompt in ("hello", "world")]
    assert texts(answer) == pairs[0] + pairs[1] and len(set(texts(answer))) == 4
    assert answer["usage"]["prompt_tokens"] == sum(len(byte_tokenizer().encode(text).ids) for text in ("hello", "world"))


@pytest.mark.parametrize("prompt", ["你好, hello", [5, 6, 7]])
def test_echo(service: Service, prompt: Any) -> None:
    plain, echoed = (complete(service, prompt=prompt, echo=echo, seed=4)["choices"][0]["text"] for echo in (False, True))
    given = prompt if isinstance(prompt, str) else byte_tokenizer().decode(prompt)
    assert echoed == given + plain


def test_logprobs_over_an_echoed_prompt(service: Service) -> None:
    ids = byte_tokenizer().encode("hello world").ids
    params = SamplingParams(temperature=0, max_new_tokens=1, logprobs=1, prompt_logprobs=1)
    (result,) = service.engine.generate([ids], params)
    assert result.logprobs and result.prompt_logprobs
    (choice,) = complete(service, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"]
    scores = choice["logprobs"]
    assert scores["token_logprobs"] == [None, *(e.logprob for e in result.prompt_logprobs if e), result.logprobs[0].logprob]
    assert scores["top_logprobs"][0] is None and scores["text_offset"][:3] == [0, 5, 11][: len(ids)] + [11][len(ids) - 2 :]
    for token, best, entry in zip(
        scores["tokens"][1:-1], scores["top_logprobs"][1:-1], result.prompt_logprobs[1:], strict=True
    ):
        assert entry is not None and best[token] == entry.logprob
        assert max(best, key=best.__getitem__) == next(iter(best)), "the best one comes first"
        assert (entry.top[0][0] == entry.token_id) == (max(best, key=best.__getitem__) == token), "greedy or not"


def test_an_answer_of_no_tokens_scores_the_prompt(service: Service) -> None:
    fields = {"prompt": "hello world", "echo": True, "logprobs": 1, "temperature": 0}
    none, one = (complete(service, max_tokens=most, **fields) for most in (0, 1))
    assert none["choices"][0]["text"] == "hello world" and none["usage"]["completion_tokens"] == 0
    assert none["choices"][0]["finish_reason"] == "length"
    for name, values in none["choices"][0]["logprobs"].items():
        assert values == one["choices"][0]["logprobs"][name][:-1]
    chunks = stream(service, PATH, max_tokens=0, stream_options={"include_usage": True}, **fields)
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "hello world"
    assert chunks[-1]["usage"]["completion_tokens"] == 0


def test_text_offsets_count_characters(service: Service) -> None:
    (choice,) = complete(service, prompt="你 x", echo=True, logprobs=0, max_tokens=1)["choices"]
    scores = choice["logprobs"]
    assert scores["text_offset"][: len(scores["tokens"]) - 1] == sorted(scores["text_offset"][:-1])
    assert scores["text_offset"][-1] == 3 and scores["tokens"][scores["text_offset"].index(2)] == "x"


def test_prompt_logprobs_and_token_ids_of_each_choice(service: Service) -> None:
    answer = complete(service, prompt=["hello", "hello world"], prompt_logprobs=0, return_token_ids=True, seed=1)
    check(answer, "choices.prompt_logprobs", "choices.prompt_token_ids", "choices.token_ids")
    for choice, text in zip(answer["choices"], ("hello", "hello world"), strict=True):
        assert choice["prompt_token_ids"] == byte_tokenizer().encode(text).ids
        assert len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"]) and len(choice["token_ids"]) == 12


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": 1}, {"logprobs": 1, "echo": True}, {"echo": True, "return_token_ids": True}]
)
def test_a_stream_says_what_the_whole_answer_says(service: Service, fields: dict[str, Any]) -> None:
    fields = {"prompt": ["hello", "你好"], "n": 2, "seed": 8} | fields
    whole = complete(service, **fields)
    chunks = stream(service, PATH, **fields)
    for chunk in chunks:
        if "echo" not in fields:  # whose first token has no log probability, which OpenAI's type does not allow
            check(chunk)
    for choice in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for name, values in (choice["logprobs"] or {}).items():
            assert [value for part in mine if part["logprobs"] for value in part["logprobs"][name]] == values
        if "return_token_ids" in fields:
            assert [token for part in mine for token in part.get("token_ids", [])] == choice["token_ids"]
