"""What llama.cpp does with a GGUF file beyond its metadata: rotary divisors, BOS, ends of turns, byte order, parts, BLOOM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer
from transformers import BloomConfig, BloomForCausalLM
from transformers import LlamaConfig as HfLlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.checkpoint.formats.gguf_rules import adds_bos, end_ids, special_id
from belle_compile.compiler.checkpoint.formats.gguf_tokenizer import gguf_tokenizer
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import bloom, build_graph, decoder_files, llama
from tests.compiler.checkpoint.models import HEAD_DIM, HEADS, KV_HEADS, byte_tokenizer, llama_tensors

Array = npt.NDArray[Any]
LITTLE, BIG = gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG


def interleaved(values: Array, heads: int) -> Array:
    rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)


def stored_llama(width: int = 32) -> dict[str, Array]:
    """A LLaMA's tensors as llama.cpp stores them; `width` is the length of the rows of the feed-forward layers."""
    parts = {hf: part for part, hf in decoder_files.GGUF_MODULES.items()}
    stored = {}
    for name, tensor in llama_tensors().items():
        values, stem = tensor.numpy(), name.removesuffix(".weight")
        layer = "blk.0." if stem.startswith("model.layers.0.") else ""
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(stem.split(".")[-1])
        stored[f"{layer}{parts[stem.removeprefix('model.layers.0.')]}.weight"] = interleaved(values, heads) if heads else values
    return stored


