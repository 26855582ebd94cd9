"""Write the directory of a calibration set, whole or not at all, and open one with its digests checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from belle_compile import __version__
from belle_compile.compiler.directory import AtomicDirectory
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.reading import DECRYPT, PLAIN, Reading
from belle_compile.compiler.requests.coverage import coverage_report
from belle_compile.compiler.requests.page import coverage_page
from belle_compile.compiler.requests.reader import Fields, RequestFile
from belle_compile.compiler.requests.request import STAGE, Request
from belle_compile.compiler.requests.selection import Selection, SelectOptions, select
from belle_compile.compiler.requests.units import Units, open_units
from belle_compile.compiler.untrusted import explained, parse_bounded, read_bounded
from belle_compile.runtime.schema import canonical_json, parse_json, to_plain

FORMAT_VERSION = 1
SET_NAME = "set.json"
CALIBRATION, HOLDOUT = "calibration.jsonl", "holdout.jsonl"
_MOST_BYTES = 1 << 30  # of a file of a set
_AGAIN = "copy the set again or make it anew with belle-compile calibrate-set"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CalibrationSet:
    """Requests to calibrate with (`calibration`), and requests that the accuracy gate runs (`holdout`).

    `digest` is the SHA-256 of the output of `sha256sum calibration.jsonl holdout.jsonl`. It identifies the requests of both
    parts, whether they were read from a set or selected from a file in this process. `description` is the content of set.json.
    """

    calibration: tuple[Request, ...]
    holdout: tuple[Request, ...]
    digest: str
    description: Mapping[str, Any]


def write_set(
    source: str | Path,
    output: str | Path,
    options: SelectOptions | None = None,
    *,
    field: str | None = None,
    answer: str | None = None,
    tokenizer: str | Path | None = None,
    reading: Reading = PLAIN,
    force: bool = False,
    on_progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Select requests from the file `source` and write the directory `output`; returns the content of set.json with `coverage`.

    The same source, options and version give the same bytes. Raises CompileError for a file whose content is not requests and
    for an output that cannot be written; nothing is left behind then.
    """
    with AtomicDirectory(Path(output), replace=force, replaceable=is_set, kind="calibration set", marker=SET_NAME) as directory:
        made = _Made.from_file(source, options or SelectOptions(), field, answer, tokenizer, reading, on_progress)
        contents = made.contents | {
            "coverage.json": canonical_json(made.coverage).encode(),
            "coverage.html": coverage_page(made.coverage, made.description).encode(),
            SET_NAME: canonical_json(made.description).encode(),
        }
        directory.check_space(sum(map(len, contents.values())))
        try:
            for name, content in contents.items():
                _write(directory.path / name, content)
        except OSError as error:
            raise directory.explain(error) from error
        directory.commit()
    return {**made.description, "coverage": made.coverage}


def open_set(
    path: str | Path,
    options: SelectOptions | None = None,
    *,
    field: str | None = None,
    answer: str | None = None,
    tokenizer: str | Path | None = None,
    reading: Reading = PLAIN,
    on_progress: Progress = lambda stage, done, total: None,
) -> CalibrationSet:
    """Open the set in a directory, or select one in memory from a file of requests.

    The arguments after the path are used for a file only. Raises CompileError for a directory that is not a set, that has
    another format or that was changed after it was written, and for a file whose content is not requests.
    """
    path = Path(path)
    if path.is_dir():
        return _read_set(path)
    made = _Made.from_file(path, options or SelectOptions(), field, answer, tokenizer, reading, on_progress)
    selection = made.selection
    return CalibrationSet(selection.calibration, selection.holdout, made.description["digest"], made.description)


def set_of(calibration: Sequence[Request], holdout: Sequence[Request], description: Mapping[str, Any]) -> CalibrationSet:
    """A set of requests that are in memory, with the digest that its directory would have."""
    contents = {CALIBRATION: _lines(calibration), HOLDOUT: _lines(holdout)}
    digest = _digest({name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})
    return CalibrationSet(tuple(calibration), tuple(holdout), digest, description)


