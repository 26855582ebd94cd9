"""The engine directory's manifest: what an engine is, what it needs, and the digest of each of its files.

Compatibility: `format_version` is one integer. A runtime reads the versions in `READABLE_VERSIONS` and no others. Any new,
removed or re-interpreted field makes a new version, so within a version every field must be present and no other may be. Fields
that are `OPTIONAL` are left out at their defaults, and so may be added within a version.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.schema import OPTIONAL, canonical_json, from_plain, json_schema, parse_json, refuse_from, to_plain

FORMAT_VERSION = 3
READABLE_VERSIONS = (3,)
MANIFEST_NAME = "manifest.json"
REPORT_NAME = "report.html"  # for people; an engine runs without it
STAGE = "engine"

# Files up to this size are digested at every load. Of larger ones (the weights) only the size is checked, unless on request.
ALWAYS_DIGESTED_BYTES = 64 << 20
_CHUNK = 4 << 20
_RANK = re.compile(r"rank\d+/")
_REBUILD = "rebuild the engine with belle-compile build"

# Called while digesting: (relative path, bytes of all files digested so far, bytes to digest in total).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ModelInfo:
    """The checkpoint: `dimensions` are the architecture's sizes (hidden_size, num_layers, …), digests are SHA-256 in hex."""

    family: str
    name: str
    parameters: int
    dimensions: dict[str, int]
    source_digests: dict[str, str]


@dataclass(frozen=True)
class Requirements:
    """What a host must have: the machine `arch` as `uname -m` prints it (empty: any), a processor or GPU with one of the
    instruction sets `isa`, and `memory_bytes` of memory, or of the GPU's, for each rank.

    `mapped_bytes` of these are weights that the executor maps from the engine's files. The kernel can take their pages back and
    read them again, so that a host with `resident_bytes` runs the engine, slowly; one with `memory_bytes` reads no file twice.
    """

    arch: str
    isa: tuple[str, ...]
    memory_bytes: int
    mapped_bytes: int = field(default=0, metadata=OPTIONAL)

    @property
    def resident_bytes(self) -> int:
        """The memory of a rank that cannot be read from the engine's files again: cache, activations, and the process."""
        return self.memory_bytes - self.mapped_bytes


@dataclass(frozen=True)
class TargetInfo:
    """The target that an engine is built for: `backend` says which executor runs it, `isas` are the instruction sets it has
    kernels for, best first, and `ranks` is the number of processes that run it together."""

    name: str
    backend: str
    isas: tuple[str, ...]
    requires: Requirements
    ranks: int = 1


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran: its options, the number of its changes, and a sentence on each change it refused to make."""

    name: str
    options: dict[str, Any]
    changes: int
    refusals: tuple[str, ...]


@dataclass(frozen=True)
class KernelCalls:
    """Kernel calls of one step before and after fusion."""

    before: int
    after: int


@dataclass(frozen=True)
class PromptTemplate:
    """A Jinja template over `messages`, `add_generation_prompt`, `bos_token`, `eos_token`."""

    name: str
    jinja: str
    bos_token: str
    eos_token: str


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids. `eos` are all ids that end an answer; with `add_bos`, `bos` is put before every prompt."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    add_bos: bool


@dataclass(frozen=True)
class GenerationDefaults:
    """Values of the sampling parameters that a request leaves open. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and
    min_tokens 0 are off. `stop` ends answers as end-of-sequence tokens do, besides a request's own stop strings."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = field(default=0.0, metadata=OPTIONAL)
    min_tokens: int = field(default=0, metadata=OPTIONAL)
    stop: tuple[str, ...] = field(default=(), metadata=OPTIONAL)


