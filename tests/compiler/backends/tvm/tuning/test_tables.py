"""Tables of tilings: they are read and written without loss, used by builds, and looked up by the documented rule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from belle_compile.compiler import targets
from belle_compile.compiler.backends import CompileOptions
from belle_compile.compiler.backends.tvm import TvmBackend
from belle_compile.compiler.backends.tvm.isa import AVX2, ISAS
from belle_compile.compiler.backends.tvm.kernels.tiling import LinearTiling, Walk, built_in
from belle_compile.compiler.backends.tvm.library import compile_library
from belle_compile.compiler.backends.tvm.tuning import __main__ as command
from belle_compile.compiler.backends.tvm.tuning import table as tuning_table
from belle_compile.compiler.backends.tvm.tuning.table import Entry, Shape, TilingTable, processors, read_table, table_path
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.passes.pipeline import run_pipeline
from belle_compile.runtime.host import PROCESSORS
from tests.compiler.backends.tvm.test_linear import floating, quantized
from tests.parity.variants import VARIANTS
from tests.pipelines import PIPELINES

SMALL = Entry(
    Shape(64, 128), LinearTiling(((1, Walk(1, 1, 256, temporal=False)), (None, Walk(1, 2, unroll=2)))), {1: (2.5, 3.0)}
)
LARGE = Entry(
    Shape(4096, 4096), LinearTiling(((None, Walk(2, 2)),), tiles_from=8, tile_wide=2, tile_panels=2), {1: (9, 9), 512: (8, 9)}
)
TABLE = TilingTable("avx2", (SMALL, LARGE), {"processor": "x", "threads": 2}, "2026-01-02", {"apache-tvm": "1"})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "avx2.json").write_text(TABLE.to_json())
    assert read_table("avx2", folder=tmp_path) == TABLE
    assert read_table("amx", folder=tmp_path) == TilingTable("amx")
    assert json.loads(TABLE.to_json()) == TABLE.to_plain()
    empty = replace(TABLE, entries=())
    (tmp_path / "avx2.json").write_text(empty.to_json())
    assert read_table("avx2", folder=tmp_path) == empty


def test_a_processor_may_have_a_table_of_its_own(tmp_path: Path) -> None:
    assert processors("avx2", tmp_path) == ()
    (tmp_path / "avx2.json").write_text(replace(TABLE, entries=(SMALL,)).to_json())
    (tmp_path / "avx2-znver4.json").write_text(TABLE.to_json())
    assert processors("avx2", tmp_path) == ("znver4",) and processors("amx", tmp_path) == ()
    own, common = read_table("avx2", "znver4", tmp_path), read_table("avx2", folder=tmp_path)
    assert own == replace(TABLE, processor="znver4") and common.entries == (SMALL,)
    assert (own.library, common.library) == ("kernels-avx2-znver4.so", "kernels-avx2.so")
    assert own.describe().startswith("avx2 on znver4: measured 2026-01-02")


@pytest.mark.parametrize("isa", ISAS)
def test_committed_tables_are_valid(isa: str) -> None:
    assert set(processors(isa)) <= set(PROCESSORS)
    for processor in ("", *processors(isa)):
        table, path = read_table(isa, processor), table_path(isa, processor)
        assert path.exists() == bool(table.entries)
        if table.entries:
            assert table.date and table.machine["processor"] and table.versions
            assert path.read_text() == table.to_json()
        for entry in table.entries:
            assert table.find(entry.shape) is entry and entry.microseconds


def test_a_build_carries_a_library_for_a_processor_whose_table_differs(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = VARIANTS["llama_gqa"](tmp_path_factory.mktemp("checkpoints") / "tiny")
    own = replace(TABLE, entries=(replace(SMALL, tiling=LinearTiling(((None, Walk(1, 1)),))),))
    for name, table in (("avx2", TABLE), ("avx2-znver4", own), ("avx2-znver5", TABLE)):
        (tmp_path / f"{name}.json").write_text(table.to_json())
    monkeypatch.setattr(tuning_table.read_table, "__defaults__", ("", tmp_path))
    monkeypatch.setattr(tuning_table.processors, "__defaults__", (tmp_path,))
    model = build_graph(open_checkpoint(checkpoint))
    run_pipeline(model, PIPELINES["int8"])
    (payload,) = TvmBackend().compile([model], targets.parse("cpu").carrying(("avx2",)), CompileOptions())
    kernels = {name: content for name, content in payload.files.items() if name.endswith(".so")}
    assert sorted(kernels) == ["kernels-avx2-znver4.so", "kernels-avx2.so"], "znver5's is the common one"
    assert kernels["kernels-avx2-znver4.so"] != kernels["kernels-avx2.so"]
    assert [source.partition(":")[0] for source in payload.toolchain["kernel tilings"].split("; ")] == [
        "avx2",
        "avx2 on znver4",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"format": 2, "isa": "avx2"}', TABLE.to_json().replace("avx2", "amx"),
        TABLE.to_json().replace("wide", "broad"), TABLE.to_json().replace('"unroll": 2', '"unroll": 3'), 
        TABLE.to_json().replace('"any"', '"7"'),
        TABLE.to_json().replace('"tall": 2', '"tall": true'),
    ],
)  # fmt: skip
def test_a_damaged_table_says_what_to_do(text: str, tmp_path: Path) -> None:
    (tmp_path / "avx2.json").write_text(text)
    with pytest.raises(
        CompileError,
        match=r"^tuning: table .*avx2\.json: found .* run `python -m belle_compile.compiler\.backends\.tvm\.tuning",
    ):
        read_table("avx2", folder=tmp_path)


def test_the_same_shape_then_the_nearest_then_the_built_in_one() -> None:
    for shape, expected in (
        (Shape(64, 128), SMALL),
        (Shape(128, 256), SMALL),  # 1 + 0.5
        (Shape(64, 384), None),  # 1.58
        (Shape(512, 128), SMALL),  # 1.5
        (Shape(576, 128), None),
        (Shape(11008, 4096), LARGE),
        (Shape(32000, 4096), LARGE),
        (Shape(64, 128, planes=2), None),
    ):
        assert TABLE.find(shape) is expected, shape
    twins = tuple(Entry(Shape(n, 128), built_in(AVX2)) for n in (256, 64))
    assert TilingTable("avx2", twins).find(Shape(128, 128)) is twins[1], "as near, but smaller"


def test_kernels_take_their_tiling_from_the_table() -> None:
    known, unknown, planes = quantized(64, 128), quantized(2048, 1024), quantized(64, 128, planes=2)
    tuned = compile_library([known, floating(64, 128)], AVX2, TABLE)
    assert tuned == compile_library([known, floating(64, 128)], AVX2, TABLE)
    assert tuned == compile_library([replace(known, tiling=SMALL.tiling), floating(64, 128)], AVX2)
    assert tuned != compile_library([known, floating(64, 128)], AVX2)
    for other in (unknown, planes):
        assert compile_library([other], AVX2, TABLE) == compile_library([other], AVX2)


def test_impossible_tilings() -> None:
    together = ({"places": 2, "depth": 64}, {"places": 8, "unroll": 4})
    alone = ({"wide": 0}, {"tall": 0}, {"unroll": 3}, {"places": 3}, {"prefetch": 100}, {"depth": 32}, {"task_groups": 0})
    for arguments in (*alone, *together):
        with pytest.raises(ValueError, match="Walk"):
            Walk(**({"wide": 1, "tall": 1} | arguments))
    walk = Walk(1, 1)
    for walks in ((), ((1, walk),), ((4, walk), (1, walk), (None, walk)), ((None, walk), (None, walk))):
        with pytest.raises(ValueError, match="row bounds"):
            LinearTiling(walks)
    with pytest.raises(ValueError, match="panels a task"):
        LinearTiling(((None, walk),), tile_panels=4)


def test_a_new_search_keeps_other_shapes_of_the_same_machine() -> None:
    again = replace(TABLE, entries=(Entry(SMALL.shape, built_in(AVX2)),), date="2026-02-03")
    joined = command.joined(again, TABLE)
    assert joined.entries == (again.entries[0], LARGE) and joined.date == "2026-02-03"
    assert command.joined(replace(again, machine={"processor": "y"}), TABLE).entries == again.entries