def is_set(path: Path) -> bool:
    """Whether `path` is a directory that `write_set` made, in this or another format."""
    try:
        plain = parse_json((path / SET_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(plain, dict) and type(plain.get("format_version")) is int and type(plain.get("digest")) is str


@dataclass(frozen=True)
class _Made:
    """A selection, its two files, the content of set.json, and the coverage report."""

    selection: Selection
    contents: dict[str, bytes]
    description: dict[str, Any]
    coverage: dict[str, Any]

    @classmethod
    def from_file(
        cls,
        source: str | Path,
        options: SelectOptions,
        field: str | None,
        answer: str | None,
        tokenizer: str | Path | None,
        reading: Reading,
        on_progress: Progress,
    ) -> _Made:
        units = open_units(tokenizer, reading, partial(on_progress, DECRYPT))
        fields = Fields(field, answer, options.labels)
        file = RequestFile(source, fields, lambda done, total: on_progress("read", done, total))
        selection = select(file, options, units)
        on_progress("report", 0, 0)
        contents = {CALIBRATION: _lines(selection.calibration), HOLDOUT: _lines(selection.holdout)}
        coverage = coverage_report(selection, options, units)
        return cls(selection, contents, _description(file, fields, options, units, contents, coverage), coverage)


def _description(
    file: RequestFile,
    fields: Fields,
    options: SelectOptions,
    units: Units,
    contents: Mapping[str, bytes],
    coverage: Mapping[str, Any],
) -> dict[str, Any]:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return {
        "format_version": FORMAT_VERSION,
        "made_by": f"belle-compile {__version__}",
        "digest": _digest(digests),
        "files": {name: {"sha256": digests[name], "bytes": len(content)} for name, content in contents.items()},
        "source": {"name": file.name, "sha256": file.sha256, "bytes": file.bytes},
        "options": {**to_plain(options), "field": fields.request, "answer": fields.answer, "tokenizer": units.source},
        "requests": coverage["requests"],
        "dropped": coverage["dropped"],
        "redacted": coverage["redacted"],
    }


def _digest(digests: Mapping[str, str]) -> str:
    listing = "".join(f"{digests[name]}  {name}\n" for name in (CALIBRATION, HOLDOUT))
    return hashlib.sha256(listing.encode()).hexdigest()


def _lines(requests: Sequence[Request]) -> bytes:
    return "".join(f"{request.to_json()}\n" for request in requests).encode()


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)


def _read_set(directory: Path) -> CalibrationSet:
    description = _read_description(directory)
    requests: dict[str, tuple[Request, ...]] = {}
    digests: dict[str, str] = {}
    for name in (CALIBRATION, HOLDOUT):
        if not (directory / name).exists():
            raise CompileError(STAGE, f"{directory} is incomplete", found=f"no {name}", remedy=_AGAIN)
        content = read_bounded(STAGE, directory / name, _MOST_BYTES)
        digests[name] = hashlib.sha256(content).hexdigest()
        stated = description["files"][name]["sha256"]
        if digests[name] != stated:
            found, expected = f"digest {digests[name][:16]}...", f"{str(stated)[:16]}... as in {SET_NAME}"
            what = f"{directory / name} was changed after the set was made"
            raise CompileError(STAGE, what, found=found, expected=expected, remedy=_AGAIN)
        with explained(
            STAGE, f"requests of {directory / name}", expected="requests as calibrate-set writes them", remedy=_AGAIN
        ):
            requests[name] = tuple(Request.from_json(line) for line in content.splitlines())
    digest = _digest(digests)
    if description["digest"] != digest:
        found, expected = f"digest {str(description['digest'])[:16]}...", f"{digest[:16]}..."
        what = f"{directory / SET_NAME} was changed after the set was made"
        raise CompileError(STAGE, what, found=found, expected=expected, remedy=_AGAIN)
    return CalibrationSet(requests[CALIBRATION], requests[HOLDOUT], digest, description)


def _read_description(directory: Path) -> dict[str, Any]:
    path = directory / SET_NAME
    if not path.is_file():
        remedy = "give a directory that belle-compile calibrate-set wrote, or a file of requests"
        raise CompileError(STAGE, f"{directory} is not a calibration set", found=f"no {SET_NAME}", remedy=remedy)
    try:
        description = parse_bounded(read_bounded(STAGE, path, _MOST_BYTES))
        version = description["format_version"]
        named = [description["files"][name]["sha256"] for name in (CALIBRATION, HOLDOUT)]
        fits = all(isinstance(name, str) for name in (*named, description["digest"]))
    except (ValueError, KeyError, TypeError):
        fits, version = False, FORMAT_VERSION
    if version != FORMAT_VERSION:
        remedy = "make the set anew with this version's belle-compile calibrate-set"
        raise CompileError(STAGE, f"format of {path}", found=str(version), expected=str(FORMAT_VERSION), remedy=remedy)
    if not fits:
        raise CompileError(STAGE, str(path), found="something else", expected="the description of a set", remedy=_AGAIN)
    plain: dict[str, Any] = description
    return plain