def write(
    file: Path,
    tensors: dict[str, Array],
    *,
    arch: str = "llama",
    endian: gguf.GGUFEndian = LITTLE,
    tokens: Iterable[str] = (),
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
    pre: str = "gpt-2",
    parts: int = 0,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Write a tiny model; with `parts`, in shards of so many tensors. `types` are the types of tensors, F32 by default."""
    w = gguf.GGUFWriter(file, arch, endianess=endian, split_max_tensors=parts)
    w.add_context_length(128)
    w.add_embedding_length(32)
    w.add_block_count(1)
    w.add_feed_forward_length(128 if arch == "bloom" else 48)
    w.add_head_count(HEADS)
    if arch == "llama":
        w.add_head_count_kv(KV_HEADS)
        w.add_layer_norm_rms_eps(1e-5)
        w.add_rope_dimension_count(HEAD_DIM)
    else:
        w.add_layer_norm_eps(1e-5)
    vocab = byte_tokenizer().get_vocab()
    words = [*sorted(vocab, key=lambda word: vocab[word]), *tokens]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(words)
    w.add_token_types([3] * 4 + [1] * (len(vocab) - 4) + [3] * (len(words) - len(vocab)))
    w.add_token_merges([])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    change(w)
    for name, values in tensors.items():
        kind = (types or {}).get(name)
        if kind is None:
            w.add_tensor(name, values.copy())
        else:
            w.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return file


def check_llama(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(llama_tensors())
    for name, tensor in llama_tensors().items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), tensor.numpy(), name)
        np.testing.assert_array_equal(checkpoint.tensors[name].rows(3, 9), tensor[3:9].numpy(), name)


# Rotary divisors


def test_divisors_of_llama_31_give_the_frequencies_of_transformers(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    config = HfLlamaConfig(
        hidden_size=32, num_attention_heads=4, head_dim=HEAD_DIM, max_position_embeddings=128,
        rope_parameters={**rope, "original_max_position_embeddings": 64},
    )  # fmt: skip
    expected = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].numpy()
    plain = 1e4 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    divisors = (plain / expected).astype(np.float32)
    assert (divisors > 1.5).any()
    for endian in (LITTLE, BIG):
        file = write(tmp_path / "m.gguf", {**stored_llama(), "rope_freqs.weight": divisors}, endian=endian)
        checkpoint = open_checkpoint(file)
        assert "rope_freqs.weight" not in checkpoint.tensors
        inv_freq = build_graph(checkpoint).graph.initializers["model.rotary_emb.inv_freq"].const_value
        assert inv_freq is not None
        np.testing.assert_allclose(inv_freq.numpy(), expected, rtol=1e-6)


def test_divisors_and_linear_scaling_both_apply(tmp_path: Path) -> None:
    def linear(w: gguf.GGUFWriter) -> None:
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(2.0)

    tensors = {**stored_llama(), "rope_freqs.weight": np.full(HEAD_DIM // 2, 4, np.float32)}
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", tensors, change=linear))
    rope = llama.read_config(checkpoint.config).rope
    np.testing.assert_allclose(rope.inv_freq * 8, 1e4 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM), rtol=1e-6)


@pytest.mark.parametrize("divisors", [[1.0] * 3, [0.0] * 4, [float("inf")] * 4])
def test_divisors_that_do_not_fit(tmp_path: Path, divisors: list[float]) -> None:
    file = write(tmp_path / "m.gguf", {**stored_llama(), "rope_freqs.weight": np.array(divisors, np.float32)})
    with pytest.raises(CompileError, match=r"key rope_divisors of config\.json: found .*, expected 4 numbers above 0"):
        build_graph(open_checkpoint(file))


# Tokens


def getter(**fields: Any) -> Any:
    return lambda key, default=None: fields.get(key.removeprefix("tokenizer.ggml."), default)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "pre": "llama3"}, True),
        ({"model": "gpt2", "pre": "falcon3"}, True),
        ({"model": "gpt2", "pre": "tekken"}, True),
        ({"model": "gpt2", "pre": "smollm"}, False),
        ({"model": "gpt2"}, False),
        ({"model": "llama"}, True),
        ({"model": "gpt2", "pre": "llama-bpe", "add_bos_token": False}, False),
        ({"model": "gpt2", "pre": "gpt-2", "add_bos_token": True}, True),
        ({"model": "llama", "add_bos_token": False}, False),
    ],
)
def test_bos_by_the_name_of_the_pre_tokenizer(fields: dict[str, Any], expected: bool) -> None:
    assert adds_bos(getter(**fields)) is expected


def test_bos_of_a_file(tmp_path: Path) -> None:
    special = open_checkpoint(write(tmp_path / "m.gguf", stored_llama(), pre="llama-bpe"), template="raw").special
    assert special["add_bos"] and special["bos_token_id"] == 1


def test_ids_that_a_sentencepiece_vocabulary_leaves_out() -> None:
    words = ["<unk>", "<s>", "</s>", "a"]
    get = getter(model="llama", tokens=words, eos_token_id=99)
    assert [special_id(get, kind) for kind in ("bos", "eos", "unknown", "padding")] == [1, 2, 0, None]
    assert special_id(getter(model="gpt2", tokens=words), "bos") is None


@pytest.mark.parametrize(
    ("tokens", "fields", "ends"),
    [
        (["a", "<|im_end|>"], {"eos_token_id": 0}, [0, 1]),
        (["a", "</s>", "<|eot_id|>"], {"eos_token_id": 1}, [1, 2]),
        (["<|endoftext|>", "a", "<end_of_turn>"], {"eos_token_id": 0}, [0, 2]),
        (["a", "<|eom_id|>", "<|eot_id|>"], {"eos_token_id": 0, "eot_token_id": 2}, [0, 2, 1]),
        (["a", "<|end|>"], {}, [1]),
        (["<|end|>", "<|return|>", "<|call|>"], {}, [1, 2]),
        (["<|end|>", "<|calls|>", "<|flush|>"], {}, [1, 2]),
        (["<|end|>", "<|return|>"], {}, [0, 1]),
        (["a", "b"], {"eos_token_id": 7}, []),
    ],
)
def test_ends_of_turns_by_their_text(tokens: list[str], fields: dict[str, Any], ends: list[int]) -> None:
    assert end_ids(getter(model="gpt2", tokens=tokens, **fields)) == ends


def test_ends_of_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", stored_llama(), tokens=["<|im_start|>", "<|im_end|>", "<end_of_turn>"])
    checkpoint = open_checkpoint(file)
    assert checkpoint.special["eos_token_ids"] == [2, 261, 262] and checkpoint.special["eos_token"] == "</s>"
    assert checkpoint.notes == ()


def test_a_tokenizer_json_that_disagrees_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", stored_llama())
    other = json.loads(byte_tokenizer().to_str())
    vocab, added = other["model"]["vocab"], other["added_tokens"]
    vocab["</s>"], vocab["<pad>"] = vocab["<pad>"], vocab["</s>"]
    added[2]["content"], added[3]["content"] = added[3]["content"], added[2]["content"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.special["eos_token"] == "</s>" and checkpoint.special["eos_token_ids"] == [2, 3]
    (note,) = checkpoint.notes
    assert note == (
        "EOS is '<pad>' (2), '</s>' (3), and files disagree: the metadata of m.gguf says '</s>' (3); "
        "the metadata of m.gguf says '<pad>' (2)"
    )


def test_sampling_settings_of_the_metadata(tmp_path: Path) -> None:
    def settings(w: gguf.GGUFWriter) -> None:
        w.add_float32("general.sampling.temp", 0.6)
        w.add_float32("general.sampling.top_p", 0.9)
        w.add_float32("general.sampling.min_p", 0.05)

    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", stored_llama(), change=settings))
    assert checkpoint.generation["temperature"] == 0.6 and checkpoint.generation["top_p"] == 0.9
    assert checkpoint.generation["min_p"] == 0.05 and checkpoint.notes == ()


# Types of tensors and byte order


def test_big_endian_floats(tmp_path: Path) -> None:
    check_llama(write(tmp_path / "m.gguf", stored_llama(), endian=BIG))


def swapped(data: Array, size: int, offsets: tuple[int, ...]) -> Array:
    """The rows of block-quantised data with numbers of two bytes in the other order, as gguf_convert_endian.py makes them."""
    blocks = data.reshape(-1, size).copy()
    for at in offsets:
        blocks[:, [at, at + 1]] = blocks[:, [at + 1, at]]
    return blocks.reshape(data.shape)


def k_quants(kind: str) -> Array:
    """Rows [96, 256] of any finite values in a K-quant or an I-quant; gguf has no quantizer for them."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    random = np.random.default_rng(3)
    rows = random.integers(0, 256, (96, size), np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
        rows[:, at : at + 2] = random.uniform(-1, 1, (96, 1)).astype(np.float16).view(np.uint8)
    return rows


@pytest.mark.parametrize(
    ("kind", "size", "offsets"), [("Q8_0", 34, (0,)), ("Q4_0", 18, (0,)), ("F16", 2, (0,)), ("BF16", 2, (0,))]
)
def test_big_endian_blocks(tmp_path: Path, kind: str, size: int, offsets: tuple[int, ...]) -> None:
    block, tensors = gguf.GGMLQuantizationType[kind], stored_llama()
    native = quantize(tensors["output.weight"], block).view(np.uint8)

    def change(w: gguf.GGUFWriter) -> None:
        w.add_tensor("output.weight", swapped(native, size, offsets), raw_dtype=block)

    rest = {name: values for name, values in tensors.items() if name != "output.weight"}
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", rest, endian=BIG, change=change))
    np.testing.assert_array_equal(checkpoint.tensors["lm_head.weight"].read(), dequantize(native, block))


def test_a_type_whose_byte_order_cannot_be_changed(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q5_0
    file = write(tmp_path / "m.gguf", stored_llama(), endian=BIG, types={"output.weight": kind})
    with pytest.raises(CompileError, match=r"output\.weight in .*: found type Q5_0 in the byte order of other hosts"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"]
)
def test_k_quants(tmp_path: Path, kind: str) -> None:
    block, rows = gguf.GGMLQuantizationType[kind], k_quants(kind)
    rest = {name: values for name, values in stored_llama().items() if name != "output.weight"}

    def change(w: gguf.GGUFWriter) -> None:
        w.add_tensor("output.weight", rows, raw_dtype=block)

    tensor = open_checkpoint(write(tmp_path / "m.gguf", rest, change=change)).tensors["lm_head.weight"]
    assert tensor.shape == (96, 256)
    np.testing.assert_array_equal(tensor.rows(5, 9), dequantize(rows[5:9], block))


def test_bfloat16_vectors_and_matrices(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.BF16
    names = ["output.weight", "output_norm.weight", "blk.0.attn_q.weight"]
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", stored_llama(), types=dict.fromkeys(names, kind)))
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        expected = llama_tensors()[name].bfloat16().float().numpy()
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), expected)
        assert checkpoint.tensors[name].dtype == "bfloat16"


# Parts


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    write(tmp_path / "model.gguf", stored_llama(), parts=5)
    found = sorted(tmp_path.glob("*.gguf"))
    assert [file.name for file in found] == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return found


def test_a_model_in_parts(parts: list[Path]) -> None:
    for path in (parts[0].parent, *parts):
        check_llama(path)
    assert set(open_checkpoint(parts[0].parent).digests()) == {part.name for part in parts}


def test_a_missing_part(parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(CompileError, match=r"GGUF .*00002-of-00003\.gguf: found no such file, .*; download all parts again"):
        open_checkpoint(parts[0])
    parts[0].unlink()
    with pytest.raises(CompileError, match=r"GGUF .*00001-of-00003\.gguf: found no such file"):
        open_checkpoint(parts[2])


def test_a_part_of_another_model(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CompileError, match=r"00003-of-00003\.gguf: found split\.no 1, expected 2"):
        open_checkpoint(parts[0])


def test_parts_beside_another_model_are_two(parts: list[Path]) -> None:
    write(parts[0].with_name("other.gguf"), stored_llama())
    with pytest.raises(CompileError, match=r"found 2 GGUF files: model-00001-of-00003\.gguf, other\.gguf, expected one"):
        open_checkpoint(parts[0].parent)


# BLOOM


def test_bloom_gives_the_tensors_and_the_graph_of_its_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=270, hidden_size=32, n_layer=1, n_head=HEADS, bos_token_id=1, eos_token_id=2)
    model = BloomForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    parts = {hf: part for part, hf in bloom.GGUF_MODULES.items()}
    stored, expected = {}, {}
    for name, tensor in model.transformer.state_dict().items():
        values, (stem, kind) = tensor.numpy(), name.rsplit(".", 1)
        expected[name] = values
        if "query_key_value" in name:  # [heads, 3, head_dim] -> [3, heads, head_dim]
            values = values.reshape(HEADS, 3, HEAD_DIM, -1).swapaxes(0, 1).reshape(values.shape)
        layer = "blk.0." if stem.startswith("h.0.") else ""
        stored[f"{layer}{parts[stem.removeprefix('h.0.')]}.{kind}"] = np.ascontiguousarray(values)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", stored, arch="bloom", pre="bloom"))
    assert checkpoint.family == "bloom" and checkpoint.template.name == "belle-bloom"
    assert checkpoint.tensors.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), values, name)
        np.testing.assert_array_equal(checkpoint.tensors[name].rows(3, 21), values[3:21], name)
    read = bloom.read_config(checkpoint.config)
    assert (read.num_heads, read.head_dim, read.vocab_size, read.tied_head) == (HEADS, HEAD_DIM, 270, True)
    build_graph(checkpoint)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["It", "'s", "Ġ", "123", "ĠnewWORDs", "/Ċ"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "ĠnewWORDs", "/Ċ"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "Ġnew", "WORDs", "/Ċ"]),
    ],
)
def test_texts_are_split_by_the_rule_of_their_model(pre: str, pieces: list[str]) -> None:
    alphabet = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    words = sorted(alphabet, key=alphabet.__getitem__)
    get = getter(model="gpt2", pre=pre, tokens=words, token_type=[1] * len(words), merges=[])
    split = Tokenizer.from_str(gguf_tokenizer(Path("m.gguf"), get)).pre_tokenizer
    assert split is not None
    assert [piece for piece, _ in split.pre_tokenize_str("It's 123 newWORDs/\n")] == pieces


def test_texts_are_split_as_bloom_splits_them() -> None:
    alphabet = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    words = sorted(alphabet, key=alphabet.__getitem__)
    text = gguf_tokenizer(
        Path("m.gguf"), getter(model="gpt2", pre="bloom", tokens=words, token_type=[1] * len(words), merges=[])
    )
    split = Tokenizer.from_str(text).pre_tokenizer
    assert split is not None
    pieces = [piece for piece, _ in split.pre_tokenize_str("Hi, you|two (a)!")]
    assert pieces == ["Hi", ",", "Ġyou", "|", "two", "Ġ(", "a", ")!"]
