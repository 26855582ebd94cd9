"""The folder beside an output that holds what calibration found, so that the next build of that output goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from belle_compile.passes.calibration.state import STATE_NAME


def folder_of(output: Path) -> Path:
    """The folder for intermediate results of calibration of a build of `output`."""
    return output.parent / f".{output.name}.calibration"


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """The folder for intermediate results. It is removed when the build succeeds. What was finished stays when the build fails,
    misses a limit of the gate, or is stopped; everything else in it is removed, and with nothing finished the folder too."""
    folder = folder_of(output)
    try:
        yield folder
    except BaseException:
        _keep_finished(folder)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def keep_report(path: Path, report: bytes) -> str:
    """Write the report of an engine that missed a limit to `path` in the folder; returns a phrase that says what stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(report)
    return "; ".join(filter(None, (kept_words(path.parent), f"the report is {path}")))


def kept_result(folder: Path, key: str) -> dict[str, Any] | None:
    """The result that `keep_result` kept in `folder` with this key; None if there is none."""
    try:
        state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state["result"] if isinstance(state, dict) and state.get("key") == key else None


def keep_result(folder: Path, key: str, result: dict[str, Any]) -> None:
    """Keep a result for the next build, in place of one with another key."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = (folder / STATE_NAME).with_suffix(".new")
    fresh.write_text(json.dumps({"key": key, "result": result}, ensure_ascii=False), encoding="utf-8")
    fresh.replace(folder / STATE_NAME)


def kept_words(folder: Path) -> str:
    """A phrase that says what a build that ended early keeps, and how to go on; empty if it keeps nothing."""
    if not any(folder.glob(f"*/{STATE_NAME}")):
        return ""
    return f"calibration is kept in {folder}, and the next build of the same output continues from it"


def _keep_finished(folder: Path) -> None:
    """Remove what no later build reads: activations of runs that have no state."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not (entry / STATE_NAME).is_file():
            shutil.rmtree(entry, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()  # unless something is left
