"""Measuring the curve of an engine without kernels, whose steps take a known time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from belle_compile.runtime import Engine, EngineError
from belle_compile.runtime.capacity.curve import CAPACITY_NAME, read_capacity
from belle_compile.runtime.capacity.measure import Plan, Watch, measure
from belle_compile.runtime.cli import main
from tests.runtime.fakes import VOCABULARY, FakeExecutor, make_directory, make_engine
from tests.runtime.server.serving import wait_until

STEP_S = 0.004


class Timed(FakeExecutor):
    """An executor whose steps take `STEP_S`, whatever is in them."""

    def step(self, batch: Any) -> NDArray[np.float32]:
        self.steps.append((batch.tokens, batch.rows))
        time.sleep(STEP_S)
        return np.zeros((batch.rows, VOCABULARY), np.float32)


def make_timed(watch: Watch) -> Engine:
    return make_engine(Timed(num_blocks=64, max_rows=8, max_sequences=4, max_tokens=64), telemetry=watch)


def test_levels_double_the_users_and_share_each_step() -> None:
    watch, shown = Watch(), []
    with make_timed(watch) as engine:
        capacity = measure(engine, watch, 1, Plan(3.0, 16, 8), shown.append)
        wait_until(lambda: engine.stats().running == engine.stats().waiting == 0)  # no user is left behind
    assert [level.users for level in capacity.levels] == [1, 2, 4] and shown == list(capacity.levels)
    one, _, four = capacity.levels
    for level in capacity.levels:
        assert level.requests >= max(3, level.users)
        assert level.token_s.p50 >= STEP_S and level.first_token_s.p50 >= STEP_S
        assert level.request_s.p99 >= level.request_s.p50 >= 8 * STEP_S
        assert level.tokens_per_s <= level.users / STEP_S and 0 < level.busy <= 1
        assert level.tokens_per_s == pytest.approx(8 * level.requests_per_s)
    assert four.tokens_per_s > one.tokens_per_s
    assert capacity.prompt_tokens_per_s <= 16 / STEP_S and capacity.engine == engine.identity.digest
    assert (capacity.threads, capacity.prompt_tokens, capacity.answer_tokens) == (1, 16, 8)


def test_fewer_users_and_too_little_time() -> None:
    watch = Watch()
    with make_timed(watch) as engine:
        assert [level.users for level in measure(engine, watch, 1, Plan(1.5, 16, 8, most_users=1)).levels] == [1]
        with pytest.raises(EngineError, match=r"the time is too short: found fewer than 3 requests of one user in 0.0 s"):
            measure(engine, watch, 1, Plan(0.05, 16, 40))
        with pytest.raises(EngineError, match=r"too long: found 100 and 50 tokens, expected 128 together"):
            measure(engine, watch, 1, Plan(1.0, 100, 50))


def test_a_failing_step_is_the_error() -> None:
    watch = Watch()

    class Broken(Timed):
        def step(self, batch: Any) -> NDArray[np.float32]:
            if len(self.steps) > 40:
                raise EngineError("cpu", "a step failed")
            return super().step(batch)

    with make_engine(Broken(max_sequences=2), telemetry=watch) as engine, pytest.raises(EngineError, match=r"a step failed"):
        measure(engine, watch, 1, Plan(20.0, 16, 8))


def test_the_command_stores_the_curve_in_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_directory(tmp_path / "engine", {"tokenizer.json": b"{}"})
    monkeypatch.setattr(Engine, "load", lambda directory, telemetry, **options: make_timed(telemetry))
    arguments = ["benchmark", str(directory), "--seconds", "2", "--input-tokens", "16", "--output-tokens", "8"]
    result = CliRunner().invoke(main, [*arguments, "--max-users", "2"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0].split()[:2] == ["users", "tokens/s"] and len(result.output.splitlines()) == 4
    assert [level.users for level in read_capacity(directory / CAPACITY_NAME).levels] == [1, 2]
    result = CliRunner().invoke(main, [*arguments, "--max-users", "1", "-o", str(tmp_path / "c.json"), "--json"])
    assert json.loads(result.stdout)["levels"][0]["users"] == 1 and (tmp_path / "c.json").read_text() == result.stdout
