"""ONNX: the folder that ONNX Runtime GenAI loads, whose model is that of an engine for ONNX Runtime with other inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.compiler.backends.onnxruntime import OnnxRuntimeBackend
from belle_compile.compiler.exports.base import CHANNEL, Carries, Format
from belle_compile.passes.presets import METHODS

if TYPE_CHECKING:
    from belle_compile.compiler.exports.model import ExportedModel
    from belle_compile.compiler.exports.runtimes import ForeignRuntime

_BACKEND = OnnxRuntimeBackend()


class Onnx(Format):
    """The graph that an engine for ONNX Runtime holds, in standard ONNX: every rotation and both widths of activations can be
    computed in it, and nothing has to keep the model's architecture. Embedding and head are INT8; what keeps floats is
    float32."""

    name = "onnx"
    summary = "INT8 for ONNX Runtime GenAI"
    runtimes = "ONNX Runtime GenAI"
    integers = True
    backend = _BACKEND
    quantizes_tables = True
    granularities = (CHANNEL,)
    default_dtype = "float32"
    carries = Carries(methods=frozenset(METHODS), refuses=_BACKEND.recipe_refusal)

    def check_model(self, model: ExportedModel) -> None:
        from belle_compile.compiler.backends.onnx.genai import genai_model

        genai_model(model.graph)

    def write(self, model: ExportedModel, folder: Path, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
        from belle_compile.compiler.backends.onnx.genai import NOT_CARRIED, genai_folder
        from belle_compile.compiler.exports.release import text_files, tokenizer_notes
        from belle_compile.runtime.artifact import GenerationDefaults, SpecialTokens

        special = model.special
        tokens = SpecialTokens(
            special["bos_token_id"], tuple(special["eos_token_ids"]), special["pad_token_id"], special["add_bos_raw"]
        )
        files = genai_folder(
            folder, model.graph, tokens, model.generation, text_files(model),
            engine_weights=model.copied, on_progress=on_progress,
        )  # fmt: skip
        notes = [*tokenizer_notes(model.tokenizer_json, self.runtimes), *_splitting_notes(model.tokenizer_json)]
        if lost := [name for name in NOT_CARRIED if getattr(model.generation, name) != getattr(GenerationDefaults(), name)]:
            notes.append(f"ONNX Runtime GenAI has no setting for {', '.join(lost)}: they are in generation_config.json only")
        return {"weights": files, "notes": notes}

    def stored_bytes(self, model: ExportedModel) -> int:
        from belle_compile.compiler.backends.onnx.genai import genai_model, weights_bytes

        return weights_bytes(genai_model(model.graph))

    def runtime(self) -> ForeignRuntime | None:
        from belle_compile.compiler.exports.runtimes import GENAI

        return GENAI

    def stand_in(self) -> ForeignRuntime | None:
        """ONNX Runtime, whose kernels GenAI runs too."""
        from belle_compile.compiler.exports.runtimes import ONNX_RUNTIME

        return ONNX_RUNTIME


def _splitting_notes(tokenizer_json: str) -> list[str]:
    """A note if GenAI's tokenizer, which has no general regular expressions for Unicode, splits texts in another way or not at
    all: BLOOM's expression is one that it refuses."""
    from belle_compile.compiler.checkpoint.formats.gguf_tokenizer import LLAMA3_SPLIT

    step = json.loads(tokenizer_json).get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    expressions = {step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"}
    if expressions <= {None, LLAMA3_SPLIT}:  # None is a text that is no expression
        return []
    return [
        "ONNX Runtime GenAI's own tokenizer does not know the expression by which this one splits texts: give it token ids, as "
        "the package tokenizers computes them from tokenizer.json"
    ]
