"""Small valid inputs of every reader, and how their bytes are put into files."""

from __future__ import annotations

import gzip
import io
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from google.protobuf import json_format
from sentencepiece import sentencepiece_model_pb2

from belle_compile.compiler.requests import SelectOptions, write_set
from tests.compiler.checkpoint.formats.test_gguf import write_gguf
from tests.compiler.checkpoint.models import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    LLAMA_CONFIG,
    llama_tensors,
    write_json,
    write_llama,
    write_sharded,
    write_small_files,
)
from tests.compiler.checkpoint.test_sentencepiece_model import train
from tests.quantized_releases import Release, compressed_tensors, gptq
from tests.releases import encrypted, key_file

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEMPLATE = "{% for m in messages %}<{{ m['role'] | upper }}>{{ m.content }}{% endfor %}"
_REQUESTS = [
    {"text": "What is the capital of France?", "label": "geography"},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    {"conversations": [{"from": "human", "value": "Write a poem."}, {"from": "gpt", "value": "No."}]},
    {"token_ids": [1, 2, 3, 400], "answer": "yes"},
    {"instruction": "Translate", "input": " this", "output": "that"},
    {"text": "one more question about the sea"},
]
_LINES = "".join(f"{json.dumps(request)}\n" for request in _REQUESTS).encode()


@dataclass(frozen=True)
class Sample:
    """A valid input: the bytes that are mutated, the reader, the path that it is given, and the file that holds the bytes.

    `packed` makes the file's content of the bytes, such as an archive. `is_json` says that values can be replaced, too.
    """

    content: bytes
    reader: str
    path: Path
    file: Path
    packed: Callable[[bytes], bytes] = bytes
    is_json: bool = False


def make_samples(directory: Path) -> dict[str, Sample]:
    """The samples by name, in folders of their own."""
    samples = {name: _json_sample(directory / name, name) for name in _JSON_FILES}
    samples["safetensors header"] = _header(_llama(directory / "header"))
    samples["gptq config.json"] = _file(_packed(directory / "gptq config", gptq, bits=4, group=16), "config.json")
    samples["gptq header"] = _header(_packed(directory / "gptq header", gptq, bits=4, group=16))
    samples["packed header"] = _header(_packed(directory / "packed header", compressed_tensors, layout="pack-quantized"))
    samples["model.safetensors"] = _file(_llama(directory / "safetensors"), "model.safetensors")
    samples["chat_template.jinja"] = _template(directory / "jinja")
    samples["index"] = _index(directory / "index")
    samples["pickle"] = _pickle(directory / "pickle")
    samples["archive"] = _archive(directory / "archive", zipped=True)
    samples["legacy pickle"] = _archive(directory / "legacy", zipped=False)
    samples["params.json"] = _original_llama(directory / "original")
    samples["encrypted"] = _encrypted(directory / "encrypted")
    samples |= {f"gguf {kind}": _gguf(directory / f"gguf {kind}", kind) for kind in ("F32", "Q8_0", "llama")}
    samples["tokenizer.model"] = _sentencepiece(directory / "sentencepiece")
    samples["normalization"] = _normalization(directory / "normalization")
    samples["pieces"] = _pieces(directory / "pieces")
    samples |= _requests(directory / "requests")
    samples["set.json"] = _set(directory / "set")
    return samples


