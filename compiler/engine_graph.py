"""The graph of an engine with its weights, read back without its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.compiler import backends
from belle_compile.compiler.backends import Backend, Passes, Repartitionable
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.ir.lazy import lazy
from belle_compile.compiler.ir.text import from_onnx
from belle_compile.compiler.stages import divided
from belle_compile.compiler.unpacking import WholeWeights
from belle_compile.compiler.writer import GRAPH_NAME
from belle_compile.passes.pipeline import FUSION
from belle_compile.passes.presets import UNQUANTIZED
from belle_compile.runtime.artifact import Manifest

if TYPE_CHECKING:
    import onnx_ir as ir

    from belle_compile.passes.base import Pass

_REBUILD = "build it again from its checkpoint"


def reader_of(engine: Path, manifest: Manifest, stage: str) -> Repartitionable:
    """The backend that packed an engine's weights; raises CompileError, in the name of `stage`, where its graph with weights
    cannot be read back."""
    reader = backends.get(manifest.target.backend)
    if not isinstance(reader, Repartitionable):
        found = f"weights of the backend {reader.name}, which cannot be read back"
        raise CompileError(stage, f"engine {engine}", found=found, remedy=_REBUILD)
    _check_graph(engine, manifest, stage)
    return reader


def _check_graph(engine: Path, manifest: Manifest, stage: str) -> None:
    if GRAPH_NAME not in manifest.files:
        raise CompileError(stage, f"engine {engine}", found=f"no {GRAPH_NAME}", remedy=_REBUILD)


def graph_without_values(engine: Path, manifest: Manifest, stage: str) -> ir.Model:
    """The quantized graph of an engine before it was divided and fused, whose weights have no values; raises CompileError, in
    the name of `stage`, for an engine without one."""
    _check_graph(engine, manifest, stage)

    def tensor(name: str, shape: Sequence[int], dtype: ir.DataType) -> ir.TensorProtocol:
        def unread() -> Any:
            raise AssertionError(f"{name} has no values")

        return lazy(name, unread, shape, dtype, sources=[f"{engine}: {name}"])

    return from_onnx((engine / GRAPH_NAME).read_bytes(), tensor)


def graph_of(engine: Path, manifest: Manifest, reader: Repartitionable) -> ir.Model:
    """The quantized graph of an engine before it was divided and fused; weights are unpacked when they are read."""
    weights = WholeWeights(engine, reader)
    graph = from_onnx((engine / GRAPH_NAME).read_bytes(), weights.tensor)
    weights.find(divided(graph, fusions_of(manifest), manifest.target.ranks))
    return graph


def fusions_of(manifest: Manifest, backend: Backend | None = None) -> Sequence[Pass]:
    """The fusing passes that a manifest records; with a backend, only those whose results it can compile."""
    passes = Passes() if backend is None else backend.passes(UNQUANTIZED)
    known = {step.name: step for step in FUSION if passes.carries_fusion(step.name)}
    return [known[record.name] for record in manifest.passes if record.name in known]
