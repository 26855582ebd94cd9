"""The search with times that are made up: what is fastest is chosen, noise is not, and a build asks for it only with `tune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from belle_compile.compiler import targets
from belle_compile.compiler.backends import CompileOptions, Payload
from belle_compile.compiler.backends.tvm import TvmBackend
from belle_compile.compiler.backends.tvm.isa import AMX, AVX2, AVX512VNNI, Isa
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import QuantizedLinear
from belle_compile.compiler.backends.tvm.kernels.tiling import LinearTiling, Walk, built_in
from belle_compile.compiler.backends.tvm.tuning import search as searching
from belle_compile.compiler.backends.tvm.tuning.search import search
from belle_compile.compiler.backends.tvm.tuning.table import Shape
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.families import build_graph
from belle_compile.passes.pipeline import run_pipeline
from belle_compile.runtime.executors import cpu
from tests.parity.variants import VARIANTS
from tests.pipelines import PIPELINES

Cost = Callable[[LinearTiling, int], float]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cost], list[int]]:
    """Replaces compiling and measuring by a function of tiling and row count; returns the numbers of variants compiled."""

    def use(cost: Cost) -> list[int]:
        compiled: list[int] = []

        class Bench:
            def __init__(self, kernel: QuantizedLinear, max_rows: int) -> None: ...

            def compare(self, functions: Sequence[Any], rows: int, every: bool = False) -> list[float]:
                return [cost(tiling, rows) for tiling in functions]

        def load_variants(kernels: Mapping[str, QuantizedLinear], isa: Isa, threads: int) -> dict[str, Any]:
            compiled.append(len(kernels))
            return {name: kernel.tiling for name, kernel in kernels.items()}

        monkeypatch.setattr(searching, "Bench", Bench)
        monkeypatch.setattr(searching, "load_variants", load_variants)
        return compiled

    return use


def test_the_fastest_of_each_bucket_wins(times: Callable[[Cost], list[int]]) -> None:
    def cost(tiling: LinearTiling, rows: int) -> float:
        walk = tiling.walk_for(rows)
        wanted = {1: Walk(6, 1, 1024, chain=True, unroll=2), 2: Walk(4, 4, 8192, chain=True)}.get(min(rows, 2), walk)
        return 1 + sum(getattr(walk, name) != getattr(wanted, name) for name in ("wide", "tall", "prefetch", "chain", "unroll"))

    compiled = times(cost)
    heard: list[tuple[int, int]] = []
    table = search({Shape(64, 64): 8}, AVX512VNNI, threads=1, progress=lambda *told: heard.append(told))
    (entry,) = table.entries
    assert entry.tiling.walks == ((1, Walk(6, 1, 1024, chain=True, unroll=2)), (None, Walk(4, 4, 8192, chain=True))), (
        "equal ones are merged"
    )
    assert heard == [(0, 1), (1, 1)] and len(compiled) == 5
    assert list(entry.microseconds) == [1, 2, 4, 8] and table.isa == "avx512vnni" and table.date
    assert table.find(Shape(64, 64)) is entry


def test_a_gain_within_the_noise_changes_nothing(times: Callable[[Cost], list[int]]) -> None:
    times(lambda tiling, rows: 1.0 if tiling.walk_for(rows) in dict.fromkeys(w for _, w in built_in(AVX2).walks) else 0.995)
    (entry,) = search({Shape(64, 64): 512}, AVX2, threads=1).entries
    assert entry.tiling.walks == built_in(AVX2).walks


@pytest.mark.parametrize("threshold", [4, 16, 128, None])
def test_tiles_take_over_where_they_win(threshold: int | None, times: Callable[[Cost], list[int]]) -> None:
    def cost(tiling: LinearTiling, rows: int) -> float:
        if rows < tiling.tiles_from:
            return 1.0
        return (2.0 if threshold is None or rows < threshold else 0.5) + 0.1 * (tiling.tile_panels != 3)

    times(cost)
    (entry,) = search({Shape(64, 64): 512}, AMX, threads=1).entries
    assert entry.tiling.tiles_from == (threshold or searching.NEVER)
    assert threshold is None or entry.tiling.tile_panels == 3


def test_shapes_of_a_program() -> None:
    from tests.compiler.backends.tvm.test_linear import floating, quantized

    found = searching.shapes_of({quantized(32, 64): 64, quantized(32, 64, bias=False): 512, floating(8, 8): 512,
                                quantized(32, 64, planes=2): 64})  # fmt: skip
    assert found == {Shape(32, 64): 512, Shape(32, 64, 2): 64}
    assert [Shape.of(searching.kernel_of(shape)) for shape in found] == list(found)


def test_a_build_searches_the_model_for_this_host_when_asked_to(
    times: Callable[[Cost], list[int]], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = VARIANTS["llama_gqa"](tmp_path_factory.mktemp("checkpoints") / "tiny")

    def compiled_graph(tune: Callable[[int, int], None] | None = None) -> Payload:
        model = build_graph(open_checkpoint(checkpoint))
        run_pipeline(model, PIPELINES["int8"])
        target = targets.parse("cpu").carrying(("avx2",))
        (payload,) = TvmBackend().compile([model], target, CompileOptions(unfused_calls=1, tune=tune))
        return payload

    compiled = times(lambda tiling, rows: 2.0 - (tiling.walk_for(rows).wide == 1))
    monkeypatch.setattr(cpu, "choose_isa", lambda isas: isas[0])
    plain = compiled_graph()
    assert compiled == [] and plain.tuning is None and ";" not in plain.toolchain["kernel tilings"], (
        "an ordinary build measures nothing"
    )
    again = compiled_graph()
    assert again.files == plain.files and again.toolchain == plain.toolchain
    heard: list[tuple[int, int]] = []
    tuned = compiled_graph(lambda *told: heard.append(told))
    assert tuned.tuning is not None and tuned.tuning.name == "tune-kernels"
    assert tuned.tuning.changes == len(tuned.tuning.options["entries"]) == len(heard) - 1 > 1
    assert all(walk["wide"] == 1 for entry in tuned.tuning.options["entries"] for walk in entry["walks"].values())
    assert tuned.toolchain["kernel tilings"].startswith("avx2: measured ")
    assert tuned.files["program.json"] == plain.files["program.json"]
    assert tuned.files["kernels-avx2.so"] != plain.files["kernels-avx2.so"]
