"""The registries of presets and methods, and what is derived from them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.passes import pipeline
from belle_compile.passes.calibration.data import CalibrationData
from belle_compile.passes.pipeline import PIPELINE, passes_of
from belle_compile.passes.presets import (
    DEFAULT_PRESET,
    METHODS,
    PRESETS,
    Recipe,
    find_preset,
    manifest_words,
    recipe_of,
)
from belle_compile.passes.quantization.scheme import FLOAT32, INT4, INT8
from tests.preset_tables import markdown

GUIDE = Path(__file__).parents[2] / "docs/guide.md"
MARKED = re.compile(r"(?<=test_presets\.py --update-golden -->\n)(.*?)(?=<!-- end -->\n)", re.DOTALL)


def names(recipe: Recipe, data: CalibrationData | None = None) -> list[str]:
    return [step.name for step in passes_of(recipe, data)]


def test_the_guide_has_the_tables_of_the_registries(request: pytest.FixtureRequest) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert len(MARKED.findall(text)) == 1, f"{GUIDE} has no place for the tables"
    if request.config.getoption("--update-golden"):
        text = MARKED.sub(lambda _: markdown(), text)
        GUIDE.write_text(text, encoding="utf-8")
    assert MARKED.findall(text) == [markdown()], f"{GUIDE} differs: run pytest {Path(__file__).name} --update-golden"


def test_every_pass_of_the_pipeline_is_used_by_something_that_there_is() -> None:
    others = {pipeline.ALWAYS, pipeline.INTEGERS, pipeline.GROUPS, pipeline.MIXED, pipeline.KEPT, pipeline.ADAPTERS}
    assert {step.used_by for step in PIPELINE} == others | set(METHODS)
    assert {name for preset in PRESETS.values() for name in preset.recipe.methods} <= set(METHODS)
    assert DEFAULT_PRESET in PRESETS


def test_methods_that_need_requests_wait_for_some(tmp_path: Path) -> None:
    data = CalibrationData(((1, 2),), "", "", tmp_path)
    for method in METHODS.values():
        recipe, plain = Recipe(methods=(method.name,)), names(Recipe())
        assert (names(recipe) == plain) == method.needs_requests
        assert len(names(recipe, data)) > len(plain)
        assert set(plain) < set(names(recipe, data))


def test_weights_in_groups_are_quantized_first() -> None:
    int4, int8 = names(Recipe(INT4)), names(Recipe(INT8))
    assert int4.index("quantize-groups") + 1 == int4.index("quantize-linears")
    assert [name for name in int4 if name != "quantize-groups"] == int8


def test_words_of_the_manifest() -> None:
    int8 = PRESETS["int8"].recipe
    assert manifest_words(int8, calibrated=False) == {
        "scheme": "w8a8",
        "weights": "int8 per output channel",
        "activations": "int8, one scale a token, found while running",
        "rotations": "residual stream and values, folded into the weights",
        "online rotations": "feed-forward activations, while running",
    }
    assert manifest_words(int8, calibrated=True)["rounding"] == "by calibration requests (GPTQ)"
    wide = manifest_words(PRESETS["int8-accurate"].recipe, calibrated=False)
    assert wide["scheme"] == "w8a16" and wide["activations"].startswith("16 bits as two int8 planes, ")
    int4 = manifest_words(PRESETS["int4"].recipe, calibrated=False)
    assert (int4["scheme"], int4["weights"]) == ("w4a8", "int4 in groups of 128 inputs, int8 embedding and head")
    static = manifest_words(replace(int8, methods=("static",)), calibrated=True)
    assert static["activations"] == "int8, one scale for all tokens" and "clipping" in static
    assert manifest_words(Recipe(FLOAT32, 32), calibrated=True) == {
        "scheme": "none", "weights": "float32", "activations": "float32",
    }  # fmt: skip


def test_methods_in_place_of_a_presets_own() -> None:
    assert recipe_of("int8", None, calibrated=False) == find_preset("int8").recipe
    assert recipe_of("int8", ("gptq", "rotate"), calibrated=True).methods == ("rotate", "gptq")
    assert recipe_of("int8-accurate", (), calibrated=False) == Recipe(INT8, 16)


@pytest.mark.parametrize(
    ("preset", "methods", "sentence"),
    [
        ("int3", None, "unknown preset: found 'int3', expected int8 or int8-accurate or int8-plain or int4 or none."),
        ("int8", ("round",), "unknown method: found round, expected some of reorder, smooth, rotate, rotate-online, gptq, "
         "static."),
        ("none", ("rotate",), "methods: found rotate, expected none with --quant none."),
        ("int8", ("rotate", "gptq", "static"), "method gptq, static: found no requests to calibrate with; give some with "
         "--calibration."),
    ],
)  # fmt: skip
def test_refusals(preset: str, methods: tuple[str, ...] | None, sentence: str) -> None:
    with pytest.raises(CompileError) as error:
        recipe_of(preset, methods, calibrated=False)
    assert str(error.value) == f"quantization: {sentence}"
