"""Open a checkpoint: fetch its files, read their format, apply overlays, and return one record for all kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from belle_compile.compiler.checkpoint.checkpoint import Checkpoint
from belle_compile.compiler.checkpoint.formats.huggingface import take_tokenizer, template_of
from belle_compile.compiler.checkpoint.formats.registry import adapter_notes, read_contents, weight_patterns
from belle_compile.compiler.checkpoint.names import canonical
from belle_compile.compiler.checkpoint.overlays.adapter import Adapter, fetch_adapter
from belle_compile.compiler.checkpoint.overlays.base import Overlay, apply_overlays
from belle_compile.compiler.checkpoint.sources.encrypted import decrypted, naming_key, save_decrypted
from belle_compile.compiler.checkpoint.sources.registry import fetch
from belle_compile.compiler.checkpoint.special_tokens import Statements, special_tokens
from belle_compile.compiler.checkpoint.templates import BELLE_TEMPLATES, RAW, PromptTemplate, choose_template
from belle_compile.compiler.checkpoint.tensors import STAGE
from belle_compile.compiler.families import registry
from belle_compile.compiler.families.config import without_keys
from belle_compile.compiler.generation import changed_defaults, generation_defaults
from belle_compile.compiler.places import check_reading
from belle_compile.compiler.reading import PLAIN, Reading
from belle_compile.compiler.untrusted import explained


def open_checkpoint(
    path: str | Path,
    *,
    template: str | None = None,
    overlays: Sequence[Overlay] = (),
    reading: Reading = PLAIN,
    generation: Sequence[str] = (),
    on_decrypted: Callable[[int, int], None] = lambda done, total: None,
) -> Checkpoint:
    """Open a Hugging Face directory, one of the original LLaMA, a .gguf file, a directory with one, or a model of the Hub.

    Verifies headers, names and the tokenizer, and reads no weights. `template` overrides the prompt template: see
    `choose_template`. `overlays` change tensors in the order given. `reading` holds what else says how files are read.
    `generation` changes the generation defaults: see `changed_defaults`. `on_decrypted` is called with the bytes of plaintext
    that `reading.save_decrypted` has had written so far, and all of them. Raises CompileError for everything that cannot be
    read.
    """
    expected = "a checkpoint as save_pretrained or llama.cpp's converter writes it"
    with explained(STAGE, f"files of {path}", expected=expected, remedy="download them again"):
        return _open(path, template, overlays, reading, generation, on_decrypted)


def _open(
    path: str | Path,
    template: str | None,
    overlays: Sequence[Overlay],
    reading: Reading,
    generation: Sequence[str],
    on_decrypted: Callable[[int, int], None],
) -> Checkpoint:
    check_reading(reading)
    files = decrypted(fetch(path, weight_patterns()), reading.key)
    with naming_key(files):
        contents = read_contents(files)
    family = registry.by_config(contents.config, files.path)
    contents.config, ignored = without_keys(contents.config, reading.ignored_config_keys, family.keys.used)
    tensors, left_out = canonical(contents.tensors, family)
    base_names = frozenset(
        {Path(path).name, Path(str(files.path)).resolve().name, Path(path).stem, *_own_name(contents.config)}
    )
    adapters = [fetch_adapter(choice, family, base_names) for choice in reading.adapters]
    beside = adapter_notes(files, reading.ignore_adapter, [adapter.directory for adapter in adapters])
    overlaid = apply_overlays(tensors, contents.config, [*adapters, *overlays])
    contents.config = dict(overlaid.config)
    if overlaid.tokenizer is not None:
        take_tokenizer(contents, overlaid.tokenizer)
    chosen = choose_template(template, contents.template, family, contents.config)
    stated = Statements(
        config=contents.config,
        tokenizer_json=contents.tokenizer_json,
        generation=contents.generation,
        tokenizer_config=contents.tokenizer_config,
        tokens_map=contents.tokens_map,
        implied=contents.implied,
        metadata_of=contents.metadata_of,
    )
    special, disagreements = special_tokens(stated, raw_template=chosen.name == RAW, own_template=chosen is contents.template)
    vocabulary = _vocabulary_note(contents.config, contents.tokenizer_json)
    source, settings = contents.sampling
    own, unsupported = generation_defaults(settings, belle=chosen.jinja in BELLE_TEMPLATES, source=source)
    defaults, of_changes = changed_defaults(own, generation)
    notes = [*files.notes, *ignored, *beside, *contents.notes, *left_out, *vocabulary, *disagreements]
    notes += [*unsupported, *of_changes, *overlaid.notes, *_template_notes(adapters, chosen, template)]
    if reading.save_decrypted is not None:
        save_decrypted(files.path, reading.save_decrypted, on_decrypted)
    return Checkpoint(
        path=files.path,
        family=family.name,
        config=contents.config,
        tensors=overlaid.tensors,
        tokenizer_json=contents.tokenizer_json,
        special=special,
        template=chosen,
        generation=asdict(defaults),
        files=(*contents.files, *overlaid.files),
        notes=tuple(notes),
    )


def _template_notes(adapters: Sequence[Adapter], chosen: PromptTemplate, argument: str | None) -> list[str]:
    """A note on each adapter that was trained with another prompt template, unless the user chose one."""
    own = {adapter.name: found for adapter in adapters if (found := template_of(adapter.directory)) is not None}
    return [
        f"adapter {name} has another prompt template, {found.name}, than the one used, {chosen.name}: --template chooses one"
        for name, found in own.items()
        if argument is None and found.jinja != chosen.jinja
    ]


def _own_name(config: dict[str, Any]) -> list[str]:
    """The last part of the name that a config.json has for its model; none if it has none."""
    name = config.get("_name_or_path")
    return [name.rstrip("/").rpartition("/")[2]] if isinstance(name, str) else []


def _vocabulary_note(config: dict[str, Any], tokenizer_json: str) -> list[str]:
    """A note if the tokenizer has ids that the embedding lacks, such as a [PAD] that fine-tuning added; else none."""
    ids = max(Tokenizer.from_str(tokenizer_json).get_vocab().values(), default=-1) + 1
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or ids <= vocab_size:
        return []
    return [f"the tokenizer knows ids up to {ids - 1} and the embedding has {vocab_size} rows: the tokens beyond are unusable"]
