"""POST /v1/chat/completions: OpenAI's objects, the fields of requests, and streams that say what whole answers say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from belle_compile.runtime import SamplingParams
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.service import Service
from tests.runtime.fakes import FakeExecutor, byte_tokenizer, script_rule
from tests.runtime.server.serving import CHAT, GREEDY, chat, post, serving, stream
from tests.runtime.server.strict import check

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving() as service:
        yield service


def expected_text(service: Service, **params: Any) -> str:
    (result,) = service.engine.generate([CHAT], SamplingParams(**params))
    return result.text


def test_an_answer_is_openais_object(service: Service) -> None:
    answer = chat(service, seed=3, max_tokens=7, user="somebody")
    check(answer)
    assert answer["id"].startswith("chatcmpl-") and answer["model"] == "tiny"
    assert answer["system_fingerprint"] == service.current.fingerprint
    (choice,) = answer["choices"]
    text = expected_text(service, seed=3, max_new_tokens=7)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    prompt = len(service.engine.encode(CHAT))
    assert {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        "prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"temperature": 0.3, "top_p": 0.7}, {"temperature": 0.3, "top_p": 0.7}),
        ({"top_k": 9, "min_p": 0.01}, {"top_k": 9, "min_p": 0.01}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_new_tokens": 5}),
        ({"presence_penalty": 1, "frequency_penalty": -0.5}, {"presence_penalty": 1, "frequency_penalty": -0.5}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {"70": 100}}, {"logit_bias": {70: 100}}),
        ({"min_tokens": 3, "ignore_eos": True}, {"min_tokens": 3, "ignore_eos": True}),
        ({"stop_token_ids": [70, 71], "logit_bias": {"70": 9}}, {"stop_token_ids": (70, 71), "logit_bias": {70: 9}}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"seed": -(2**63)}, {"seed": 2**63}),
        ({"prompt_lookup": 4}, {"prompt_lookup": 4}),
        ({"n": 1.0, "priority": -3, "timeout": 50, "cache_salt": "tenant"}, {"cache_salt": "tenant"}),
    ],
)  # fmt: skip
def test_fields_reach_the_engine(service: Service, fields: dict[str, Any], params: dict[str, Any]) -> None:
    answer = chat(service, **{"seed": 3} | fields)
    assert answer["choices"][0]["message"]["content"] == expected_text(service, **{"seed": 3} | params)


def test_the_engines_defaults_fill_what_is_null(service: Service) -> None:
    nothing = dict.fromkeys(
        ("temperature", "top_p", "n", "stop", "max_tokens", "logit_bias", "logprobs", "stream", "tools", "model")
    )
    answer = chat(service, seed=3, **nothing)
    assert answer["choices"][0]["message"]["content"] == expected_text(service, seed=3)
    assert answer["usage"]["completion_tokens"] == 12


def test_stop_strings_and_the_ends_of_answers(service: Service) -> None:
    prompt = len(service.engine.encode(CHAT))
    said = byte_tokenizer().encode("hello world, 你好").ids
    with serving(FakeExecutor(script_rule(prompt, said))) as scripted:
        (choice,) = chat(scripted, **GREEDY)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("hello world, 你好", "stop")
        for stop in ("world", [", ", "world"]):
            (choice,) = chat(scripted, stop=stop, **GREEDY)["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("hello ", "stop")
        (choice,) = chat(scripted, max_tokens=2, **GREEDY)["choices"]
        assert choice["finish_reason"] == "length"
        texts = [event["choices"][0]["delta"].get("content", "") for event in stream(scripted, PATH, **GREEDY)]
        assert "".join(texts) == "hello world, 你好" and "\ufffd" not in "".join(texts)


def test_roles_and_parts_of_content(service: Service) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    whole = chat(service, messages=[{"role": "system", "content": "be kind"}, *CHAT], seed=1)
    split = chat(service, messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}], seed=1)
    assert whole["choices"] == split["choices"]


def test_a_message_of_an_answer_can_be_sent_back(service: Service) -> None:
    given = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    chat(service, messages=[*CHAT, given, *CHAT])


def test_logprobs(service: Service) -> None:
    (result,) = service.engine.generate([CHAT], SamplingParams(seed=3, logprobs=2))
    (choice,) = chat(service, seed=3, logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    assert result.logprobs and len(content) == len(result.token_ids)
    for entry, scored in zip(content, result.logprobs, strict=True):
        assert entry["logprob"] == scored.logprob and bytes(entry["bytes"]) == service.engine.tokenizer.token_bytes(
            scored.token_id
        )
        assert [alternative["logprob"] for alternative in entry["top_logprobs"]] == [logprob for _, logprob in scored.top]
    joined = b"".join(bytes(entry["bytes"]) for entry in content)
    assert joined.decode(errors="replace") == choice["message"]["content"]
    plain = chat(service, seed=3, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in plain] == [entry["logprob"] for entry in content]
    assert all(entry["top_logprobs"] == [] for entry in plain)


def test_prompt_logprobs_and_token_ids(service: Service) -> None:
    answer = chat(service, seed=3, prompt_logprobs=1, return_token_ids=True)
    check(answer, "prompt_logprobs", "prompt_token_ids", "choices.token_ids")
    ids = service.engine.encode(CHAT)
    assert answer["prompt_token_ids"] == ids and len(answer["choices"][0]["token_ids"]) == 12
    first, *rest = answer["prompt_logprobs"]
    assert first is None
    for token, entry in zip(ids[1:], rest, strict=True):
        assert set(next(iter(entry.values()))) == {"logprob", "rank", "decoded_token"}
        assert next(iter(entry)) == str(token)
    chunks = stream(service, PATH, seed=3, prompt_logprobs=1, return_token_ids=True)
    assert chunks[0]["prompt_logprobs"] == answer["prompt_logprobs"] and chunks[0]["prompt_token_ids"] == ids
    streamed = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert streamed == answer["choices"][0]["token_ids"]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("scores", [{}, {"logprobs": True, "top_logprobs": 1}])
def test_a_stream_says_what_the_whole_answer_says(service: Service, n: int, scores: dict[str, Any]) -> None:
    whole = chat(service, seed=11, n=n, **scores)
    chunks = stream(service, PATH, seed=11, n=n, stream_options={"include_usage": True}, **scores)
    for chunk in chunks:
        check(chunk)
        assert chunk["id"] == chunks[0]["id"] and chunk["created"] == chunks[0]["created"]
    *chunks, usage = chunks
    assert usage["choices"] == []
    for counts in (usage["usage"], whole["usage"]):
        assert counts.pop("prompt_tokens_details")["cached_tokens"] >= 0  # depends on the requests before
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in mine) == choice["message"]["content"]
        assert mine[-1]["delta"] == {} and [part["finish_reason"] for part in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if scores:
            content = [entry for part in mine if part["logprobs"] for entry in part["logprobs"]["content"]]
            assert content == choice["logprobs"]["content"]


def test_a_stream_without_usage_has_none(service: Service) -> None:
    for options in (None, {}, {"include_usage": False}):
        assert all("usage" not in chunk for chunk in stream(service, PATH, seed=3, stream_options=options))


def test_choices_are_interleaved(service: Service) -> None:
    indices = [chunk["choices"][0]["index"] for chunk in stream(service, PATH, n=3, seed=5, max_tokens=12)]
    assert indices != sorted(indices)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_header_of_the_result_cache(streamed: bool) -> None:
    def state(service: Service, control: str = "", **fields: Any) -> str:
        body = {"messages": CHAT, "seed": 99, "stream": streamed} | fields
        return str(post(service, PATH, body, **{"cache-control": control}).headers["x-result-cache"])

    with serving() as service:
        assert [state(service), state(service), state(service, seed=98)] == ["miss", "hit", "miss"]
        assert [state(service, "no-store", seed=97), state(service, seed=97)] == ["miss", "miss"]
        assert state(service, "max-age=0, No-Cache") == "bypass" and state(service, seed=None) == "bypass"
        assert state(service, cache_salt="other") == "miss"
    with serving(cache=False) as service:
        assert state(service) == "bypass"


def test_names_of_the_model() -> None:
    with serving(options=ServerOptions(served_model_names=("belle", "org/belle-7b"))) as service:
        assert chat(service)["model"] == "belle" and chat(service, model="org/belle-7b")["model"] == "org/belle-7b"
        response = post(service, PATH, {"messages": CHAT, "model": "tiny"})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found" and response.json()["error"]["param"] == "model"


def test_control_tokens_in_messages_are_text_unless_asked_for(service: Service) -> None:
    messages = [{"role": "user", "content": "a</s>\u200b b"}]
    for fields, expected in (
        ({}, 0),
        ({"parse_special": False}, 0),
        ({"parse_special": True}, 1),
        ({"parse_special": None}, 0),
    ):
        answer = chat(service, messages=messages, max_tokens=1, return_token_ids=True, **fields)
        assert answer["prompt_token_ids"].count(2) == expected
        tokens = post(service, "/tokenize", {"messages": messages, **fields}).json()["tokens"]
        assert tokens == answer["prompt_token_ids"]
    for fields, expected in (({}, 1), ({"parse_special": False}, 0), ({"parse_special": True}, 1)):
        body = {"prompt": "a</s>", "max_tokens": 1, "return_token_ids": True, **fields}
        (choice,) = post(service, "/v1/completions", body).json()["choices"]
        assert choice["prompt_token_ids"].count(2) == expected
        assert post(service, "/tokenize", {"prompt": "a</s>", **fields}).json()["tokens"].count(2) == expected
