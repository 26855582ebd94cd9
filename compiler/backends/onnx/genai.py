"""A model as a folder that ONNX Runtime GenAI loads: the ONNX file with GenAI's inputs, and genai_config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.backends.base import tensor_bytes
from belle_compile.compiler.backends.onnx.attention import cached_head_dim
from belle_compile.compiler.backends.onnx.graph import OnnxModel, StoredTensor
from belle_compile.compiler.backends.onnx.interface import GenAIInterface
from belle_compile.compiler.backends.onnx.translate import translate
from belle_compile.compiler.backends.onnx.translation import STAGE
from belle_compile.compiler.backends.packed import packed_bytes
from belle_compile.compiler.backends.weights_header import weights_header
from belle_compile.compiler.errors import CompileError
from belle_compile.runtime.artifact import GenerationDefaults, SpecialTokens
from belle_compile.runtime.executors.onnxruntime_sizes import MODEL_NAME
from belle_compile.runtime.program import WEIGHTS_NAME

CONFIG_NAME = "genai_config.json"
NOT_CARRIED = ("min_p", "min_tokens", "stop")  # generation defaults that GenAI has no setting for
# The kind of model by which GenAI chooses its code: that of models with these inputs and outputs, of any architecture.
_TYPE = "llama"
_BLOCK = 8 << 20  # bytes that are copied at a time


def genai_model(graph: ir.Model) -> OnnxModel:
    """The model with GenAI's inputs. `graph` is that of one rank, fused as for the backend `onnxruntime`. Raises CompileError
    for an op that has no translation."""
    return translate(graph, GenAIInterface())


def genai_folder(
    folder: Path,
    graph: ir.Model,
    special_tokens: SpecialTokens,
    generation: GenerationDefaults,
    files: Mapping[str, str],
    *,
    engine_weights: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write a model into an empty folder: model.onnx with its weights, genai_config.json, and the texts `files` by name.

    `graph` is that of `genai_model`. Its weights are computed, or copied from `engine_weights`, the file of an engine for ONNX
    Runtime: which inputs a model has makes no difference to its weights. Returns the names of the model's files. `on_progress`
    is called with the bytes of weights written so far and in all. The caller makes sure that the folder appears whole or not at
    all. Raises CompileError for weights that cannot be read.
    """
    model = genai_model(graph)
    (folder / MODEL_NAME).write_bytes(model.content)
    with (folder / WEIGHTS_NAME).open("xb") as file:
        parts = _computed(model.weights) if engine_weights is None else _copied(model.weights, engine_weights)
        done, total = 0, weights_bytes(model)
        for part in parts:
            file.write(part)
            done += len(part)
            on_progress(done, total)
        file.flush()
        os.fsync(file.fileno())
    facts = {key: int(value) for key, value in graph.metadata_props.items() if value.isdecimal()}
    config = genai_config(facts, special_tokens, generation)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [MODEL_NAME, WEIGHTS_NAME]


def weights_bytes(model: OnnxModel) -> int:
    """The size of the file of weights."""
    return len(weights_header(model.weights)) + sum(map(tensor_bytes, model.weights))


def genai_config(facts: Mapping[str, int], special_tokens: SpecialTokens, generation: GenerationDefaults) -> dict[str, Any]:
    """The content of genai_config.json; `facts` are the numbers of the graph's metadata."""
    past, present = ({f"{time}_{part}_names": f"{prefix}.%d.{part}" for part in ("key", "value")}
                     for time, prefix in (("past", "past_key_values"), ("present", "present")))  # fmt: skip
    decoder = {
        "session_options": {"provider_options": []},
        "filename": MODEL_NAME,
        "head_size": cached_head_dim(facts["head_dim"]),
        "hidden_size": facts["hidden_size"],
        "num_attention_heads": facts["num_heads"],
        "num_hidden_layers": facts["num_layers"],
        "num_key_value_heads": facts["num_kv_heads"],
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **past},
        "outputs": {"logits": "logits", **present},
    }
    eos = list(special_tokens.eos)
    first = eos[0] if eos else 0
    model = {
        "type": _TYPE,
        "bos_token_id": first if special_tokens.bos is None else special_tokens.bos,
        "eos_token_id": eos or [first],
        "pad_token_id": first if special_tokens.pad is None else special_tokens.pad,
        "vocab_size": facts["vocab_size"],
        "context_length": facts["max_position"],
        "decoder": decoder,
    }
    search = {
        "do_sample": generation.temperature > 0,
        "temperature": generation.temperature or 1.0,
        "top_k": generation.top_k,
        "top_p": generation.top_p,
        "repetition_penalty": generation.repetition_penalty,
        "max_length": facts["max_position"],
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search}


def _computed(tensors: Sequence[StoredTensor]) -> Iterator[memoryview]:
    yield memoryview(weights_header(tensors))
    yield from map(packed_bytes, tensors)


def _copied(tensors: Sequence[StoredTensor], engine_weights: Path) -> Iterator[memoryview]:
    """The content of a file that holds these tensors; raises CompileError if it holds others."""
    header = weights_header(tensors)
    with engine_weights.open("rb") as file:
        if file.read(len(header)) != header:
            raise CompileError(
                STAGE, f"weights of {engine_weights}", found="others than the engine's graph has",
                remedy="export the engine's checkpoint, or build the engine again",
            )  # fmt: skip
        yield memoryview(header)
        while block := file.read(_BLOCK):
            yield memoryview(block)
