"""GGUF: config, names, row permutation and block quantisation, against the tensors it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.checkpoint.formats.gguf_blocks import BLOCK_FORMATS
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.families.decoder_files import GGUF_MODULES
from belle_compile.compiler.ir.lazy import describe, quantized_source
from belle_compile.compiler.ir.quantized import QuantizedRows
from belle_compile.passes.pipeline import run_pipeline
from belle_compile.passes.quantization.quantize_linears import QuantizeLinears
from belle_compile.passes.rotation.rotate_residual import RotateResidual
from tests.compiler.checkpoint.models import HEAD_DIM, HEADS, KV_HEADS, VOCAB, byte_tokenizer, llama_tensors

BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
TEMPLATE = "{% for m in messages %}<{{ m.content }}>{% endfor %}"


def gguf_name(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`."""
    stem, kind = name.rsplit(".", 1)
    layer = "blk.0." if stem.startswith("model.layers.0.") else ""
    part = {hf: part for part, hf in GGUF_MODULES.items()}[stem.removeprefix("model.layers.0.")]
    return f"{layer}{part}.{kind}"


def permuted(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's convert_hf_to_gguf.py stores Q and K."""
    rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    stored: np.ndarray[Any, Any] = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)
    return stored


def write_gguf(
    file: Path,
    *,
    arch: str = "llama",
    tied: bool = False,
    kind: str = "F32",
    extra: dict[str, Any] | None = None,
    tensor: str = "",
    pre: str = "gpt-2",
    model: str = "gpt2",
) -> dict[str, np.ndarray[Any, Any]]:
    """Write a tiny LLaMA; returns the values that reading must give, under Hugging Face names."""
    w = gguf.GGUFWriter(file, arch)
    w.add_context_length(128)
    w.add_embedding_length(32)
    w.add_block_count(1)
    w.add_feed_forward_length(64)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(50000.0)
    w.add_rope_dimension_count(HEAD_DIM)
    vocab = byte_tokenizer().get_vocab()
    tokens = [*sorted(vocab, key=lambda word: vocab[word]), "ab", "abc"]
    tokens += [f"<extra {i}>" for i in range(VOCAB - len(tokens))]
    w.add_tokenizer_model(model)
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types([3] * 4 + [1] * (VOCAB - 4))
    w.add_token_merges(["a b", "ab c"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_uint32("tokenizer.ggml.eot_token_id", 3)
    w.add_chat_template(TEMPLATE)
    for key, value in (extra or {}).items():
        w.add_string(key, value) if isinstance(value, str) else w.add_float32(key, value) if isinstance(value, float) else (
            w.add_uint32(key, value)
        )
    expected = {}
    for name, torch_values in llama_tensors().items():
        values = torch_values.numpy()
        if name == "lm_head.weight" and tied:
            continue
        if "mlp" in name:  # blocks need rows of 32 k
            values = np.random.default_rng(len(name)).normal(size=(32, 64) if "down" in name else (64, 32)).astype(np.float32)
        q_or_k = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        stored = permuted(values, q_or_k) if q_or_k else values
        if values.ndim == 2 and kind in BLOCKS:
            block = gguf.GGMLQuantizationType[kind]
            w.add_tensor(gguf_name(name), quantize(stored, block), raw_dtype=block)
            expected[name] = dequantize(quantize(values, block), block)
        elif values.ndim == 2 and kind == "F16":
            w.add_tensor(gguf_name(name), stored.astype(np.float16))
            expected[name] = values.astype(np.float16).astype(np.float32)
        else:
            w.add_tensor(gguf_name(name), stored)
            expected[name] = values
    if tensor:
        w.add_tensor(tensor, np.ones(4, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return expected


@pytest.mark.parametrize("kind", ["F32", "F16", *BLOCKS])
def test_tensors(tmp_path: Path, kind: str) -> None:
    expected = write_gguf(tmp_path / "m.gguf", kind=kind)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(expected)
    for name, values in expected.items():
        tensor = checkpoint.tensors[name]
        assert tensor.shape == values.shape and tensor.read().dtype == np.float32
        np.testing.assert_array_equal(tensor.read(), values, name)
        for start, stop in ((0, 1), (3, 13), (len(values) - 1, len(values)), (5, 5)):  # within, across and at the end of heads
            np.testing.assert_array_equal(tensor.rows(start, stop), values[start:stop], name)
        assert (tensor.quantized is not None) == (kind in BLOCKS and values.ndim == 2)
    noted = f"m.gguf is quantised already ({kind}): its errors add to those of this build"
    assert checkpoint.notes == ((noted,) if kind in BLOCKS else ())


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_graph_can_be_asked_for_the_integers_of_a_file(tmp_path: Path, kind: str) -> None:
    expected = write_gguf(tmp_path / "m.gguf", kind=kind)
    model = build_graph(open_checkpoint(tmp_path))
    for name, values in expected.items():
        initializer = model.graph.initializers[name]
        quantized = quantized_source(initializer)
        if values.ndim == 1:
            assert quantized is None
            continue
        assert quantized is not None and initializer.const_value is not None
        rows = quantized.read()
        bits = int(kind[1])
        lowest, highest = (0, 2**bits - 1) if kind.endswith("_1") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert (quantized.shape, quantized.bits, quantized.group) == (values.shape, bits, 32)
        assert rows.integers.dtype == np.int8 and lowest <= rows.integers.min() < rows.integers.max() <= highest
        assert rows.scales.dtype == np.float16 and rows.scales.shape == (len(values), values.shape[1] // 32)
        assert rows.zero_points is None and (rows.offsets is not None) == kind.endswith("_1")
        np.testing.assert_array_equal(rows.dequantized(), values, name)
        np.testing.assert_array_equal(initializer.const_value.numpy(), values, name)


def test_rotated_weights_are_not_quantized_any_more(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q4_1")
    model = build_graph(open_checkpoint(tmp_path))
    run_pipeline(model, [RotateResidual()])
    rotated = model.graph.initializers["model.layers.0.mlp.gate_proj.weight.rotated"]
    assert quantized_source(rotated) is None and rotated.const_value is not None
    assert describe(rotated.const_value) == ("model.layers.0.mlp.gate_proj.weight.rotated <- m.gguf: blk.0.ffn_gate.weight")


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_against_llama_cpp_for_any_bytes(kind: str) -> None:
    block, random = gguf.GGMLQuantizationType[kind], np.random.default_rng(5)
    size = gguf.GGML_QUANT_SIZES[block][1]
    stored = random.integers(0, 256, (200, 3, size), np.uint8)
    for at in range(2 if kind.endswith("_1") else 1):  # any finite float16, subnormal ones too
        scales = random.integers(0, 0x7C00, (200, 3, 1), np.uint16) | (random.integers(0, 2, (200, 3, 1), np.uint16) << 15)
        stored[..., 2 * at : 2 * at + 2] = scales.view(np.uint8)
    rows = stored.reshape(200, 3 * size)
    decoded = BLOCK_FORMATS[kind].decoded(rows).dequantized()
    np.testing.assert_array_equal(decoded.view(np.uint32), dequantize(rows, block).view(np.uint32))


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    model = build_graph(open_checkpoint(tmp_path))
    run_pipeline(model, [RotateResidual(), QuantizeLinears()])
    (tmp_path / "m.gguf").write_bytes(b"")
    message = (
        r"weights .*m\.gguf: found a file that became shorter, expected the file the build began with; start the build again; "
        r"while computing lm_head\.weight\.rotated\.int8 <- rotated <- m\.gguf: output\.weight"
    )
    integers = model.graph.initializers["lm_head.weight.rotated.int8"].const_value
    assert integers is not None
    with pytest.raises(CompileError, match=message):
        integers.numpy()


def test_only_the_wanted_rows_are_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    seen: list[int] = []

    def spy(rows: QuantizedRows) -> np.ndarray[Any, Any]:
        seen.append(len(rows.integers))
        return dequantized(rows)

    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    dequantized = QuantizedRows.dequantized
    monkeypatch.setattr(QuantizedRows, "dequantized", spy)
    checkpoint.tensors["lm_head.weight"].rows(7, 9)
    checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].rows(7, 10)
    assert seen == [2, 3]


@pytest.mark.parametrize("tied", [False, True])
def test_config_tokenizer_and_template(tmp_path: Path, tied: bool) -> None:
    write_gguf(tmp_path / "m.gguf", tied=tied)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    assert checkpoint.special["eos_token_ids"] == [2, 3] and checkpoint.special["bos_token"] == "<s>"
    assert checkpoint.template.jinja == TEMPLATE
    assert list(checkpoint.digests()) == ["m.gguf"]
    assert Tokenizer.from_str(checkpoint.tokenizer_json).encode("abc</s>").tokens == ["abc", "</s>"]


def test_tokenizer_json_beside_it_is_preferred(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", pre="gpt-4o")
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert set(open_checkpoint(tmp_path).digests()) == {"m.gguf", "tokenizer.json"}
    with pytest.raises(
        CompileError, match=r"found tokenizer\.ggml\.pre 'gpt-4o', expected .*smollm.*; put the tokenizer\.json"
    ):
        open_checkpoint(tmp_path / "m.gguf")


def test_linear_rope_scaling(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", extra={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert open_checkpoint(tmp_path).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.original_context_length": 32}


@pytest.mark.parametrize(
    ("extra", "stated"),
    [
        ({}, {}),
        ({"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}, {"beta_fast": 16.0, "beta_slow": 2.0}),
        ({"yarn_attn_factor": 0.75}, {"attention_factor": 0.75}),
        ({"attn_factor": 0.5}, {"attention_factor": pytest.approx(0.5 * (1 + 0.1 * np.log(4)))}),
        ({"yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}, {}),
    ],
)
def test_yarn(extra: dict[str, Any], stated: dict[str, Any], tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", extra=YARN | {f"llama.rope.scaling.{key}": value for key, value in extra.items()})
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **stated}
    assert open_checkpoint(tmp_path).config["rope_scaling"] == expected


def test_a_factor_of_attention_without_scaling(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", extra={"llama.rope.scaling.attn_factor": 1.5})
    checkpoint = open_checkpoint(tmp_path)
    (table,) = (node for node in build_graph(checkpoint).graph if node.op_type == "RotaryTable")
    assert table.attributes["attention_scaling"].as_float() == 1.5


@pytest.mark.parametrize("key", ["yarn_ext_factor", "yarn_log_multiplier"])
def test_yarn_that_transformers_does_not_compute(key: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", extra=YARN | {f"llama.rope.scaling.{key}": 0.5})
    with pytest.raises(CompileError, match=r"rope\.scaling\.yarn_\* of .*: found an extrapolation factor or a multiplier"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2moe"}, "found architecture qwen2moe, expected bloom, llama"),
        (
            {"extra": {"split.count": 3}},
            r"found one of 3 parts, expected the name NAME-00001-of-00003\.gguf; download all",
        ),
        ({"extra": {"llama.expert_count": 8}}, "found partial rotary, uneven heads or experts, expected a plain LLaMA"),
        ({"tensor": "rope_long.weight"}, r"tensor rope_long\.weight in .*: found a tensor that a plain LLaMA does not have"),
        ({"model": "bert"}, r"found tokenizer\.ggml\.model 'bert', expected gpt2 or llama"),
    ],
)
def test_other_models(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(CompileError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 40, 2000, -100])
def test_truncated(tmp_path: Path, keep: int) -> None:
    write_gguf(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[:keep])
    with pytest.raises(CompileError, match=r"found a file of \d+ bytes that does not parse .*; it is truncated or damaged"):
        open_checkpoint(tmp_path)
