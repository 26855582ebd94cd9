"""What an engine directory is, as one plain object: for `belle-compile inspect`, `verify` and a build's summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from belle_compile.runtime import artifact, host
from belle_compile.runtime.program import Program, read_program
from belle_compile.runtime.schema import to_plain

# Parts of an engine that sizes are summed by: name and what its files end in, first match wins.
_PARTS = (
    ("weights", ".safetensors"),
    ("kernels", ".so"),
    ("kernels", ".zip"),
    ("program", "program.json"),
    ("tokenizer", "tokenizer.json"),
    ("graph", "graph.onnx"),
    ("report", "report.html"),
    ("other", ""),
)


def inspect(directory: str | Path) -> dict[str, Any]:
    """The manifest of the engine in `directory`, with sizes by part and, of an engine for GPUs, its kernels; reads no weights.
    Raises EngineError."""
    manifest = artifact.read_manifest(directory)
    sizes: dict[str, int] = {}
    for path, record in manifest.files.items():
        part = next(part for part, end in _PARTS if path.endswith(end))
        sizes[part] = sizes.get(part, 0) + record.bytes
    plain: dict[str, Any] = to_plain(manifest)
    kernels = {"kernels": _kernels(read_program(Path(directory) / "rank0"))} if manifest.target.is_gpu else {}
    return {"engine": str(directory), "bytes": sum(sizes.values()), "bytes_by_part": sizes, **kernels, **plain}


def _kernels(program: Program) -> dict[str, Any]:
    """Of a GPU: by name, the kind and what the machine code says of itself."""
    kinds = {name: call.kind for call in program.calls for _, name in call.kernels()}
    for name, by_bound in program.alternatives.items():
        kinds |= {other: kinds[name] for others in by_bound.values() for other in others}
    return {name: {"kind": kinds[name]} | to_plain(launch) for name, launch in program.launches.items()}


def verify(directory: str | Path, progress: artifact.Progress | None = None) -> dict[str, Any]:
    """Checks all digests, then that this host can run the engine; raises EngineError at the first thing that is wrong."""
    manifest = artifact.read_manifest(directory)
    artifact.verify_files(directory, manifest, full=True, progress=progress)
    artifact.check_host(manifest)
    has = manifest.target.isas if manifest.target.is_gpu else host.host_isas()  # a GPU is looked at when it is opened
    usable = [isa for isa in has if isa in manifest.target.isas]
    return {
        "engine": str(directory),
        "files": len(manifest.files),
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "isa": usable[0],
    }
