"""Files made to exhaust memory or time: each is refused in a child with a limit on both, by one sentence."""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiler.checkpoint.models import (
    LLAMA_CONFIG,
    byte_tokenizer,
    llama_tensors,
    write_json,
    write_llama,
    write_small_files,
)
from tests.compiler.readers.runs import Runs

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def text(value: bytes) -> bytes:
    """A text as GGUF files store it."""
    return struct.pack("<Q", len(value)) + value


def gguf(*metadata: bytes, tensors: int = 0, keys: int | None = None) -> bytes:
    architecture = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    counts = struct.pack("<IQQ", 3, tensors, 1 + len(metadata) if keys is None else keys)
    return b"GGUF" + counts + architecture + b"".join(metadata) + b"\0" * 64


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return text(b"x.y") + struct.pack("<IIQ", 9, kind, count) + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gguf(array(4, 1 << 62)), "an array of 4611686018427387904 elements where 64 bytes are left"),
        (gguf(array(8, 1 << 40)), "an array of 1099511627776 elements"),
        (gguf(array(0, 1 << 23, b"\0" * (1 << 23))), "an array of 8388608 elements"),
        (gguf(array(9, 1 << 32)), "an array of 4294967296 elements"),
        (gguf(array(9, 1, array(9, 1))), "an array of the type 9"),
        (gguf(text(b"a") + struct.pack("<IQ", 8, 1 << 60)), "1152921504606846976 bytes where 64 are left"),
        (gguf(keys=1 << 50), "it claims 0 tensors and 1125899906842624 keys"),
        (gguf(tensors=1 << 50), "it claims 1125899906842624 tensors"),
        (gguf(text(b"a") + struct.pack("<I", 77)), "a value of the unknown type 77"),
        (gguf(text(b"general.alignment") + struct.pack("<II", 4, 0)), "its alignment is 0"),
        (gguf(tensors=1)[:-64] + text(b"t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0), "tensor t needs 4835703278458"),
        (gguf(tensors=1)[:-64] + text(b"t") + struct.pack("<I", 1 << 30) + b"\0" * 64, "tensor t has 1073741824 axes"),
        (gguf(tensors=1)[:-64] + text(b"t") + struct.pack("<IQQIQ", 2, 0, 4, 0, 0), r"tensor t has the shape \[4, 0\]"),
    ],
)
def test_gguf_counts(tmp_path: Path, runs: Runs, content: bytes, message: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert_refused(runs, file, rf"GGUF .*does not parse \(.*{message}")


def assert_refused(runs: Runs, path: Path, message: str, reader: str = "checkpoint") -> None:
    end, detail = runs.end_of(reader, path)
    assert end == "refused" and re.search(message, detail), f"{end}: {detail}"


def with_config(directory: Path, **config: Any) -> None:
    write_json(directory / "config.json", LLAMA_CONFIG | config)


def deep(directory: Path) -> None:
    (directory / "config.json").write_text('{"a":' * 200_000 + "0" + "}" * 200_000)


def many_words(directory: Path) -> None:
    words = ",".join(f'"w{index}":0' for index in range(600_000))
    (directory / "tokenizer.json").write_text(f'{{"model": {{"vocab": {{{words}}}}}}}', encoding="utf-8")


def a_far_id(directory: Path) -> None:
    tokenizer = json.loads(byte_tokenizer().to_str())
    tokenizer["model"]["vocab"]["far"] = (1 << 31) - 1
    write_json(directory / "tokenizer.json", tokenizer)


def many_names(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    names = ",".join(f'"layers.{index}":"model-00001-of-00001.safetensors"' for index in range(600_000))
    (directory / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{names}}}}}', encoding="utf-8")


