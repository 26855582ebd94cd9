"""The GPU check: made-up processes in place of its own, a small engine on an interpreted device, other engines on a CPU."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch

from belle_compile.compiler.backends.triton.kernels.linear import _TILES
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime.executors.choices import Choices
from belle_compile.runtime.program_json import read_program
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import adapters, bundle, checks, findings, peers
from tests.interpreted import InterpretedDevice, interpreted_gpu
from tests.parity.variants import VARIANTS, random_ids

__all__ = ["interpreted_gpu"]


# Processes


FOUND = "from pathlib import Path; from benchmarks.gpu_check.findings import Findings; f = Findings(Path({!r})); f.note(a=1); "
ENDS = {
    "device": "f.note(b=2, right=True)",
    "wrong": "f.note(right=False)",
    "crashes": "import os; os.abort()",
    "fails": "f.note(failed='a reason'); raise SystemExit(1)",
    "hangs": "import time; time.sleep(60)",
    "last": "f.note(right=True)",
}


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: dict[str, str], seconds: float = 100.0) -> dict[str, Any]:
    def command(bundle: Path, name: str, path: Path) -> list[str]:
        return [sys.executable, "-X", "faulthandler", "-c", FOUND.format(str(path)) + ends[name]]

    monkeypatch.setattr(gpu_check, "command_of", command)
    (tmp_path / "bundle.json").write_text('{"target": "h100", "arch": "sm_90"}')
    limits = {name: 5 if name == "hangs" else 60 for name in ends}
    returned = gpu_check.run(tmp_path, tmp_path / "out.json", limits, seconds)
    assert returned == json.loads((tmp_path / "out.json").read_text())
    assert returned.pop("about")["arch"] == "sm_90"
    assert all(entry.pop("wall_s") >= 0 for entry in returned.values())
    return returned


def test_what_hangs_or_crashes_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch, ENDS) == {
        "device": {"a": 1, "b": 2, "right": True},
        "wrong": {"a": 1, "right": False},
        "crashes": {"a": 1, "failed": "exit code -6"},
        "fails": {"a": 1, "failed": "a reason"},
        "hangs": {"a": 1, "failed": "ended after 5 s"},
        "last": {"a": 1, "right": True},
    }


def test_without_a_gpu_or_time_nothing_else_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(tmp_path, monkeypatch, {"device": ENDS["fails"], "last": ENDS["last"]})
    assert found == {"device": {"a": 1, "failed": "a reason"}}
    assert run(tmp_path, monkeypatch, {"last": ENDS["last"]}, 1.0) == {"last": {"failed": "not run: no time was left"}}


def test_a_directory_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"bundle\.json.*; make it with python -m benchmarks\.gpu_check\.bundle"):
        gpu_check.dry_run(tmp_path)
    (tmp_path / "bundle.json").write_text('{"target": "h100", "arch": "sm_90"}')
    with pytest.raises(SystemExit, match="no program in it"):
        gpu_check.dry_run(tmp_path)


# Small engines


def test_plans_have_every_number_of_rows_that_kernels_differ_by() -> None:
    bounds = [bound for bound, _ in _TILES]
    rows = {sum(step.values()) for plan in checks.PLANS.values() for step in plan}
    reached = {next(bound for bound in bounds if bound is None or bound >= number) for number in rows}
    assert reached == set(bounds)
    lengths = {
        name: max(sum(step.get(sequence, 0) for step in plan) for sequence in range(3)) for name, plan in checks.PLANS.items()
    }
    assert max(lengths.values()) == checks.PROMPT + checks.GREEDY - 1


def test_answers_of_a_small_engine(tmp_path: Path, interpreted_gpu: InterpretedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bundle, checks, gpu_check):
        monkeypatch.setattr(module, "PROMPT", 4)
        monkeypatch.setattr(module, "GREEDY", 2)
    monkeypatch.setattr(checks, "CANDIDATES", 2)
    monkeypatch.setattr(checks, "open_device", lambda: interpreted_gpu)
    monkeypatch.setattr(checks, "PLANS", {"several": ({0: 3, 1: 1}, {1: 4, 0: 1})})
    checkpoint = VARIANTS["llama_tied"](tmp_path / "checkpoint")
    folder = tmp_path / "small-none"
    bundle._small(checkpoint, random_ids(checkpoint, 4), "none", folder, "a100")
    (tmp_path / "bundle.json").write_text('{"target": "a100", "arch": "sm_80"}')
    program, answers = gpu_check.dry_run(tmp_path)
    assert program.startswith("small-none/rank0: ") and "kernels for sm_80" in program
    assert answers.startswith("small-none: logits of 5 tokens, an answer of 2 ")
    noted = findings.Findings(tmp_path / "found.json")
    checks.check_small(folder, "sm_80", noted)
    assert findings.read(tmp_path / "found.json") == noted.found
    choices = {f"choice {number}" for number in range(2)}  # of attention's kernels
    assert noted.found["right"] and set(noted.found) == {"tolerance", "right", "fastest"} | choices, noted.found
    spoilt = dict(np.load(folder / checks.EXPECTED))
    spoilt["logits"][3, 7] += 1
    np.savez(folder / checks.EXPECTED, **spoilt)
    checks.check_small(folder, "sm_80", noted)
    assert not noted.found["right"] and noted.found["fastest"]["several"]["position"] == 3


def test_adapters_of_a_small_engine(
    tmp_path: Path, interpreted_gpu: InterpretedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits need not be those of the step that has other rows: the interpreter adds in an order that depends on their number."""
    monkeypatch.setattr(adapters, "PLAN", ({0: 2, 1: 1, 3: 1}, {0: 1, 1: 2, 2: 3, 3: 2}))
    monkeypatch.setattr(adapters, "TOKENS", 3)
    monkeypatch.setattr(adapters, "same_bits", lambda found, wanted: np.allclose(found, wanted, atol=1e-4))
    checkpoint = VARIANTS["llama_tied"](tmp_path / "checkpoint")
    folder = tmp_path / adapters.FOLDER / "small-none"
    bundle._with_adapters(checkpoint, random_ids(checkpoint, 4), "none", folder, "a100")
    (tmp_path / "bundle.json").write_text('{"target": "a100", "arch": "sm_80"}')
    assert gpu_check.dry_run(tmp_path)[0].startswith("adapters/small-none/rank0: ")
    assert list(gpu_check.checks_of(tmp_path, False))[1] == "adapters/small-none"
    noted = findings.Findings(tmp_path / "found.json")
    (tmp_path / "work").mkdir()
    checks.check_adapters(folder, "sm_80", noted, tmp_path / "work")
    assert noted.found["right"] and len(noted.found["sequences"]) == 5, noted.found
    with np.load(folder / checks.EXPECTED) as file:
        logits = file["logits"]
        np.savez(folder / checks.EXPECTED, ids=file["ids"], logits=logits[[1, 0, 2, 3]])
    assert np.abs(logits[0] - logits[3]).max() > 0.3 * np.abs(logits).max(), "an adapter that is not applied is noticed"
    (tmp_path / "again").mkdir()
    checks.check_adapters(folder, "sm_80", noted, tmp_path / "again")
    assert not noted.found["right"]


