"""The formats that BELLE's models, and those that they are made from, were published in, written small.

Each function writes what the publisher's own program writes; none shares code with the readers that are tested with it:

    release = encrypted(plain, key, tmp_path / "release")          # as models/decrypt.py of the BELLE repository expects
    original_llama(hugging_face, tmp_path / "13B", parts=2)        # what facebookresearch/llama loads
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2

from tests.parity.variants import make_bloom, make_llama

CHUNK = 10 << 20
TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, this is a test of tokens",
    "写一首关于春天的诗，北京的春天",
    "今天天气怎么样，中国人民",
    "Human: hello Assistant: hi there",
] * 20
CHINESE = ("写一首", "春天", "北京", "今天", "天气", "中国", "人民", "怎么样", "春天的")
PIECES = 420  # of the tokenizers, but for those that extend them
# The width of feed-forward layers that params.json gives a model of dim 64: two thirds of 4 * 64, rounded up.
FFN, MULTIPLE_OF = 176, 8


def xored(data: bytes, key: bytes) -> bytes:
    """What decrypt.py does with the bytes behind the header: it reads file and key side by side, a chunk of each at a time."""
    result, at = [], 0
    for start in range(0, len(data), CHUNK):
        chunk = data[start : start + CHUNK]
        key_chunk = key[at : at + CHUNK]
        at += len(key_chunk)
        if not key_chunk:
            key_chunk, at = key[:CHUNK], len(key[:CHUNK])
        repeated = (key_chunk * (len(chunk) // len(key_chunk) + 1))[: len(chunk)]
        result.append((int.from_bytes(chunk, "little") ^ int.from_bytes(repeated, "little")).to_bytes(len(chunk), "little"))
    return b"".join(result)


def encrypted(plain: Path, key: Path, directory: Path) -> Path:
    """An encrypted release of all files of a directory."""
    directory.mkdir()
    secret = key.read_bytes()
    for file in plain.iterdir():
        content = file.read_bytes()
        digest = hashlib.sha256(content)
        (directory / f"{file.name}.{digest.hexdigest()}.enc").write_bytes(digest.digest() + xored(content, secret))
    return directory


def key_file(file: Path, size: int = 40_000, seed: int = 0) -> Path:
    """A stand-in for consolidated.00.pth of LLaMA-7B."""
    file.write_bytes(b"PK\x03\x04" + random.Random(seed).randbytes(size - 4))
    return file


def sentencepiece_model(file: Path, added: Iterable[str] = (), *, score: float = 0.0) -> Path:
    """A tokenizer.model with LLaMA's settings, and `added` pieces of one score, as BELLE-LLaMA-EXT has 47,458 of."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(file.with_suffix("")), vocab_size=PIECES, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    file.with_suffix(".vocab").unlink()
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(file.read_bytes())
    have = {piece.piece for piece in proto.pieces}
    for word in added:
        if word not in have:
            proto.pieces.add(piece=word, score=score)
    file.write_bytes(proto.SerializeToString())
    return file


def pieces_of(file: Path) -> int:
    return int(sentencepiece.SentencePieceProcessor(model_file=str(file)).vocab_size())


def belle_llama(directory: Path, *, added: Iterable[str] = (), **config: Any) -> Path:
    """A BELLE-LLaMA or, with `added` pieces, a BELLE-LLaMA-EXT, before its encryption: shards of pytorch_model.bin in float16,
    tokenizer.model, and the small files of early 2023."""
    directory.mkdir(parents=True)
    sentencepiece_model(directory / "tokenizer.model", added)
    rows = pieces_of(directory / "tokenizer.model")
    dimensions = {"vocab_size": rows, "intermediate_size": FFN, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
    make_llama(directory, **{**dimensions, **config})
    (directory / "tokenizer.json").unlink()
    tensors = {name: value.half() for name, value in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    words = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LlamaTokenizer", "model_max_length": 512}
    (directory / "tokenizer_config.json").write_text(json.dumps(words))
    (directory / "special_tokens_map.json").write_text("{}")
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def belle_bloom(directory: Path, *, prefix: str = "transformer.", **config: Any) -> Path:
    """A BELLE-7B: one pytorch_model.bin in float32."""
    make_bloom(directory, **config)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(
        {prefix + name.removeprefix("transformer."): value for name, value in tensors.items()}, directory / "pytorch_model.bin"
    )
    return directory


def original_llama(source: Path, directory: Path, *, parts: int = 1, **params: Any) -> Path:
    """The original release of the LLaMA that a Hugging Face directory holds: consolidated.*.pth in float16 and params.json.
    Its tokenizer.model comes beside it."""
    directory.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    tensors = hugging_face_tensors(source)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    stored: list[dict[str, torch.Tensor]] = [{} for _ in range(parts)]
    for name, value in tensors.items():
        own, axis = _original(name)
        if own.endswith(("attention.wq.weight", "attention.wk.weight")):
            count = heads if "wq" in own else kv_heads
            rows, columns = value.shape  # from two halves of a head to pairs of neighbours, as the rotary embedding was trained
            value = value.view(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)
        for part, piece in zip(stored, value.chunk(parts, axis) if axis is not None else [value] * parts, strict=True):
            part[own] = piece.half().clone()
    for number, part in enumerate(stored):
        part["rope.freqs"] = torch.ones(config["hidden_size"] // heads // 2)
        torch.save(part, directory / f"consolidated.{number:02d}.pth")
    stated = {
        "dim": config["hidden_size"], "multiple_of": MULTIPLE_OF, "n_heads": heads, "n_layers": config["num_hidden_layers"],
        "norm_eps": config["rms_norm_eps"], "vocab_size": -1,
    } | ({} if kv_heads == heads else {"n_kv_heads": kv_heads})  # fmt: skip
    (directory / "params.json").write_text(json.dumps(stated | params))
    (directory / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    return directory


def hugging_face_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory of pickles."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("pytorch_model*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return tensors


_MODULES = {
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0), "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1), "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None), "embed_tokens": ("tok_embeddings", 1), "norm": ("norm", None),
    "lm_head": ("output", 0),
}  # fmt: skip


def _original(name: str) -> tuple[str, int | None]:
    """The name of a tensor in the original release, and the axis along which its processes divided it."""
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    module, axis = _MODULES[".".join(parts[2:]) if parts[0] == "layers" else parts[0]]
    return ".".join([*(parts[:2] if parts[0] == "layers" else []), module, "weight"]), axis
