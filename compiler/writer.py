"""Write an engine directory: files with their digests, weights one tensor at a time, the manifest last."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import TracebackType

from belle_compile.compiler.backends.base import PackedTensor, Payload, tensor_bytes
from belle_compile.compiler.backends.packed import packed_bytes
from belle_compile.compiler.backends.weights_header import weights_header
from belle_compile.compiler.directory import AtomicDirectory
from belle_compile.compiler.engine_directory import output_directory
from belle_compile.compiler.ir.lazy import wholes_kept
from belle_compile.compiler.temporary import TemporaryFiles
from belle_compile.runtime.artifact import MANIFEST_NAME, FileRecord, Manifest, manifest_text, read_manifest
from belle_compile.runtime.executors import executor_of
from belle_compile.runtime.program import WEIGHTS_NAME

TEMPORARY = ".temporary"  # folder of the directory under construction, gone before that is complete
GRAPH_NAME = "graph.onnx"  # the quantized graph before it is divided among ranks and fused, without weights
# Bytes that one system call writes, at multiples of this size: the file cache then holds them in contiguous pages, which are
# mapped as huge pages.
_CHUNK = 8 << 20


class EngineWriter:
    """Writes an engine: `with EngineWriter(out) as writer:` write files and tensors, then `writer.finish(manifest)`.

    Nothing appears at `out` before `finish`, and leaving the block without it leaves nothing (see `AtomicDirectory`).
    With `force`, an existing engine is replaced, but not before the new one is complete. The same calls give the same bytes and
    the same permissions: 0644 for files, 0755 for directories.
    """

    def __init__(self, out: str | Path, *, force: bool = False, needed: int = 0) -> None:
        self._directory = output_directory(out, force=force, needed=needed)
        self._temporary = TemporaryFiles(self._directory.path / TEMPORARY)
        self.files: dict[str, FileRecord] = {}

    def __enter__(self) -> EngineWriter:
        self._directory.__enter__()
        try:
            self._temporary.open()
        except BaseException as error:
            self._directory.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._temporary.close()
        finally:
            self._directory.__exit__(kind, error, trace)

    def check_space(self, needed: int) -> None:
        """Raise CompileError where the output's file system has fewer than `needed` bytes free."""
        self._directory.check_space(needed)

    def write(self, path: str, content: bytes | memoryview) -> None:
        """Write one file; `path` is relative to the engine, with "/" between its parts."""
        with _File(self._directory, path) as file:
            file.write(content)
        self.files[path] = file.entry()

    @contextmanager
    def tensor_file(self, path: str, tensors: Sequence[PackedTensor]) -> Iterator[Callable[[PackedTensor], None]]:
        """Open a safetensors file; several may be open at a time. Yields a function that packs and writes one tensor, to be
        called for each of `tensors` in order.

        Every tensor starts at a multiple of 64 bytes of the file, so that kernels can use a mapped file: the header is padded
        with spaces, and the sizes of tensors must be multiples of 64, since the format allows no holes."""
        with _File(self._directory, path) as file:
            file.write(weights_header(tensors))

            expected = iter(tensors)

            def write(tensor: PackedTensor) -> None:
                assert tensor is next(expected), f"{tensor.name} is not next in the header of {path}"
                file.write(packed_bytes(tensor))

            yield write
        self.files[path] = file.entry()

    def draft(self, manifest: Manifest) -> Path:
        """Write a preliminary manifest, which `finish` replaces, and return the directory under construction, which the runtime
        can then load."""
        draft = self._directory.path / MANIFEST_NAME
        draft.write_text(manifest_text(self._complete(manifest)), encoding="utf-8")
        return self._directory.path

    def finish(self, manifest: Manifest) -> Path:
        """Write manifest.json with the records of all files written so far, and put the engine in place; returns its path."""
        complete = self._complete(manifest)
        (self._directory.path / MANIFEST_NAME).unlink(missing_ok=True)
        self.write(MANIFEST_NAME, manifest_text(complete).encode())
        executor_of(read_manifest(self._directory.path))  # raises what the runtime would raise for a manifest that it refuses
        self._temporary.close()
        self._directory.commit()
        return self._directory.out

    def _complete(self, manifest: Manifest) -> Manifest:
        return replace(manifest, files=dict(sorted(self.files.items())))


def write_ranks(
    writer: EngineWriter, ranks: Sequence[Payload], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write the directory of each rank; `on_progress` is called with the bytes of weights written so far and in all."""
    for number, rank in enumerate(ranks):
        for name, content in sorted(rank.files.items()):
            writer.write(f"rank{number}/{name}", content)
    _write_weights(writer, ranks, on_progress)


def _write_weights(writer: EngineWriter, ranks: Sequence[Payload], on_progress: Callable[[int, int], None]) -> None:
    """Write the weights of all ranks side by side, one group of tensors after the other. A tensor of which several ranks have a
    part is then computed once, and no more memory is needed than for one rank."""
    done, total = 0, sum(tensor_bytes(tensor) for rank in ranks for tensor in rank.tensors)
    with ExitStack() as files:
        writes = [
            files.enter_context(writer.tensor_file(f"rank{number}/{WEIGHTS_NAME}", rank.tensors))
            for number, rank in enumerate(ranks)
            if rank.tensors
        ]
        for groups in zip(*(rank.weights for rank in ranks if rank.tensors), strict=True):
            with wholes_kept() if len(ranks) > 1 else nullcontext():
                for write, tensors in zip(writes, groups, strict=True):
                    for tensor in tensors:
                        write(tensor)
                        done += tensor_bytes(tensor)
                        on_progress(done, total)


class _File:
    """A new file below the directory under construction. It is hashed as it is written, and synced to the disk when closed."""

    def __init__(self, directory: AtomicDirectory, path: str) -> None:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts:
            raise AssertionError(f"{path!r} is not a path below the engine directory")
        self._directory, self._path = directory, directory.path.joinpath(*parts)
        self._hash, self._bytes = hashlib.sha256(), 0
        self._waiting = bytearray()

    def __enter__(self) -> _File:
        try:
            if not self._path.parent.exists():
                self._path.parent.mkdir(parents=True)
                self._path.parent.chmod(0o755)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            os.fchmod(self._descriptor, 0o644)
        except OSError as error:
            raise self._directory.explain(error) from error
        return self

    def write(self, content: bytes | memoryview) -> None:
        rest = memoryview(content)
        self._hash.update(rest)
        self._bytes += len(rest)
        while rest:
            taken = rest[: _CHUNK - len(self._waiting)]
            self._waiting += taken
            rest = rest[len(taken) :]
            if len(self._waiting) == _CHUNK:
                try:
                    self._flush()
                except OSError as error:
                    raise self._directory.explain(error) from error

    def _flush(self) -> None:
        done = 0
        while done < len(self._waiting):
            done += os.write(self._descriptor, memoryview(self._waiting)[done:])
        self._waiting.clear()

    def entry(self) -> FileRecord:
        return FileRecord(self._hash.hexdigest(), self._bytes)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            try:
                if error is None:
                    self._flush()
                    os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)
        except OSError as failure:
            raise self._directory.explain(failure) from failure
