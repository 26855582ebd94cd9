"""GGUF: blocks that carry our integers and scales, read by this project's reader and by the gguf package."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.families.decoder_files import GGUF_MODULES
from belle_compile.compiler.families.rope import read_rope
from belle_compile.compiler.gate import Gate
from belle_compile.compiler.ir.stream import rounded_blocks
from tests.compiler.exports.models import bloom, content, export, llama, relative, requests
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import hf_logits, load_hf, make_minicpm, random_ids

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
METHODS = ("smooth", "gptq")  # of both formats, for a BLOOM too


def blocks(file: Path) -> dict[str, tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]]:
    """The integers [N, K] and the scales [N, K / 32] of the Q8_0 tensors of a file, as llama.cpp reads them."""
    found = {}
    for tensor in gguf.GGUFReader(str(file)).tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            stored = tensor.data.reshape(len(tensor.data), -1, 34)
            scales = np.ascontiguousarray(stored[..., :2]).view(np.float16)[..., 0]
            found[tensor.name] = stored[..., 2:].view(np.int8).reshape(len(stored), -1), scales
    return found


def file_of(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def metadata(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(str(file)).fields.items()}


@pytest.mark.parametrize("make", [llama, bloom])
def test_blocks_have_the_integers_and_scales_of_channels(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "model")
    calibration = requests(source)
    common = {"calibration": calibration, "gate": None, "methods": METHODS}
    stored = blocks(file_of(export(source, "gguf", granularity="channel", **common)[0]))
    tensors = load_file(export(source, "compressed-tensors", **common)[0] / "model.safetensors")
    heads, count = load_hf(source).config.num_attention_heads, 0
    for name, ours in {"attn_q": "self_attn.q_proj", "ffn_down": "mlp.down_proj", "attn_qkv": "self_attention.query_key_value",
                       "ffn_up": "mlp.dense_h_to_4h"}.items():  # fmt: skip
        prefix = next((key.removesuffix(f"1.{ours}.weight") for key in tensors if key.endswith(f"1.{ours}.weight")), None)
        if prefix is None:
            continue
        weight, scale = (tensors[f"{prefix}1.{ours}.{kind}"].numpy() for kind in ("weight", "weight_scale"))
        if name == "attn_q":  # llama.cpp pairs neighbours: the halves of each head are interleaved
            weight, scale = (x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape) for x in (weight, scale))
        if name == "attn_qkv":  # all q, all k, all v
            weight, scale = (x.reshape(heads, 3, -1, x.shape[1]).swapaxes(0, 1).reshape(x.shape) for x in (weight, scale))
        integers, scales = stored[f"blk.1.{name}.weight"]
        assert np.array_equal(integers, weight)
        assert np.array_equal(scales, np.broadcast_to(scale.astype(np.float16), scales.shape))
        count += 1
    assert count == 2


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (llama, {}),
        (llama, {"tie_word_embeddings": True, "head_dim": 32, "attention_bias": True}),
        (llama, {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}),
        (llama, {"rope_parameters": LLAMA3}),
        (llama, {"rope_parameters": YARN}),
        (llama, {"rope_parameters": {**YARN, "attention_factor": 0.8}}),
        (llama, {"rope_parameters": {**YARN, "beta_fast": 8.0, "beta_slow": 0.2, "mscale": 1.0, "mscale_all_dim": 1.0}}),
        (bloom, {}),
        (bloom, {"tie_word_embeddings": False}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("quantization", ["int8", "int8-plain"])
def test_the_file_is_the_model(make: Any, changes: dict[str, Any], quantization: str, tmp_path: Path) -> None:
    """Read back by this project's reader and written as floats, it computes the model but for the rounding to 8 bits."""
    source = make(tmp_path / "model", **changes)
    out, record = export(source, "gguf", quantization=quantization)
    plain = tmp_path / "plain"
    if any(word in str(changes) for word in ("llama3", "beta_fast")):
        # A GGUF has divisors in place of parameters, which config.json cannot express.
        with pytest.raises(CompileError, match=r"rope_divisors .* give the Hugging Face checkpoint"):
            export(out, "safetensors", quantization="none")
        config, stated = open_checkpoint(out).config, open_checkpoint(source).config
        assert np.allclose(config["rope_divisors"][-1], 8.0)
        got, expected = (read_rope(each, 16) for each in (config, stated))
        assert np.allclose(got.inv_freq, expected.inv_freq, rtol=1e-6)
        assert got.attention_scaling == pytest.approx(expected.attention_scaling, rel=1e-6)
        return
    plain, _ = export(out, "safetensors", quantization="none")
    ids = random_ids(source, 24)
    expected, got = hf_logits(source, ids), hf_logits(plain, ids)
    assert np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()) < 0.06
    tied = load_hf(source).config.tie_word_embeddings
    assert record["head"] == ("tied to the embedding" if tied else "of its own")


