"""BELLE's encrypted releases: what readers see is the plaintext, and a wrong key or a damaged file is known at once."""

from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from belle_compile.compiler import cli
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.checkpoint.formats.original_llama import PARAMS
from belle_compile.compiler.checkpoint.formats.pickles import open_pickle
from belle_compile.compiler.checkpoint.sources.base import Files
from belle_compile.compiler.checkpoint.sources.encrypted import CHUNK_BYTES, decrypted
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.reading import Reading
from tests.compiler.checkpoint.models import write_llama
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import hf_logits, make_bloom, random_ids
from tests.quantized_releases import gptq_file
from tests.releases import CHINESE, belle_bloom, belle_llama, encrypted, key_file, original_llama

WEIGHTS = "pytorch_model-00002-of-00002.bin"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return belle_llama(tmp_path_factory.mktemp("plain") / "BELLE-LLaMA-EXT-7B", added=CHINESE)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return key_file(tmp_path_factory.mktemp("key") / "consolidated.00.pth")


@pytest.fixture(scope="module")
def published(plain: Path, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encrypted(plain, key, tmp_path_factory.mktemp("published") / "BELLE-LLaMA-EXT-7B-enc")


@pytest.fixture
def release(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(published, tmp_path / "release"))


def file_of(release: Path, name: str) -> Path:
    (file,) = release.glob(f"{name}.*.enc")
    return file


@pytest.mark.parametrize("key_bytes", [1000, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 4099, 2 * CHUNK_BYTES + (3 << 20)])
def test_chunks_of_files_and_keys_of_any_length(tmp_path: Path, key_bytes: int) -> None:
    """The key restarts where it ends, and its short last chunk repeats within a chunk of the file, as in decrypt.py."""
    (tmp_path / "plain").mkdir()
    content = bytearray(random.Random(1).randbytes(3 * CHUNK_BYTES + 12345))
    (tmp_path / "plain" / "weights").write_bytes(content)
    key = key_file(tmp_path / "key", key_bytes)
    files = decrypted(Files(encrypted(tmp_path / "plain", key, tmp_path / "release")), key)
    (file,) = files.matching("weights")
    assert file.stat().st_size == len(content) and file.name == "weights"
    with file.open("rb") as opened:
        for place in (0, 1, CHUNK_BYTES - 3, CHUNK_BYTES + 4090, 2 * CHUNK_BYTES + 5, len(content) - 9, len(content)):
            opened.seek(place)
            assert opened.read(70_000) == content[place : place + 70_000], place
        opened.seek(0)
        assert opened.read() == content


def test_it_is_the_plain_checkpoint(plain: Path, published: Path, key: Path) -> None:
    open_plain, opened = open_checkpoint(plain), open_checkpoint(published, reading=Reading(key=key))
    assert [*opened.tensors] == [*open_plain.tensors] and opened.tokenizer_json == open_plain.tokenizer_json
    assert (opened.config, opened.special, opened.template) == (open_plain.config, open_plain.special, open_plain.template)
    for name, tensor in open_plain.tensors.items():
        np.testing.assert_array_equal(opened.tensors[name].read(), tensor.read())
    assert opened.digests() == open_plain.digests()
    decrypting = "files were decrypted with consolidated.00.pth while they were read; digests are those of the plaintexts"
    assert opened.notes == (f"8 {decrypting}", *open_plain.notes)


def test_logits_equal_those_of_transformers(plain: Path, published: Path, key: Path) -> None:
    ids = random_ids(plain, 21)
    model = build_graph(open_checkpoint(published, reading=Reading(key=key)))
    assert relative_error(Stepper(model).step({0: ids})[0], hf_logits(plain, ids)) < 1e-5


def test_safetensors_are_decrypted_by_their_offsets(tmp_path: Path, key: Path) -> None:
    plain = write_llama(tmp_path / "plain")
    opened = open_checkpoint(encrypted(plain, key, tmp_path / "release"), reading=Reading(key=key))
    for name, tensor in open_checkpoint(plain).tensors.items():
        np.testing.assert_array_equal(opened.tensors[name].rows(3, 9), tensor.rows(3, 9))


def test_an_original_llama_can_be_encrypted_too(plain: Path, key: Path, tmp_path: Path) -> None:
    original = original_llama(plain, tmp_path / "7B", parts=2)
    opened = open_checkpoint(encrypted(original, key, tmp_path / "release"), reading=Reading(key=key))
    assert {PARAMS, "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"} == set(opened.digests())


def test_files_that_are_not_encrypted_are_read_as_they_are(plain: Path, release: Path, key: Path) -> None:
    file_of(release, "tokenizer.model").unlink()
    shutil.copy(plain / "tokenizer.model", release)
    assert open_checkpoint(release, reading=Reading(key=key)).digests() == open_checkpoint(plain).digests()


def test_one_file_of_a_release(plain: Path, published: Path, key: Path) -> None:
    """Of several models in files of their own, as in BELLE-LLaMA-7B-2M-gptq-enc, one is given."""
    files = decrypted(Files(file_of(published, WEIGHTS)), key)
    (file,) = files.matching("*.bin")
    assert files.directory is None and file.name == WEIGHTS and len(open_pickle(file)) > 1
    with (file.parent / "config.json").open("rb") as config:
        assert config.read() == (plain / "config.json").read_bytes()


def refusal(release: Path, key: Path, **reading: Path) -> str:
    with pytest.raises(CompileError) as error:
        checkpoint = open_checkpoint(release, reading=Reading(key=key, **reading))
        checkpoint.digests()
    return str(error.value)


def test_a_gptq_file(tmp_path: Path, key: Path) -> None:
    """As BELLE-LLaMA-7B-2M-gptq-enc: integers in a .pt, which is named, beside the file with the other number of bits."""
    made = gptq_file(
        make_bloom(tmp_path / "float", hidden_size=128, n_layer=1, n_head=4), tmp_path / "plain", bits=8, group=128
    )
    other = gptq_file(tmp_path / "float", tmp_path / "other", "bloom7b-2m-4bit-128g.pt", bits=4, group=128)
    shutil.copy(other.directory / "bloom7b-2m-4bit-128g.pt", made.directory)
    release = encrypted(made.directory, key, tmp_path / "release")
    with pytest.raises(
        CompileError, match=r"found 2 \.pt files: bloom7b-2m-4bit-128g\.pt, bloom7b-2m-8bit-128g\.pt, expected one"
    ):
        open_checkpoint(release, reading=Reading(key=key))
    opened = open_checkpoint(file_of(release, "bloom7b-2m-8bit-128g.pt"), reading=Reading(key=key))
    plain = open_checkpoint(made.directory / "bloom7b-2m-8bit-128g.pt")
    assert opened.digests() == plain.digests() and [*opened.tensors] == [*plain.tensors]
    for name, tensor in plain.tensors.items():
        np.testing.assert_array_equal(opened.tensors[name].read(), tensor.read())
    ids = random_ids(made.plain, 21)
    assert relative_error(Stepper(build_graph(opened)).step({0: ids})[0], hf_logits(made.plain, ids)) < 1e-5


def test_a_wrong_key_is_known_by_the_smallest_file(release: Path, tmp_path: Path) -> None:
    other = key_file(tmp_path / "other.pth", seed=1)
    for file in release.glob("pytorch_model-*"):  # no weight is looked at
        file.write_bytes(file.read_bytes()[:32])
    said = refusal(release, other)
    assert f": found with the key {other} of 40,000 bytes, SHA-256 " in said and " with the SHA-256 " in said
    assert "consolidated.00.pth of the original LLaMA-7B, a file of 13,476,939,516 bytes" in said


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3000])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3000] ^= 1
    file.write_bytes(content)


