"""Opens a checkpoint: finds it, reads its headers, and brings the formats to one shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from belle_compile.compiler.checkpoint.checkpoint import Checkpoint
from belle_compile.compiler.checkpoint.formats.gguf import open_gguf
from belle_compile.compiler.checkpoint.formats.huggingface import open_huggingface
from belle_compile.compiler.checkpoint.generation import generation_defaults
from belle_compile.compiler.checkpoint.sources.locate import locate, single_gguf
from belle_compile.compiler.checkpoint.special_tokens import special_tokens
from belle_compile.compiler.checkpoint.templates import RAW, choose_template
from belle_compile.compiler.checkpoint.tensors import canonical
from belle_compile.compiler.families import registry


def open_checkpoint(path: str | Path, *, template: str | None = None) -> Checkpoint:
    """Open a Hugging Face directory, a .gguf file, a directory with one, or a model of the Hugging Face Hub.

    Verifies headers, names and the tokenizer, and reads no weights. `template` overrides the prompt template: see
    `choose_template`. Raises CompileError with what to do about it.
    """
    found = locate(path)
    gguf = single_gguf(found)
    contents = open_gguf(gguf, directory=None if gguf == found else found) if gguf else open_huggingface(found)
    family = registry.by_config(contents.config, found)
    chosen = choose_template(template, contents.template, family, contents.config)
    notes = [*contents.notes, *_vocabulary_note(contents.config, contents.tokenizer_json)]
    special = special_tokens(
        contents.config,
        contents.generation,
        contents.tokenizer_config,
        contents.tokens_map,
        contents.tokenizer_json,
        raw_template=chosen.name == RAW,
    )
    return Checkpoint(
        path=found,
        family=family.name,
        config=contents.config,
        tensors=canonical(contents.tensors, family),
        tokenizer_json=contents.tokenizer_json,
        special=special,
        template=chosen,
        generation=generation_defaults(contents.generation),
        files=tuple(contents.files),
        notes=tuple(notes),
    )


def _vocabulary_note(config: dict[str, Any], tokenizer_json: str) -> list[str]:
    """A sentence when the tokenizer knows ids that the embedding lacks (a [PAD] that fine-tuning added, for example)."""
    ids = max(Tokenizer.from_str(tokenizer_json).get_vocab().values(), default=-1) + 1
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or ids <= vocab_size:
        return []
    return [f"the tokenizer knows ids up to {ids - 1} and the embedding has {vocab_size} rows: the tokens beyond are unusable"]
