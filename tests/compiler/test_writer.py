"""The engine directory appears whole or not at all, and its bytes are a function of what was written."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.writer import EngineWriter, write_ranks
from belle_compile.runtime.artifact import read_manifest, verify_files
from belle_compile.runtime.errors import EngineError
from tests.compiler.engines import MANIFEST, Tensor, payload, tensors, write_engine

ROOT = Path(__file__).parents[2]
USAGE = namedtuple("USAGE", "total used free")

# A build that says it is ready when all but the last tensor is written, and then hangs.
BUILD = """
import sys, time
from pathlib import Path
from tests.compiler.engines import write_engine
def hang():
    print("ready", flush=True)
    time.sleep(60)
write_engine(Path(sys.argv[1]), force="--force" in sys.argv, before=hang)
"""


def heed_signals() -> None:
    """Undoes what nohup and shells' background jobs hand down."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start_build(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILD, str(out), *options]
    build = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heed_signals)
    assert build.stdout is not None and build.stdout.readline() == "ready\n"
    return build


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", stat.S_IMODE(path.stat().st_mode))
        for path in [folder, *folder.rglob("*")]
    }


def test_what_is_written_can_be_read_by_the_runtime_and_by_safetensors(tmp_path: Path) -> None:
    out = write_engine(tmp_path / "engine")
    manifest = read_manifest(out)
    verify_files(out, manifest, full=True)
    assert list(manifest.files) == sorted(
        ["rank0/kernels-avx2.so", "rank0/program.json", "rank0/weights.safetensors", "tokenizer.json"]
    )
    weights = out / "rank0" / "weights.safetensors"
    assert manifest.files["rank0/weights.safetensors"].sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    loaded = load_file(weights)
    for tensor in tensors():
        np.testing.assert_array_equal(loaded[tensor.name], tensor.array)
    header_bytes = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    header = json.loads(weights.read_bytes()[8:header_bytes])
    assert all((header_bytes + entry["data_offsets"][0]) % 64 == 0 for entry in header.values())
    assert entries(tmp_path) == ["engine"]


def test_same_calls_give_the_same_bytes_and_permissions_whatever_the_umask(tmp_path: Path) -> None:
    first = content(write_engine(tmp_path / "a"))
    previous = os.umask(0o077)
    try:
        second = content(write_engine(tmp_path / "b"))
    finally:
        os.umask(previous)
    assert first == second
    assert {mode for _, mode in first.values()} == {0o644, 0o755}


def test_tensors_are_packed_one_at_a_time_and_progress_is_told(tmp_path: Path) -> None:
    events: list[str] = []
    both = [Tensor(t.name, t.array, partial(events.append, t.name)) for t in tensors()]
    with EngineWriter(tmp_path / "engine") as writer:
        write_ranks(writer, [payload(both)], lambda done, total: events.append(f"{done}/{total}"))
    assert events == ["layer.weight", "512/640", "layer.weight.scale", "640/640"]


def test_a_tensor_unlike_its_announcement_is_a_bug_and_leaves_nothing(tmp_path: Path) -> None:
    class Wrong(Tensor):
        def pack(self) -> npt.NDArray[Any]:
            transposed: npt.NDArray[Any] = self.array.T
            return transposed

    with pytest.raises(AssertionError, match=r"w was announced as int8\[2, 64\] and packed as int8\[64, 2\]"):
        with EngineWriter(tmp_path / "engine") as writer:
            write_ranks(writer, [payload([Wrong("w", np.zeros((2, 64), np.int8))])])
    assert entries(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("bad layer"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_nothing_not_even_the_folders_it_made(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        assert entries(tmp_path / "new" / "folders") == [f".engine.building-{os.getpid()}", ".engine.lock"]
        raise error

    with pytest.raises(type(error)):
        write_engine(tmp_path / "new" / "folders" / "engine", before=fail)
    assert entries(tmp_path) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, None)])
def test_a_signal_in_the_middle_leaves_nothing(tmp_path: Path, number: int, status: int | None) -> None:
    build = start_build(tmp_path / "engine")
    assert len(entries(tmp_path)) == 2
    build.send_signal(number)
    build.wait(10)
    assert status is None or build.returncode == status
    assert entries(tmp_path) == []


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("swallowed", [True, False])
def test_a_signal_is_not_lost_in_native_code(
    tmp_path: Path, number: signal.Signals, ending: type[BaseException], swallowed: bool
) -> None:
    def native() -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            if not swallowed:
                raise RuntimeError("an error of the library") from None

    # Shells start background jobs with SIGINT ignored, and builds leave what is ignored alone.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(ending):
            write_engine(tmp_path / "engine", before=native)
    finally:
        signal.signal(signal.SIGINT, before)
    assert entries(tmp_path) == []


