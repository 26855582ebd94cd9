"""What passes do to tiny graphs, by hand where that is possible."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import onnx_ir as ir
import pytest

from belle_compile.compiler import backends
from belle_compile.compiler.ir.build import make_initializer
from belle_compile.compiler.ir.lazy import lazy
from belle_compile.compiler.report import Drift, Effects, PassEffects, Stage, pass_effects
from belle_compile.compiler.report.effects import MOST_PARAMETERS, TOKENS, logits_of, weight_bytes
from belle_compile.passes.base import Pass, PassResult
from belle_compile.passes.pipeline import run_pipeline
from tests.passes.helpers import HIDDEN, VOCABULARY, bloom, llama
from tests.pipelines import CLEANUP, PIPELINES

TVM = backends.get("tvm")
IDS = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)
_MODEL = '{"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "b"}'
TOKENIZER = f'{{"version": "1.0", "added_tokens": [], "model": {_MODEL}}}'


def effects_of(model: ir.Model, passes: tuple[Pass, ...], observer: PassEffects | None = None) -> Effects:
    observer = observer or PassEffects(TVM, IDS)
    run_pipeline(model, passes, on_pass=observer.observe)
    return observer.result()


def by_name(effects: Effects) -> dict[str, Stage]:
    return {stage.name: stage for stage in effects.stages}


def drift_of(stage: Stage) -> Drift:
    assert stage.drift is not None
    return stage.drift


@pytest.mark.parametrize("preset", PIPELINES)
def test_every_pass_has_a_stage_after_the_frontend(preset: str) -> None:
    effects = effects_of(llama(layers=1), PIPELINES[preset])
    assert [stage.name for stage in effects.stages] == ["frontend", *(step.name for step in PIPELINES[preset])]
    first, last = effects.stages[0], effects.stages[-1]
    assert first.changes is None and first.drift == Drift(0.0, 1.0, 0.0)
    assert effects.tokens == len(IDS) and effects.unmeasured == ""
    assert last.kernel_calls < first.kernel_calls and first.lowers and last.lowers


def test_bytes_and_calls_by_hand() -> None:
    model = llama(layers=1)
    matrices = {
        "embed": (VOCABULARY, HIDDEN), "q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32),
        "gate": (48, 32), "up": (48, 32), "down": (32, 48), "head": (VOCABULARY, HIDDEN),
    }  # fmt: skip
    vectors = 4 * (4 + 2 * HIDDEN)  # frequencies, two norms
    values, rows = sum(map(prod, matrices.values())), sum(shape[0] for shape in matrices.values())
    head = VOCABULARY * HIDDEN
    stages = by_name(effects_of(model, PIPELINES["int8-plain"]))
    assert stages["frontend"].weight_bytes == stages["remove-unused"].weight_bytes == 4 * values + vectors
    linear_rows = rows - VOCABULARY
    assert stages["quantize-linears"].weight_bytes == 4 * head + (values - head) + 4 * linear_rows + vectors
    assert stages["quantize-embedding"].weight_bytes == values + 4 * rows + vectors
    sizes = 8 * (3 + 2)  # of the splits of q, k, v and of gate, up
    assert stages["fuse-projections"].weight_bytes == values + 4 * rows + vectors + sizes
    # embed, rotary; norm, q, k, v, append, attend, o, add; norm, gate, up, swiglu, down, add; rows, head
    assert stages["frontend"].kernel_calls == 18
    # A quantization for each of 4 inputs and the head's, and two calls instead of one for each of 8 linears.
    assert stages["quantize-linears"].kernel_calls == 18 + 5 + 8 and not stages["quantize-linears"].lowers
    assert stages["fuse-dequantize"].kernel_calls == 18 + 5 and stages["fuse-dequantize"].lowers
    assert stages["fuse-projections"].kernel_calls == 18 + 5 - 3
    assert stages["fuse-activation-quantize"].kernel_calls == TVM.kernel_calls(model)


@pytest.mark.parametrize("make", [llama, bloom])
def test_drift_is_there_where_values_are_rounded(make: type) -> None:
    stages = by_name(effects_of(make(last_norm=True), PIPELINES["int8"]))
    for name in ("remove-identities", "merge-duplicates", "remove-unused"):
        assert stages[name].drift == Drift(0.0, 1.0, 0.0), "nothing was changed, so nothing was measured"
    rotated, quantized, last = (drift_of(stages[n]) for n in ("rotate-values", "quantize-linears", "fuse-activation-quantize"))
    assert stages["rotate-residual"].changes and rotated.kl < 1e-9 and rotated.top1 == 1 and 0 < rotated.max_difference < 1e-4
    assert quantized.kl > 1e-6 and 1e-4 < quantized.max_difference < 0.5
    assert drift_of(stages["quantize-embedding"]).kl != quantized.kl
    assert last == drift_of(stages["quantize-embedding"]), "fusions change no bit"


@dataclass(frozen=True)
class ScaleHead(Pass):
    """logits = rows @ w.T   becomes   logits = rows @ (factor * w).T"""

    factor: float = 2.0

    def run(self, model: ir.Model) -> PassResult:
        (head,) = [node for node in model.graph if node.name == "lm_head"]
        old = head.inputs[1]
        assert old is not None and old.const_value is not None
        new = make_initializer(ir.Tensor((self.factor * old.const_value.numpy()).astype(np.float32), name="scaled"))
        model.graph.register_initializer(new)
        head.replace_input_with(1, new)
        return PassResult(1)


def test_drift_by_hand() -> None:
    """Twice the logits: the largest is off by itself, the same token is likeliest, and KL is what the definition says."""
    model, scaled = llama(layers=1), llama(layers=1)
    stage = effects_of(scaled, (ScaleHead(),)).stages[1]
    logits = [found.astype(np.float64) for _, found in logits_of({0: model, 1: scaled}, IDS)]
    np.testing.assert_allclose(logits[1], 2 * logits[0], rtol=1e-6)
    p, q = (np.exp(each) / np.exp(each).sum(-1, keepdims=True) for each in logits)
    assert drift_of(stage).kl == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-6)
    assert drift_of(stage).top1 == 1 and drift_of(stage).max_difference == pytest.approx(1, rel=1e-6)
    assert stage.changes == 1


def test_graphs_side_by_side_give_what_they_give_alone() -> None:
    graphs = {0: bloom(last_norm=True), 3: bloom(last_norm=True), 5: bloom(last_norm=True)}
    run_pipeline(graphs[3], PIPELINES["int8-plain"])
    run_pipeline(graphs[5], PIPELINES["int8"])
    heard: list[tuple[int, int]] = []
    found = dict(logits_of(graphs, IDS, lambda *told: heard.append(told)))
    assert list(found) == [0, 3, 5]
    for number, graph in graphs.items():
        assert np.array_equal(found[number], dict(logits_of({number: graph}, IDS))[number])
    assert heard == sorted(heard) and heard[-1][0] == heard[-1][1] > 0


def test_a_weight_is_computed_once_for_all_stages() -> None:
    model = llama(layers=1, last_norm=True)
    reads: Counter[str] = Counter()

    def counted(name: str, array: np.ndarray) -> np.ndarray:
        reads[name] += 1
        return array.copy()

    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        value.const_value = lazy(name, partial(counted, name, array), array.shape, array.dtype)
    effects = effects_of(model, PIPELINES["int8"])
    assert len(effects.stages) > 10 and drift_of(effects.stages[-1]).kl > 0
    assert set(reads.values()) == {1}


def test_weights_that_nothing_reads_are_not_counted() -> None:
    model = llama(layers=1)
    before = weight_bytes(model)
    model.graph.register_initializer(make_initializer(ir.Tensor(np.zeros(1000, np.float32), name="unread")))
    assert weight_bytes(model) == before


def test_without_drift_everything_else_is_counted() -> None:
    measured = effects_of(bloom(layers=1), PIPELINES["int8"])
    for observer in (pass_effects(TVM, TOKENIZER, 10, False), pass_effects(TVM, TOKENIZER, MOST_PARAMETERS + 1)):
        effects = effects_of(bloom(layers=1), PIPELINES["int8"], observer)
        assert effects.tokens == 0 and "not measured: " in effects.unmeasured and "drift" in effects.unmeasured
        for with_drift, without in zip(measured.stages, effects.stages, strict=True):
            assert without == Stage(**{**vars(with_drift), "drift": None})


def test_drift_is_measured_when_asked_for_or_where_it_is_quick() -> None:
    for observer in (pass_effects(TVM, TOKENIZER, MOST_PARAMETERS), pass_effects(TVM, TOKENIZER, MOST_PARAMETERS + 1, True)):
        effects = effects_of(llama(layers=1), CLEANUP, observer)
        assert 1 < effects.tokens <= TOKENS and effects.stages[0].drift == Drift(0.0, 1.0, 0.0)


def test_tokens_the_model_does_not_have_are_left_out() -> None:
    effects = effects_of(llama(layers=1), CLEANUP, PassEffects(TVM, [1, 2, VOCABULARY, 3]))
    assert effects.tokens == 3
    assert effects_of(llama(layers=1), CLEANUP, PassEffects(TVM, [VOCABULARY] * 9)).tokens == TOKENS
    short = llama(layers=1)
    short.metadata_props["max_position"] = "4"
    assert effects_of(short, CLEANUP).tokens == 4


def test_a_model_whose_logits_are_not_finite_has_no_drift() -> None:
    model = llama(layers=1)
    norm = model.graph.initializers["layers.0.input_norm.weight"]
    norm.const_value = ir.Tensor(np.full(HIDDEN, np.nan, np.float32), name=norm.name)
    effects = effects_of(model, CLEANUP)
    assert effects.tokens == 0 and effects.unmeasured == "not measured: the model's own logits are not finite"
