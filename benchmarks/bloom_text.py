"""What benchmarks/train_bloom.py trains on: English from Python's standard library, Chinese from records of the BELLE project.

Documents are split by a digest of their names, so the same ones are held out whenever this runs. Topics of Python's
documentation quote each other: a paragraph that a held-out document has is taken out of all others.
"""

from __future__ import annotations

import ast
import json
import pydoc_data.topics
import sysconfig
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT = 10  # one document in so many
REPEATED = 40  # shorter paragraphs ("Returns:") may stand in both parts
SKIPPED = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "pydoc_data"}


@dataclass(frozen=True)
class Split:
    """Documents of one language, by name."""

    train: Mapping[str, str]
    held_out: Mapping[str, str]


def english() -> Split:
    """The documentation of the language (pydoc_data.topics) and the docstrings of the standard library's modules."""
    return split({**topics(), **docstrings(Path(sysconfig.get_path("stdlib")))})


def chinese(files: Sequence[Path]) -> Split:
    """Records of BELLE's eval_set.json or zh_seed_tasks.json, a JSON object a line, as the prompts that BELLE-7B knows."""
    return split({question: _prompt(question, answer) for file in files for question, answer in _records(file)})


def split(documents: Mapping[str, str]) -> Split:
    """Every `HELD_OUT`th document against the others, with no paragraph of the former, and none twice, in the latter."""
    held_out = {name: text for name, text in documents.items() if zlib.crc32(name.encode()) % HELD_OUT == 0}
    seen = {_normalized(paragraph) for text in held_out.values() for paragraph in text.split("\n\n")}
    train: dict[str, str] = {}
    for name, text in documents.items():
        if name not in held_out and (kept := _without(seen, text)):
            train[name] = kept
    return Split(train, held_out)


def topics() -> dict[str, str]:
    """Python's own documentation of the language, by topic."""
    return {f"topic {name}": text.strip() for name, text in sorted(pydoc_data.topics.topics.items())}


def docstrings(root: Path) -> dict[str, str]:
    """The docstrings of every module below `root`, one document a module."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not SKIPPED.intersection(name.parts) and (text := "\n\n".join(_docstrings_of(file))):
            found[f"module {name.as_posix()}"] = text
    return found


def _docstrings_of(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # lib2to3 keeps files of Python 2
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if text := ast.get_docstring(node):
            yield text.strip()


def _records(file: Path) -> Iterator[tuple[str, str]]:
    """(question, answer or "") of each record."""
    for line in file.read_text(encoding="utf-8").splitlines():
        record: dict[str, Any] = json.loads(line)
        if "question" in record:
            yield record["question"].strip(), record["std_answer"].strip()
        else:
            for instance in record["instances"]:
                yield f"{record['instruction']}\n{instance['input']}".strip(), instance["output"].strip()


def _prompt(question: str, answer: str) -> str:
    return f"Human: {question}\n\nAssistant:{answer}" if answer else f"Human: {question}\n\n"


def _without(seen: set[str], text: str) -> str:
    """`text` without the longer paragraphs that are in `seen`, to which its own are added."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = _normalized(paragraph)
        if len(key) < REPEATED or key not in seen:
            kept.append(paragraph)
            seen.add(key)
    return "\n\n".join(kept)


def _normalized(paragraph: str) -> str:
    return " ".join(paragraph.split())
