"""The processes that run an export in its own runtime: answers, failures, ends; and the gate that uses one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports.gguf import Gguf
from belle_compile.compiler.exports.runtimes import ForeignRuntime
from belle_compile.compiler.gate import Gate
from tests.compiler.exports.models import export, llama, requests

WORKER = """
import json, os, struct, subprocess, sys, array
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
print("a runtime that talks")
child = subprocess.Popen(["sleep", "600"])
open(sys.argv[0] + ".child", "w").write(str(child.pid))
answers.write(struct.pack("<qq", 0, 0))
answers.flush()
for line in sys.stdin:
    ids = json.loads(line)
    if ids == [13]:
        raise SystemExit("it does not like 13")
    answers.write(struct.pack("<qq", len(ids), COLUMNS))
    for token in ids:
        answers.write(array.array("f", [token * FACTOR] * COLUMNS).tobytes())
    answers.flush()
"""


def runtime(folder: Path, columns: int = 4, factor: float = 1.0) -> ForeignRuntime:
    """A runtime that answers each token with its id; numpy stands for its package."""
    worker = folder / "worker.py"
    worker.write_text(WORKER.replace("COLUMNS", str(columns)).replace("FACTOR", str(factor)))
    return ForeignRuntime("Echo", "numpy", ("no-such-package", "numpy"), str(worker))


def ended(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_logits_arrive_and_all_processes_end(tmp_path: Path) -> None:
    with runtime(tmp_path).start(tmp_path, 8, None) as running:
        for ids in ([5, 6, 7], [9]):
            assert np.array_equal(running.logits(ids), np.repeat(np.array(ids, np.float32)[:, None], 4, axis=1))
    assert ended(int((tmp_path / "worker.py.child").read_text()))


def test_a_runtime_that_fails_says_why(tmp_path: Path) -> None:
    with runtime(tmp_path).start(tmp_path, 8, None) as running:
        with pytest.raises(
            CompileError, match=r"gate: Echo cannot run the export: found it ended; it last printed: it does not"
        ):
            running.logits([13])
    broken = ForeignRuntime("Echo", "numpy", ("numpy",), str(tmp_path / "missing.py"))
    with pytest.raises(
        CompileError, match=r"Echo cannot run the export: found it ended; .*missing\.py.*; export with --no-gate"
    ):
        broken.start(tmp_path, 8, None)


def test_versions_are_those_of_the_environment(tmp_path: Path) -> None:
    assert runtime(tmp_path).version(None) == np.__version__
    assert ForeignRuntime("None", "no_such_module", ("numpy",), "").version(None) == ""


def test_the_gate_runs_an_export_in_its_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = llama(tmp_path / "llama")
    equal = runtime(tmp_path, columns=311, factor=0.0)  # every token as likely as any other
    monkeypatch.setattr(Gguf, "runtime", lambda self: equal)
    calibration = requests(source)
    loose = Gate(max_perplexity_ratio=1e9, min_top1=0.0)
    accuracy = export(source, "gguf", calibration=calibration, gate=loose)[1]["accuracy"]
    assert accuracy["how"] == f"run in Echo {np.__version__}" and accuracy["perplexity"] == pytest.approx(311)
    with pytest.raises(CompileError, match=r"gate: the export is too far from .* \(run in Echo"):
        export(source, "gguf", calibration=calibration)
