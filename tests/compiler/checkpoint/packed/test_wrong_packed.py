"""Packed checkpoints that are damaged, inconsistent or of a layout that is not read: one sentence each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from belle_compile.compiler import cli
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from tests.parity.variants import make_llama
from tests.quantized_releases import Tensors, awq, compressed_tensors, gptq, gptq_file

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("releases")
    (root / "llama").mkdir()
    source = make_llama(root / "llama", intermediate_size=128, num_hidden_layers=1)
    return {
        "gptq": gptq(source, root / "gptq", bits=4, group=32).directory,
        "awq": awq(source, root / "awq", group=32).directory,
        "w8a8": compressed_tensors(source, root / "w8a8").directory,
        "w4a16": compressed_tensors(source, root / "w4a16", "pack-quantized", bits=4, group=32, symmetric=False).directory,
        "pt": gptq_file(source, root / "pt", bits=8, group=32).directory,
    }


def configure(**changes: Any) -> Callable[[Path], None]:
    """Change quantization_config; None removes a key."""

    def spoil(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        settings = config["quantization_config"] | changes
        config["quantization_config"] = {key: value for key, value in settings.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(config))

    return spoil


def scheme(**changes: Any) -> Callable[[Path], None]:
    """Change the scheme of compressed-tensors."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return configure(config_groups={"group_0": group | changes})


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """Let `change` edit the tensors."""

    def spoil(directory: Path) -> None:
        held = load_file(directory / "model.safetensors")
        change(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, directory / "model.safetensors")

    return spoil


