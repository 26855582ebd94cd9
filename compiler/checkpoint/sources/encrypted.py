"""BELLE's encrypted releases of LLaMA models: every file is XORed with a file of the original LLaMA, the key.

The layout is that of models/decrypt.py in the BELLE repository. `NAME.SHA256.enc` begins with the 32 bytes of the plaintext's
SHA-256, which is in its name too. Chunks of 10 MiB follow: chunk i is XORed with chunk i modulo n of the n chunks of the key.
Where the key's last chunk is shorter, its bytes repeat within the chunk.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from belle_compile.compiler.checkpoint.sources.base import DIGEST_CHUNK_BYTES, Files
from belle_compile.compiler.checkpoint.tensors import STAGE, Bytes
from belle_compile.compiler.directory import AtomicDirectory
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.lfs import refuse_pointer
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import require_regular

PATTERN = "*.enc"
KEY = "consolidated.00.pth of the original LLaMA-7B, a file of 13,476,939,516 bytes, for releases of every size"
CHUNK_BYTES = 10 << 20
_NAME = re.compile(r"(?P<name>.+)\.(?P<digest>[0-9a-f]{64})\.enc")
_HEADER_BYTES = 32
_BUFFER_BYTES = 1 << 16
_SMALL_BYTES = 8 << 20  # of files that are decrypted when a release is opened: JSON and tokenizer.model
_MOST_SMALL = 32
# How files of weights begin, by their suffix: the place of a byte, and the bytes that may be there.
_ARCHIVE, _ARCHIVE_END, _ARCHIVE_TAIL_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22 + (1 << 16)
_BEGINNINGS: Mapping[str, tuple[int, tuple[bytes, ...]]] = {
    **dict.fromkeys((".bin", ".pt", ".pth"), (0, (_ARCHIVE, b"\x80\x02"))),
    ".safetensors": (8, (b"{",)),
}


@dataclass(frozen=True)
class Key:
    """The file that a release is XORed with, and its size in bytes."""

    path: Path
    size: int

    @property
    def chunks(self) -> int:
        return -(-self.size // CHUNK_BYTES)


@dataclass(frozen=True)
class EncryptedDirectory:
    """A directory in which the encrypted files have the names of their plaintexts; its other files are there as they are."""

    path: Path
    key: Key = field(repr=False)
    encrypted: Mapping[str, Path] = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def parent(self) -> Path:
        return self.path.parent

    @property
    def files(self) -> list[EncryptedFile]:
        return [EncryptedFile(self, name) for name in sorted(self.encrypted)]

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> StoredPath:
        return EncryptedFile(self, name) if name in self.encrypted else self.path / name

    def is_file(self) -> bool:
        return False

    def is_dir(self) -> bool:
        return self.path.is_dir()

    def match(self, pattern: str) -> bool:
        return self.path.match(pattern)

    def glob(self, pattern: str) -> Iterator[StoredPath]:
        yield from (file for file in self.files if fnmatchcase(file.name, pattern))
        yield from (path for path in self.path.glob(pattern) if path.name not in self.encrypted and not path.match(PATTERN))

    def iterdir(self) -> Iterator[StoredPath]:
        return self.glob("*")

    def stat(self) -> os.stat_result:
        return self.path.stat()

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        return self.path.open(mode)


@dataclass(frozen=True)
class EncryptedFile:
    """A file whose readers see the plaintext. str() is the path of the encrypted file.

    A file that is read from its beginning to its end is verified: the last read raises CompileError if the SHA-256 differs.
    """

    parent: EncryptedDirectory
    name: str

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def path(self) -> Path:
        return self.parent.encrypted[self.name]

    @property
    def digest(self) -> str:
        """The SHA-256 that its name states."""
        match = _NAME.fullmatch(self.path.name)
        assert match is not None, f"{self.path} is no encrypted file"
        return match["digest"]

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> StoredPath:
        return self.path / name

    def is_file(self) -> bool:
        return self.path.is_file()

    def is_dir(self) -> bool:
        return False

    def match(self, pattern: str) -> bool:
        return Path(self.name).match(pattern)

    def glob(self, pattern: str) -> Iterator[StoredPath]:
        return iter(())

    def iterdir(self) -> Iterator[StoredPath]:
        return iter(())

    def stat(self) -> os.stat_result:
        """The facts of the encrypted file, but for the size, which is the plaintext's."""
        found = self.path.stat()
        size = max(found.st_size - _HEADER_BYTES, 0)
        return os.stat_result((*found[:6], size, *found[7:10]), {"st_mtime_ns": found.st_mtime_ns})

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        return io.BufferedReader(_Plaintext(self), _BUFFER_BYTES)