def file_of_llama_cpp(source: Path, file: Path, **factors: float) -> None:
    """A MiniCPM as llama.cpp's conversion/minicpm.py writes it, in float32."""
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(file, "minicpm")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for key, value in factors.items():
        writer.add_float32(f"minicpm.{key}", value)
    parts = {module: part for part, module in GGUF_MODULES.items()}
    for name, tensor in checkpoint.tensors.items():
        module, values = name.removesuffix(".weight"), tensor.read()
        layer = re.match(r"model\.layers\.(\d+)\.", module)
        part = parts[module[layer.end() :] if layer else module]
        if count := heads.get(module.rpartition(".")[2]):
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"blk.{layer[1]}.{part}.weight" if layer else f"{part}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("stated", [True, False])
def test_a_minicpm_of_llama_cpp(stated: bool, tmp_path: Path) -> None:
    """A file from before factors were stated is of the first releases, and read with their factors."""
    base = 16 if stated else 256
    source = make_minicpm(tmp_path, scale_emb=12, scale_depth=1.4, dim_model_base=base, tie_word_embeddings=True)
    config, folder = open_checkpoint(source).config, tmp_path / "file"
    scales = {
        "embedding_scale": 12.0,
        "residual_scale": 1.4 / np.sqrt(config["num_hidden_layers"]),
        "logit_scale": config["hidden_size"] / base,
    }
    folder.mkdir()
    shutil.copy(source / "tokenizer.json", folder)
    file_of_llama_cpp(source, folder / "minicpm.gguf", **scales if stated else {})
    ids = random_ids(source, 24)
    got, expected = (Stepper(build_graph(open_checkpoint(path))).step({0: ids})[0] for path in (folder, source))
    assert relative_error(got, expected) < 1e-6


def test_an_exported_minicpm_has_neutral_factors(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    source = make_minicpm(tmp_path / "model", scale_emb=12, scale_depth=1.4, dim_model_base=16, intermediate_size=96)
    out, _ = export(source, "gguf")
    values, epsilon = metadata(file_of(out)), open_checkpoint(source).config["rms_norm_eps"]
    assert [values[f"minicpm.{name}_scale"] for name in ("embedding", "residual", "logit")] == [1.0, 1.0, 1.0]
    assert values["minicpm.attention.layer_norm_rms_epsilon"] == pytest.approx(epsilon / 144)
    ids = random_ids(source, 24)
    got, expected = (Stepper(build_graph(open_checkpoint(path))).step({0: ids})[0] for path in (out, source))
    assert np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()) < 0.06


@pytest.mark.parametrize("scaling", [YARN, {**YARN, "attention_factor": 0.8}])
@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])
def test_yarn_of_other_families(variant: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    changes = {"use_sliding_window": False, "layer_types": None, "head_dim": 32, "rope_parameters": scaling}
    source = relative(tmp_path / "model", variant, **changes)
    out, _ = export(source, "gguf", quantization="int8-plain")
    keys = {key.partition(".rope.")[2]: value for key, value in metadata(file_of(out)).items() if ".rope.scaling" in key}
    attention = {"scaling.attn_factor": pytest.approx(0.8 / (1 + 0.1 * np.log(8.0)))} if "attention_factor" in scaling else {}
    yarn = {"scaling.type": "yarn", "scaling.factor": 8.0, "scaling.original_context_length": 8}
    assert keys == yarn | attention
    got, expected = (read_rope(open_checkpoint(path).config, 32) for path in (out, source))
    assert np.array_equal(got.inv_freq, expected.inv_freq) and got.max_position == expected.max_position == 64
    assert got.attention_scaling == pytest.approx(expected.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("scaling", [{**YARN, "beta_fast": 8.0}, {**YARN, "truncate": False}, LLAMA3])
def test_frequencies_that_llama_cpp_divides_in_no_qwen_are_refused(scaling: dict[str, Any], tmp_path: Path) -> None:
    source = relative(tmp_path / "model", "qwen2", rope_parameters=scaling)
    with pytest.raises(CompileError, match=r"rope_scaling .* expected default, linear or yarn rope parameters, as llama\.cpp"):
        export(source, "gguf")


@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "internlm2"])
def test_files_of_other_families_are_those_of_llama_cpp(variant: str, tmp_path: Path) -> None:
    """Names and metadata by the tables of the gguf package; read back, the file computes the model."""
    source = relative(tmp_path / "model", variant, use_sliding_window=False, layer_types=None, head_dim=32)
    out, _ = export(source, "gguf")
    keys = metadata(file_of(out))
    architecture = keys["general.architecture"]
    arch = next(member for member, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    stored = [tensor.name for tensor in gguf.GGUFReader(str(file_of(out))).tensors]
    assert {re.sub(r"\.\d+\.", ".{bid}.", name).rpartition(".")[0] for name in stored} <= known
    config = open_checkpoint(source).config
    assert keys[f"{architecture}.attention.head_count_kv"] == config["num_key_value_heads"]
    ids = random_ids(source, 24)
    expected, got = hf_logits(source, ids), hf_logits(export(out, "safetensors", quantization="none")[0], ids)
    assert np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()) < 0.06


