"""GGUF: Q8_0 for llama.cpp, with a scale for each block, or with the integers of engines and the scales of their channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.compiler.exports.base import BLOCK, CHANNEL, Carries, Format, Simulation
from belle_compile.passes.presets import BLOCK as Q8_0_BLOCK
from belle_compile.passes.presets import INT8

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from belle_compile.compiler.exports.model import ExportedModel
    from belle_compile.compiler.exports.runtimes import ForeignRuntime


class Gguf(Format):
    """All matrices are Q8_0: blocks of 32 integers with a float16 scale each, which is that of the output channel where scales
    are those of channels. Norms and biases are float32. llama.cpp rounds activations to 8 bits in blocks of 32 while running,
    so that outliers harm their neighbours only: reordered and smoothed channels lose less there than rotated ones.
    """

    name = "gguf"
    summary = "Q8_0 for llama.cpp"
    runtimes = "llama.cpp"
    integers = True
    options = frozenset({"keep_tied", "dtype"})
    quantizes_tables = True
    granularities = (BLOCK, CHANNEL)
    default_dtype = "float32"
    activations = "int8, one scale for 32 channels of a token, found while running"
    keeps_tied = "llama.cpp rounds activations in blocks of 32, where the rotation is worth less than a second table costs"
    smooths_instead = "channels that are sorted and smoothed lose less, and the rotation undoes both for what norms compute"
    carries = Carries(
        methods=frozenset({"reorder", "smooth", "rotate", "gptq"}),
        weights=INT8,
        activation_bits=8,
        reasons={
            "rotate-online": "which llama.cpp does not compute",
            "static": "since llama.cpp chooses the scales of activations itself",
        },
        substitutes={"rotate-online": ("reorder", "smooth")},
    )

    def check_model(self, model: ExportedModel) -> None:
        from belle_compile.compiler.exports.gguf_file import check_model

        check_model(model)
        model.check_head(self.name)

    def write(self, model: ExportedModel, folder: Path, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
        from belle_compile.compiler.exports.gguf_file import write_gguf

        file = folder / f"{model.name}-Q8_0.gguf"
        notes = write_gguf(model, file, on_progress)
        return {"weights": [file.name], "notes": notes}

    def stored_bytes(self, model: ExportedModel) -> int:
        from belle_compile.compiler.exports.gguf_file import planned_tensors

        return sum(tensor.bytes for tensor in planned_tensors(model))

    def runtime(self) -> ForeignRuntime | None:
        from belle_compile.compiler.exports.runtimes import LLAMA_CPP

        return LLAMA_CPP

    def simulation(self, folder: Path) -> Simulation:
        from belle_compile.compiler.checkpoint import open_checkpoint
        from belle_compile.compiler.families import build_graph

        return Simulation(build_graph(open_checkpoint(folder)), _rounded_input)


def _rounded_input(node: ir.Node, x: Tensor) -> Tensor:
    """Blocks of 32 neighbours rounded to 8 bits with a float16 scale each."""
    from belle_compile.compiler.ir.stream import rounded_blocks

    return rounded_blocks(x, Q8_0_BLOCK)
