"""Requests for tests: texts that have little in common, and files of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ENGLISH = (
    "river copper lantern thirty budget gravel meadow silent harbor ticket velvet orbit mustard falcon ladder pepper quarter "
    "window anchor barrel canyon dragon engine fabric garden hammer island jacket kettle lemon"
).split()


def distinct_texts(count: int, seed: int = 1, shortest: int = 8, longest: int = 200) -> list[str]:
    """Texts of random characters or words, Chinese and English by turns: no two are near duplicates."""
    chance = random.Random(seed)
    texts = []
    for index in range(count):
        length = round(shortest * (longest / shortest) ** chance.random())
        if index % 2:
            words = [f"{chance.choice(ENGLISH)}{chance.randrange(1000)}" for _ in range(length // 6 + 1)]
            texts.append(" ".join(words))
        else:
            texts.append("".join(chr(0x4E00 + chance.randrange(4000)) for _ in range(length)))
    return texts


def write_lines(path: Path, records: Iterable[Mapping[str, Any] | str]) -> Path:
    """A file with each record as a line of JSON, or as it is if it is a text."""
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def jaccard(one: str, other: str) -> float:
    """Exact overlap of the sets of 4-grams."""
    first, second = ({text[start : start + 4] for start in range(len(text) - 3)} for text in (one, other))
    return len(first & second) / len(first | second)
