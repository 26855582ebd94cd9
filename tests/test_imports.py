"""Imports go one way, and `import belle_compile.runtime` stays small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("belle_compile", "compiler", "passes", "runtime")
NOT_IN_RUNTIME = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "tvm",
    "belle_compile.compiler",
    "belle_compile.passes",
    "rich",
)
OF_RAY = ("aiohttp", "ray", "yarl")  # the extra `ray`
OF_THE_SERVER = ("fastapi", "httptools", "prometheus_client", "pydantic", "starlette", "uvicorn", "uvloop")  # the extra `serve`


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports, those inside functions too."""
    names: set[str] = set()
    package = ("belle_compile", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, *modules: str) -> bool:
    """Whether a name is one of the modules or something inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no sources in {package}/"
    return found


def offenders(
    package: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = (), besides: tuple[str, ...] = ()
) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        if str(path.relative_to(ROOT)) not in besides
        for name in sorted(imports(path))
        if within(name, *forbidden) and not within(name, *allowed)
    ]


def test_passes_import_only_the_ir_and_the_errors() -> None:
    assert (
        offenders(
            "passes", OURS, allowed=("belle_compile.passes", "belle_compile.compiler.ir", "belle_compile.compiler.errors")
        )
        == []
    )


_DRIVERS = (
    "driver",
    "engine_graph",
    "exports/driver",
    "exports/model",
    "exports/plans",
    "integers",
    "layers",
    "plan/work",
    "repartition",
    "stages",
    "work_folder",
)


def test_only_the_driver_imports_passes() -> None:
    drivers = tuple(f"compiler/{name}.py" for name in _DRIVERS)
    names = ("belle_compile.passes.presets",)  # of presets and methods, which the command line offers
    assert offenders("compiler", ("belle_compile.passes",), allowed=names, besides=drivers) == []


def test_only_the_command_line_imports_itself() -> None:
    command = [str(path.relative_to(ROOT)) for path in (ROOT / "compiler/cli").iterdir()]
    assert offenders("compiler", ("belle_compile.compiler.cli",), besides=(*command, "compiler/__main__.py")) == []
    assert offenders("passes", ("belle_compile.compiler.cli",)) == offenders("runtime", ("belle_compile.compiler.cli",)) == []


LARGE = ("torch", "transformers", "onnx", "onnx_ir", "tvm", "triton", "numpy", "jinja2", "rich")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_no_large_package(option: str) -> None:
    code = f"""
import sys
from belle_compile.compiler.cli import main
try:
    main([{option!r}])
finally:
    print(sorted(set(sys.modules) & set({LARGE!r})), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert done.stderr.strip() == "[]"


def test_runtime_imports_neither_sibling_nor_their_needs() -> None:
    assert offenders("runtime", NOT_IN_RUNTIME, besides=("runtime/executors/torchscript.py",)) == []
    scale_out = tuple(str(path.relative_to(ROOT)) for path in sources("runtime/scale_out"))
    server = tuple(str(path.relative_to(ROOT)) for path in sources("runtime/server"))
    assert offenders("runtime", OF_THE_SERVER, besides=(*server, *scale_out)) == []
    assert offenders("runtime", OF_RAY, besides=scale_out) == []
    entrances = ("belle_compile.runtime.scale_out",)
    assert offenders("runtime", entrances, besides=scale_out) == [], "only the table of subcommands names it"


def test_ir_imports_nothing_else_of_the_compiler() -> None:
    assert offenders("compiler/ir", OURS, allowed=("belle_compile.compiler.ir", "belle_compile.compiler.errors")) == []


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("import torch.nn as nn", "torch.nn"),
        ("from belle_compile.compiler import driver", "belle_compile.compiler.driver"),
        ("from ..ir import text", "belle_compile.compiler.ir.text"),
        ("def f():\n    from belle_compile.passes.base import Pass", "belle_compile.passes.base.Pass"),
    ],
)
def test_imports_are_seen(statement: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "compiler/backends/module.py"
    path.parent.mkdir(parents=True)
    path.write_text(statement, encoding="utf-8")
    assert imports(path) == {name}
    assert within(name, name.split(".")[0]) and not within("torchvision", "torch")


def test_import_runtime_pulls_in_nothing_of_the_compiler() -> None:
    names = (*NOT_IN_RUNTIME, *OF_THE_SERVER, *OF_RAY, "onnxruntime")
    code = f"import sys, belle_compile.runtime; print(sorted(set(sys.modules) & set({names!r})))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