_JSON_FILES: dict[str, Any] = {
    "config.json": LLAMA_CONFIG | {
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "generation_config.json": {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "eos_token_id": [2, 3], "max_new_tokens": 20,
        "repetition_penalty": 1.1, "bad_words_ids": [[1]], "num_beams": 2,
    },
    "tokenizer_config.json": {
        "bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>", "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {"260": {"content": "<a>", "special": True, "lstrip": False}, "2": {"content": "</s>"}},
        "extra_special_tokens": {"image": "<i>"}, "additional_special_tokens": ["<x>"],
        "chat_template": [{"name": "default", "template": TEMPLATE}],
    },
    "special_tokens_map.json": {"bos_token": "<s>", "pad_token": {"content": "<pad>"}, "additional_special_tokens": ["<y>"]},
    "added_tokens.json": {"<b>": 260, "<c>": 261},
    "chat_template.json": {"chat_template": TEMPLATE},
    "tokenizer.json": None,
}  # fmt: skip


def _llama(directory: Path) -> Path:
    """A LLaMA without a template, whose family has one."""
    return write_llama(directory)


def _file(directory: Path, name: str) -> Sample:
    file = directory / name
    return Sample(file.read_bytes(), "checkpoint", directory, file, is_json=file.suffix == ".json")


def _json_sample(directory: Path, name: str) -> Sample:
    _llama(directory)
    if _JSON_FILES[name] is not None:
        write_json(directory / name, _JSON_FILES[name])
    return _file(directory, name)


def _packed(directory: Path, write: Callable[..., Release], **options: Any) -> Path:
    """A LLaMA whose linears are integers."""
    return write(_llama(directory / "source"), directory / "release", **options).directory


def _header(directory: Path) -> Sample:
    """The JSON header of model.safetensors, in a file whose data stay as they are."""
    file = directory / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    return Sample(
        header, "checkpoint", directory, file, lambda text: len(text).to_bytes(8, "little") + text + data, is_json=True
    )


def _template(directory: Path) -> Sample:
    (_llama(directory) / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return _file(directory, "chat_template.jinja")


def _index(directory: Path) -> Sample:
    write_small_files(directory, LLAMA_CONFIG)
    write_sharded(directory, llama_tensors(), "safetensors")
    return _file(directory, "model.safetensors.index.json")


def _archive(directory: Path, *, zipped: bool) -> Sample:
    write_small_files(directory, LLAMA_CONFIG)
    torch.save(llama_tensors(), directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return _file(directory, "pytorch_model.bin")


def _pickle(directory: Path) -> Sample:
    """The pickle of an archive, which is archived again, as its checksum would give away that it has changed."""
    sample = _archive(directory, zipped=True)
    with zipfile.ZipFile(sample.file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (name,) = (name for name in entries if name.endswith("/data.pkl"))

    def packed(pickled: bytes) -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
            for entry, stored in entries.items():
                archive.writestr(entry, pickled if entry == name else stored)
        return content.getvalue()

    return Sample(entries[name], "checkpoint", directory, sample.file, packed)


def _original_llama(directory: Path) -> Sample:
    """The dimensions of an original LLaMA of one part, whose tokenizer is a tokenizer.json."""
    write_small_files(directory, LLAMA_CONFIG)
    (directory / "config.json").unlink()
    names = {name: _ORIGINAL[name.rpartition("layers.0.")[2].removesuffix(".weight")] for name in llama_tensors()}
    tensors = {f"{names[name]}.weight": value.half() for name, value in llama_tensors().items()}
    torch.save(tensors, directory / "consolidated.00.pth")
    params = {"dim": HIDDEN, "n_layers": 1, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "multiple_of": 16, "norm_eps": 1e-5,
              "ffn_dim_multiplier": 0.5, "rope_theta": 10000.0, "vocab_size": -1, "max_seq_len": 512}  # fmt: skip
    write_json(directory / "params.json", params)
    return _file(directory, "params.json")


_ORIGINAL = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "input_layernorm": "layers.0.attention_norm", "post_attention_layernorm": "layers.0.ffn_norm",
    **{f"self_attn.{part}_proj": f"layers.0.attention.w{part}" for part in "qkvo"},
    "mlp.gate_proj": "layers.0.feed_forward.w1", "mlp.down_proj": "layers.0.feed_forward.w2",
    "mlp.up_proj": "layers.0.feed_forward.w3",
}  # fmt: skip


def _encrypted(directory: Path) -> Sample:
    """The weights of an encrypted release, whose reader finds the key in the directory above."""
    directory.mkdir()
    plain = directory / "plain"
    write_small_files(plain, LLAMA_CONFIG)
    torch.save(llama_tensors(), plain / "pytorch_model.bin")
    release = encrypted(plain, key_file(directory / "key"), directory / "release")
    (file,) = release.glob("pytorch_model.bin.*")
    return Sample(file.read_bytes(), "encrypted", release, file)


def _gguf(directory: Path, kind: str) -> Sample:
    directory.mkdir()
    file = directory / "model.gguf"
    scored = kind == "llama"  # a sentencepiece vocabulary
    write_gguf(file, kind="F32" if scored else kind, model="llama" if scored else "gpt2")
    content = file.read_bytes()
    header = 12_000  # most of it: the header and the start of the first tensor
    return Sample(content[:header], "checkpoint", file, file, lambda start: start + content[header:])


def _sentencepiece(directory: Path) -> Sample:
    write_small_files(directory, LLAMA_CONFIG)
    (directory / "tokenizer.json").unlink()
    write_sharded(directory, llama_tensors(), "bin")
    train(directory)
    return _file(directory, "tokenizer.model")


def _normalization(directory: Path) -> Sample:
    """The precompiled normalization of a sentencepiece model: an automaton that native code follows."""
    sample = _sentencepiece(directory)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(sample.content)

    def packed(charsmap: bytes) -> bytes:
        model.normalizer_spec.precompiled_charsmap = charsmap
        return bytes(model.SerializeToString())

    return Sample(model.normalizer_spec.precompiled_charsmap, "checkpoint", directory, sample.file, packed)


def _pieces(directory: Path) -> Sample:
    """The pieces and specifications of a sentencepiece model, as JSON; what protobuf refuses to store stays JSON."""
    sample = _sentencepiece(directory)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(sample.content)
    plain = json_format.MessageToDict(model)

    def packed(text: bytes) -> bytes:
        try:
            return bytes(json_format.Parse(text, sentencepiece_model_pb2.ModelProto()).SerializeToString())
        except (json_format.Error, RecursionError, ValueError, TypeError):
            return text

    return Sample(json.dumps(plain).encode(), "checkpoint", directory, sample.file, packed, is_json=True)


def _set(directory: Path) -> Sample:
    requests = directory.with_suffix(".jsonl")
    requests.write_bytes(_LINES)
    write_set(requests, directory, SelectOptions(size=3, holdout=2))
    file = directory / "set.json"
    return Sample(file.read_bytes(), "requests", directory, file, is_json=True)


def _requests(directory: Path) -> dict[str, Sample]:
    directory.mkdir()
    packers: dict[str, Callable[[bytes], bytes]] = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstd.compress}
    samples = {}
    for suffix, pack in packers.items():
        file = directory / f"requests.{suffix}"
        samples[f"requests.{suffix}"] = Sample(pack(_LINES), "requests", file, file)
    return samples
