"""safetensors: the transformed float model in Transformers' format, for looking at what rotations and smoothing do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.compiler.exports.base import Carries, Format

if TYPE_CHECKING:
    from belle_compile.compiler.exports.model import ExportedModel


class Safetensors(Format):
    """Nothing is rounded to integers. The model computes the logits of its checkpoint, but for the rounding of floats."""

    name = "safetensors"
    summary = "the transformed float model, for looking"
    runtimes = "Transformers"
    integers = False
    options = frozenset({"keep_tied", "dtype"})
    default_dtype = "float32"
    carries = Carries(
        methods=frozenset({"reorder", "smooth", "rotate"}),
        reasons={
            "rotate-online": "since the architecture computes no rotation",
            "gptq": "since nothing is rounded",
            "static": "since activations stay floats",
        },
    )

    def check_model(self, model: ExportedModel) -> None:
        model.release.config(model.config)
        model.check_head(self.name)

    def write(self, model: ExportedModel, folder: Path, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
        from belle_compile.compiler.exports.release import stored_tensors, tokenizer_notes, write_release
        from belle_compile.compiler.exports.shards import SHARD_BYTES, write_shards

        write_release(model, folder)
        files = write_shards(folder, stored_tensors(model), SHARD_BYTES, on_progress)
        return {"weights": files, "notes": tokenizer_notes(model.tokenizer_json)}

    def stored_bytes(self, model: ExportedModel) -> int:
        from belle_compile.compiler.exports.release import stored_tensors

        return sum(tensor.bytes for tensor in stored_tensors(model))
