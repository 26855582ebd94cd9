"""Every shape a request comes in, and errors that say which line does not fit without quoting it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests.reader import NO_LABEL, read_requests
from belle_compile.compiler.requests.request import Request
from tests.compiler.requests.samples import write_lines


def read(tmp_path: Path, *records: dict[str, Any] | str, name: str = "x.jsonl", **options: Any) -> list[Request]:
    return list(read_requests(write_lines(tmp_path / name, records), **options))


def refusal(tmp_path: Path, *records: dict[str, Any] | str, name: str = "x.jsonl", **options: Any) -> str:
    with pytest.raises(CompileError) as error:
        read(tmp_path, *records, name=name, **options)
    return str(error.value)


@pytest.mark.parametrize("field", ["text", "prompt", "question", "instruction", "input"])
def test_a_text_is_found_by_the_usual_names(tmp_path: Path, field: str) -> None:
    assert read(tmp_path, {"id": "7", field: "你好"}) == [Request(text="你好", line=1)]


def test_the_first_usual_name_counts(tmp_path: Path) -> None:
    assert read(tmp_path, {"input": "b", "question": "a", "prompt": None})[0].text == "a"


def test_instruction_and_input_are_joined_as_belle_joins_them(tmp_path: Path) -> None:
    record = {"instruction": "翻译：", "input": "hello", "output": "你好"}
    assert read(tmp_path, record) == [Request(text="翻译：hello", answer="你好", line=1)]
    assert read(tmp_path, record, field="instruction")[0].text == "翻译："


@pytest.mark.parametrize("field", ["text", "prompt", "messages", "token_ids"])
def test_null_is_an_empty_request(tmp_path: Path, field: str) -> None:
    assert [request.text for request in read(tmp_path, {field: None}, {field: None, "id": 3})] == ["", ""]
    assert read(tmp_path, {"query": None}, field="query")[0].text == ""


def test_a_field_by_name_may_hold_any_shape(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"text": "no", "ask": "a"},
        {"ask": [{"role": "user", "content": "b"}]},
        {"ask": [3, 0, 2]},
    ]
    text, chat, ids = read(tmp_path, *records, field="ask")
    assert (text.text, chat.messages, ids.token_ids) == ("a", ({"role": "user", "content": "b"},), (3, 0, 2))


def test_chats_of_both_conventions(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "写"}, {"type": "text", "text": "诗"}]
    records = [
        {"messages": [{"role": "System", "content": "short"}, {"role": "user", "content": parts}]},
        {"id": 1, "conversations": [{"from": "human", "value": "问"}, {"from": "assistant", "value": "答"}]},
        {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}, {"from": "human", "value": "3"}]},
    ]
    openai, belle, sharegpt = read(tmp_path, *records)
    assert openai.messages == ({"role": "system", "content": "short"}, {"role": "user", "content": "写诗"})
    assert (belle.messages, belle.answer) == (({"role": "user", "content": "问"},), "答")
    assert [message["role"] for message in sharegpt.messages or ()] == ["user", "assistant", "user"]
    assert sharegpt.written() == "1\n2\n3" and sharegpt.answer == ""


@pytest.mark.parametrize("field", ["token_ids", "input_ids"])
def test_token_ids(tmp_path: Path, field: str) -> None:
    assert read(tmp_path, {field: [1, 250879]}) == [Request(token_ids=(1, 250879), line=1)]


def test_answers(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"question": "q", "std_answer": "a"},
        {"question": "q", "expected": "e", "output": "o"},
        {"question": "q", "answer": ["not", "text"]},
    ]
    assert [request.answer for request in read(tmp_path, *records)] == ["a", "e", ""]
    assert [request.answer for request in read(tmp_path, *records[:2], answer="output")] == ["", "o"]
    assert "line 3 of" in refusal(tmp_path, *records, answer="answer")


def test_labels_have_one_spelling(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"text": "a", "class": "closed\u00a0qa"},
        {"text": "b", "class": " closed  qa"},
        {"text": "c", "class": True},
        {"text": "d"},
    ]
    found = [request.labels["class"] for request in read(tmp_path, *records, labels=["class"])]
    assert found == ["closed qa", "closed qa", "true", NO_LABEL]


def test_plain_text_is_a_request_a_line(tmp_path: Path) -> None:
    found = read(tmp_path, "写一首诗", "", '{"text": "kept as it is"}', name="x.txt")
    assert [request.text for request in found] == ["写一首诗", "", '{"text": "kept as it is"}']
    assert [request.line for request in found] == [1, 2, 3]


def test_other_names_are_told_by_their_content(tmp_path: Path) -> None:
    assert read(tmp_path, {"text": "a"}, name="requests")[0].text == "a"
    assert read(tmp_path, "a", "b", name="requests.log")[1].text == "b"
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert next(read_requests(tmp_path / "x.txt.gz")).text == '{"text": "a"}'


def test_reading_is_lazy(tmp_path: Path) -> None:
    requests = read_requests(write_lines(tmp_path / "x.jsonl", [{"text": "a"}, "broken"]))
    assert next(requests).text == "a"
    with pytest.raises(CompileError, match="line 2"):
        next(requests)


def test_a_request_is_stored_and_read_again() -> None:
    for request in (
        Request(text="a\u2028\n\"'你", answer="b", labels={"class": "x", "b": "y"}, line=3),
        Request(messages=({"role": "user", "content": "你好"},), line=1),
        Request(token_ids=(1, 2, 3), line=9),
    ):
        stored = request.to_json()
        assert Request.from_json(stored) == request and "\n" not in stored
        assert json.loads(stored)["line"] == request.line


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ("{'text': 'a'}", "found invalid JSON (Expecting property name enclosed in double quotes at position 2), exp"),
        ('["secret"]', "found a list, expected a JSON object; write one object a line, with jq -c '.[]' for example"),
        ("[" * 100_000, "found invalid JSON (out of bounds)"),
        ("3", "found a single value, expected a JSON object"),
        ('{"query": "secret"}', "found the fields query, expected one of text, prompt, question, instruction, input, me"),
        ("{}", "found no fields, expected one of text"),
        ('{"text": 3}', "field text: found another value, expected a text, a list of messages or a list of token ids"),
        ('{"text": ["secret"]}', "field text: found a list of something else"),
        ('{"token_ids": [1, -1]}', "field token_ids: found a number that is no token id, expected ids from 0"),
        ('{"token_ids": [1, true]}', "field token_ids: found a list of something else"),
        ('{"messages": [{"role": "wizard secret", "content": ""}]}', "message 1: found another role, expected a "),
        ('{"messages": [{"content": "secret"}]}', "message 1: found the fields content, expected a role (or from) among"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "message 1: found other content, exp"),
        ('{"text": "half \\ud83d"}', "found half of a \\ud800 pair, expected whole characters"),
    ],
)  # fmt: skip
def test_a_line_that_does_not_fit(tmp_path: Path, record: str, sentence: str) -> None:
    found = refusal(tmp_path, {"text": "good"}, record)
    assert found.startswith(f"calibration: line 2 of {tmp_path / 'x.jsonl'}") and sentence in found
    assert "secret" not in found


def test_whole_surrogate_pairs_are_fine(tmp_path: Path) -> None:
    assert read(tmp_path, '{"text": "\\ud83d\\ude00"}')[0].text == "\U0001f600"


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("good\n你好".encode("gb18030"))
    with pytest.raises(
        CompileError, match=r"line 2 of .*: found byte 0xc4 at position 1, expected UTF-8; convert the file, with icon"
    ):
        list(read_requests(path))


def test_an_empty_file(tmp_path: Path) -> None:
    for lines in ([], ["", "  "]):
        assert "x.jsonl: found an empty file, expected a request a line" in refusal(tmp_path, *lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(CompileError, match="an empty file"):
        list(read_requests(tmp_path / "x.jsonl.gz"))


def test_fields_that_no_request_has(tmp_path: Path) -> None:
    record = {"question": "q", "class": "c"}
    sentence = refusal(tmp_path, record, labels=["clas"])
    assert "no request of" in sentence and "has the field clas: found the fields question, class; name one" in sentence
    assert "has the field reply" in refusal(tmp_path, record, answer="reply")
    assert "expected the field ask; name a field that all" in refusal(tmp_path, {"ask": "a"}, record, field="ask")
    assert "found plain text, expected JSON with the field class" in refusal(tmp_path, "a", name="x.txt", labels=["class"])
