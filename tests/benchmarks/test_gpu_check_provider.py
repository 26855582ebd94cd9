"""The GPU check of engines for ONNX Runtime, over the host's memory and the CPU provider."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import torch
from transformers import AutoModelForCausalLM

from belle_compile.runtime.executors import onnxruntime_sizes
from benchmarks.gpu_check import bundle, checks, findings, provider
from tests.parity.variants import VARIANTS, random_ids
from tests.runtime.executors.onnxruntime_gpu_host import run_on_the_host

PROMPT, GREEDY = 20, 6


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle's engine with the answers expected of it."""
    for module in (bundle, checks):
        monkeypatch.setattr(module, "PROMPT", PROMPT)
        monkeypatch.setattr(module, "GREEDY", GREEDY)
    monkeypatch.setattr(onnxruntime_sizes, "MOST_GPU_CONTEXT", 64)
    checkpoint = VARIANTS["llama_tied"](tmp_path / "checkpoint")
    ids = random_ids(checkpoint, PROMPT)
    logits, tokens = bundle._answer(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), ids)
    (tmp_path / "small-none").mkdir()
    np.savez(tmp_path / "small-none" / checks.EXPECTED, ids=ids, logits=logits, tokens=tokens)
    bundle._of_provider(checkpoint, "none", tmp_path, "small-none", "a100")
    return tmp_path / provider.FOLDER / "small-none"


def test_answers_and_their_bits(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_the_host(monkeypatch)
    monkeypatch.setattr(provider, "version", lambda package: "1.31.0")
    found = findings.Findings(tmp_path / "found.json")
    provider.check_small(small, found, PROMPT)
    assert found.found["right"] and found.found["same_tokens"] == GREEDY, found.found
    assert set(found.found["rows_with_other_bits"].values()) == {0} and len(found.found["rows_with_other_bits"]) == 4
    spoilt = dict(np.load(small / checks.EXPECTED))
    spoilt["logits"][3, 7] += 1
    np.savez(small / checks.EXPECTED, **spoilt)
    provider.check_small(small, found, PROMPT)
    assert not found.found["right"]


def test_bits_that_depend_on_the_step_are_found(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_the_host(monkeypatch)
    monkeypatch.setattr(provider, "version", lambda package: "1.31.0")
    plain = provider.Reader.step

    def shifted(self: provider.Reader, counts: provider.Step) -> dict[tuple[int, int], provider.Floats]:
        return {place: row + np.float32(1e-6 * len(counts)) for place, row in plain(self, counts).items()}

    monkeypatch.setattr(provider.Reader, "step", shifted)
    found = findings.Findings(tmp_path / "found.json")
    provider.check_small(small, found, PROMPT)
    assert not found.found["right"] and found.found["rows_with_other_bits"]["together"] > 0


def test_times(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_the_host(monkeypatch)
    monkeypatch.setattr(provider, "version", lambda package: "1.31.0")
    monkeypatch.setattr(provider, "PROMPT", 32)
    monkeypatch.setattr(provider, "PIECE", 16)
    monkeypatch.setattr(provider, "STEPS", 2)
    found = findings.Findings(tmp_path / "found.json")
    provider.check_large(small, found)
    assert {"decode, batch 1", "decode, batch 8"} <= set(found.found) and json.loads((tmp_path / "found.json").read_text())


def test_without_the_package_nothing_is_run(small: Path, tmp_path: Path) -> None:
    found = findings.Findings(tmp_path / "found.json")
    provider.check_small(small, found, PROMPT)
    assert found.found == {"unmeasured": "onnxruntime-gpu is not installed"}