class _Plaintext(io.RawIOBase):
    """The plaintext of a file as a stream. It hashes what is read in order, and verifies it at the end."""

    def __init__(self, file: EncryptedFile) -> None:
        self._file, self._size, self._at = file, file.stat().st_size, 0
        self._key = file.parent.key
        self._hash, self._hashed, self._verified = hashlib.sha256(), 0, False
        self._stream = file.path.open("rb", buffering=0)
        try:
            self._key_stream = self._key.path.open("rb", buffering=0)
        except BaseException:
            self._stream.close()
            raise

    def close(self) -> None:
        self._stream.close()
        self._key_stream.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = np.frombuffer(buffer, np.uint8)[: max(self._size - self._at, 0)]
        count = os.preadv(self._stream.fileno(), [data.data], _HEADER_BYTES + self._at) if data.size else 0
        self._decrypt(data[:count])
        if self._hashed == self._at and not self._verified:
            self._hash.update(data[:count].data)
            self._hashed += count
        self._at += count
        if self._hashed == self._size and not self._verified:
            self._verified = True
            if self._hash.hexdigest() != self._file.digest:
                raise _other_contents(self._file, f"SHA-256 {self._hash.hexdigest()}")
        return count

    def _decrypt(self, data: Bytes) -> None:
        """Decrypt the bytes from the stream's place on, in place."""
        done = 0
        while done < data.size:
            number, within = divmod(self._at + done, CHUNK_BYTES)
            start = number % self._key.chunks * CHUNK_BYTES
            own = min(CHUNK_BYTES, self._key.size - start)
            count = min(data.size - done, CHUNK_BYTES - within)
            if own == CHUNK_BYTES:
                data[done : done + count] ^= self._key_bytes(start + within, count)
            else:
                first = within % own
                repeated = np.tile(self._last_chunk, (first + count) // own + 1) if first + count > own else self._last_chunk
                data[done : done + count] ^= repeated[first : first + count]
            done += count

    @cached_property
    def _last_chunk(self) -> Bytes:
        """The last chunk of a key that it is shorter in."""
        start = (self._key.chunks - 1) * CHUNK_BYTES
        return self._key_bytes(start, self._key.size - start)

    def _key_bytes(self, start: int, count: int) -> Bytes:
        data = np.empty(count, np.uint8)
        if os.preadv(self._key_stream.fileno(), [data.data], start) != count:
            remedy = "start again with the whole key"
            raise CompileError(STAGE, f"key {self._key.path}", found="a file that became shorter", remedy=remedy)
        return data


def decrypted(files: Files, key: Path | None) -> Files:
    """The files of an encrypted release, or the one that was given of them, as their readers see them with a key; the files as
    they are without one.

    Decrypts the small files and looks at both ends of the others, so that a wrong key is known at once. Raises CompileError for
    a wrong key and for files that are damaged, as far as these parts show it, and for a release that is not encrypted.
    """
    if key is None:
        return files
    given = Path(str(files.path))
    folder = given if files.directory is not None else given.parent
    paths = sorted(folder.glob(PATTERN))
    if not paths or given not in (folder, *paths):
        found = f"no encrypted file ({PATTERN}) in {files.path}"
        raise CompileError(STAGE, f"--key {key}", found=found, remedy="leave the option out")
    size = require_regular(STAGE, key)
    if not size:
        raise CompileError(STAGE, f"--key {key}", found="an empty file", expected=KEY, remedy="download it again")
    directory = EncryptedDirectory(folder, Key(key, size), _by_plain_name(paths))
    for file in directory.files:
        _check_header(file)
    weights = [file for file in directory.files if file.suffix in _BEGINNINGS]
    _check_small([file for file in directory.files if file not in weights and file.stat().st_size <= _SMALL_BYTES])
    for file in weights:
        _check_ends(file)
    note = f"{len(paths)} files were decrypted with {key.name} while they were read; digests are those of the plaintexts"
    alone = next((file for file in directory.files if file.path == given), None)
    return replace(files, path=alone or directory, notes=(*files.notes, note))


def _by_plain_name(paths: Sequence[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in paths:
        match = _NAME.fullmatch(path.name)
        if match is None or match["name"] in named:
            found = f"{named[match['name']].name} of the same name" if match else "a name without the SHA-256 of the plaintext"
            remedy = "keep only the files of one release in the directory"
            raise CompileError(
                STAGE, f"file {path}", found=found, expected="NAME.SHA256.enc, once for each NAME", remedy=remedy
            )
        named[match["name"]] = path
    return named


def _check_header(file: EncryptedFile) -> None:
    """Raise CompileError for a file whose first bytes are not the SHA-256 in its name."""
    refuse_pointer(file.path)
    with file.path.open("rb") as stream:
        stated = stream.read(_HEADER_BYTES).hex()
    if stated != file.digest:
        found = f"a header with the SHA-256 {stated}" if len(stated) == 2 * _HEADER_BYTES else "a file without a whole header"
        expected, remedy = "the SHA-256 in its name", "it is truncated or renamed: download it again"
        raise CompileError(STAGE, f"file {file}", found=found, expected=expected, remedy=remedy)


def _check_small(files: Sequence[EncryptedFile]) -> None:
    """Decrypt small files, the smallest ones first; raises CompileError for one with other contents than its name says."""
    for file in sorted(files, key=lambda file: (file.stat().st_size, file.name))[:_MOST_SMALL]:
        with file.open("rb") as stream:
            stream.read()


def _check_ends(file: EncryptedFile) -> None:
    """Raise CompileError for weights that do not begin, or end, as files of their kind do."""
    place, beginnings = _BEGINNINGS[file.suffix]
    with file.open("rb") as stream:
        stream.seek(place)
        start = stream.read(max(map(len, beginnings)))
        if not start.startswith(beginnings):
            raise _other_contents(file, f"{start.hex()} at byte {place}")
        if start == _ARCHIVE:
            stream.seek(max(file.stat().st_size - _ARCHIVE_TAIL_BYTES, 0))
            if _ARCHIVE_END not in stream.read():
                raise _other_contents(file, "no end of an archive")


def _other_contents(file: EncryptedFile, found: str) -> CompileError:
    key = file.parent.key
    return CompileError(
        STAGE,
        f"file {file}",
        found=f"with the key {key.path} of {key.size:,} bytes, {found}",
        expected=f"{file.name} with the SHA-256 {file.digest}",
        remedy=f"give the key of the release with --key: {KEY}; if that is it, download the file again",
    )


@contextmanager
def naming_key(files: Files) -> Iterator[None]:
    """Let errors that the `with` block raises about encrypted weights name the key. Before a file is read in whole, nobody can
    tell whether it is damaged or the key is a wrong one: files of PyTorch begin alike, and so do their differences from a key
    that is one."""
    try:
        yield
    except CompileError as error:
        place = files.path
        directory = place.parent if isinstance(place, EncryptedFile) else place
        if not isinstance(directory, EncryptedDirectory) or str(directory.key.path) in error.found:
            raise
        if not any(str(file) in error.what for file in directory.files if file.suffix in _BEGINNINGS):
            raise
        found = f"with the key {directory.key.path} of {directory.key.size:,} bytes, {error.found}"
        remedy = f"give the key of the release with --key: {KEY}; if that is it, {error.remedy or 'download the file again'}"
        raise CompileError(error.stage, error.what, found=found, expected=error.expected, remedy=remedy) from error


def save_decrypted(
    directory: StoredPath, out: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write the plaintexts of an encrypted release to a new directory, whole or not at all. `on_progress` is called with the
    bytes written so far and those of the whole release.

    Raises CompileError for files whose SHA-256 is another than their names state, and for a directory that exists or cannot be
    written.
    """
    if isinstance(directory, EncryptedFile):
        directory = directory.parent
    assert isinstance(directory, EncryptedDirectory), f"{directory} is no encrypted release"
    needed = sum(file.stat().st_size for file in directory.files)
    done = 0
    with AtomicDirectory(out, needed=needed, kind="decrypted release", option="--save-decrypted") as made:
        for file in directory.files:
            with file.open("rb") as plain:
                try:
                    with (made.path / file.name).open("xb") as written:
                        while chunk := plain.read(DIGEST_CHUNK_BYTES):
                            written.write(chunk)
                            done += len(chunk)
                            on_progress(done, needed)
                        written.flush()
                        os.fsync(written.fileno())
                except OSError as error:
                    raise made.explain(error) from error
        made.commit()