def test_windows_shorter_than_the_longest_sequence_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"key sliding_window .* found 7, expected no windows .*; use another --format"):
        export(relative(tmp_path / "model", "qwen2_window"), "gguf")


@pytest.mark.parametrize("make", [llama, bloom])
def test_a_tied_head_is_untied_on_request(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "model", tie_word_embeddings=True)
    tied, record = export(source, "gguf")
    assert "token_embd.weight" in blocks(file_of(tied)) and "output.weight" not in blocks(file_of(tied))
    assert any("stays tied" in note for note in record["notes"]) and record["quantization"]["rotations"].startswith("values")
    untied, record = export(source, "gguf", keep_tied=False)
    assert "output.weight" in blocks(file_of(untied)) and record["quantization"]["rotations"].startswith("residual stream")
    plain, _ = export(untied, "safetensors", quantization="none")
    ids = random_ids(source, 24)
    expected, got = hf_logits(source, ids), hf_logits(plain, ids)
    assert np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()) < 0.06


def test_blocks_are_nearer_than_those_of_llama_cpp(tmp_path: Path) -> None:
    """Beside its rounding in the gguf package: ours takes the scale of each block with the least error, in the same bytes."""
    source = bloom(tmp_path / "bloom")
    plain, record = export(source, "gguf", methods=())
    assert record["quantization"]["weights"] == "int8 in groups of 32 inputs"
    weights, kind = load_hf(source).state_dict(), gguf.GGMLQuantizationType.Q8_0
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(file_of(plain))).tensors}
    for name, module in {"token_embd": "word_embeddings", "blk.1.ffn_down": "h.1.mlp.dense_4h_to_h"}.items():
        weight = weights[f"transformer.{module}.weight"].numpy()
        own = gguf.quants.quantize(weight, kind)
        assert found[f"{name}.weight"].shape == own.shape
        ours, theirs = (np.square(gguf.quants.dequantize(stored, kind) - weight) for stored in (found[f"{name}.weight"], own))
        assert ours.sum() < 0.9 * theirs.sum()


def test_scales_of_blocks_are_nearer_than_those_of_channels(tmp_path: Path) -> None:
    source = bloom(tmp_path / "bloom")
    ids, errors = random_ids(source, 48), []
    expected = hf_logits(source, ids)
    calibration = requests(source, 32)
    for granularity in (None, "channel"):
        options = {"calibration": calibration, "gate": None, "keep_tied": False, "methods": ("gptq",)}
        out, _ = export(source, "gguf", granularity=granularity, **options)
        assert blocks(file_of(out))["blk.1.ffn_down.weight"][1].shape == (64, 8)
        errors.append(np.square(hf_logits(export(out, "safetensors", quantization="none")[0], ids) - expected).mean())
    assert errors[0] < 0.8 * errors[1]


def test_the_default_reorders_and_smooths_channels(tmp_path: Path) -> None:
    source = bloom(tmp_path / "bloom")
    out, record = export(source, "gguf", calibration=requests(source), gate=None)
    assert {"order of channels", "smoothing", "rotations", "rounding"} <= record["quantization"].keys()
    plain, _ = export(out, "safetensors", quantization="none")
    ids = random_ids(source, 24)
    expected, got = hf_logits(source, ids), hf_logits(plain, ids)
    assert np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()) < 0.06