@dataclass(frozen=True)
class FileRecord:
    """A file of the engine: SHA-256 in hex, and its size."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `files` maps POSIX paths below the directory to records of all files but the manifest.

    `digest` is that of the manifest's canonical JSON with an empty `digest`; it is filled in when the manifest is written.
    """

    model: ModelInfo
    target: TargetInfo
    passes: tuple[PassRecord, ...]
    quantization: dict[str, Any]
    kernel_calls: KernelCalls
    prompt_template: PromptTemplate
    special_tokens: SpecialTokens
    generation: GenerationDefaults
    toolchain: dict[str, str]
    files: dict[str, FileRecord]
    accuracy: dict[str, Any] | None = None
    format_version: int = field(default=FORMAT_VERSION)
    digest: str = ""


def manifest_text(manifest: Manifest) -> str:
    """Canonical JSON with the manifest's own digest in it. The same manifest gives the same bytes."""
    return canonical_json(to_plain(replace(manifest, digest=_digest(manifest))))


def _digest(manifest: Manifest) -> str:
    """SHA-256 in hex of the canonical JSON with an empty digest."""
    return hashlib.sha256(canonical_json(to_plain(replace(manifest, digest=""))).encode()).hexdigest()


def manifest_schema() -> dict[str, Any]:
    """JSON Schema of manifest.json."""
    return json_schema(Manifest, "belle-compile engine manifest")


def read_manifest(directory: str | Path) -> Manifest:
    """Read and validate manifest.json.

    Raises `EngineError` when it is missing, malformed, of another version, or was changed after the build. Whether this runtime
    knows the engine's backend is checked by `executors.executor_of`.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        remedy = "give the directory that belle-compile build wrote"
        found = f"no {MANIFEST_NAME}" if Path(directory).exists() else "nothing there"
        raise EngineError(STAGE, f"{directory} is not an engine", found=found, remedy=remedy)
    try:
        plain = parse_json(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError as error:
        raise EngineError(STAGE, f"{path} is not JSON", found=str(error), remedy=_REBUILD) from None
    version = plain.get("format_version") if isinstance(plain, dict) else None
    if type(version) is not int or version not in READABLE_VERSIONS:
        readable = " or ".join(map(str, READABLE_VERSIONS))
        found = "none" if version is None else json.dumps(version)
        remedy = f"{_REBUILD} of this version, or install the runtime that belongs to the engine"
        raise EngineError(STAGE, f"format version of {path}", found=found, expected=readable, remedy=remedy)
    manifest = from_plain(Manifest, plain, refuse_from(f"{STAGE}: {path}", _REBUILD))
    _check_values(manifest, path)
    digest = _digest(manifest)
    if manifest.digest != digest:
        expected, remedy = f"{manifest.digest[:16] or 'none'}...", "copy the engine again or rebuild it"
        what = f"{path} was changed after the build"
        raise EngineError(STAGE, what, found=f"digest {digest[:16]}...", expected=expected, remedy=remedy)
    return manifest


def _check_values(manifest: Manifest, path: Path) -> None:
    """Check what the fields' types do not ensure: paths stay in the directory; digests, sizes and number of ranks are valid."""
    refuse = refuse_from(f"{STAGE}: {path}", _REBUILD)
    for name, record in manifest.files.items():
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or str(pure) != name or name == ".":
            raise refuse("files", f"path {json.dumps(name)}", "a relative path inside the engine directory")
        if len(record.sha256) != 64 or set(record.sha256) - set("0123456789abcdef"):
            raise refuse(f"files.{name}.sha256", json.dumps(record.sha256[:70]), "64 hexadecimal digits")
        if record.bytes < 0:
            raise refuse(f"files.{name}.bytes", str(record.bytes), "a size")
    for name, value, expected, fits in _generation_ranges(manifest.generation):
        if not fits:
            raise refuse(f"generation.{name}", str(value), expected)
    if not all(manifest.generation.stop):
        raise refuse("generation.stop", "an empty text", "texts")
    requires = manifest.target.requires
    if not 0 <= requires.mapped_bytes <= requires.memory_bytes:
        expected = f"0 to {requires.memory_bytes}, the field memory_bytes"
        raise refuse("target.requires.mapped_bytes", str(requires.mapped_bytes), expected)
    if manifest.target.ranks < 1:
        raise refuse("target.ranks", str(manifest.target.ranks), "at least 1")


