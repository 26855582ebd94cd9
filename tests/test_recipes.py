"""The recipes of CONTRIBUTING.md work: each is followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkouts import copy_checkout

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(python|diff|sh) ?(\S*)\n(.*?)^```$", re.M | re.S)
COMMANDS = {
    "python": [sys.executable],
    "belle-compile": [sys.executable, "-m", "belle_compile.compiler"],
    "belle-run": [sys.executable, "-m", "belle_compile.runtime"],
}


def recipes() -> dict[str, list[tuple[str, str, str]]]:
    """Heading -> its blocks as (language, path, content)."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^### ", text.partition("\n## Recipes\n")[2], flags=re.M)
    return {part.partition("\n")[0]: BLOCK.findall(part) for part in parts}


def changed(text: str, diff: str) -> str:
    """The text with lines added behind, or in place of, lines that it must have once."""
    lines, at = text.split("\n"), 0
    for line in diff.splitlines():
        sign, content = line[:1], line[1:]
        if sign == "+":
            lines.insert(at, content)
            at += 1
        else:
            assert lines.count(content) == 1, f"expected once: {content}"
            at = lines.index(content) + 1
            if sign == "-":
                at -= 1
                del lines[at]
    return "\n".join(lines)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that git knows of, the links of the package among them."""
    copy_checkout(tmp_path)
    return tmp_path


def test_there_are_three_recipes() -> None:
    assert list(recipes()) == ["A pass", "A family", "A backend"]


@pytest.mark.parametrize("name", ["A pass", "A family", "A backend"])
def test_a_recipe_works(name: str, copy: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    outputs = []
    for language, path, content in recipes()[name]:
        if language == "python":
            assert not (copy / path).exists(), f"{path} is there already"
            (copy / path).write_text(content, encoding="utf-8")
        elif language == "diff":
            (copy / path).write_text(changed((copy / path).read_text(encoding="utf-8"), content), encoding="utf-8")
        else:
            for line in content.splitlines():
                program, *arguments = shlex.split(line)
                done = subprocess.run(
                    [*COMMANDS[program], *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
                )
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
                outputs.append(done.stdout)
    check = {"A pass": "passed", "A family": "1 passed", "A backend": "avx2"}[name]
    assert any(check in output for output in outputs)


def test_lines_that_are_not_there_are_refused() -> None:
    assert changed("a\nb\nc", " a\n+x\n-c\n+y") == "a\nx\nb\ny"
    with pytest.raises(AssertionError, match="expected once: z"):
        changed("a\nb", " z\n+x")
