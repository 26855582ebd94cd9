"""belle-run batch over a fake engine: every request is answered once, however often the run is stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import PromptTemplate
from belle_compile.runtime.cli import main
from tests.runtime.fakes import FakeExecutor, make_directory, make_engine

REQUESTS = [
    "hello",
    {"id": "a", "prompt": "hello there", "max_new_tokens": 3},
    {"id": 7, "messages": [{"role": "user", "content": "你好"}]},
    {"token_ids": [5, 6, 7], "temperature": 0},
    {"prompt": "hello", "system": "Be brief."},
    *({"prompt": f"hello {number}"} for number in range(80)),
]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose engine answers by a hash of the context."""
    monkeypatch.setattr(Engine, "load", lambda directory, **options: make_engine(FakeExecutor()))
    return make_directory(tmp_path / "engine", {"tokenizer.json": b"{}"})


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(request) for request in REQUESTS), encoding="utf-8")
    return path


def run(engine: Path, requests: Path, *arguments: object, temperature: str = "0") -> Result:
    output = engine.parent / "out.jsonl"
    words = ["batch", engine, requests, "-o", output, "--temperature", temperature, *arguments]
    return CliRunner().invoke(main, [str(word) for word in words])


def answers(engine: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (engine.parent / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_request_has_an_answer_in_its_place(engine: Path, requests: Path) -> None:
    result = run(engine, requests)
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    assert f"{len(REQUESTS)} answers" in result.stderr
    found = answers(engine)
    assert [answer["index"] for answer in found] == list(range(len(REQUESTS)))
    assert [found[number].get("id") for number in range(3)] == [None, "a", 7]
    assert found[1]["finish_reason"] == "length" and found[1]["generated_tokens"] == 3
    with make_engine(FakeExecutor()) as alone:
        (expected,) = alone.generate(["hello 79"])
        assert found[4]["prompt_tokens"] > found[0]["prompt_tokens"], "it has a system message"
        assert found[3]["prompt_tokens"] == 3 and found[-1]["prompt_tokens"] == len(expected.prompt_token_ids)


@pytest.mark.parametrize("cut", [0, 1, 5, 40])
def test_a_run_that_was_stopped_goes_on(engine: Path, requests: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run(engine, requests)
    whole = (engine.parent / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    order = sorted(range(len(lines)), key=lambda number: (number * 7919) % 97)[:cut]  # as they happened to end
    (engine.parent / "out.jsonl").write_bytes(
        b"".join(lines[number] for number in order) + lines[order[-1] if order else 0][:9]
    )
    loaded: list[int] = []
    generate = Engine.agenerate

    async def counted(self: Engine, *arguments: Any, **named: Any) -> Any:
        loaded.append(1)
        return await generate(self, *arguments, **named)

    monkeypatch.setattr(Engine, "agenerate", counted)
    result = run(engine, requests)
    assert result.exit_code == 0 and len(loaded) == len(REQUESTS) - cut
    assert (engine.parent / "out.jsonl").read_bytes() == whole
    assert cut == 0 or f"{cut} of them by earlier runs" in result.stderr
    assert sorted(path.name for path in engine.parent.iterdir()) == ["engine", "in.jsonl", "out.jsonl"]


def test_ctrl_c_keeps_the_answers_so_far(engine: Path, requests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, started = Engine.agenerate, []

    async def interrupted(self: Engine, *arguments: Any, **named: Any) -> Any:
        started.append(1)
        if len(started) == 70:
            signal.raise_signal(signal.SIGINT)
        return await generate(self, *arguments, **named)

    monkeypatch.setattr(Engine, "agenerate", interrupted)
    # Shells start background jobs with SIGINT ignored.
    before_tests = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run(engine, requests)
    finally:
        signal.signal(signal.SIGINT, before_tests)
    assert result.exit_code == 130 and "the same command goes on from there" in result.stderr
    before = len(answers(engine))
    assert 0 < before < len(REQUESTS)
    monkeypatch.setattr(Engine, "agenerate", generate)
    assert f"{before} of them by earlier runs" in run(engine, requests).stderr
    assert len(answers(engine)) == len(REQUESTS)


def test_answers_of_something_else_are_not_taken_over(engine: Path, requests: Path, tmp_path: Path) -> None:
    run(engine, requests)
    before = (tmp_path / "out.jsonl").read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps("something else") + "\n")
    for result in (run(engine, other), run(engine, requests, temperature="0.5"), run(engine, requests, "--system", "x")):
        assert result.exit_code == 1 and "has answers to other requests, or by another engine or other set" in result.stderr
    (tmp_path / "out.jsonl").write_text("notes of mine\n")
    assert run(engine, requests).exit_code == 1 and (tmp_path / "out.jsonl").read_text() == "notes of mine\n"
    assert run(engine, requests, "--force").exit_code == 0 and (tmp_path / "out.jsonl").read_bytes() == before


def test_variables_of_the_template(engine: Path, requests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = PromptTemplate("says", "{{ tone }}{% for m in messages %}{{ m.content }}{% endfor %}", "", "")
    monkeypatch.setattr(Engine, "load", lambda directory, **options: make_engine(FakeExecutor(), prompt_template=template))
    requests.write_text('"hello"\n', encoding="utf-8")
    assert run(engine, requests).exit_code == 0
    (plain,) = answers(engine)
    other = run(engine, requests, "--chat-template-kwargs", '{"tone": "kind"}')
    assert other.exit_code == 1 and "by another engine or other settings" in other.stderr
    assert run(engine, requests, "--force", "--chat-template-kwargs", '{"tone": "kind"}').exit_code == 0
    (kind,) = answers(engine)
    assert kind["prompt_tokens"] == plain["prompt_tokens"] + len("kind")


def test_requests_that_cannot_be_answered_have_an_error(engine: Path, tmp_path: Path) -> None:
    wrong = [
        ("{", "a request is no JSON"),
        ("[1]", "found list, expected a text or an object"),
        ('{"prompt": 5}', "prompt: found int, expected a text"),
        ('{"id": 1}', "found none of them"),
        ('{"prompt": "a", "messages": []}', "found prompt and messages"),
        ('{"prompt": "a", "temprature": 0}', "found the key 'temprature'"),
        ('{"prompt": "a", "top_p": 3}', "top_p: found 3"),
        (json.dumps({"id": "long", "prompt": "x" * 900}), "too long"),
    ]
    requests = tmp_path / "wrong.jsonl"
    requests.write_text("\n".join([line for line, _ in wrong] + ['"hello"']))
    result = run(engine, requests, "--quiet")
    assert result.exit_code == 1
    assert result.stderr == f'belle-run: batch: 8 of 9 requests failed; see "error" in {tmp_path / "out.jsonl"}.\n'
    found = answers(engine)
    for answer, (_, message) in zip(found, wrong, strict=False):
        assert message in answer["error"]["message"]
    assert found[7]["id"] == "long" and "text" in found[8]


def test_the_end_as_json(engine: Path, requests: Path) -> None:
    output = str(engine.parent / "out.jsonl")
    assert json.loads(run(engine, requests, "--json").stdout) == {"answers": len(REQUESTS), "output": output}
    requests.write_text('"hello"\n[]\n', encoding="utf-8")
    failed = run(engine, requests, "--json", "--force")
    error = json.loads(failed.stdout)["error"]
    assert failed.exit_code == 1 and failed.stderr.endswith(f"belle-run: {error['message']}\n")
    assert (error["what"], error["remedy"]) == ("1 of 2 requests failed", f'see "error" in {output}')
    foreign = json.loads(run(engine, requests, "--json", temperature="1").stdout)["error"]
    assert "has answers to other requests" in foreign["what"] and foreign["remedy"]
