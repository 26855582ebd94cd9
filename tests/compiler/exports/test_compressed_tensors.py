"""compressed-tensors: names, shapes, types and config as vLLM loads them, and what the integers compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.exports.compressed_tensors import CompressedTensors
from belle_compile.compiler.gate import Gate
from tests.compiler.exports.models import bloom, export, llama, requests
from tests.parity.variants import hf_logits, random_ids


def dequantized(out: Path, folder: Path) -> Path:
    """The export as a float checkpoint that Transformers loads by itself: int8 weights times their scales."""
    tensors = load_file(out / "model.safetensors")
    plain = {
        name: value.float() * tensors[f"{name}_scale"] if value.dtype == torch.int8 else value.float()
        for name, value in tensors.items()
        if not name.endswith("_scale")
    }
    folder.mkdir()
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def w8a8_scheme(config: dict[str, Any]) -> tuple[Any, ...]:
    group = config["config_groups"]["group_0"]
    weights, activations = group["weights"], group["input_activations"]
    return (
        (config["quant_method"], config["format"], group["targets"], config["ignore"]),
        (weights["num_bits"], weights["type"], weights["strategy"], weights["symmetric"], weights["dynamic"]),
        (
            activations["num_bits"],
            activations["type"],
            activations["strategy"],
            activations["symmetric"],
            activations["dynamic"],
        ),
    )


W8A8 = (8, "int", "channel", True, False), (8, "int", "token", True, True)


def test_a_llama_as_vllm_loads_it(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama", tie_word_embeddings=True)
    out, record = export(source, "compressed-tensors", calibration=requests(source), gate=None, keep_tied=False)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is False
    assert w8a8_scheme(config["quantization_config"]) == (
        ("compressed-tensors", "int-quantized", ["Linear"], ["lm_head"]),
        *W8A8,
    )
    tensors = load_file(out / "model.safetensors")
    assert "rounding" in record["quantization"]
    linears = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    assert len(linears) == 14
    for name in linears:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert weight.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (len(weight), 1)
        assert int(weight.abs().max()) == 127 and float(scale.min()) > 0
    others = {name: value for name, value in tensors.items() if not name.removesuffix("_scale").endswith("_proj.weight")}
    assert {value.dtype for value in others.values()} == {torch.float16}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= others.keys()
    assert torch.equal(tensors["model.norm.weight"], torch.ones(64, dtype=torch.float16)), "the head absorbs the norm's gain"


def test_the_residual_stream_is_rotated_where_nothing_is_smoothed_or_on_request(tmp_path: Path) -> None:
    """The rotation of a stream undoes the smoothing of what its norms compute, and loses more."""
    source = llama(tmp_path / "llama")
    calibrated = {"calibration": requests(source), "gate": None}
    gains = {}
    for name, options in {
        "smoothed": calibrated,
        "kept": calibrated | {"keep_tied": True},
        "asked": calibrated | {"keep_tied": False},
        "uncalibrated": {},
        "not smoothed": calibrated | {"methods": ("rotate", "gptq")},
    }.items():
        out, record = export(source, "compressed-tensors", **options)
        rotated = record["quantization"]["rotations"].startswith("residual stream and values")
        assert rotated == (name in ("asked", "uncalibrated", "not smoothed")), name
        assert rotated != any("not rotated, because SmoothQuant alone loses less" in note for note in record["notes"]), name
        gains[name] = load_file(out / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    ones = torch.ones(64, dtype=torch.float16)
    assert {name for name, gain in gains.items() if torch.equal(gain, ones)} == {"asked", "uncalibrated", "not smoothed"}


def test_a_bloom_as_vllm_loads_it(tmp_path: Path) -> None:
    source = bloom(tmp_path / "bloom")
    out, record = export(source, "compressed-tensors", calibration=requests(source), gate=None)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BloomForCausalLM"] and config["tie_word_embeddings"] is True
    tensors = load_file(out / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors), "a tied head is not stored"
    fused = tensors["transformer.h.0.self_attention.query_key_value.weight"]
    assert fused.dtype == torch.int8 and fused.shape == (192, 64)
    assert tensors["transformer.h.0.self_attention.query_key_value.bias"].shape == (192,)
    assert tensors["transformer.word_embeddings.weight"].dtype == torch.float16
    assert "smoothing" in record["quantization"] and record["quantization"]["rotations"].startswith("values")
    groups = config["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"] and groups["group_0"]["input_activations"]["symmetric"]
    assert groups["group_1"]["targets"] == [f"transformer.h.{layer}.mlp.dense_4h_to_h" for layer in range(2)]
    assert groups["group_1"] == groups["group_0"] | {
        "targets": groups["group_1"]["targets"],
        "input_activations": groups["group_0"]["input_activations"] | {"symmetric": False},
    }, "hardly any result of a GELU is negative"
    assert any("vLLM's BLOOM loads no head of its own" in note for note in record["notes"])


@pytest.mark.parametrize("make", [llama, bloom])
@pytest.mark.parametrize("quantization", ["int8", "int8-plain"])
def test_integers_times_scales_compute_the_model(make: Any, quantization: str, tmp_path: Path) -> None:
    """Rounding weights to 8 bits moves the logits of these models a little; a wrong order of rows or a wrong norm, a lot."""
    source = make(tmp_path / "model")
    out, _ = export(source, "compressed-tensors", quantization=quantization, dtype="float32")
    ids = random_ids(source, 24)
    expected, got = hf_logits(source, ids), hf_logits(dequantized(out, tmp_path / "plain"), ids)
    assert np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()) < 0.04


def test_the_simulation_gives_a_zero_point_to_what_a_gelu_computes(tmp_path: Path) -> None:
    simulation = CompressedTensors().simulation(export(bloom(tmp_path / "bloom"), "compressed-tensors")[0])
    nodes = {str(node.name).removeprefix("h.0."): node for node in simulation.graph.graph}
    x = torch.nn.functional.gelu(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    errors = {
        name: float((simulation.on_linear(nodes[name], x) - x).square().mean())
        for name in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "lm_head")
    }
    assert errors["lm_head"] == 0 < errors["mlp.dense_4h_to_h"] < 0.5 * errors["mlp.dense_h_to_4h"]
    constant = torch.full((1, 64), 0.5)
    assert torch.allclose(simulation.on_linear(nodes["mlp.dense_4h_to_h"], constant), constant, atol=0.01)


def test_bfloat16_stays_and_float16_that_overflows_is_refused(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    tensors = load_file(source / "model.safetensors")
    save_file({name: value.bfloat16() for name, value in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    out, _ = export(source, "compressed-tensors", quantization="int8-plain")
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CompileError, match=r"model\.norm\.weight: found a magnitude of 1,000,000, expected finite float16; give"
    ):
        export(source, "compressed-tensors", quantization="int8-plain")


def test_a_head_of_its_own_in_a_bloom_is_refused(tmp_path: Path) -> None:
    source = bloom(tmp_path / "bloom", tie_word_embeddings=False)
    with pytest.raises(CompileError, match=r"a head that is not the embedding .* since vLLM's BLOOM loads no head of its own"):
        export(source, "compressed-tensors")
    assert not list(tmp_path.glob("bloom-*"))


def test_the_gate_simulates_where_vllm_is_not_installed(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    calibration = requests(source)
    _, record = export(source, "compressed-tensors", calibration=calibration, gate=Gate(1.1, 0.5))
    accuracy = record["accuracy"]
    assert accuracy["how"].startswith("not run in vLLM, which is not installed here; its arithmetic was simulated")
    assert accuracy["requests"] >= 1 and 0 < accuracy["kl"] < 0.05 and accuracy["top1_agreement"] > 0.5
    with pytest.raises(
        CompileError, match=r"gate: the export is too far from .* simulated .* or build an engine; calibration is kept in"
    ):
        export(source, "compressed-tensors", calibration=calibration, gate=Gate(1.0, 1.0, 1.0))
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("llama-compressed-tensors-3")]
