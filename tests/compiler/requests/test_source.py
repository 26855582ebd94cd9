"""Lines of plain and compressed files; damage is an error that says where."""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.requests.source import Source

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LINES = [f"line {number} 你好".encode() for number in range(1, 2001)]
CONTENT = b"\n".join(LINES) + b"\n"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd.compress}


def lines_of(path: Path) -> list[bytes]:
    return [line for _, line in Source(path).lines()]


@pytest.mark.parametrize("kind", ["", "gz", "zst"])
def test_lines_and_digest(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"requests.jsonl{kind and '.'}{kind}"
    path.write_bytes(COMPRESS[kind](CONTENT) if kind else CONTENT)
    heard: list[tuple[int, int]] = []
    source = Source(path, lambda done, total: heard.append((done, total)))
    found = list(source.lines())
    assert found == list(enumerate(LINES, 1))
    assert source.suffix == ".jsonl"
    size = path.stat().st_size
    assert (source.bytes, source.sha256) == (size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert heard[-1] == (size, size) and [done for done, _ in heard] == sorted(done for done, _ in heard)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_parts_one_after_the_other_are_one_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(COMPRESS[kind](b"a\nb") + COMPRESS[kind](b"c\n"))
    assert lines_of(path) == [b"a", b"bc"]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_is_known_by_its_content(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(COMPRESS[kind](CONTENT))
    assert lines_of(path) == LINES


@pytest.mark.parametrize(("kind", "name"), [("gz", "gzip"), ("zst", "zstd")])
def test_a_file_that_was_cut_off(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(COMPRESS[kind](CONTENT)[:-3])
    with pytest.raises(
        CompileError, match=rf"^calibration: .*: found the end of the file amid its {name} data, after line \d+"
    ):
        lines_of(path)


def test_damage(tmp_path: Path) -> None:
    damaged = bytearray(gzip.compress(CONTENT))
    damaged[-6] ^= 1  # of the checksum
    (tmp_path / "x.gz").write_bytes(damaged)
    with pytest.raises(CompileError, match=r"found damaged gzip data after line 2000 .*expected an intact gzip file"):
        lines_of(tmp_path / "x.gz")
    (tmp_path / "x.zst").write_bytes(zstd.compress(CONTENT)[:4] + b"\xff" * 40)
    with pytest.raises(CompileError, match=r"found damaged zstd data after line 0"):
        lines_of(tmp_path / "x.zst")


@pytest.mark.parametrize(("suffix", "name"), [("gz", "gzip"), ("zst", "zstd")])
def test_a_name_that_promises_compression(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"x.jsonl.{suffix}"
    path.write_bytes(CONTENT)
    with pytest.raises(CompileError, match=rf"found a file named \.{suffix} that does not begin as {name} does"):
        lines_of(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"missing\.jsonl: found nothing there, expected a file of requests; check the path"):
        lines_of(tmp_path / "missing.jsonl")
    with pytest.raises(CompileError, match=r"found a directory, expected a file of requests"):
        lines_of(tmp_path)


def test_line_breaks_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\xe2\x80\xa8still two")
    assert lines_of(path) == [b"one", b"", "two\u2028still two".encode()]


def test_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("belle_compile.compiler.requests.source._LONGEST_LINE", 10)
    path = tmp_path / "x.txt"
    path.write_bytes(b"0123456789"[:9] + b"\n" + b"x" * 11)
    with pytest.raises(CompileError, match=r"line 2 of .*: found more than 16 MiB, expected one request a line"):
        lines_of(path)


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    compressed = gzip.compress(CONTENT)
    writer = threading.Thread(target=path.write_bytes, args=(compressed,))
    writer.start()
    source = Source(path)
    assert [line for _, line in source.lines()] == LINES
    writer.join()
    assert (source.bytes, source.sha256) == (len(compressed), hashlib.sha256(compressed).hexdigest())