def test_every_alternative_has_its_turn(tmp_path: Path, interpreted_gpu: InterpretedDevice) -> None:
    checkpoint = VARIANTS["bloom"](tmp_path / "checkpoint")
    engine = build(BuildRequest(checkpoint, tmp_path / "engine", "a100", "int8"))
    program = read_program(engine / "rank0")
    fastest, *turns = checks._selections(program)
    assert fastest == ("fastest", None) and [name for name, _ in turns] == [f"choice {number}" for number in range(len(turns))]
    rank = checks.linked(engine / "rank0", Path(tempfile.mkdtemp(dir=tmp_path)))
    had = set()
    for _, chosen in turns:
        assert chosen is not None
        Choices(rank, interpreted_gpu).keep(chosen)
        assert Choices(rank, interpreted_gpu).known(program), "it is not measured again"
        had |= set(chosen.values())
    others = {name for by_bound in program.alternatives.values() for names in by_bound.values() for name in names}
    assert had == others | set(program.alternatives)
    assert not list(engine.rglob("choices-*")), "the engine is left as it was"


def test_the_meaning_that_quantized_engines_are_held_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step or at once, it is the same."""
    monkeypatch.setattr(bundle, "PROMPT", 9)
    monkeypatch.setattr(bundle, "GREEDY", 4)
    checkpoint = VARIANTS["bloom"](tmp_path / "checkpoint")
    ids = random_ids(checkpoint, 9)
    logits, tokens = bundle._meaning(checkpoint, "int8", ids)
    assert (logits.shape[0], len(tokens)) == (12, 4)
    assert tokens == logits[8:].argmax(axis=1).tolist()
    monkeypatch.setattr(bundle, "PROMPT", 12)
    monkeypatch.setattr(bundle, "GREEDY", 1)
    again, _ = bundle._meaning(checkpoint, "int8", ids + tokens[:3])
    np.testing.assert_allclose(again, logits, atol=0.02 * float(np.abs(logits).max()))


# The other engines


def test_other_engines_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(model: Any, **options: Any) -> Any:
        return model

    monkeypatch.setattr(torch, "compile", compile)  # takes a minute
    monkeypatch.setattr(peers, "STEPS", 2)
    config = {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 300}
    found = findings.Findings(tmp_path / "found.json")
    peers.measure(config, found, device="cpu", rows=32, batches=(1, 2))
    measured = {name: entry for name, entry in found.found.items() if name not in ("torch", "cuda")}
    assert len(measured) == 8 and not any("unmeasured" in entry for entry in measured.values()), measured
    monkeypatch.setattr(peers, "_transformers", None)
    peers.measure(config | {"n_head": 0}, found, device="cpu", rows=32, batches=(1,))
    assert "ZeroDivisionError" in found.found["torch.compile int8 weight-only, batch 1"]["unmeasured"]
    if not torch.cuda.is_available():
        peers.measure(config, found)
        assert found.found["unmeasured"] == "this torch sees no GPU"
