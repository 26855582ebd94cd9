"""Every variant's graph, by the NumPy meaning of its ops, against Transformers."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.families import build_graph
from tests.compiler.families.helpers import rewrite_config
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import VARIANTS, hf_logits, hf_step_logits, random_ids

TOLERANCE = 1e-5  # float32 sums in another order: about 1e-6 is seen
PROMPT = 21  # tokens: more than one block, and more than the dynamic RoPE variant's 16


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ir.Model]:
    directory = VARIANTS[request.param](tmp_path_factory.mktemp(request.param))
    return directory, build_graph(open_checkpoint(directory))


def test_prefill_matches_transformers(variant: tuple[Path, ir.Model]) -> None:
    directory, model = variant
    ids = random_ids(directory, PROMPT)
    assert relative_error(Stepper(model).step({0: ids})[0], hf_logits(directory, ids)) < TOLERANCE


def test_decoding_after_a_prompt_matches_transformers(variant: tuple[Path, ir.Model]) -> None:
    directory, model = variant
    ids = random_ids(directory, PROMPT, seed=1)
    steps = [ids[:13], *([token] for token in ids[13:])]  # across the end of a block, and of the dynamic variant's 16
    stepper = Stepper(model)
    expected = hf_step_logits(directory, steps)
    done = 0
    for step in steps:
        found = stepper.step({0: step})[0]
        assert relative_error(found, expected[done : done + len(step)]) < TOLERANCE
        done += len(step)


def test_ragged_batch_matches_transformers(variant: tuple[Path, ir.Model]) -> None:
    directory, model = variant
    a, b = random_ids(directory, PROMPT, seed=2), random_ids(directory, 7, seed=3)
    stepper = Stepper(model, sequences=2)
    first = stepper.step({1: b[:5], 0: a[:-1]})
    second = stepper.step({0: a[-1:], 1: b[5:]})
    for sequence, ids, cut in ((0, a, PROMPT - 1), (1, b, 5)):
        expected = hf_step_logits(directory, [ids[:cut], ids[cut:]])
        assert relative_error(first[sequence], expected[:cut]) < TOLERANCE
        assert relative_error(second[sequence], expected[cut:]) < TOLERANCE


def test_parity_notices_a_wrong_epsilon(tmp_path: Path) -> None:
    """The least visible of all mistakes a family can make is still far above the tolerance."""
    directory = VARIANTS["llama_head_dim"](tmp_path)
    ids = random_ids(directory, PROMPT)
    expected = hf_logits(directory, ids)
    model = build_graph(open_checkpoint(rewrite_config(directory, rms_norm_eps=1e-6)))  # for 1e-5
    assert relative_error(Stepper(model).step({0: ids})[0], expected) > 10 * TOLERANCE
