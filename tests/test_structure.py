"""The shape of the code: no import circles, sizes, and questions that only their home may ask."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.import_graph import circles, imports

ROOT = Path(__file__).parent.parent
PACKAGES = ("compiler", "passes", "runtime")
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 500, 60


def source_files() -> list[Path]:
    """Every source file of the product, relative to the repository."""
    found = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert found
    return found


def test_circles_are_found(tmp_path: Path) -> None:
    sources = {
        "__init__": "",
        "a": "from p import b\ndef f():\n    import p.c",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import f",
        "c": "from p.d.e import g",
        "d/__init__": "",
        "d/e": "def g():\n    from p.a import f",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(source)
    graph = imports({"p": tmp_path})
    assert graph["p.a"] == {"p.b", "p.c"} and graph["p.b"] == {"p.a"}
    assert circles(graph) == [["p.a", "p.b", "p.c", "p.d.e"]]


def product_imports() -> dict[str, set[str]]:
    return imports({f"belle_compile.{package}": ROOT / package for package in PACKAGES})


def test_no_import_circles() -> None:
    graph = product_imports()
    executor = "belle_compile.runtime.executors.cpu"
    assert executor in graph["belle_compile.runtime.executors.cpu_factory"], "imports in functions count"
    assert circles(graph) == []


def test_only_the_command_line_imports_the_terminal() -> None:
    cli = "belle_compile.compiler.cli"
    importing = [name for name, imported in product_imports().items() if f"{cli}.terminal" in imported]
    assert importing and all(name.startswith(cli) for name in importing)


def test_files_stay_short() -> None:
    sizes = {str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in source_files()}
    assert {path: lines for path, lines in sizes.items() if lines > MOST_LINES_OF_A_FILE} == {}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{path}: {node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_functions_stay_short() -> None:
    sizes = [entry for path in source_files() for entry in functions(path)]
    assert [name for name, lines in sizes if lines > MOST_LINES_OF_A_FUNCTION] == []


@pytest.mark.parametrize(
    ("question", "homes"),
    [
        (r"\bis_gpu\b|\bBEHIND_LOGITS\b", ()),
        (r"\bGPU_ARCHS\b", ("compiler/backends/triton/", "runtime/executors/cuda", "runtime/host.py")),
        (r"\bcompute_capability\b", ("compiler/backends/triton/", "compiler/devices.py", "compiler/cli/rows.py")),
        (r"\bfamily\s*(==|!=|in)\s|\bFAMILIES\b", ("compiler/families/",)),
        (r"\bweight_bits\b", ("passes/quantization/gptq_rounding.py",)),  # an option in the manifest
        (r"\b__module__\b", ()),
    ],
)
def test_a_question_is_asked_in_its_home_only(question: str, homes: tuple[str, ...]) -> None:
    asked = [
        str(path)
        for path in source_files()
        if re.search(question, (ROOT / path).read_text(encoding="utf-8")) and not str(path).startswith(homes or ("-",))
    ]
    assert asked == []
