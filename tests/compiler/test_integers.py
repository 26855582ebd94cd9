"""What builds and exports do with a checkpoint's integers: they keep them where they can, else they say what it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.engine_graph import graph_of, reader_of
from belle_compile.compiler.inspection import inspect
from belle_compile.compiler.plan.table import Load, plan
from belle_compile.compiler.reading import AdapterChoice, Reading
from belle_compile.runtime import Engine
from belle_compile.runtime.artifact import Manifest, PassRecord, read_manifest
from tests.compiler.checkpoint.overlays.adapters import make_adapter
from tests.compiler.exports.models import export, requests
from tests.parity.engines import BEST_ISA
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import hf_logits, make_bloom, make_llama, random_ids
from tests.quantized_releases import Release, Weight, awq, compressed_tensors, gptq, gptq_file

Array = npt.NDArray[Any]
Make = Callable[..., Release]
HEADS, WIDTH = 4, 128


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return make_llama(folder, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=2)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bloom(tmp_path_factory.mktemp("bloom"), hidden_size=WIDTH, n_layer=1, n_head=HEADS)


def engine_of(release: Release, **options: Any) -> tuple[Path, Manifest]:
    out = release.directory.with_name(f"engine-{len(list(release.directory.parent.iterdir()))}")
    engine = build(BuildRequest(release.directory, out, **options))
    return engine, read_manifest(engine)


def weights_of(engine: Path) -> dict[str, tuple[Array, Array]]:
    """Integers and scales of an engine's linears by module."""
    manifest = read_manifest(engine)
    graph = graph_of(engine, manifest, reader_of(engine, manifest, "test")).graph
    weights = {}
    for name, value in graph.initializers.items():
        module, _, kind = name.partition(".weight.")
        if kind in ("int8", "int4"):
            scales = graph.initializers[f"{module}.weight.{'scale' if kind == 'int8' else 'scales'}"].const_value
            assert value.const_value is not None and scales is not None
            weights[module] = value.const_value.numpy().astype(np.int8), scales.numpy()
    return weights