def change_header(file: Path) -> None:
    file.write_bytes(bytes(32) + file.read_bytes()[32:])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (WEIGHTS, truncate, f"of 40,000 bytes, no end of an archive, expected {WEIGHTS} with"),
        (
            WEIGHTS,
            flip,
            rf"SHA-256 \w{{64}}, expected {WEIGHTS} with the SHA-256 \w{{64}}; give the key .*download the file again",
        ),
        (
            WEIGHTS,
            change_header,
            "a header with the SHA-256 0{64}, expected the SHA-256 in its name; it is truncated or renamed",
        ),
        ("tokenizer.model", truncate, r"SHA-256 \w{64}, expected tokenizer.model with the SHA-256 \w{64}"),
        ("config.json", lambda file: file.write_bytes(b"short"), "a file without a whole header"),
        ("config.json", lambda file: file.rename(file.with_name("config.json.enc")), "a name without the SHA-256"),
        ("config.json", lambda file: shutil.copy(file, file.with_name(f"config.json.{'0' * 64}.enc")), "of the same name"),
    ],
)
def test_damaged_files(release: Path, key: Path, name: str, change: Callable[[Path], None], message: str) -> None:
    change(file_of(release, name))
    with pytest.raises(CompileError, match=rf"^checkpoint: file {release}/{name}.*enc: found .*{message}"):
        open_checkpoint(release, reading=Reading(key=key)).digests()


