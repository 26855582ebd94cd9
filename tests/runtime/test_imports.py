"""What `import belle_compile.runtime` pulls in: the serving host has neither compiler nor torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_graph import circles, imports

ROOT = Path(__file__).parents[2]
FOREIGN = {
    "torch", "transformers", "onnx", "onnx_ir", "tvm", "pydantic", "rich", "safetensors", "tvm_ffi", "mpi4py",
    "belle_compile.compiler", "belle_compile.passes",
}  # fmt: skip
HEAVY = {"numpy", "tokenizers", "jinja2", "click"}


def modules_after(statement: str) -> set[str]:
    code = (
        f"{statement}\nimport sys, json; print(json.dumps([*sys.modules, *(name.partition('.')[0] for name in sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import belle_compile.runtime",
        "import belle_compile.runtime.artifact, belle_compile.runtime.program, belle_compile.runtime.errors",
    ],
)
def test_light_imports(statement: str) -> None:
    assert not modules_after(statement) & (FOREIGN | HEAVY)


@pytest.mark.parametrize(
    "statement",
    [
        "from belle_compile.runtime import Engine, SamplingParams",
        "import belle_compile.runtime.executors.cpu, belle_compile.runtime.distributed.executor",
        "import belle_compile.runtime.cli",
    ],
)
def test_runtime_needs_no_compiler(statement: str) -> None:
    assert not modules_after(statement) & FOREIGN


def test_the_runtime_has_no_import_circles() -> None:
    graph = imports(ROOT / "runtime", "belle_compile.runtime")
    assert "belle_compile.runtime.executors.cpu" in graph["belle_compile.runtime.executors.cpu_factory"], "in a function"
    assert circles(graph) == []


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
    graph = imports(tmp_path, "p")
    assert graph["p.a"] == {"p", "p.b", "p.c"} and not graph["p.b"]
    assert circles(graph) == [["p.a", "p.c", "p.d.e"]]


def test_unknown_name() -> None:
    from belle_compile import runtime

    with pytest.raises(AttributeError, match=r"module 'belle_compile\.runtime' has no attribute 'Motor'"):
        _ = runtime.Motor