def expected(module: str, weight: Weight) -> tuple[Array, Array]:
    """Centred integers and scales in the order of an engine: q, k and v of a BLOOM are apart."""
    integers = (weight.integers - 2 ** (weight.bits - 1)).astype(np.int8)
    scales = weight.scales.astype(np.float32)
    if "query_key_value" not in module:
        return integers, scales
    split = (HEADS, 3, WIDTH // HEADS)
    return tuple(part.reshape(*split, -1).transpose(1, 0, 2, 3).reshape(len(part), -1) for part in (integers, scales))  # type: ignore[return-value]


def record(manifest: Manifest, name: str) -> PassRecord | None:
    return next((record for record in manifest.passes if record.name == name), None)


def opened(manifest: Manifest) -> str:
    """The notes on how the checkpoint was read."""
    found = record(manifest, "open-checkpoint")
    assert found is not None
    return "\n".join(found.refusals)


INT8: dict[str, Make] = {
    "W8A8": compressed_tensors,
    "GPTQ, one scale an output": lambda source, out: gptq(source, out, bits=8, group=-1),
    "W8A16": lambda source, out: compressed_tensors(source, out, "pack-quantized"),
    "4 bits with zero points": lambda source, out: gptq(source, out, bits=4, group=-1, symmetric=False),
}


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("layout", INT8)
def test_integers_with_a_scale_for_each_output_are_kept(
    layout: str, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    release = INT8[layout](request.getfixturevalue(family), tmp_path / "release")
    engine, manifest = engine_of(release)
    count = len(release.weights)
    assert (
        f"{count} linears keep the integers of the checkpoint; methods that change weights were left out: rotate, "
        in opened(manifest)
    )
    assert manifest.quantization["integers"] == "those of the checkpoint, where weights can be stored so"
    assert "rotations" not in manifest.quantization and record(manifest, "quantize-again") is None
    assert record(manifest, "keep-integers") == PassRecord(
        "keep-integers", {"keep": [], "layout": "int8 per output channel"}, count, ()
    )
    found = weights_of(engine)
    for module, weight in release.weights.items():
        integers, scales = expected(module, weight)
        if weight.zeros.max() != weight.zeros.min():
            integers = (weight.integers - weight.zeros).astype(np.int8)
            integers = expected(module, replace(weight, integers=integers.astype(np.int64) + 8))[0]
        np.testing.assert_array_equal(found[module.removeprefix("transformer.")][0], integers, err_msg=module)
        np.testing.assert_array_equal(found[module.removeprefix("transformer.")][1], scales[:, 0], err_msg=module)


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("group", [128, 256, -1])
def test_int4_in_groups_is_kept_by_the_preset_int4(group: int, llama: Path, tmp_path: Path) -> None:
    """Larger groups repeat their scale."""
    release = gptq(llama, tmp_path / "release", bits=4, group=group)
    engine, manifest = engine_of(release, quantization="int4")
    assert "7 linears keep the integers" in opened(manifest) and record(manifest, "quantize-again") is None
    found = weights_of(engine)
    for module, weight in release.weights.items():
        integers, scales = expected(module, weight)
        np.testing.assert_array_equal(found[module][0], integers, err_msg=module)
        np.testing.assert_array_equal(found[module][1], scales[:, weight.group_of[::128]], err_msg=module)


AGAIN: dict[str, tuple[Make, dict[str, Any], str, tuple[float, float]]] = {
    "BELLE's 8 bits": (
        lambda source, out: gptq_file(source, out, bits=8, group=64),
        {},
        "7 linears, from model.layers.0.self_attn.q_proj on, are quantized again: a scale for every 64 inputs, where int8 has "
        "one for each output",
        (0.003, 0.02),
    ),
    "AWQ": (
        lambda source, out: awq(source, out, group=128),
        {"quantization": "int4"},
        "are quantized again: 4 bits with zero points, that is integers from -",
        (0.05, 0.2),
    ),
    "small groups": (
        lambda source, out: gptq(source, out, bits=4, group=32),
        {"quantization": "int4"},
        "a scale for every 32 inputs, where int4 has one for 128",
        (0.05, 0.2),
    ),
    "act-order": (
        lambda source, out: gptq(source, out, bits=4, group=64, act_order=True),
        {"quantization": "int4"},
        "inputs in an order of their own (act-order), which groups of neighbours do not have",
        (0.05, 0.2),
    ),
    "scales of float32": (
        lambda source, out: gptq_file(source, out, bits=4, group=128, symmetric=True),
        {"quantization": "int4"},
        "scales that float16 does not represent",
        (0.05, 0.2),
    ),
    "16-bit activations": (
        compressed_tensors,
        {"quantization": "int8-accurate"},
        "8 bits, that is integers from -128 to 127, where int8 has -127 to 127",
        (0.003, 0.02),
    ),
    "methods asked for": (
        compressed_tensors,
        {"methods": ("rotate",)},
        "--methods rotate changes the weights",
        (0.003, 0.02),
    ),
}


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("case", AGAIN)
def test_what_cannot_be_kept_is_quantized_again_and_measured(case: str, llama: Path, tmp_path: Path) -> None:
    make, options, note, (least, most) = AGAIN[case]
    release = make(llama, tmp_path / "release")
    engine, manifest = engine_of(release, **options)
    assert note in opened(manifest) and record(manifest, "keep-integers") is None and "integers" not in manifest.quantization
    measured = record(manifest, "quantize-again")
    assert measured is not None and measured.changes == 7
    errors = measured.options["relative_errors"]
    assert errors.keys() == release.weights.keys()
    assert all(least < error < most for error in errors.values()), errors
    (worst, *_) = sorted(errors, key=lambda name: -errors[name])
    (summary,) = measured.refusals
    assert summary.startswith("7 weights were quantized again: relative error ") and summary.endswith(f"in the worst, {worst}")
    page = (engine / "report.html").read_text(encoding="utf-8")
    assert "quantize-again" in page and f"{worst}: " in page
    assert inspect(engine)["passes"][-1]["name"] == "quantize-again"


@pytest.mark.usefixtures("no_kernels")
def test_the_error_is_that_of_the_weights(llama: Path, tmp_path: Path) -> None:
    """Without rotations it can be computed from what the engine holds."""
    release = gptq_file(llama, tmp_path / "release", bits=8, group=64)
    engine, manifest = engine_of(release, quantization="int8-plain")
    measured = record(manifest, "quantize-again")
    assert measured is not None
    for module, (integers, scales) in weights_of(engine).items():
        if module in release.weights:
            weight = release.weights[module].values.astype(np.float64)
            error = np.linalg.norm(integers * scales[:, None].astype(np.float64) - weight) / np.linalg.norm(weight)
            assert measured.options["relative_errors"][module] == pytest.approx(error, rel=1e-3)


@pytest.mark.usefixtures("no_kernels")
def test_a_calibrated_build_rounds_the_rest(llama: Path, tmp_path: Path) -> None:
    """GPTQ chooses integers of the head alone, and those of another scheme where they cannot be kept."""
    release = compressed_tensors(llama, tmp_path / "release")
    calibration = requests(release.directory)
    engine, manifest = engine_of(release, calibration=calibration, gate=None)
    rounding = record(manifest, "gptq-rounding")
    assert rounding is not None and rounding.changes == 1 and manifest.quantization["rounding"]
    for module, weight in release.weights.items():
        np.testing.assert_array_equal(weights_of(engine)[module][0], expected(module, weight)[0])
    again = gptq_file(llama, tmp_path / "again", bits=8, group=64)
    _, manifest = engine_of(again, calibration=calibration, gate=None)
    measured = record(manifest, "quantize-again")
    assert measured is not None and all(0.003 < error < 0.03 for error in measured.options["relative_errors"].values())


def test_engines_compute_what_the_integers_mean(llama: Path, bloom: Path, tmp_path: Path) -> None:
    """The kernels' logits are those of the NumPy meanings of the kept integers; unquantized, those of Transformers."""
    for number, (release, quantization) in enumerate(
        [
            (compressed_tensors(llama, tmp_path / "w8a8"), "int8"),
            (gptq(llama, tmp_path / "w4", bits=4, group=128), "int4"),
            (gptq_file(bloom, tmp_path / "bloom", bits=8, group=128), "none"),
        ]
    ):
        engine, manifest = engine_of(release, quantization=quantization, kv_cache="float32", isas=(BEST_ISA,), drift=False)
        ids = random_ids(release.plain, 16, seed=number)
        with Engine.load(engine, threads=2, kv_tokens=256) as loaded:
            logits = loaded.logits(ids)
        plain = hf_logits(release.plain, ids)
        if quantization == "none":
            assert relative_error(logits, plain) < 1e-5
            continue
        meaning = Stepper(graph_of(engine, manifest, reader_of(engine, manifest, "test"))).step({0: ids})[0]
        assert relative_error(logits, meaning) < 1e-4 and relative_error(logits, plain) < 0.1


@pytest.mark.usefixtures("no_kernels")
def test_exports_keep_integers(llama: Path, bloom: Path, tmp_path: Path) -> None:
    """From the checkpoint, and from an engine of it; in compressed-tensors both have the file's own integers."""
    for source in (llama, bloom):
        release = compressed_tensors(source, tmp_path / source.name)
        out, exported = export(release.directory, "compressed-tensors", gate=None)
        assert any("linears keep the integers of the checkpoint" in note for note in exported["notes"])
        stored, ours = (load_file(folder / "model.safetensors") for folder in (release.directory, out))
        for module in release.weights:
            assert torch.equal(ours[f"{module}.weight"], stored[f"{module}.weight"])
            assert torch.equal(ours[f"{module}.weight_scale"], stored[f"{module}.weight_scale"].float())
    engine, _ = engine_of(release := compressed_tensors(llama, tmp_path / "again"))
    out, _ = export(engine, "compressed-tensors")
    ours, stored = (load_file(folder / "model.safetensors") for folder in (out, release.directory))
    assert all(torch.equal(ours[f"{module}.weight"], stored[f"{module}.weight"]) for module in release.weights)
    for format in ("gguf", "safetensors"):
        out, exported = export(gptq_file(llama, tmp_path / f"g{format}", bits=8, group=64).directory, format, gate=None)
        again = [each for each in exported["passes"] if each["name"] == "quantize-again"]
        assert bool(again) == (format == "gguf")


@pytest.mark.usefixtures("no_kernels")
def test_plans_of_integers(llama: Path, tmp_path: Path) -> None:
    release = compressed_tensors(llama, tmp_path / "release")
    whole, outline = (
        plan(path, "a100", "int8", Load(1, 64)) for path in (release.directory, release.directory / "config.json")
    )
    sizes = [planned["plan"][0]["weight_bytes"] for planned in (whole, outline)]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0], "only gains that a rotation folds away differ"


@pytest.mark.usefixtures("no_kernels")
def test_an_adapter_changes_some_weights_and_the_others_keep_theirs(llama: Path, tmp_path: Path) -> None:
    release = compressed_tensors(llama, tmp_path / "release")
    adapter = make_adapter(release.plain, tmp_path / "adapter", target_modules=["q_proj"])
    engine, manifest = engine_of(release, reading=Reading(adapters=(AdapterChoice(str(adapter)),)))
    assert "6 linears keep the integers of the checkpoint" in opened(manifest)
    found = weights_of(engine)
    for module, weight in release.weights.items():
        assert np.array_equal(found[module][0], expected(module, weight)[0]) == ("q_proj" not in module), module