def test_what_sigkill_leaves_is_no_engine_and_the_next_build_removes_it(tmp_path: Path) -> None:
    build = start_build(tmp_path / "engine")
    build.kill()
    build.wait(10)
    assert entries(tmp_path) == [f".engine.building-{build.pid}", ".engine.lock"]
    neighbour = tmp_path / ".engine2.building-1"
    neighbour.mkdir()
    write_engine(tmp_path / "engine")
    assert entries(tmp_path) == [neighbour.name, "engine"]


def test_output_in_use_by_another_build(tmp_path: Path) -> None:
    build = start_build(tmp_path / "engine")
    try:
        with pytest.raises(CompileError, match=r"^output: another build is writing .*/engine: .*wait for it to end"):
            write_engine(tmp_path / "engine")
        write_engine(tmp_path / "other")
        assert f".engine.building-{build.pid}" in entries(tmp_path), "the running build keeps its files"
    finally:
        build.kill()
        build.wait(10)


def test_output_exists(tmp_path: Path) -> None:
    write_engine(tmp_path / "engine")
    with pytest.raises(CompileError, match=r"^output: .*/engine exists already; .*pass --force to replace an engine\.$"):
        write_engine(tmp_path / "engine")
    assert entries(tmp_path) == ["engine"]


def test_force_replaces_an_engine_with_a_finished_one_only(tmp_path: Path) -> None:
    out = write_engine(tmp_path / "engine")
    before = content(out)
    build = start_build(out, "--force")
    assert content(out) == before
    build.terminate()
    build.wait(10)
    assert content(out) == before
    write_engine(out, force=True, tokenizer=b'{"new": 1}')
    assert (out / "tokenizer.json").read_bytes() == b'{"new": 1}'
    assert entries(tmp_path) == ["engine"]


def test_force_without_an_exchanging_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_engine(tmp_path / "engine")
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    write_engine(out, force=True, tokenizer=b"[]")
    assert (out / "tokenizer.json").read_bytes() == b"[]"
    assert entries(tmp_path) == ["engine"]


def test_an_engine_moved_aside_by_a_killed_build_comes_back(tmp_path: Path) -> None:
    write_engine(tmp_path / "engine").rename(tmp_path / ".engine.replaced")
    with pytest.raises(CompileError, match="exists already"):
        write_engine(tmp_path / "engine")
    assert entries(tmp_path) == ["engine"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("thesis.txt", "precious"),
        ("manifest.json", '{"name": "my web app", "version": 3}'),
        ("manifest.json", '{"format_version": "3", "digest": "", "model": {}, "target": {}, "files": {}}'),
        ("manifest.json", "[1]"),
        ("manifest.json", "{"),
        ("", "precious"),
    ],
)
def test_force_touches_engines_only(tmp_path: Path, name: str, text: str) -> None:
    out = tmp_path / "mine"
    if name:
        out.mkdir()
    (out / name).write_text(text)
    with pytest.raises(CompileError, match=r"^output: --force replaces engine directories only and .*/mine is none"):
        write_engine(out, force=True)
    assert entries(tmp_path) == ["mine"] and (out / name).read_text() == text


def test_force_replaces_an_engine_of_another_format(tmp_path: Path) -> None:
    out = write_engine(tmp_path / "engine")
    plain = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(plain | {"format_version": 1, "new": 2}))
    write_engine(out, force=True)
    assert read_manifest(out)


def test_force_onto_a_link_replaces_the_engine_that_it_points_to(tmp_path: Path) -> None:
    engine, link = write_engine(tmp_path / "engine"), tmp_path / "elsewhere" / "current"
    link.parent.mkdir()
    link.symlink_to(engine)
    assert write_engine(link, force=True, tokenizer=b'{"new": 1}') == engine
    assert link.is_symlink() and (engine / "tokenizer.json").read_bytes() == b'{"new": 1}'
    assert entries(tmp_path) == ["elsewhere", "engine"] and entries(link.parent) == ["current"]


