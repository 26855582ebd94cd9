"""The C sources that are linked into kernel libraries, under the sanitizers of the C compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from belle_compile.compiler.backends.tvm.library import NATIVE

SOURCES = [Path(__file__).with_name("native_sources.c"), *sorted(NATIVE.glob("*.c"))]


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sources_under_sanitizers(sanitizers: str, tmp_path: Path) -> None:
    """No byte beside a buffer, no undefined behaviour and no race: of messages of any length, loops, failures and the end."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program = tmp_path / "native"
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-std=gnu11", "-O1", "-g", "-pthread", "-Wall", "-Wextra"]
    built = subprocess.run([compiler, *flags, f"-I{NATIVE}", *SOURCES, "-o", program], capture_output=True, text=True)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip(f"this compiler has no library for {sanitizers}")
    assert built.returncode == 0 and not built.stderr, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the sanitizer does not run on this kernel")
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[-3000:]