def test_a_key_that_is_truncated_behind_the_small_files(plain: Path, tmp_path: Path) -> None:
    longest = max(file.stat().st_size for file in plain.iterdir() if file.suffix != ".bin")
    whole = key_file(tmp_path / "whole", 1 << 20)
    release = encrypted(plain, whole, tmp_path / "release")
    short = tmp_path / "short"
    short.write_bytes(whole.read_bytes()[: longest + 100])
    assert f"with the key {short} of {longest + 100:,} bytes, no end of an archive" in refusal(release, short)


def old_pickle(file: Path) -> None:
    """The format before PyTorch 1.6, which has no end that tells it."""
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)


def safetensors(file: Path) -> None:
    save_file(torch.load(file), file.with_name("model.safetensors"))
    file.unlink()


@pytest.mark.parametrize("rewrite", [old_pickle, safetensors])
def test_a_wrong_key_that_begins_like_the_right_one(rewrite: Callable[[Path], None], tmp_path: Path) -> None:
    """Both are files of PyTorch. Weights alone are encrypted, so that no small file tells."""
    plain = belle_bloom(tmp_path / "plain")
    rewrite(plain / "pytorch_model.bin")
    (tmp_path / "weights").mkdir()
    for file in (*plain.glob("*.bin"), *plain.glob("*.safetensors")):
        file.rename(tmp_path / "weights" / file.name)
    key = key_file(tmp_path / "key", 1 << 20)
    release = Path(shutil.copytree(plain, encrypted(tmp_path / "weights", key, tmp_path / "release"), dirs_exist_ok=True))
    assert open_checkpoint(release, reading=Reading(key=key)).digests()
    wrong = tmp_path / "wrong"
    wrong.write_bytes(key.read_bytes()[:40] + key_file(tmp_path / "other", 1 << 20, seed=1).read_bytes()[40:])
    said = refusal(release, wrong)
    assert said.startswith("checkpoint: ") and str(next(release.glob("*.enc"))) in said
    assert f"found with the key {wrong} of 1,048,576 bytes, " in said and "; give the key of the release with --key: " in said


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_a_key_that_is_none(release: Path, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "key")
    assert "expected" in refusal(release, tmp_path / "key") and "/key" in refusal(release, tmp_path / "key")


def test_without_a_key(release: Path) -> None:
    message = r"found only \S+\.enc, a file of an XOR-encrypted release, .*; give its key with --key: consolidated\.00\.pth of"
    with pytest.raises(CompileError, match=message):
        open_checkpoint(release)


def test_a_key_for_what_is_not_encrypted(llama: Path, key: Path) -> None:
    message = r"--key \S+: found no encrypted file \(\*\.enc\) in \S+; leave the option out"
    with pytest.raises(CompileError, match=message):
        open_checkpoint(llama, reading=Reading(key=key))


