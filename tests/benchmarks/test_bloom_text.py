"""What the small BLOOM model is trained on: nothing that is held out."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.bloom_text import REPEATED, chinese, docstrings, split, topics

LONG = "A paragraph that several topics of the documentation quote word for word."


def test_nothing_held_out_is_trained_on() -> None:
    parts = split(topics())
    assert parts.train and parts.held_out

    def paragraphs(texts: object) -> set[str]:
        assert isinstance(texts, dict)
        found = {" ".join(paragraph.split()) for text in texts.values() for paragraph in text.split("\n\n")}
        return {paragraph for paragraph in found if len(paragraph) >= REPEATED}

    assert not paragraphs(parts.train) & paragraphs(parts.held_out)


def test_a_paragraph_is_trained_on_once() -> None:
    documents = {f"document {number}": f"{LONG}\n\nReturns:\n\nNumber {number}." for number in range(30)}
    texts = list(split(documents).train.values())
    assert sum(LONG in text for text in texts) == 0  # a held-out document has it
    assert all("Returns:" in text for text in texts)
    alone = {name: text for name, text in documents.items() if name in split(documents).train}
    assert sum(LONG in text for text in split(alone).train.values()) == 1


def test_docstrings_of_modules(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text('"""Module."""\ndef f():\n    """Function."""\n', encoding="utf-8")
    (tmp_path / "python2.py").write_text("print 1\n", encoding="utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('"""Skipped."""\n', encoding="utf-8")
    assert docstrings(tmp_path) == {"module good.py": "Module.\n\nFunction."}


def test_both_kinds_of_records(tmp_path: Path) -> None:
    records = [
        {"question": "你好", "std_answer": "你好！", "class": "chat"},
        {"question": "写一首诗", "std_answer": "", "class": "generation"},
        {"instruction": "翻译", "instances": [{"input": "猫", "output": "cat"}]},
    ]
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    parts = chinese([file])
    assert {**parts.train, **parts.held_out} == {
        "你好": "Human: 你好\n\nAssistant:你好！",
        "写一首诗": "Human: 写一首诗\n\n",
        "翻译\n猫": "Human: 翻译\n猫\n\nAssistant:cat",
    }
