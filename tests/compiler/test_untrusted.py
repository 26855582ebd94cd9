"""Exceptions of readers become sentences, and sizes are checked before anything is read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tokenizers import normalizers

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.untrusted import explained, parse_bounded, read_bounded, require_regular
from belle_compile.runtime.errors import EngineError


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (PermissionError(errno.EACCES, "whatever the host's language"), "Permission denied"),
        (MemoryError(), "sizes that exceed the memory"),
        (RecursionError("maximum recursion depth"), "values nested too deeply"),
        (UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "invalid start byte"), "text that is no utf-8 at byte 2"),
        (KeyError("shape"), r"values that do not fit \(KeyError: 'shape'\)"),
        (ZeroDivisionError(), r"values that do not fit \(ZeroDivisionError\)"),
        (ValueError("the magic number is wrong.\nadvice"), "the magic number is wrong"),
        (Exception(), "Exception"),
        (ValueError("a" * 1000), r"a{197}\.\.\."),
    ],
)
def test_reasons(error: Exception, found: str) -> None:
    with pytest.raises(CompileError, match=rf"^reading: file x: found {found}, expected y; z\.$") as raised:
        with explained("reading", "file x", expected="y", remedy="z"):
            raise error
    assert raised.value.__cause__ is error


def test_a_reason_stands_in_brackets_after_what_was_found() -> None:
    with pytest.raises(CompileError, match=r"found a file of 3 bytes \(no magic\), expected"):
        with explained("reading", "file x", found="a file of 3 bytes", expected="y"):
            raise ValueError("no magic")


def test_a_panic_is_a_sentence() -> None:
    with pytest.raises(CompileError, match="file x"):
        with explained("reading", "file x", expected="y"):
            normalizers.Precompiled(b"\x01")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), EngineError("a", "b"), CompileError("a", "b")])
def test_what_ends_the_program_and_what_is_a_sentence_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised:
        with explained("reading", "file x", expected="y"):
            raise error
    assert raised.value is error


def test_files_are_bounded_and_regular(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"four")
    assert require_regular("reading", file) == 4 and read_bounded("reading", file, 4) == b"four"
    with pytest.raises(CompileError, match="found 4 bytes, expected at most 3"):
        read_bounded("reading", file, 3)
    with pytest.raises(CompileError, match="found a directory, expected a regular file"):
        require_regular("reading", tmp_path)
    with pytest.raises(CompileError, match="found No such file or directory"):
        require_regular("reading", tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CompileError, match="found a named pipe"):
        read_bounded("reading", tmp_path / "pipe", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" + b"[]," * (1 << 20) + b"0]", "more than 1048576 lists"),
        (b"[" + b"{}," * (1 << 20) + b"{}]", "more than 1048576 objects"),
        (b"[" + b"0," * (1 << 22) + b"0,0]", "more than 4194304 values"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": \xff}', "utf-8"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_json_is_bounded(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_bounded(text)
