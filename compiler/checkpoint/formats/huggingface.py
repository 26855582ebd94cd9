"""Read the files beside the weights in a Hugging Face directory: config, tokenizer, templates, generation defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from belle_compile.compiler.checkpoint.formats.base import Contents
from belle_compile.compiler.checkpoint.packed.registry import packed_by, weights_of, without_statements
from belle_compile.compiler.checkpoint.templates import PromptTemplate, read_template
from belle_compile.compiler.checkpoint.tensors import DERIVED_BUFFERS, STAGE, LazyTensor, is_buffer, require_float
from belle_compile.compiler.checkpoint.tokenizers import load_tokenizer
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.generation import settings_of_config
from belle_compile.compiler.json_files import read_json
from belle_compile.compiler.stored_path import StoredPath

CONFIG = "config.json"
OPTIONAL_FILES = ("tokenizer_config", "special_tokens_map", "generation_config", "chat_template")


@dataclass
class Weights:
    """Tensors under their stored names, the files that were read for them, and notes. `packed` says that a format is for packed
    weights alone."""

    tensors: list[LazyTensor]
    files: list[StoredPath]
    notes: list[str] = field(default_factory=list)
    packed: bool = False


def read_release(directory: StoredPath, open_weights: Callable[[StoredPath], Weights]) -> Contents:
    """The contents of a directory in the layout of `save_pretrained`, with the weights that `open_weights(directory)` returns.

    Tensors hold floats, or integers with scales (`LazyTensor.quantized`). Raises CompileError for missing or damaged files, and
    for weights that are quantized in another way than those of checkpoint/packed."""
    config_file = require_config(directory)
    config = read_json(config_file)
    packed = packed_by(config, config_file)
    config = without_statements(config)
    tokenizer_json, tokenizer_files, notes, implied = load_tokenizer(directory, rows_of(config))
    weights = open_weights(directory)
    tensors, of_packing = weights_of(weights.tensors, packed, config_file, required=weights.packed)
    for tensor in tensors:
        if not tensor.name.endswith(DERIVED_BUFFERS) and not is_buffer(tensor):
            require_float(tensor)
    stated_files = [packed.stated.file] if packed else []
    files, optional = _optional_files(directory)
    stated = "generation_config" in files  # Transformers reads config.json only where this file is missing
    own = "generation_config.json", optional["generation_config"]
    sampling = own if stated else (CONFIG, settings_of_config(config))
    template, template_files = _own_template(directory, optional["tokenizer_config"], optional["chat_template"])
    return Contents(
        config=config,
        tensors=tensors,
        tokenizer_json=tokenizer_json,
        tokenizer_config=optional["tokenizer_config"],
        implied=implied,
        tokens_map=optional["special_tokens_map"],
        generation=optional["generation_config"],
        sampling=sampling,
        template=template,
        files=list(
            dict.fromkeys([config_file, *stated_files, *weights.files, *tokenizer_files, *files.values(), *template_files])
        ),
        notes=[*notes, *weights.notes, *of_packing],
    )


def take_tokenizer(contents: Contents, directory: StoredPath) -> None:
    """Put the tokenizer of another directory in the place of that in `contents`, with the files beside it that are about
    tokens, and the chat template if it has one."""
    contents.tokenizer_json, tokenizer_files, notes, contents.implied = load_tokenizer(directory, rows_of(contents.config))
    files, optional = _optional_files(directory)
    contents.tokenizer_config, contents.tokens_map = optional["tokenizer_config"], optional["special_tokens_map"]
    contents.metadata_of = ""
    template, template_files = _own_template(directory, optional["tokenizer_config"], optional["chat_template"])
    contents.template = template or contents.template
    read = [files[name] for name in ("tokenizer_config", "special_tokens_map", "chat_template") if name in files]
    contents.files = list(dict.fromkeys([*contents.files, *tokenizer_files, *read, *template_files]))
    contents.notes += notes


def template_of(directory: StoredPath) -> PromptTemplate | None:
    """The chat template of a directory; None if it has none."""
    _, optional = _optional_files(directory)
    template, _ = _own_template(directory, optional["tokenizer_config"], optional["chat_template"])
    return template


def _optional_files(directory: StoredPath) -> tuple[dict[str, StoredPath], dict[str, dict[str, Any]]]:
    """The files of `OPTIONAL_FILES` that a directory has, and the content of each, empty if it is missing."""
    files = {name: file for name in OPTIONAL_FILES if (file := directory / f"{name}.json").is_file()}
    return files, {name: read_json(files[name]) if name in files else {} for name in OPTIONAL_FILES}


def rows_of(config: Mapping[str, Any]) -> int | None:
    """The number of rows of the embedding that a config.json states; None if it states none."""
    size = config.get("vocab_size")
    return size if type(size) is int else None


def require_config(directory: StoredPath) -> StoredPath:
    """The path of a directory's config.json; raises CompileError if there is none."""
    config_file = directory / CONFIG
    if not config_file.is_file():
        raise CompileError(
            STAGE,
            f"directory {directory}",
            found="no config.json",
            expected="a Hugging Face checkpoint or one .gguf file",
            remedy="give the directory that holds config.json and the weights",
        )
    return config_file


def _own_template(
    directory: StoredPath, tokenizer_config: dict[str, Any], chat_template: dict[str, Any]
) -> tuple[PromptTemplate | None, list[StoredPath]]:
    """The checkpoint's own chat template; chat_template.jinja outranks tokenizer_config.json, as in Transformers."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return PromptTemplate(file.name, read_template(file)), [file]
    for name, stored in (
        ("chat_template.json", chat_template.get("chat_template")),
        ("tokenizer_config.json", tokenizer_config.get("chat_template")),
    ):
        if isinstance(stored, list):  # several named templates, of which "default" is the one for chat
            defaults = [entry.get("template") for entry in stored if isinstance(entry, dict) and entry.get("name") == "default"]
            stored = defaults[-1] if defaults else None
        if isinstance(stored, str) and stored:
            return PromptTemplate(name, stored), []
    return None, []