def part(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Change one tensor of a module."""
    return tensors(lambda held: held.update({f"{Q}.{name}": change(held[f"{Q}.{name}"])}))


def without(*names: str) -> Callable[[Path], None]:
    return tensors(lambda held: [held.pop(f"{Q}.{name}") for name in names])


def truncated(directory: Path) -> None:
    (file,) = directory.glob("*.pt")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def two_files(directory: Path) -> None:
    shutil.copy(directory / "bloom7b-2m-8bit-128g.pt", directory / "bloom7b-0.2m-8bit-128g.pt")


def of_floats(directory: Path) -> None:
    (file,) = directory.glob("*.pt")
    torch.save({name: value for name, value in torch.load(file).items() if value.dtype.is_floating_point}, file)


def with_a_bias(directory: Path) -> None:
    (file,) = directory.glob("*.pt")
    held = torch.load(file)
    torch.save(held | {f"{Q}.bias": torch.ones(64)}, file)


WRONG: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "bits": ("gptq", configure(bits=5), r"GPTQ settings in .*config\.json: found 5 bits, expected one of 2, 3, 4, 8"),
    "other bits": ("gptq", configure(bits=8), r"found 4 bits by the shapes of qzeros and scales, expected 8, as the settings "),
    "bits by shape": (
        "gptq", part("qzeros", lambda held: held[:, :5]),
        r"found qzeros of shape \[2, 5\] and scales of shape \[2, 64\], which is 2\.5 bits, expected 2, 3, 4, 8 bits",
    ),
    "groups": ("gptq", configure(group_size=16), r"found 4 groups of 128 inputs, expected group_size 16, which the settings"),
    "format": ("gptq", configure(checkpoint_format="marlin"), r"found checkpoint_format 'marlin', expected gptq or gptq_v2"),
    "marlin": ("gptq", configure(is_marlin_format=True), r"found is_marlin_format, expected gptq or gptq_v2"),
    "no qzeros": ("gptq", without("qzeros"), rf"integers of {Q} in .*: found no qzeros, expected qzeros beside g_idx, "),
    "no qweight": ("gptq", without("qweight"), r"found (qzeros|g_idx) alone, expected qweight beside it"),
    "rows": ("gptq", part("qzeros", lambda held: held[:1]), r"found qzeros of shape \[1, 8\], expected \[2, 8\], as the "),
    "columns": ("gptq", part("qweight", lambda held: held[:, :40]), r"found qweight of shape \[8, 40\], expected \[8, 64\]"),
    "type": ("gptq", part("qweight", lambda held: held.short()), r"found qweight of int16 and shape .*, expected int32 with 2"),
    "scales": ("gptq", part("scales", lambda held: held[0]), r"found scales of float16 and shape \[64\], expected bfloat16 "),
    "order beyond": ("gptq", part("g_idx", lambda held: held + 1), r"found g_idx with groups 1 to 2, expected groups 0 to 1"),
    "order before": ("gptq", part("g_idx", lambda held: held - 1), r"found g_idx with groups -1 to 0, expected groups 0 to 1"),
    "order's length": ("gptq", part("g_idx", lambda held: held[:9]), r"found g_idx of shape \[9\], expected \[64\]"),
    "order unknown": (
        "gptq",
        lambda directory: [spoil(directory) for spoil in (configure(desc_act=True), without("g_idx"))] and None,
        r"found desc_act, and no g_idx that says which group an input is in, expected g_idx; give the checkpoint that it was",
    ),
    "inputs": ("gptq", part("qweight", lambda held: held[:4]), r"found (g_idx of shape|2 groups of 32 inputs)"),
    "AWQ's version": ("awq", configure(version="gemv"), r"AWQ settings in .*: found version 'gemv', expected gemm"),
    "AWQ's bits": ("awq", configure(bits=8), r"found 8 bits, expected 4"),
    "AWQ's zeros": ("awq", part("qzeros", lambda held: held[:, :4]), r"found qzeros of shape \[2, 4\], expected \[2, 8\]"),
    "AWQ as GPTQ": ("awq", configure(quant_method="gptq", version=None), r"qweight of shape \[128, 8\], expected \[128, 64\]"),
    "format of compressed-tensors": ("w8a8", configure(format="marlin-24"), r"found format 'marlin-24', expected int-quant"),
    "float8": (
        "w8a8", scheme(weights={"num_bits": 8, "type": "float"}),
        r"found weights of float, 8 bits in int-quantized, expected integers of ",
    ),
    "outputs": ("w8a8", scheme(output_activations={"num_bits": 8}), r"found outputs that are rounded, expected weights, or "),
    "cache": ("w8a8", configure(kv_cache_scheme={"num_bits": 8}), r"found a kv_cache_scheme, expected none: int-quantized or "),
    "sparse": ("w8a8", configure(sparsity_config={"format": "sparse-24-bitmask"}), r"found a sparsity_config, expected none"),
    "transforms": ("w8a8", configure(transform_config={"config_groups": {}}), r"found a transform_config, expected none"),
    "no schemes": ("w8a8", configure(config_groups=None), r"found no config_groups, expected a scheme for each group"),
    "no scales": ("w8a8", without("weight_scale"), r"found dtype int8, expected float32, float16 or bfloat16"),
    "few scales": ("w8a8", part("weight_scale", lambda held: held[:9]), r"found weight_scale of shape \[9, 1\], expected one "),
    "floats": ("w8a8", part("weight", lambda held: held.float()), r"found weight of float32 and shape .*, expected int8 with "),
    "shape": ("w4a16", part("weight_shape", lambda held: held * 3), r"found weight_packed of shape \[64, 8\] for a weight of "),
    "zero points": ("w4a16", part("weight_zero_point", lambda held: held[:3]), r"found weight_zero_point of shape \[3, 2\], "),
    "truncated": ("pt", truncated, r"weights .*\.pt: found a file of \d+ bytes that does not load"),
    "two models": ("pt", two_files, r"found 2 \.pt files: bloom7b-0\.2m-8bit-128g\.pt, bloom7b-2m-8bit-128g\.pt, expected one"),
    "floats alone": ("pt", of_floats, r"found (scales|bias) alone|found no packed weights, expected tensors called qweight"),
    "a bias": ("pt", with_a_bias, rf"found {Q}\.bias, which the graph does not use, expected only tensors that config\.json"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_weights(wrong: str, releases: dict[str, Path], tmp_path: Path) -> None:
    kind, spoil, message = WRONG[wrong]
    directory = Path(shutil.copytree(releases[kind], tmp_path / "checkpoint"))
    spoil(directory)
    with pytest.raises(CompileError, match=message) as error:
        build_graph(open_checkpoint(directory))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.usefixtures("no_kernels")
def test_scales_that_are_no_numbers(releases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The build ends with one sentence and writes nothing."""
    directory = Path(shutil.copytree(releases["w8a8"], tmp_path / "checkpoint"))
    part("weight_scale", lambda held: torch.where(torch.arange(len(held))[:, None] == 3, np.nan, held))(directory)
    with pytest.raises(SystemExit) as end:
        cli.main(["build", str(directory), "-o", str(tmp_path / "out"), "--quiet", "--no-drift"])
    (sentence,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and f"the integers of {Q}.weight: found scales with NaN or infinity" in sentence
    assert not (tmp_path / "out").exists()


def test_one_of_several_files_by_its_path(releases: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(releases["pt"], tmp_path / "checkpoint"))
    two_files(directory)
    opened = open_checkpoint(directory / "bloom7b-0.2m-8bit-128g.pt")
    assert opened.path.name == "bloom7b-0.2m-8bit-128g.pt" and directory / "config.json" in opened.files
    assert "7 weights are integers of GPTQ: 7 with 8 bits and a scale for 32 inputs of each output" in opened.notes


def test_settings_beside_config(releases: dict[str, Path], tmp_path: Path) -> None:
    """AutoGPTQ's quantize_config.json, from before config.json had the settings; and a release that says nothing."""
    directory = Path(shutil.copytree(releases["gptq"], tmp_path / "checkpoint"))
    expected = open_checkpoint(directory).tensors[f"{Q}.weight"].read()
    config = json.loads((directory / "config.json").read_text())
    settings = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    for beside in ({}, {"quantize_config.json": {key: settings[key] for key in ("bits", "group_size", "desc_act", "sym")}}):
        for name, content in beside.items():
            (directory / name).write_text(json.dumps(content))
        opened = open_checkpoint(directory)
        np.testing.assert_array_equal(opened.tensors[f"{Q}.weight"].read(), expected)
        assert {directory / name for name in beside} <= set(opened.files)
    (directory / "quantize_config.json").write_text(json.dumps({"bits": 6}))
    with pytest.raises(CompileError, match=r"GPTQ settings in .*quantize_config\.json: found 6 bits"):
        open_checkpoint(directory)


def test_a_module_may_have_bits_of_its_own(releases: dict[str, Path], tmp_path: Path) -> None:
    """GPTQModel's "dynamic" settings."""
    directory = Path(shutil.copytree(releases["gptq"], tmp_path / "checkpoint"))
    configure(bits=8, group_size=64, dynamic={r".*q_proj": {"bits": 4}})(directory)
    assert open_checkpoint(directory).tensors[f"{Q}.weight"].shape == (64, 64)


def test_static_scales_of_activations_are_noted(releases: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(releases["w8a8"], tmp_path / "checkpoint"))
    scheme(input_activations={"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False})(directory)
    tensors(lambda held: held.update({f"{Q}.input_scale": torch.ones(1)}))(directory)
    opened = open_checkpoint(directory)
    build_graph(opened)
    assert any("scales for activations were left out" in note for note in opened.notes)
