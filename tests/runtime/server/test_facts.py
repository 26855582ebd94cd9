"""Models, tokenizer, version, facts, counts and report; and the application's own document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import TypeAdapter

from belle_compile import __version__
from belle_compile.runtime.server.app import create_app
from belle_compile.runtime.server.options import ServerOptions
from belle_compile.runtime.server.schemas import responses
from belle_compile.runtime.server.service import Service
from tests.runtime.fakes import byte_tokenizer, make_engine
from tests.runtime.server.serving import CHAT, chat, complete, post, run, serving, stream
from tests.runtime.server.strict import check


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    options = ServerOptions(served_model_names=("belle", "org/belle-7b"))
    with serving(options=options) as service:
        yield service


def get(service: Service, path: str, status: int = 200) -> Any:
    response = run(service, lambda client: client.get(path))
    assert response.status_code == status, response.text
    return response.json()


def test_models(service: Service) -> None:
    models = get(service, "/v1/models")
    assert [model["id"] for model in models["data"]] == ["belle", "org/belle-7b"]
    for model in models["data"]:
        check(model, "max_model_len")
        assert model["max_model_len"] == service.engine.max_context
        assert get(service, f"/v1/models/{model['id']}") == model
    assert get(service, "/v1/models/gpt-4", 404)["error"]["code"] == "model_not_found"


def test_tokenize_gives_the_tokens_of_requests(service: Service) -> None:
    text = post(service, "/tokenize", {"prompt": "你 hello", "return_token_strs": True}).json()
    assert text["tokens"] == service.engine.encode("你 hello", raw=True) and text["count"] == len(text["tokens"])
    assert text["max_model_len"] == service.engine.max_context and len(text["token_strs"]) == text["count"]
    assert post(service, "/detokenize", {"tokens": text["tokens"]}).json() == {"prompt": "你 hello"}
    messages = post(service, "/tokenize", {"messages": CHAT}).json()
    assert messages["tokens"] == service.engine.encode(CHAT) and messages["token_strs"] is None
    cut = post(service, "/tokenize", {"messages": CHAT, "add_generation_prompt": False}).json()["tokens"]
    assert cut == messages["tokens"][: len(cut)] and len(cut) < len(messages["tokens"])


def test_special_tokens_of_the_tokenizer() -> None:
    from tests.runtime.fakes import special_tokens

    with serving(special_tokens=special_tokens(add_bos=True)) as service:
        with_bos = post(service, "/tokenize", {"prompt": "hello", "return_token_strs": True}).json()
        without = post(service, "/tokenize", {"prompt": "hello", "add_special_tokens": False}).json()["tokens"]
        assert with_bos["tokens"] == [1, *without] and with_bos["token_strs"][0] == "<s>"
        assert post(service, "/detokenize", {"tokens": with_bos["tokens"]}).json()["prompt"] == "<s>hello"
        echoed = complete(service, echo=True, logprobs=0, max_tokens=0)["choices"][0]
        assert echoed["text"] == "hello" and echoed["logprobs"]["text_offset"] == [0, 0], "a special token has no characters"


def test_tokenizer_info(service: Service) -> None:
    info = get(service, "/tokenizer_info")
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "</s>", None)
    assert info["chat_template"] == service.engine.manifest.prompt_template.jinja


def test_facts(service: Service) -> None:
    assert get(service, "/version") == {"version": __version__}
    info = get(service, "/info")
    assert info["model"] == "belle" and info["engine"]["name"] == "tiny" and info["engine"]["parameters"] == 1234
    assert info["engine"]["digest"] == service.engine.manifest.digest and info["report"] is None
    assert info["defaults"] == {"max_tokens": 12, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
    assert get(service, "/report", 404)["error"]["code"] == "no_report"


def test_the_engines_report(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<h1>built</h1>")
    with make_engine() as engine:
        service = Service(engine, ServerOptions(), directory=tmp_path)
        assert get(service, "/info")["report"] == "/report"
        response = run(service, lambda client: client.get("/report"))
        assert response.text == "<h1>built</h1>" and response.headers["content-type"].startswith("text/html")
        service.close()


def test_stats_count() -> None:
    with serving() as service:
        before = get(service, "/stats")
        chat(service, seed=1, max_tokens=5)
        chat(service, seed=1, max_tokens=5)
        after = get(service, "/stats")
        grown = {
            name: after[name] - before[name] for name in ("prompt_tokens", "generated_tokens", "result_hits", "result_lookups")
        }
        assert grown == {
            "prompt_tokens": len(service.engine.encode(CHAT)), "generated_tokens": 5, "result_hits": 1, "result_lookups": 2,
        }  # fmt: skip
        assert after["running"] == after["waiting"] == after["kv_usage"] == 0 and after["uptime_s"] > 0


def test_fingerprints_tell_engines_apart() -> None:
    with make_engine() as one, make_engine() as same:
        fingerprints = [Service(engine, ServerOptions()).current.fingerprint for engine in (one, same)]
        assert fingerprints[0] == fingerprints[1]
        same.executor.kernels = "kernels-amx"
    with make_engine(same.executor) as other:  # type: ignore[arg-type]
        assert Service(other, ServerOptions()).current.fingerprint != fingerprints[0]


def test_every_route_documents_its_statuses(service: Service) -> None:
    document = get(service, "/openapi.json")
    routes = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert {("/v1/chat/completions", "post"), ("/v1/completions", "post"), ("/v1/models/{model}", "get")} <= routes
    for path, method in routes:
        statuses = set(document["paths"][path][method]["responses"])
        assert "200" in statuses and "422" not in statuses, path
        if path.startswith("/v1"):
            assert statuses >= {"400", "401", "404", "408", "413", "429", "500", "503"}, path
    text = str(document)
    for name in document["components"]["schemas"]:
        assert f"#/components/schemas/{name}'" in text
    assert document == create_app(service).openapi()


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/chat/completions", {"messages": CHAT, "logprobs": True, "prompt_logprobs": 1}, "ChatCompletion"),
        ("/v1/chat/completions", {"messages": CHAT, "return_token_ids": True}, "ChatCompletion"),
        ("/v1/completions", {"prompt": "hello", "logprobs": 1, "echo": True, "prompt_logprobs": 1, "n": 2}, "Completion"),
        ("/tokenize", {"prompt": "hello"}, "Tokens"),
        ("/detokenize", {"tokens": [5]}, "DetokenizedText"),
        ("/v1/completions", {"prompt": 5}, "ErrorBody"),
    ],
)  # fmt: skip
def test_responses_are_as_documented(service: Service, path: str, body: Any, kind: str) -> None:
    fits(post(service, path, body).json(), kind)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/models", "ModelList"),
        ("/tokenizer_info", "TokenizerInfo"),
        ("/info", "Info"),
        ("/stats", "Stats"),
        ("/version", "Version"),
    ],
)
def test_facts_are_as_documented(service: Service, path: str, kind: str) -> None:
    fits(get(service, path), kind)


def test_chunks_are_as_documented(service: Service) -> None:
    for path, kind in (("/v1/chat/completions", "ChatCompletionChunk"), ("/v1/completions", "CompletionChunk")):
        fields: dict[str, Any] = {"logprobs": True} if "chat" in path else {"logprobs": 1, "echo": True}
        for chunk in stream(service, path, stream_options={"include_usage": True}, prompt_logprobs=1, **fields):
            fits(chunk, kind)


def fits(value: Any, kind: str) -> None:
    documented = getattr(responses, kind)
    TypeAdapter(documented).validate_python(value, strict=True)
    assert set(value) <= set(get_type_hints(documented))


def test_tokens_of_a_byte_level_vocabulary() -> None:
    with make_engine() as engine:
        ids = byte_tokenizer().encode("你 a\n").ids
        assert b"".join(map(engine.tokenizer.token_bytes, ids)).decode() == "你 a\n"
        assert engine.tokenizer.token_bytes(299) == b"" and engine.tokenizer.token_bytes(2) == b"</s>"
