"""Writes the data of benchmarks/lm_eval_tasks from the prose of Python's language reference, which Python carries.

    python -m benchmarks.lm_eval.make_tasks

The same Python gives the same bytes. The committed data are of Python 3.11.7; another version's documentation differs.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lm_eval import TASKS

ENDINGS, WORDS, TEXTS = 160, 100, 12  # items of each kind
CHOICES = 4
_SENTENCE = re.compile(r"(?<=[a-z)\"’]\.) (?=[A-Z\"])")
_NOT_PROSE = re.compile(r"::=|>>>|\*\*\*|===|---|\[\d+\]|^\W|[:;]$")
_CONTEXT = range(120, 500)  # characters
_ENDING = range(6, 25)  # words
_TEXT = range(1800, 6000)  # characters


@dataclass(frozen=True)
class Passage:
    """A paragraph of a topic, in two parts that a space joins."""

    topic: str
    context: str
    rest: str


def paragraphs(text: str) -> list[str]:
    """Paragraphs of at least two sentences, each on one line; headings, grammar, code, lists and footnotes are left out."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if paragraph.endswith(".") and not _NOT_PROSE.search(paragraph) and len(_SENTENCE.split(paragraph)) > 1:
            found.append(paragraph)
    return found


def prose(topics: Mapping[str, str]) -> dict[str, str]:
    """Paragraph -> the first topic that has it: topics repeat each other."""
    found: dict[str, str] = {}
    for topic in sorted(topics):
        for paragraph in paragraphs(topics[topic]):
            found.setdefault(paragraph, topic)
    return found


def passages(found: Mapping[str, str]) -> Iterable[Passage]:
    """Paragraphs cut in the middle of their last sentence."""
    for paragraph, topic in found.items():
        *before, last = _SENTENCE.split(paragraph)
        words = last.split()
        half = len(words) // 2
        context, rest = " ".join([*before, *words[:half]]), " ".join(words[half:])
        if len(context) in _CONTEXT and len(words) - half in _ENDING:
            yield Passage(topic, context, rest)


def endings(found: Sequence[Passage]) -> Iterable[dict[str, Any]]:
    """Which of four endings is the passage's own? The others end passages of other topics and are about as long."""
    chance = random.Random(0)
    for number, passage in enumerate(chance.sample(found, ENDINGS)):
        others = {other.rest: abs(len(other.rest) - len(passage.rest)) for other in found if other.topic != passage.topic}
        others.pop(passage.rest, None)
        choices = chance.sample(sorted(others, key=lambda rest: others[rest])[: 5 * CHOICES], CHOICES - 1)
        label = chance.randrange(CHOICES)
        choices.insert(label, passage.rest)
        yield {"id": f"{passage.topic}-{number}", "context": passage.context, "endings": choices, "label": label}


def last_words(found: Mapping[str, str]) -> Iterable[dict[str, Any]]:
    """What is the paragraph's last word, which it said before?"""
    fitting = []
    for paragraph, topic in found.items():
        context, _, word = paragraph.removesuffix(".").rpartition(" ")
        if re.fullmatch(r"[a-z]{4,}", word) and word in words_of(context):
            fitting.append({"id": topic, "context": context, "word": word})
    for number, item in enumerate(random.Random(1).sample(fitting, WORDS)):
        yield item | {"id": f"{item['id']}-{number}"}


def words_of(text: str) -> set[str]:
    """Its words in lower case, without punctuation."""
    return set(re.findall(r"[a-z]+", text.lower()))


def texts(found: Mapping[str, str]) -> Iterable[dict[str, Any]]:
    """Beginnings of topics, as many as are wanted, spread over the alphabet."""
    long = []
    for topic in dict.fromkeys(found.values()):
        text = ""
        for paragraph in (paragraph for paragraph, owner in found.items() if owner == topic):
            if len(text) + len(paragraph) >= _TEXT.stop:
                break
            text += "\n\n" * bool(text) + paragraph
        if len(text) in _TEXT:
            long.append({"id": topic, "text": text})
    assert len(long) >= TEXTS, f"only {len(long)} topics are long enough"
    return [long[index * len(long) // TEXTS] for index in range(TEXTS)]


def write(folder: Path, topics: Mapping[str, str]) -> None:
    """The three data files, one JSON object a line."""
    found = prose(topics)
    for name, items in (("endings", endings(list(passages(found)))), ("last_word", last_words(found)), ("texts", texts(found))):
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write(TASKS, pydoc_data.topics.topics)