def long_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def many_tensors(directory: Path) -> None:
    entries = ",".join(f'"{index}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for index in range(200_000))
    header = f"{{{entries}}}".encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def many_objects(directory: Path) -> None:
    (directory / "special_tokens_map.json").write_text('{"a": [' + "[]," * 3_000_000 + "0]}")


def pipe(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return make


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(target)

    return make


def shards_of_zero(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model-00001-of-00001.safetensors").symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (deep, r"config\.json: found text that is not JSON \(.*nested too deeply"),
        (lambda directory: with_config(directory, head_dim=1 << 29), "head_dim .*found 536870912, .* of at most"),
        (lambda directory: with_config(directory, hidden_size=1 << 40), "hidden_size .*expected a whole number <="),
        (lambda directory: with_config(directory, num_hidden_layers=10**4), "no such tensor"),
        (lambda directory: with_config(directory, num_hidden_layers=10**9), "num_hidden_layers .*a whole number <= 10000"),
        (lambda directory: with_config(directory, max_position_embeddings=10**400), "max_position_.*a whole number <="),
        (lambda directory: with_config(directory, rope_scaling={"type": "linear", "factor": 1e300}), "factor .*found 1e[+]300"),
        (lambda directory: with_config(directory, rms_norm_eps=float("nan")), "config.json: found text that is not JSON .*NaN"),
        (many_words, "tokenizer.json: found (text that is not JSON .*more than 524288 keys|.* bytes, expected at most)"),
        (a_far_id, "tokenizer .*found a file that the tokenizers library cannot read .*ids other than whole numbers"),
        (many_names, "index.json: found .*(more than 524288 keys|bytes, expected at most)"),
        (long_header, "found a header of 4611686018427387904 bytes in a file of 10 bytes"),
        (many_tensors, "found a header"),
        (many_objects, "special_tokens_map.json: found text that is not JSON .*more than 1048576 lists"),
        (link("config.json", "config.json"), "no config.json"),
        (link("model.safetensors", "/dev/zero"), "download the weight files"),
        (shards_of_zero, "a device, expected a regular file"),
        (pipe("model.safetensors"), "download the weight files"),
        (pipe("config.json"), "no config.json"),
    ],
)  # fmt: skip
def test_hugging_face_directories(tmp_path: Path, runs: Runs, change: Callable[[Path], None], message: str) -> None:
    directory = write_llama(tmp_path / "llama")
    change(directory)
    assert_refused(runs, directory, message)


@pytest.mark.parametrize("make", [pipe("model.gguf"), link("model.gguf", "/dev/zero"), link("model.gguf", "model.gguf")])
def test_gguf_that_is_no_file(tmp_path: Path, runs: Runs, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    assert_refused(runs, tmp_path, "model.gguf: found (a named pipe|a device|Too many levels of symbolic links)")


def archive(entries: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        with zipfile.ZipFile(file, "w", how) as written:
            for name, content in entries.items():
                written.writestr(name, content)

    return make


def pickled(value: object) -> Callable[[Path], None]:
    return lambda file: torch.save(value, file)


def resized(file: Path) -> None:
    """A legacy file in which a tensor claims more than its storage holds, which PyTorch would enlarge."""
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    size = b"K\x03\x85q"  # the tuple (3,)
    assert content.count(size) == 1
    file.write_bytes(content.replace(size, b"J\xff\xff\xff\x7f\x85q"))


BYTEARRAY = b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85Rs."
DOUBLED = b"\x80\x02}NN\x86" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"Ns."  # a key of 2**61 equal parts
BOMB = b"\x80\x02}." + b"\0" * (64 << 20)
NESTED = b"\x80\x04)\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))  # a tuple of 2**60 parts
# A list of 200,000 values that is made a size 10,000 times.
SIZES = b"\x80\x02](" + b"N" * 200_000 + b"eq\0" + b"ctorch\nSize\nq\x01" + b"h\x01h\0\x85R0" * 10_000 + b"."
MODULE = b"\x80\x02}X\x01\0\0\0a(X\x06\0\0\0modulectorch\nFloatStorage\ntQs."
ATTRIBUTES = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\0\0\0__code__NsbN."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (archive({"archive/data.pkl": BOMB}, zipfile.ZIP_DEFLATED), "archive/data.pkl is compressed"),
        (archive({"archive/data.pkl": BOMB}), r"a pickle of \d+ bytes"),
        (archive({"archive/data.pkl": BYTEARRAY}), r"more than tensors \(GLOBAL __builtin__.bytearray\)"),
        (archive({"archive/data.pkl": b"\x80\x02" + b"N" * 2_000_000 + b"."}), "a pickle of more than 262144 instructions"),
        (archive({"archive/data.pkl": DOUBLED}), r"more than tensors \(a dict with keys that are no names\)"),
        (archive({"archive/data.pkl": NESTED + b"\x8c\x01x\x93."}), "a number in the place of a text"),
        (archive({"archive/data.pkl": SIZES}), "a size that is no tuple of a few numbers"),
        (archive({"archive/data.pkl": MODULE}), "more than tensors .a reference to something that is no storage"),
        (archive({"archive/data.pkl": ATTRIBUTES}), "more than tensors .attributes of something that is no dict"),
        (archive({"archive/data.pkl": b"\x80\x02\x82\x01."}), "more than tensors .instruction EXT1"),
        (archive({"archive/data.pkl": b"\x80\x02J\0\0\0\x7f\x80\x02N"}), "does not load"),
        (pickled({"a": torch.ones(2, device="meta")}), "more than tensors .*meta_tensor"),
        (pickled({"a": torch.ones(2, 2).to_sparse()}), "more than tensors .*sparse_tensor"),
        (pickled({("a", "b"): torch.ones(2)}), "holds more than tensors"),
        (pickled({"a": torch.ones(1).expand(1 << 40)}), "holds more than tensors"),
        (resized, "does not load|more than tensors"),
    ],
)  # fmt: skip
def test_pickles(tmp_path: Path, runs: Runs, make: Callable[[Path], None], message: str) -> None:
    directory = write_small_files(tmp_path, LLAMA_CONFIG)
    make(directory / "pytorch_model.bin")
    assert_refused(runs, directory, message)


def test_overlapping_entries_of_an_archive(tmp_path: Path, runs: Runs) -> None:
    """Many entries of an archive's directory that stand for the same bytes."""
    directory = write_small_files(tmp_path, LLAMA_CONFIG)
    file = directory / "pytorch_model.bin"
    torch.save(llama_tensors(), file)
    content = file.read_bytes()
    at = content.rindex(b"PK\x05\x06")
    count, size, start = struct.unpack_from("<HII", content, at + 10)
    entries = content[start : start + size] * 8
    end = struct.pack("<4s4xHHII2x", b"PK\x05\x06", 8 * count, 8 * count, len(entries), start)
    file.write_bytes(content[:start] + entries + end)
    assert_refused(runs, directory, "the entries of its archive exceed the file")


def test_a_broken_normalization_of_sentencepiece(tmp_path: Path, runs: Runs) -> None:
    from sentencepiece import sentencepiece_model_pb2

    from tests.compiler.checkpoint.test_sentencepiece_model import train

    directory = write_llama(tmp_path / "llama", vocab_size=400)
    (directory / "tokenizer.json").unlink()
    file = train(directory)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    for charsmap in (
        b"\xff\xff\xff\x7f",
        b"\x01",
        b"\x04\0\0\0\xff\xff\xff\xffabc",
        model.normalizer_spec.precompiled_charsmap[:99],
    ):
        model.normalizer_spec.precompiled_charsmap = charsmap
        file.write_bytes(model.SerializeToString())
        assert_refused(runs, directory, "found a file that sentencepiece cannot read")


def test_a_tokenizer_with_a_broken_normalization(tmp_path: Path, runs: Runs) -> None:
    """The library in Rust panics, which is no Exception in Python."""
    directory = write_llama(tmp_path / "llama")
    tokenizer = json.loads(byte_tokenizer().to_str())
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    write_json(directory / "tokenizer.json", tokenizer)
    assert_refused(runs, directory, "found a file that the tokenizers library cannot read")


def test_requests_that_unpack_without_end(tmp_path: Path, runs: Runs) -> None:
    file = tmp_path / "requests.jsonl.gz"
    file.write_bytes(gzip.compress(b"\n" * (8 << 20)))
    assert_refused(runs, file, "line 100001 of .*found more than 100000 blank lines", reader="requests")
    file.write_bytes(zstd.compress((b'{"text": "' + b"a" * (12 << 20) + b'"}\n') * 8))
    assert_refused(runs, file, "zstd data that unpack to more than 1000 times their size", reader="requests")
    lines = tmp_path / "requests.jsonl"
    lines.write_text('{"text": "a", "rest": [' + "[]," * 2_000_000 + "0]}\n")
    assert_refused(runs, lines, r"line 1 of .*invalid JSON \(out of bounds\)", reader="requests")
    os.mkfifo(tmp_path / "set.json")
    assert_refused(runs, tmp_path, "no set.json", reader="requests")
