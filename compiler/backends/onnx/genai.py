"""A model as a folder that ONNX Runtime GenAI loads: the ONNX file with GenAI's inputs, and genai_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from belle_compile.compiler.backends.onnx.attention import cached_head_dim
from belle_compile.compiler.backends.onnx.graph import StoredTensor
from belle_compile.compiler.backends.onnx.interface import GenAIInterface
from belle_compile.compiler.backends.onnx.translate import translate
from belle_compile.compiler.backends.weights_header import weights_header
from belle_compile.runtime.artifact import GenerationDefaults, SpecialTokens
from belle_compile.runtime.executors.onnxruntime_sizes import MODEL_NAME
from belle_compile.runtime.program import WEIGHTS_NAME

CONFIG_NAME = "genai_config.json"
# The kind of model by which GenAI chooses its code: that of models with these inputs and outputs, of any architecture.
_TYPE = "llama"


def genai_folder(
    folder: Path,
    graph: ir.Model,
    special_tokens: SpecialTokens,
    generation: GenerationDefaults,
    tokenizer_files: Mapping[str, bytes],
) -> None:
    """Write a model into an empty folder: model.onnx with its weights, genai_config.json, and `tokenizer_files` by name.

    `graph` is the graph of one rank, fused as for the backend `onnxruntime`. GenAI reads the chat template from
    tokenizer_config.json. The caller makes sure that the folder appears whole or not at all. Raises CompileError for an op
    that has no translation, and for weights that cannot be read.
    """
    model = translate(graph, GenAIInterface())
    (folder / MODEL_NAME).write_bytes(model.content)
    _write_weights(folder / WEIGHTS_NAME, model.weights)
    config = genai_config({key: int(value) for key, value in graph.metadata_props.items() if value.isdecimal()},
                          special_tokens, generation)  # fmt: skip
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in tokenizer_files.items():
        (folder / name).write_bytes(content)


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


def _write_weights(path: Path, tensors: Sequence[StoredTensor]) -> None:
    with open(path, "wb") as file:
        file.write(weights_header(tensors))
        for tensor in tensors:
            file.write(tensor.pack().data)