def test_temporary_files_are_beside_the_output_or_below_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def leave_a_file() -> None:
        folders.append(Path(tempfile.mkdtemp()).parent)
        assert os.environ["TMPDIR"] == str(folders[-1]), "for the processes of compilers"

    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    write_engine(tmp_path / "one" / "engine", before=leave_a_file)
    assert folders[-1].parent.parent == tmp_path / "one" and "TMPDIR" not in os.environ
    (tmp_path / "chosen").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "chosen"))
    write_engine(tmp_path / "two" / "engine", before=leave_a_file)
    assert folders[-1].parent == tmp_path / "chosen" and os.environ["TMPDIR"] == str(tmp_path / "chosen")
    assert [entries(tmp_path / name) for name in ("one", "two", "chosen")] == [["engine"], ["engine"], []]
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nothing"))
    with pytest.raises(CompileError, match=r"^output: temporary files cannot be written to .*/nothing: .*set TMPDIR to"):
        write_engine(tmp_path / "three" / "engine")
    assert not (tmp_path / "three").exists()


def test_too_little_room_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, tight = shutil.disk_usage, tmp_path / "tmp"
    tight.mkdir()
    monkeypatch.setenv("TMPDIR", str(tight))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(9, 9, 0) if Path(path) == tight else usage(path))
    with pytest.raises(CompileError, match=r"^output: not enough free space for temporary files \(.*/tmp\): found 0 bytes"):
        write_engine(tmp_path / "engine")
    assert entries(tmp_path) == ["tmp"] and entries(tight) == []


def test_a_signal_during_the_clean_up_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = shutil.rmtree

    def interrupted(folder: Path, ignore_errors: bool) -> None:
        signal.raise_signal(signal.SIGTERM)
        remove(folder, ignore_errors=ignore_errors)

    def fail() -> None:
        monkeypatch.setattr(shutil, "rmtree", interrupted)
        raise ValueError("bad layer")

    with pytest.raises(SystemExit) as ended:
        write_engine(tmp_path / "engine", before=fail)
    assert ended.value.code == 143 and entries(tmp_path) == []


def test_disk_full_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10_000, 9_000, 1_000))
    message = r"^output: not enough free space .*/engine\): found 1000 bytes free, expected 5000 bytes needed; free some space"
    with pytest.raises(CompileError, match=message):
        with EngineWriter(tmp_path / "engine", needed=5_000):
            pytest.fail("the build went on")
    with pytest.raises(CompileError, match=message):
        monkeypatch.undo()
        with EngineWriter(tmp_path / "engine") as writer:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10_000, 9_000, 1_000))
            writer.check_space(5_000)
    assert entries(tmp_path) == []


def test_disk_full_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = r"^output: No space left on device while writing .*: found [0-9]+ bytes free, expected 640 bytes needed"
    with pytest.raises(CompileError, match=message):
        with EngineWriter(tmp_path / "engine", needed=640) as writer:
            monkeypatch.setattr(os, "write", full)
            write_ranks(writer, [payload(tensors())])
    assert entries(tmp_path) == []


def test_a_file_size_limit_ends_like_a_full_disk(tmp_path: Path) -> None:
    script = BUILD.replace('print("ready", flush=True)', "return")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "engine")], cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256)),
    )  # fmt: skip
    assert "CompileError: output: File too large while writing" in done.stderr
    assert entries(tmp_path) == []


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CompileError, match=r"^output: cannot write .*/file/engine: found Not a directory at .*; choose"):
        write_engine(tmp_path / "file" / "engine")


def test_a_manifest_the_runtime_would_refuse_is_not_put_in_place(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"field target\.isas does not fit: found sse9"):
        with EngineWriter(tmp_path / "engine") as writer:
            writer.finish(replace(MANIFEST, target=replace(MANIFEST.target, isas=("sse9",))))
    assert entries(tmp_path) == []


def test_many_builds_of_one_output_at_once_make_one_engine(tmp_path: Path) -> None:
    script = BUILD.replace('print("ready", flush=True)', "return")
    builds = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "engine")], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    errors = [build.communicate(timeout=30)[1] for build in builds]
    assert [build.returncode for build in builds].count(0) == 1
    assert all(not error or "another build is writing" in error or "exists already" in error for error in errors)
    assert entries(tmp_path) == ["engine"]
    verify_files(tmp_path / "engine", read_manifest(tmp_path / "engine"), full=True)


def test_signal_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    write_engine(tmp_path / "engine", before=lambda: time.sleep(0))
    assert signal.getsignal(signal.SIGTERM) is before