def _generation_ranges(generation: GenerationDefaults) -> Iterator[tuple[str, float, str, bool]]:
    """Yield name, value, range in words, and whether the value is in it."""
    yield "max_new_tokens", generation.max_new_tokens, "1 or more", generation.max_new_tokens >= 1
    yield "temperature", generation.temperature, "0 or more", 0 <= generation.temperature < math.inf
    yield "top_k", generation.top_k, "0 (off) or more", generation.top_k >= 0
    yield "top_p", generation.top_p, "above 0 and at most 1", 0 < generation.top_p <= 1
    yield "repetition_penalty", generation.repetition_penalty, "above 0", 0 < generation.repetition_penalty < math.inf
    yield "min_p", generation.min_p, "0 (off) to 1", 0 <= generation.min_p <= 1
    yield "min_tokens", generation.min_tokens, "0 (off) or more", generation.min_tokens >= 0


def verify_files(
    directory: str | Path, manifest: Manifest, *, full: bool, progress: Progress | None = None, rank: int | None = None
) -> None:
    """Check that every file of the manifest is a regular file in the directory with its size and digest, and that the directory
    has no code that the manifest does not list. Only the report may be missing. With `rank`, only the files that this rank
    reads are checked.

    Without `full`, files above `ALWAYS_DIGESTED_BYTES` are checked by size only, so that loading reads no weights. Raises
    `EngineError` at the first file that does not fit.
    """
    root = Path(directory).resolve()
    folder = "rank*" if rank is None else f"rank{rank}"
    files = {
        name: record
        for name, record in manifest.files.items()
        if (name != REPORT_NAME or os.path.lexists(root / name))
        and (rank is None or PurePosixPath(name).parts[0] == folder or not _RANK.match(name))
    }
    for name, record in files.items():
        _check_entry(root, name, record)
    # An executor looks for a library by the processor's name, and so might load one that the build did not write.
    for path in sorted([*root.glob(f"{folder}/*.so"), *root.glob(f"{folder}/*.zip")]):
        if (name := str(path.relative_to(root))) not in manifest.files:
            raise EngineError(STAGE, f"file {name} is not in the manifest", remedy="remove it or copy the engine again")
    digested = {name: r for name, r in files.items() if full or r.bytes <= ALWAYS_DIGESTED_BYTES}
    total, done = sum(record.bytes for record in digested.values()), 0
    for name, record in digested.items():
        digest = hashlib.sha256()
        try:
            with open(root / name, "rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress:
                        progress(name, done, total)
        except OSError as error:
            raise _unreadable(root / name, error) from None
        if digest.hexdigest() != record.sha256:
            found, expected = f"SHA-256 {digest.hexdigest()[:12]}…", f"{record.sha256[:12]}…"
            remedy = "the file was changed after the build: copy the engine again or rebuild it"
            raise EngineError(STAGE, f"digest of {name}", found=found, expected=expected, remedy=remedy)


def _unreadable(path: Path, error: OSError) -> EngineError:
    remedy = "let this user read it, or copy the engine again"
    return EngineError(STAGE, f"file {path} cannot be read", found=error.strerror or str(error), remedy=remedy)


def _check_entry(root: Path, name: str, record: FileRecord) -> None:
    """Check that a file is a regular file of its size in the directory."""
    path = root / name
    copy_again = "copy the engine again or rebuild it"
    try:
        entry = path.stat()
    except OSError:
        raise EngineError(STAGE, f"file {name} is missing from {root}", remedy=copy_again) from None
    if not path.resolve().is_relative_to(root):
        raise EngineError(STAGE, f"file {name} is a link out of {root}", found=str(path.resolve()), remedy=copy_again)
    if not stat.S_ISREG(entry.st_mode) or entry.st_size != record.bytes:
        found = f"{entry.st_size} bytes" if stat.S_ISREG(entry.st_mode) else "no regular file"
        raise EngineError(STAGE, f"size of {name}", found=found, expected=f"{record.bytes} bytes", remedy=copy_again)
