"""Change what an engine's manifest says without building the engine again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence, Set
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from belle_compile.compiler.directory import AtomicDirectory
from belle_compile.compiler.engine_directory import is_engine
from belle_compile.compiler.generation import changed_defaults
from belle_compile.compiler.report import REPORT_NAME, with_generation
from belle_compile.runtime.artifact import MANIFEST_NAME, FileRecord, Manifest, manifest_text, read_manifest


def edit(engine: Path, generation: Sequence[str]) -> tuple[Manifest, list[str]]:
    """Change the generation defaults of an engine (see `changed_defaults`); returns its new manifest and notes.

    The digest becomes that of the new manifest, so that no cached answer of the old defaults is taken for one of the new. The
    report shows the new defaults. The engine is replaced in one step by a directory whose other files are the same ones, by
    hard links where the file system has them. Raises EngineError for a directory that is no engine, and CompileError for
    changes that cannot be made.
    """
    engine = engine.resolve()
    manifest = read_manifest(engine)
    defaults, notes = changed_defaults(manifest.generation, generation)
    changed = replace(manifest, generation=defaults)
    rewritten = {}
    if REPORT_NAME in manifest.files and (engine / REPORT_NAME).is_file():
        page = with_generation((engine / REPORT_NAME).read_text(encoding="utf-8"), manifest.generation, defaults)
        if page is None:
            notes.append(f"{REPORT_NAME} still shows the defaults of the build")
        else:
            rewritten[REPORT_NAME] = page.encode()
            record = FileRecord(sha256(rewritten[REPORT_NAME]).hexdigest(), len(rewritten[REPORT_NAME]))
            changed = replace(changed, files={**manifest.files, REPORT_NAME: record})
    rewritten[MANIFEST_NAME] = manifest_text(changed).encode()
    with AtomicDirectory(engine, replace=True, replaceable=is_engine) as directory:
        try:
            _link_files(engine, directory.path, without=rewritten.keys())
            for name, content in rewritten.items():
                _write(directory.path / name, content)
        except OSError as error:
            raise directory.explain(error) from error
        new = read_manifest(directory.path)
        directory.commit()
    return new, notes


def _link_files(old: Path, new: Path, *, without: Set[str]) -> None:
    """Put every file below `old` at the same place below `new`, but those named at the top."""
    for folder, _, names in os.walk(old):
        relative = Path(folder).relative_to(old)
        if relative != Path():
            shutil.copystat(folder, _made(new / relative))
        for name in names:
            if relative == Path() and name in without:
                continue
            source, target = Path(folder, name), new / relative / name
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(source, target, follow_symlinks=False)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _write(path: Path, content: bytes) -> None:
    """Write a new file and sync it to the disk."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
