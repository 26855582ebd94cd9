"""Changing an engine's generation defaults without a build."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from belle_compile.compiler import cli
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.editing import edit
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.report import REPORT_NAME
from belle_compile.runtime.artifact import read_manifest, verify_files
from belle_compile.runtime.errors import EngineError
from tests.compiler.engines import MANIFEST, write_engine
from tests.parity.variants import VARIANTS


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine")


def contents(engine: Path) -> dict[str, bytes]:
    return {str(path.relative_to(engine)): path.read_bytes() for path in engine.rglob("*") if path.is_file()}


def test_only_the_defaults_and_the_digest_change(engine: Path) -> None:
    old, before = read_manifest(engine), contents(engine)
    (engine / "notes.txt").write_text("mine")
    weights = (engine / "rank0" / "weights.safetensors").stat().st_ino
    new, notes = edit(engine, ["temperature=0.5", "top_k=3"])
    assert new == read_manifest(engine) and notes == []
    assert new.generation == replace(old.generation, temperature=0.5, top_k=3) and new.digest != old.digest
    assert replace(new, generation=old.generation, digest=old.digest) == old
    verify_files(engine, new, full=True)
    after = contents(engine)
    assert {name for name in after if after[name] != before.get(name)} == {"manifest.json", "notes.txt"}
    assert (engine / "rank0" / "weights.safetensors").stat().st_ino == weights, "a link, not a copy"
    assert (engine / "manifest.json").stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in engine.parent.iterdir()] == ["engine"]


def test_going_back_gives_the_first_bytes_again(engine: Path) -> None:
    before = contents(engine)
    edit(engine, ["temperature=0.5"])
    edit(engine, [f"temperature={MANIFEST.generation.temperature}"])
    assert contents(engine) == before


@pytest.mark.usefixtures("no_kernels")
def test_an_edited_engine_equals_one_built_with_these_defaults(tmp_path: Path) -> None:
    checkpoint = VARIANTS["llama_gqa"](tmp_path / "tiny-llama")
    changes = ("temperature=0.7", "max_new_tokens=12345")
    built = build(BuildRequest(checkpoint, tmp_path / "built", quantization="none", drift=False, generation=changes))
    edited = build(BuildRequest(checkpoint, tmp_path / "edited", quantization="none", drift=False))
    new, notes = edit(edited, changes)
    assert notes == [] and REPORT_NAME in new.files
    assert contents(edited) == contents(built)


def test_a_report_of_another_version_is_left_as_it_is(engine: Path) -> None:
    page = b"<html>"
    manifest = read_manifest(engine)
    from hashlib import sha256

    from belle_compile.runtime.artifact import FileRecord, manifest_text

    (engine / REPORT_NAME).write_bytes(page)
    files = {**manifest.files, REPORT_NAME: FileRecord(sha256(page).hexdigest(), len(page))}
    (engine / "manifest.json").write_text(manifest_text(replace(manifest, files=files)))
    new, notes = edit(engine, ["top_k=3"])
    assert notes == ["report.html still shows the defaults of the build"]
    verify_files(engine, new, full=True)


def test_a_link_to_an_engine_stays_a_link(engine: Path) -> None:
    link = engine.parent / "current"
    link.symlink_to(engine)
    edit(link, ["top_k=3"])
    assert link.is_symlink() and read_manifest(link).generation.top_k == 3


def test_without_hard_links_files_are_copied(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    new, _ = edit(engine, ["top_k=3"])
    verify_files(engine, new, full=True)


@pytest.mark.parametrize("change", ["top_k=x", "nothing=1", "missing.json"])
def test_a_wrong_change_leaves_the_engine(engine: Path, change: str) -> None:
    before = contents(engine)
    with pytest.raises(CompileError):
        edit(engine, ["temperature=0.5", change])
    assert contents(engine) == before


def test_something_that_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is not an engine"):
        edit(tmp_path, ["top_k=3"])


def test_the_command(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        return int(end.value.code or 0), capsys.readouterr().out

    status, out = run("edit", str(engine), "--generation-defaults", "top_p=0.5", "--json")
    assert status == 0 and json.loads(out)["generation"]["top_p"] == 0.5
    assert json.loads(out)["digest"] == read_manifest(engine).digest
    assert "top_p 0.5" in run("inspect", str(engine))[1]
    assert run("edit", str(engine))[0] == 2
