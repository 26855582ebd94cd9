"""TorchScript engines: unquantized ones against Transformers, quantized ones against TVM's, and bits that must not differ."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.families import build_graph
from belle_compile.passes.pipeline import passes_of, run_pipeline
from belle_compile.passes.presets import find_preset
from belle_compile.runtime import Engine, SamplingParams
from benchmarks.invariance.requests import cases, longest
from benchmarks.invariance.ways import Answer, answer, ways
from tests.compiler.backends.torchscript.harness import FIXTURE, Engines, logits_of, needs_avx2
from tests.parity.copies import logits_over_copies
from tests.parity.engines import EngineStepper
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import VARIANTS, hf_greedy, hf_logits, hf_step_logits, random_ids
from tests.quantized_releases import compressed_tensors

pytestmark = needs_avx2

TOLERANCE = 1e-5  # of the largest logit; the promise is 1e-4
GREEDY = 64


@pytest.mark.parametrize("variant", VARIANTS)
def test_unquantized_logits_and_answers(variant: str, engines: Engines) -> None:
    """A prompt at once, in steps, and beside another sequence; and 64 greedy tokens."""
    checkpoint = engines.checkpoint(variant)
    first, second = random_ids(checkpoint, 35, seed=2), random_ids(checkpoint, 11, seed=3)
    steps = [{0: first[:17]}, {0: first[17:18], 1: second[:9]}, {1: second[9:], 0: first[18:]}]
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=GREEDY, ignore_eos=True)
    with Engine.load(engines.engine(variant), threads=1, kv_tokens=512) as engine:
        assert relative_error(engine.logits(first), hf_logits(checkpoint, first)) < TOLERANCE
        stepper = EngineStepper(engine, sequences=2)
        logits = [stepper.step(step) for step in steps]
        for sequence in (0, 1):
            mine = [step[sequence] for step in steps if sequence in step]
            got = np.concatenate([result[sequence] for result in logits if sequence in result])
            assert relative_error(got, hf_step_logits(checkpoint, mine)) < TOLERANCE
        (answer,) = engine.generate([first[:21]], params)
    assert answer.token_ids == hf_greedy(checkpoint, first[:21], GREEDY)


CASES = [
    ("llama_gqa", "none", "auto"),
    ("trained", "int8", "auto"),
    ("llama_gqa", "int8", "int8"),
    ("bloom", "int8-accurate", "float32"),
]


@pytest.mark.parametrize(("variant", "quantization", "kv_cache"), CASES)
def test_bits_do_not_depend_on_the_step(variant: str, quantization: str, kv_cache: str, engines: Engines) -> None:
    """A sequence alone and at once; token by token; in chunks beside others, on two threads."""
    directory = engines.engine(variant, quantization, kv_cache)
    ids, others = (random_ids(engines.checkpoint(variant), 45, seed) for seed in (1, 2))
    expected = logits_of(directory, [{0: ids}], 0)
    one_by_one = [{0: [token]} for token in ids]
    mixed = [{0: others[:3], 1: ids[:1]}, {1: ids[1:20], 0: others[3:4], 2: others[:19]}, {2: others[19:20], 1: ids[20:21]},
             {1: ids[21:], 2: others[20:]}]  # fmt: skip
    np.testing.assert_array_equal(logits_of(directory, one_by_one, 0), expected)
    np.testing.assert_array_equal(logits_of(directory, mixed, 1, threads=2), expected)


@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_copied_blocks_hold_keys_and_values(kv_cache: str, engines: Engines) -> None:
    with Engine.load(engines.engine("llama_gqa", "int8", kv_cache), threads=1, kv_tokens=512) as engine:
        for expected, found in logits_over_copies(engine, random_ids(engines.checkpoint("llama_gqa"), 200), 31):
            np.testing.assert_array_equal(found, expected)


def test_answers_are_the_same_in_every_way(engines: Engines, tmp_path: Path) -> None:
    """Alone, together, preempted, from prefixes, over HTTP and from the result cache: tokens and log probabilities."""
    directory = engines.engine("trained", "int8")
    lines = (FIXTURE / "heldout-zh.txt").read_text(encoding="utf-8").splitlines()
    calls = cases([line for line in lines if line.strip()], 12, 32)
    expected: list[Answer] = []
    for name, way in ways(f"sqlite:{tmp_path}/answers.db").items():
        answers, facts = answer(way, partial(Engine.load, directory, threads=1), calls, longest(directory, calls))
        expected = expected or answers
        assert [one.same(other) for one, other in zip(expected, answers, strict=True)] == [True] * len(answers), (name, facts)


def test_a_step_without_logits(engines: Engines) -> None:
    with Engine.load(engines.engine("llama_gqa", "int8", "int8"), threads=1, kv_tokens=512) as engine:
        batch = engine.executor.batch
        batch.tokens, batch.rows = 3, 0
        batch.positions[:3] = range(3)
        assert engine.executor.step(batch).shape == (0, engine.executor.vocab_size)


@pytest.mark.parametrize(("variant", "quantization"), [("trained", "int8"), ("llama_gqa", "int4")])
def test_logits_are_those_of_the_tvm_backend(variant: str, quantization: str, engines: Engines) -> None:
    """Bit for bit: the kernels are the same, whoever divides their loops among threads."""
    ids = random_ids(engines.checkpoint(variant), 45)
    steps = [{0: ids[:30]}, {0: ids[30:31]}, {0: ids[31:]}]
    expected = logits_of(engines.engine(variant, quantization, backend="tvm"), steps, 0)
    for threads in (1, 2, 3):
        np.testing.assert_array_equal(logits_of(engines.engine(variant, quantization), steps, 0, threads), expected)


@pytest.mark.parametrize("variant", ["bloom", "llama"])
def test_the_integers_are_those_of_the_passes(variant: str, engines: Engines) -> None:
    """Where activations have 16 bits, a rounding to the other side is not felt: what differs would be weights or scales."""
    checkpoint = engines.checkpoint(variant)
    ids, graph = random_ids(checkpoint, 30), build_graph(open_checkpoint(checkpoint))
    run_pipeline(graph, passes_of(find_preset("int8-accurate").recipe.applied(calibrated=False)))
    found = logits_of(engines.engine(variant, "int8-accurate", "float32"), [{0: ids}], 0)
    assert relative_error(found, Stepper(graph).step({0: ids})[0]) < 1e-3


def test_two_builds_give_the_same_bytes(engines: Engines, tmp_path: Path) -> None:
    first, second = engines.engine("llama_gqa", "int8"), Engines(tmp_path).engine("llama_gqa", "int8")
    names = {str(path.relative_to(first)) for path in first.rglob("*") if path.is_file()}
    assert {"rank0/model-avx2.ts", "rank0/kernels-avx2.so", "rank0/weights.safetensors", "manifest.json"} <= names
    assert [name for name in sorted(names) if (first / name).read_bytes() != (second / name).read_bytes()] == []


def test_integers_of_a_release_down_to_minus_128(engines: Engines, tmp_path: Path) -> None:
    """The kernels are those of the TVM backend, which get the same integers."""
    release = compressed_tensors(engines.checkpoint("llama_gqa"), tmp_path / "release")
    assert min(int(weight.integers.min()) for weight in release.weights.values()) == 0, "which stands for -128"
    ids, found = random_ids(release.directory, 20), {}
    for backend in ("torchscript", "tvm"):
        request = BuildRequest(release.directory, tmp_path / backend, backend=backend, isas=("avx2",), drift=False)
        with Engine.load(build(request), threads=1, kv_tokens=512) as engine:
            assert engine.manifest.quantization["integers"].startswith("those of the checkpoint")
            found[backend] = engine.logits(ids)
    np.testing.assert_array_equal(found["torchscript"], found["tvm"])
