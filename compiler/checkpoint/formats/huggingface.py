"""Reads a Hugging Face checkpoint directory: config, weights, tokenizer, templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from belle_compile.compiler.checkpoint.formats.base import Contents, read_json
from belle_compile.compiler.checkpoint.formats.pickles import is_legacy
from belle_compile.compiler.checkpoint.formats.shards import open_weights
from belle_compile.compiler.checkpoint.templates import PromptTemplate, read_template
from belle_compile.compiler.checkpoint.tensors import DERIVED_BUFFERS, STAGE, require_float
from belle_compile.compiler.checkpoint.tokenizers import load_tokenizer
from belle_compile.compiler.errors import CompileError


def open_huggingface(directory: Path) -> Contents:
    """The contents of a directory that `save_pretrained` or a release made."""
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise CompileError(
            STAGE,
            f"directory {directory}",
            found="no config.json",
            expected="a Hugging Face checkpoint or one .gguf file",
            remedy="give the directory that holds config.json and the weights",
        )
    config = read_json(config_file)
    if quantization := config.get("quantization_config"):
        method = str(quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown").upper()
        raise CompileError(
            STAGE,
            f"config {config_file}",
            found=f"a checkpoint quantised with {method}",
            expected="float32, float16 or bfloat16 weights",
            remedy=f"quantised {method} checkpoints are not yet supported: give the one it was made from",
        )
    tokenizer_json, tokenizer_files, notes, implied = load_tokenizer(directory)
    tensors, weight_files, weight_notes = open_weights(directory)
    for tensor in tensors:
        if not tensor.name.endswith(DERIVED_BUFFERS):
            require_float(tensor)
    legacy = [file.name for file in weight_files if file.suffix == ".bin" and is_legacy(file)]
    if legacy:
        weight_notes.append(
            f"{', '.join(legacy)}: the format of PyTorch before 1.6 cannot be memory-mapped, so the build "
            "holds one such file in memory"
        )
    optional = {
        name: directory / f"{name}.json"
        for name in ("tokenizer_config", "special_tokens_map", "generation_config", "chat_template")
    }
    found = {name: file for name, file in optional.items() if file.is_file()}
    read = {name: read_json(found[name]) if name in found else {} for name in optional}
    template, template_files = _own_template(directory, read["tokenizer_config"], read["chat_template"])
    return Contents(
        config=config,
        tensors=tensors,
        tokenizer_json=tokenizer_json,
        tokenizer_config=implied | read["tokenizer_config"],
        tokens_map=read["special_tokens_map"],
        generation=read["generation_config"],
        template=template,
        files=list(dict.fromkeys([config_file, *weight_files, *tokenizer_files, *found.values(), *template_files])),
        notes=[*notes, *weight_notes],
    )


def _own_template(
    directory: Path, tokenizer_config: dict[str, Any], chat_template: dict[str, Any]
) -> tuple[PromptTemplate | None, list[Path]]:
    """The checkpoint's own chat template; a file of its own outranks tokenizer_config.json, as in Transformers."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return PromptTemplate(file.name, read_template(file)), [file]
    for name, stored in (
        ("chat_template.json", chat_template.get("chat_template")),
        ("tokenizer_config.json", tokenizer_config.get("chat_template")),
    ):
        if isinstance(stored, list):  # several named templates; "default" is the one for chat
            named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
            stored = named.get("default")
        if isinstance(stored, str) and stored:
            return PromptTemplate(name, stored), []
    return None, []
