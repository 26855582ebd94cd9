"""Manifest: round trip, and a clear sentence for everything that does not fit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from belle_compile.runtime.artifact import (
    FileRecord,
    manifest_schema,
    manifest_text,
    read_manifest,
    verify_files,
)
from belle_compile.runtime.errors import EngineError
from tests.runtime.fakes import make_directory, manifest

CONTENTS = {"tokenizer.json": b"{}", "rank0/program.json": b"{ }\n", "rank0/weights.safetensors": bytes(range(200))}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_directory(tmp_path / "engine", CONTENTS)


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_is_exact_and_canonical(tmp_path: Path) -> None:
    written = manifest({"a/b.bin": FileRecord("ab" * 32, 3)}, accuracy={"kl": 0.01})
    text = manifest_text(written)
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    assert replace(read_manifest(tmp_path), digest="") == written
    assert text == manifest_text(read_manifest(tmp_path))
    assert text.endswith("}\n") and list(json.loads(text)) == sorted(json.loads(text))


def test_whole_directory_verifies_with_progress(directory: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    verify_files(directory, read_manifest(directory), full=True, progress=lambda *args: seen.append(args))
    total = sum(map(len, CONTENTS.values()))
    assert {name for name, _, _ in seen} == set(CONTENTS)
    assert seen[-1][1:] == (total, total)


def test_header_check_skips_large_files_and_full_does_not(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("belle_compile.runtime.artifact.ALWAYS_DIGESTED_BYTES", 100)
    (directory / "rank0/weights.safetensors").write_bytes(bytes(200))
    verify_files(directory, read_manifest(directory), full=False)
    with pytest.raises(EngineError, match=r"digest of rank0/weights\.safetensors: found SHA-256 .*rebuild"):
        verify_files(directory, read_manifest(directory), full=True)


def test_tampered_file_is_named(directory: Path) -> None:
    (directory / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(EngineError, match=r"digest of tokenizer\.json: found .*the file was changed after the build"):
        verify_files(directory, read_manifest(directory), full=False)


def test_truncated_file_is_named_with_both_sizes(directory: Path) -> None:
    os.truncate(directory / "rank0/weights.safetensors", 10)
    with pytest.raises(EngineError, match=r"size of rank0/weights\.safetensors: found 10 bytes, expected 200 bytes; copy"):
        verify_files(directory, read_manifest(directory), full=False)


def test_missing_file_is_named(directory: Path) -> None:
    (directory / "rank0/program.json").unlink()
    with pytest.raises(EngineError, match=r"file rank0/program\.json is missing from .*; copy the engine again"):
        verify_files(directory, read_manifest(directory), full=False)


@pytest.mark.parametrize("full", [False, True])
def test_an_engine_without_its_report_runs(tmp_path: Path, full: bool) -> None:
    directory = make_directory(tmp_path, {"tokenizer.json": b"{}", "report.html": b"<p>"})
    (directory / "report.html").write_bytes(b"<q>")
    with pytest.raises(EngineError, match=r"digest of report\.html"):
        verify_files(directory, read_manifest(directory), full=full)
    (directory / "report.html").unlink()
    verify_files(directory, read_manifest(directory), full=full)
    (directory / "report.html").symlink_to(tmp_path / "nothing")
    with pytest.raises(EngineError, match=r"file report\.html is missing"):
        verify_files(directory, read_manifest(directory), full=full)


def test_a_rank_needs_its_own_files_only(tmp_path: Path) -> None:
    names = ("tokenizer.json", "rank0/program.json", "rank1/program.json")
    directory = make_directory(tmp_path / "e", {name: b"x" for name in names})
    manifest = read_manifest(directory)
    (directory / "rank0/program.json").unlink()
    verify_files(directory, manifest, full=True, rank=1)
    for rank in (0, None):
        with pytest.raises(EngineError, match=r"file rank0/program\.json is missing"):
            verify_files(directory, manifest, full=True, rank=rank)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match=r"file tokenizer\.json is missing"):
        verify_files(directory, manifest, full=True, rank=1)


def test_link_out_of_the_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(CONTENTS["tokenizer.json"])
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to(outside)
    with pytest.raises(EngineError, match=r"tokenizer\.json is a link out of"):
        verify_files(directory, read_manifest(directory), full=False)


def test_files_that_may_not_be_read_are_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    manifest = read_manifest(directory)
    message = r"^engine: file .*/{} cannot be read: found Permission denied; let this user read it, or copy"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(EngineError, match=message.format("manifest.json")):
            read_manifest(directory)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(EngineError, match=message.format("rank0/program.json")):
        verify_files(directory, manifest, full=False)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "a\\b", "a//b", ".", ""])
def test_path_that_escapes_is_refused(directory: Path, path: str) -> None:
    edit(directory, files={path: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(EngineError, match=r"field files does not fit: found path .*expected a relative path inside"):
        read_manifest(directory)


@pytest.mark.parametrize(("version", "found"), [(1, "1"), ("2", '"2"'), (True, "true")])
def test_other_format_version(directory: Path, version: object, found: str) -> None:
    edit(directory, format_version=version)
    with pytest.raises(EngineError, match=rf"format version of .*: found {found}, expected 3; rebuild the engine"):
        read_manifest(directory)


def test_manifests_without_optional_fields_are_read_and_written_as_they_are(tmp_path: Path) -> None:
    fields = {"max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"}  # those of the first engines
    text = manifest_text(manifest())
    assert json.loads(text)["generation"].keys() == fields
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    read = read_manifest(tmp_path)
    assert (read.generation.min_p, read.generation.min_tokens, read.generation.stop) == (0.0, 0, ())
    changed = replace(read, generation=replace(read.generation, min_p=0.1, stop=("x",)))
    (tmp_path / "manifest.json").write_text(manifest_text(changed), encoding="utf-8")
    again = read_manifest(tmp_path)
    assert again.generation == changed.generation and again.digest != read.digest
    assert json.loads(manifest_text(again))["generation"].keys() == fields | {"min_p", "stop"}
    schema = manifest_schema()["properties"]["generation"]
    assert set(schema["required"]) == fields and schema["properties"].keys() == fields | {"min_p", "min_tokens", "stop"}


@pytest.mark.parametrize("stop", [[""], "x", [5], None])
def test_stop_strings_of_a_manifest_that_are_none(directory: Path, stop: object) -> None:
    generation = json.loads((directory / "manifest.json").read_text())["generation"]
    edit(directory, generation=generation | {"stop": stop})
    with pytest.raises(EngineError, match=r"field generation\.stop(\[0\])? does not fit: found"):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.5),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("min_p", 1.5),
        ("min_p", -0.1),
        ("min_tokens", -1),
    ],
)
def test_generation_defaults_that_no_request_could_have(directory: Path, name: str, value: float) -> None:
    generation = json.loads((directory / "manifest.json").read_text())["generation"]
    edit(directory, generation=generation | {name: value})
    with pytest.raises(EngineError, match=rf"field generation\.{name} does not fit: found {value}, expected"):
        read_manifest(directory)


@pytest.mark.parametrize(("text", "found"), [("[" * 99_999, "nested too deeply"), ('{"format_version": NaN}', "NaN, which")])
def test_a_manifest_that_json_does_not_allow(directory: Path, text: str, found: str) -> None:
    (directory / "manifest.json").write_text(text)
    with pytest.raises(EngineError, match=rf"manifest\.json is not JSON: found .*{found}.*; rebuild"):
        read_manifest(directory)


def test_directory_that_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"is not an engine: found no manifest\.json; give the directory"):
        read_manifest(tmp_path)


def test_manifest_that_is_not_json(directory: Path) -> None:
    (directory / "manifest.json").write_bytes(b'{"format_version": \xff')
    with pytest.raises(EngineError, match=r"manifest\.json is not JSON: found .*; rebuild"):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "field surprise does not fit: found an unknown field, expected one of model"),
        ({"model": {"family": "bloom"}}, r"field model\.name does not fit: found nothing, expected a string"),
        ({"special_tokens": None}, "field special_tokens does not fit: found null, expected an object"),
        ({"kernel_calls": {"before": True, "after": 1}}, r"kernel_calls\.before does not fit: found true, expected an integer"),
        ({"passes": {}}, "field passes does not fit: found an object, expected a list"),
        ({"files": {"a": {"sha256": "xyz", "bytes": 1}}}, r'files\.a\.sha256 does not fit: found "xyz", expected 64 hex'),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": -1}}}, r"files\.a\.bytes does not fit: found -1"),
    ],
)
def test_malformed_field_is_named(directory: Path, changes: dict[str, Any], message: str) -> None:
    edit(directory, **changes)
    with pytest.raises(EngineError, match=message):
        read_manifest(directory)


@pytest.mark.parametrize("mapped", [-1, (1 << 20) + 1])
def test_more_mapped_than_needed_is_refused(tmp_path: Path, mapped: int) -> None:
    target = manifest().target
    odd = replace(target, requires=replace(target.requires, mapped_bytes=mapped))
    (tmp_path / "manifest.json").write_text(manifest_text(manifest(target=odd)))
    message = rf"field target\.requires\.mapped_bytes does not fit: found {mapped}, expected 0 to 1048576"
    with pytest.raises(EngineError, match=message):
        read_manifest(tmp_path)


def test_schema_names_every_field(directory: Path) -> None:
    schema = manifest_schema()
    assert set(schema["required"]) == set(json.loads((directory / "manifest.json").read_text()))
    assert schema["properties"]["special_tokens"]["properties"]["eos"] == {"type": "array", "items": {"type": "integer"}}
