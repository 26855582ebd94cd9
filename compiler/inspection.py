"""Descriptions of engine directories as plain objects: for `belle-compile inspect`, `verify` and a build's summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from belle_compile.runtime import artifact
from belle_compile.runtime.executors import executor_of
from belle_compile.runtime.schema import to_plain
from belle_compile.runtime.selftest import SELF_TEST_NAME, read_golden_answers

# Parts of an engine over which file sizes are summed: a name and the ending of its files; the first match wins.
_PARTS = (
    ("weights", ".safetensors"),
    ("kernels", ".so"),
    ("kernels", ".zip"),
    ("plan", ".plan"),
    ("program", "program.json"),
    ("module", ".ts"),
    ("tokenizer", "tokenizer.json"),
    ("graph", "graph.onnx"),
    ("report", "report.html"),
    ("self-test", SELF_TEST_NAME),
    ("other", ""),
)


def inspect(directory: str | Path) -> dict[str, Any]:
    """The manifest of the engine in `directory`, with the sizes of its parts, the size of its self-test, and its kernels or
    layers where its backend describes them; reads no weights. Raises EngineError if the directory has no valid manifest."""
    manifest = artifact.read_manifest(directory)
    sizes: dict[str, int] = {}
    for path, record in manifest.files.items():
        part = next(part for part, end in _PARTS if path.endswith(end))
        sizes[part] = sizes.get(part, 0) + record.bytes
    plain: dict[str, Any] = to_plain(manifest)
    kernels = executor_of(manifest).kernels(Path(directory) / "rank0")
    layers = executor_of(manifest).layers(Path(directory) / "rank0")
    reported = ({"kernels": kernels} if kernels else {}) | ({"layers": layers} if layers else {})
    golden = read_golden_answers(Path(directory), manifest)
    self_test = {"prompts": len(golden.answers), "tokens": golden.tokens, "reason": golden.reason}
    described = {"engine": str(directory), "bytes": sum(sizes.values()), "bytes_by_part": sizes, "self_test": self_test}
    return described | reported | plain


def verify(directory: str | Path, progress: artifact.Progress | None = None) -> dict[str, Any]:
    """Check all digests, then that this host can run the engine; raises EngineError for the first check that fails."""
    manifest = artifact.read_manifest(directory)
    artifact.verify_files(directory, manifest, full=True, progress=progress)
    isa = executor_of(manifest).try_host(manifest.target)
    return {
        "engine": str(directory),
        "files": len(manifest.files),
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "isa": isa,
    }
