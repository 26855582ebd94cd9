"""What README, docs/ and the other pages name exists: paths, links with their headings, modules, make targets, commands."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "artifacts/README.md")] + sorted((ROOT / "docs").glob("*.md"))
TOP = "compiler|passes|runtime|benchmarks|tests|docs|deploy|belle_compile|artifacts/README.md"
TOP += "|constraints.txt|pyproject.toml|Makefile"
PATH = re.compile(rf"(?<![\w./-])(?:{TOP})(?:/[\w.-]+)*/?")
MADE = re.compile(r"^(?:artifacts|build|tests/golden)/")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
MODULE = re.compile(r"python -m ([\w.]+)")
TARGET = re.compile(r"(?<![\w-])make ([a-z][a-z-]+)(?= |$|`|,|;|\))", re.M)
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)  # those of CONTRIBUTING.md make files, see test_recipes.py


def texts() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        yield page, page.read_text(encoding="utf-8")


def anchor(heading: str) -> str:
    """The fragment that a Markdown heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(line.lstrip("#")) for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("#")}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in LINK.findall(text):
        path, _, fragment = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (fragment and fragment not in anchors(file)):
            broken.append(target)
    return broken


def missing_paths(text: str) -> list[str]:
    code = re.sub(LINK, "", text)
    named = {path.rstrip("/.") for path in PATH.findall(code) if "/" in path}
    return sorted(path for path in named if not MADE.match(path) and not (ROOT / path).exists())


@pytest.mark.parametrize(("page", "text"), [pytest.param(page, text, id=str(page.relative_to(ROOT))) for page, text in texts()])
def test_what_a_page_names_exists(page: Path, text: str) -> None:
    assert broken_links(page, text) == []
    assert missing_paths(re.sub(FENCED, "", text)) == []
    assert [
        name for name in MODULE.findall(text) if name not in ("pip", "venv") and importlib.util.find_spec(name) is None
    ] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert [name for name in TARGET.findall(code_of(text)) if name not in targets] == []


def code_of(text: str) -> str:
    """The indented blocks and code spans of a page."""
    blocks = [line for line in text.splitlines() if line.startswith("    ")]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)])


def test_what_is_missing_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[here](#a-heading) [gone](nowhere.md) [not](#other)", encoding="utf-8")
    assert broken_links(page, page.read_text(encoding="utf-8")) == ["nowhere.md", "#other"]
    assert missing_paths("see compiler/driver.py and `compiler/absent.py`, runtime/none/") == [
        "compiler/absent.py",
        "runtime/none",
    ]


def test_readme_is_a_door() -> None:
    assert len((ROOT / "README.md").read_bytes()) < 7 << 10