def test_plaintext_is_written_only_when_asked_for(plain: Path, published: Path, key: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    open_checkpoint(published, reading=Reading(key=key)).digests()
    assert sorted(tmp_path.rglob("*")) == before
    saved, progress = tmp_path / "saved", []
    reading = Reading(key=key, save_decrypted=saved)
    open_checkpoint(published, reading=reading, on_decrypted=lambda done, total: progress.append((done, total)))
    size = sum(file.stat().st_size for file in plain.iterdir())
    assert sorted(progress) == progress and progress[-1] == (size, size) and {total for _, total in progress} == {size}
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == {
        file.name: file.read_bytes() for file in plain.iterdir()
    }
    assert "found something there already" in refusal(published, key, save_decrypted=saved)


def test_nothing_is_saved_of_a_damaged_release(release: Path, key: Path, tmp_path: Path) -> None:
    flip(file_of(release, WEIGHTS))
    before = sorted(tmp_path.rglob("*"))
    assert ", SHA-256 " in refusal(release, key, save_decrypted=tmp_path / "new" / "saved")
    assert sorted(tmp_path.rglob("*")) == before


def test_saving_needs_a_key(tmp_path: Path) -> None:
    write_llama(tmp_path / "llama")
    with pytest.raises(CompileError, match=r"--save-decrypted \S+: found no key to decrypt with, .*; give the key"):
        open_checkpoint(tmp_path / "llama", reading=Reading(save_decrypted=tmp_path / "saved"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return (int(end.value.code or 0), *capsys.readouterr())


@pytest.mark.usefixtures("no_kernels")
def test_engines_from_both_differ_in_their_records_only(
    plain: Path, published: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_plain, from_encrypted = tmp_path / "plain", tmp_path / "encrypted"
    assert run(capsys, "build", plain, "-o", from_plain, "--quiet")[0] == 0
    assert run(capsys, "build", published, "-o", from_encrypted, "--key", key, "--quiet")[0] == 0
    differing = {"manifest.json", "report.html"}  # the name of the checkpoint, and how it was read
    for file in from_plain.iterdir():
        if file.name not in differing and file.is_file():
            assert (from_encrypted / file.name).read_bytes() == file.read_bytes(), file.name
    ours, theirs = (json.loads((engine / "manifest.json").read_text()) for engine in (from_encrypted, from_plain))
    assert ours["passes"][0]["options"] == theirs["passes"][0]["options"] | {"decrypted_with": "consolidated.00.pth"}
    assert ours["model"]["source_digests"] == theirs["model"]["source_digests"]
    status, shown, _ = run(capsys, "inspect", from_encrypted)
    assert status == 0 and "decrypted with consolidated.00.pth" in shown


def test_plan_reads_an_encrypted_release(published: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, _ = run(capsys, "plan", published, "--key", key, "--target", "a100", "--json")
    assert status == 0 and json.loads(shown)


def test_a_set_is_measured_by_the_tokenizer_of_an_encrypted_release(
    plain: Path, published: Path, key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = tmp_path / "requests.txt"
    requests.write_text("".join(f"the {i} and {i * i} you 春天\n" for i in range(40)))
    command = ("calibrate-set", requests, "--size", 8, "--holdout", 2, "--quiet", "--tokenizer")
    assert run(capsys, *command, plain, "-o", tmp_path / "of-plain")[0] == 0
    assert run(capsys, *command, published, "--key", key, "-o", tmp_path / "of-encrypted")[0] == 0
    ours, theirs = (json.loads((tmp_path / name / "set.json").read_text()) for name in ("of-encrypted", "of-plain"))
    assert (ours["digest"], ours["options"]["tokenizer"]["sha256"]) == (
        theirs["digest"],
        theirs["options"]["tokenizer"]["sha256"],
    )
    status, _, said = run(capsys, *command, published, "-o", tmp_path / "without")
    assert status == 1 and "give its key with --key" in said


def test_a_plan_of_a_config_alone_needs_no_key(plain: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, said = run(capsys, "plan", plain / "config.json", "--key", key)
    assert status == 1 and "a plan with a key: found a config.json alone, expected a checkpoint; give the directory" in said


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("command", ["build", "plan"])
def test_a_wrong_key_leaves_nothing(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    wrong = key_file(tmp_path / "wrong", seed=1)
    options = ["-o", tmp_path / "engine", "--quiet", "--save-decrypted", tmp_path / "saved"] if command == "build" else []
    status, _, said = run(capsys, command, published, "--key", wrong, *options)
    assert status == 1 and said.count("\n") == 1 and "give the key of the release with --key" in said
    assert [*tmp_path.iterdir()] == [wrong]


def test_memory_is_that_of_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    torch.save({"a": torch.zeros(16 << 20), "b": torch.ones(16, 4)}, tmp_path / "plain" / "pytorch_model.bin")
    key = key_file(tmp_path / "key", 11 << 20)
    files = decrypted(Files(encrypted(tmp_path / "plain", key, tmp_path / "release")), key)
    tracemalloc.start()
    try:
        _, b = open_pickle(files.path / "pytorch_model.bin")
        assert b.read().sum() == 64 and b.file.name == "pytorch_model.bin"
        assert tracemalloc.get_traced_memory()[1] < 16 << 20  # most of it for the key's last chunk
    finally:
        tracemalloc.stop()
