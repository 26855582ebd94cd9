"""The executor of TensorRT engines over stand-ins for the GPU and the plan: how it maps steps to runs of the profiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from belle_compile.compiler.backends.base import LibraryChoice
from belle_compile.compiler.backends.tensorrt.build import build_plan
from belle_compile.compiler.backends.tensorrt.installed import builder_for
from belle_compile.compiler.backends.tensorrt.rules import translate
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine, SamplingParams
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import tensorrt_library, tensorrt_plan, tensorrt_runtime
from belle_compile.runtime.executors.tensorrt_library import RTX
from belle_compile.runtime.executors.tensorrt_plan import FACTS_NAME, PLAN_NAME, PROFILES
from benchmarks.invariance.requests import Case, cases, longest
from benchmarks.invariance.ways import Answer, answer, ways
from tests.compiler.backends.tensorrt.graphs import graph
from tests.parity.variants import VARIANTS, hf_greedy, hf_logits, random_ids
from tests.runtime.executors import tensorrt_host

pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt` is not installed")

FIXTURE = Path(__file__).parents[2] / "fixtures" / "tiny-bloom-trained"
WAYS = ("alone and cold", "together", "few blocks, others given up", "prefix hits", "prefix hits, streamed")
NAMES = ("bloom", "llama_gqa", "llama_dynamic_rope")
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True, repetition_penalty=1.0)
Built = tuple[Path, Path]  # an engine and the folder of its ONNX model


def built(checkpoint: Path, folder: Path, **changes: object) -> Built:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tensorrt_plan, "MOST_CONTEXT", 384)  # ONNX Runtime reads the whole cache in every run
        tensorrt_host.build_models(monkeypatch, folder / "model")
        request = BuildRequest(checkpoint, folder / "engine", target="a100", backend="tensorrt", drift=False, **changes)  # type: ignore[arg-type]
        return build(request), folder / "model"


@pytest.fixture(scope="module", params=NAMES)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    checkpoint = VARIANTS[request.param](tmp_path_factory.mktemp("checkpoints") / request.param)
    return checkpoint, built(checkpoint, tmp_path_factory.mktemp("engines"), quantization="none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(FIXTURE, tmp_path_factory.mktemp("trained"), quantization="int8-accurate", methods=("rotate",))


@pytest.fixture
def invariant(trained: Built, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    tensorrt_host.run_models(monkeypatch, trained[1])
    yield trained[0]


def test_answers_are_those_of_transformers(variant: tuple[Path, Built], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, (engine, model) = variant
    last = tensorrt_host.run_models(monkeypatch, model)
    prompts = [random_ids(checkpoint, length, length) for length in (5, 100, 1, 17, 30, 2, 64, 9, 33, 40)]  # more than slots
    with Engine.load(engine) as loaded:
        logits, expected = loaded.logits(prompts[1]), hf_logits(checkpoint, prompts[1])
        assert abs(logits - expected).max() < 1e-5 * abs(expected).max()
        results = loaded.generate(prompts, GREEDY)
        runs = last().runs
    for prompt, result in zip(prompts[:4], results, strict=False):
        assert list(result.token_ids) == hf_greedy(checkpoint, prompt, len(result.token_ids))
    assert set(runs) == {0, 1} and runs.count(0) < 3 * GREEDY.max_new_tokens, "answers are computed together"


def test_answers_depend_on_the_request_alone(invariant: Path) -> None:
    lines = (FIXTURE / "heldout-zh.txt").read_text(encoding="utf-8").splitlines()
    calls: list[Case] = cases([line for line in lines if line.strip()], 8, 24)
    expected: list[Answer] = []
    for name in WAYS:
        answers, facts = answer(ways()[name], partial(Engine.load, invariant), calls, longest(invariant, calls))
        expected = expected or answers
        assert all(one.same(other) for one, other in zip(expected, answers, strict=True)), f"{name}: {facts}"


def test_a_prompt_longer_than_a_chunk_is_computed_chunk_by_chunk(trained: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    last = tensorrt_host.run_models(monkeypatch, trained[1])
    with Engine.load(trained[0]) as loaded:
        ids = [3 + token % 200 for token in range(300)]
        whole = loaded.logits(ids)[-1]
        runs = last().runs.count(1)
        assert runs > 300 // 128 and (loaded.logits(ids)[-1] == whole).all()
        (again,) = loaded.generate([ids], GREEDY)
        assert again.token_ids[0] == int(whole.argmax())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rank: (rank / PLAN_NAME).write_bytes(b"in pla"), r"size of .*engine.plan: found 6 bytes, expected 18; copy"),
        (lambda rank: (rank / FACTS_NAME).write_text("{}"), r"field library does not fit: found nothing, expected a string"),
        (lambda rank: (rank / FACTS_NAME).unlink(), r"tensorrt.json cannot be read: found No such file"),
    ],
)
def test_damaged_engines_are_refused(change: object, message: str, trained: Built, tmp_path: Path) -> None:
    from belle_compile.runtime.executors.tensorrt_plan import read_facts

    for name in (PLAN_NAME, FACTS_NAME):
        (tmp_path / name).write_bytes((trained[0] / "rank0" / name).read_bytes())
    change(tmp_path)  # type: ignore[operator]
    with pytest.raises(EngineError, match=message):
        read_facts(tmp_path)


def test_hosts_that_cannot_run_an_engine(trained: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = trained
    monkeypatch.setattr(tensorrt_library, "version", lambda package: "1.8.0.1")
    with pytest.raises(EngineError, match=r"^tensorrt: version of TensorRT: found tensorrt-rtx 1\.8\.0\.1, expected ten"):
        Engine.load(engine)
    monkeypatch.undo()
    tensorrt_host.run_models(monkeypatch, model)
    monkeypatch.setattr(tensorrt_host.HostDevice, "arch", "sm_89")
    with pytest.raises(EngineError, match=r"^tensorrt: GPU: found a host \(sm_89\), expected sm_80; rebuild the engine"):
        Engine.load(engine)
    monkeypatch.setattr(tensorrt_host.HostDevice, "arch", "sm_80")
    with pytest.raises(EngineError, match=r"kv_tokens: found 1000000 tokens, .* free beside the plan"):
        Engine.load(engine, kv_tokens=1_000_000)
    with pytest.raises(EngineError, match="instruction set: found sm_75, expected sm_80"):
        Engine.load(engine, isa="sm_75")


def test_the_runtime_refuses_a_plan_that_is_cut_off(tmp_path: Path) -> None:
    _, source = graph("llama", "none", tmp_path)
    builder = builder_for("sm_80", LibraryChoice(RTX.name))
    plan = bytes(build_plan(translate(source, "float16", 128), "sm_80", PROFILES, builder).content)
    (tmp_path / PLAN_NAME).write_bytes(plan[:5000])
    with pytest.raises(EngineError, match=r"^tensorrt: plan .* does not load on this host: found .*; see that the GPU and its"):
        tensorrt_runtime.TensorRtPlan(tmp_path / PLAN_NAME, 0, RTX.package)


def test_a_host_without_the_package(trained: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise tensorrt_library.PackageNotFoundError

    monkeypatch.setattr(tensorrt_library, "version", missing)
    with pytest.raises(EngineError, match=r"^tensorrt: the Python package tensorrt-rtx or tensorrt is not installed; pip"):
        Engine.load(trained[0])
