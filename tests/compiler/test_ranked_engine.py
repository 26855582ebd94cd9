"""RankedEngine: an engine of several ranks asked from outside of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.ranked_engine import RankedEngine
from belle_compile.runtime import Engine, SamplingParams
from belle_compile.runtime.errors import EngineError
from tests.parity.variants import VARIANTS, random_ids
from tests.runtime.ranked import is_parent

GREEDY = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["llama_gqa"](tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    return build(BuildRequest(checkpoint, folder / "two", target="cpux2", quantization="none", isas=("avx2",)))


def test_answers_and_logits_are_those_of_one_rank(checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    ids = random_ids(checkpoint, 23)
    one = build(BuildRequest(checkpoint, tmp_path / "one", quantization="none", isas=("avx2",)))
    with Engine.load(one, kv_tokens=512) as alone, RankedEngine(engine, 2) as ranked:
        assert ranked.max_context >= 23 + 12
        expected = alone.logits(ids)
        np.testing.assert_allclose(ranked.logits(ids), expected, atol=1e-5 * float(np.abs(expected).max()))
        answers = [[result.token_ids for result in each.generate([ids, ids[:5]], GREEDY)] for each in (alone, ranked)]
        assert answers[0] == answers[1]
        with pytest.raises(EngineError, match="request: a token id: found -1"):
            ranked.logits([-1])
        np.testing.assert_array_equal(ranked.logits(ids[:3]), ranked.logits(ids[:3]))  # it goes on after a refusal


def test_ranks_that_cannot_load_say_why(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"ranks: they cannot run on this host: found engine: .* is not an engine"):
        RankedEngine(tmp_path, 2)
    (tmp_path / "engine").symlink_to(engine)
    with pytest.raises(EngineError, match="they cannot run on this host: found engine: ranks: found 3, expected 2"):
        RankedEngine(tmp_path / "engine", 3)


def test_a_rank_that_is_killed_ends_the_question(checkpoint: Path, engine: Path) -> None:
    with RankedEngine(engine, 2) as ranked:
        ranked.logits([1, 2, 3])
        workers = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and _runs(int(entry), str(engine))]
        os.kill(max(workers), signal.SIGKILL)
        with pytest.raises(EngineError, match=r"they cannot run on this host: found ranks: rank \d .* was killed by signal 9"):
            for _ in range(100):
                ranked.logits([1, 2, 3])
    assert json.loads((engine / "manifest.json").read_text())["target"]["ranks"] == 2


def _runs(process: int, engine: str) -> bool:
    """Whether a process is a rank of the engine."""
    try:
        return (
            engine.encode() in Path(f"/proc/{process}/cmdline").read_bytes()
            and b"PMI_RANK=" in Path(f"/proc/{process}/environ").read_bytes()
            and not is_parent(process)
        )
    except OSError:
        return False
