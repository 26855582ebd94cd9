"""What `import belle_compile.runtime` pulls in: the serving host has neither compiler nor torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOREIGN = {
    "torch", "transformers", "onnx", "onnx_ir", "tvm", "pydantic", "rich", "safetensors", "tvm_ffi", "mpi4py", "redis",
    "sqlite3", "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "prometheus_client", "llguidance",
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


def test_unknown_name() -> None:
    from belle_compile import runtime

    with pytest.raises(AttributeError, match=r"module 'belle_compile\.runtime' has no attribute 'Motor'"):
        _ = runtime.Motor