def test_sorted_and_smoothed_channels_are_not_rotated_but_on_request(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    calibrated = {"calibration": requests(source), "gate": None}
    for options, rotated in ((calibrated, False), (calibrated | {"keep_tied": False}, True), ({}, True)):
        _, record = export(source, "gguf", **options)
        assert record["quantization"]["rotations"].startswith("residual stream and values") == rotated
        assert any("not rotated, because channels that are sorted" in note for note in record["notes"]) != rotated


def test_metadata_of_a_llama(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama")
    (source / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.5, "eos_token_id": [2, 3]}))
    out, _ = export(source, "gguf", quantization="int8-plain")
    values = metadata(file_of(out))
    assert values["general.architecture"] == "llama" and values["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert values["llama.attention.head_count_kv"] == 2 and values["llama.context_length"] == 128
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert values["tokenizer.ggml.model"] == "llama" and len(values["tokenizer.ggml.tokens"]) == 311
    assert values["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 3, 6] and values["tokenizer.ggml.tokens"][310] == "[PAD310]"
    ends = [values[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "eot", "padding", "unknown")]
    assert ends == [1, 2, 3, 3, 0]
    assert values["tokenizer.ggml.add_bos_token"] is False and "Human" in values["tokenizer.chat_template"]
    assert values["general.sampling.temp"] == 0.5
    vectors = [tensor for tensor in gguf.GGUFReader(str(file_of(out))).tensors if len(tensor.shape) == 1]
    assert {tensor.tensor_type for tensor in vectors} == {gguf.GGMLQuantizationType.F32}


@pytest.mark.parametrize("make", [llama, bloom])
def test_the_tokenizer_comes_back(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "model")
    out, record = export(source, "gguf", quantization="int8-plain")
    ours, theirs = (Tokenizer.from_str(open_checkpoint(path).tokenizer_json) for path in (out, source))
    for text in ("the and ing helo", "  你好 世界, x.\n", "<s> the </s>", "🙂 1234"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids
    assert not [note for note in record["notes"] if "encode texts" in note]


def test_the_same_export_has_the_same_bytes(tmp_path: Path) -> None:
    source = bloom(tmp_path / "bloom")
    assert content(export(source, "gguf")[0]) == content(export(source, "gguf")[0])


def test_activations_are_rounded_in_blocks() -> None:
    x = torch.linspace(-1, 1, 64).reshape(1, 64) * torch.tensor([1.0] * 32 + [100.0] * 32)
    error = (rounded_blocks(x, 32) - x).abs()
    assert 0 < error[0, :32].max() < 0.005 and 0.1 < error[0, 32:].max() < 0.45
    assert torch.equal(rounded_blocks(torch.zeros(2, 32), 32), torch.zeros(2, 32))


def test_the_gate_reads_the_file_back(tmp_path: Path) -> None:
    source = bloom(tmp_path / "bloom")
    accuracy = export(source, "gguf", calibration=requests(source), gate=Gate(1.2, 0.5))[1]["accuracy"]
    assert accuracy["how"].startswith("not run in llama.cpp") and 0 < accuracy["kl"] < 0.1


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (bloom, {"hidden_size": 72, "n_head": 3}, r"token_embd\.weight: found rows of 72 values, expected a multiple of 32"),
        (llama, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}},
         r"key rope_scaling .* found dynamic, expected default, linear, llama3 or yarn"),
        (bloom, {"apply_residual_connection_post_layernorm": True},
         r"key apply_residual_connection_post_layernorm .* found true, expected false"),
    ],
)  # fmt: skip
def test_what_llama_cpp_has_no_place_for_is_refused(make: Any, changes: Any, message: str, tmp_path: Path) -> None:
    source = make(tmp_path / "model", **changes)
    with pytest.raises(CompileError, match=message):
        export(source, "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_without_rules_in_llama_cpp_is_refused(tmp_path: Path) -> None:
    source = bloom(tmp_path / "bloom")
    plain = json.loads((source / "tokenizer.json").read_text())
    plain["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(CompileError, match=r"BPE of texts that are split by Whitespace, expected a rule that llama\.cpp has"):
        export(source, "gguf")


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path) -> None:
    source = bloom(tmp_path / "bloom")
    plain = json.loads((source / "tokenizer.json").read_text())
    plain["model"]["merges"] = []
    (source / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(CompileError, match=r"merges of the tokenizer: found none, expected some, since llama\.cpp loads"):
        export(source, "gguf")
