"""A directory that Transformers loads: tensors under their stored names, config.json, tokenizer, template, generation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from belle_compile.compiler.checkpoint.formats.gguf_rows import separated_parts
from belle_compile.compiler.checkpoint.sentencepiece_model import SAMPLES
from belle_compile.compiler.exports.model import HEAD, ExportedModel, Integers, Module, Order, chunks
from belle_compile.compiler.exports.shards import StoredTensor
from belle_compile.compiler.generation import generation_config
from belle_compile.runtime.schema import canonical_json
from belle_compile.runtime.sentencepiece_rule import RANKS_KEY, load

Plain = dict[str, Any]
# Keys of config.json that describe how another release was made or stored.
_DROPPED = frozenset({"_name_or_path", "torch_dtype", "auto_map", "quantization_config", "rope_divisors", "chat_template"})


def stored_tensors(model: ExportedModel) -> list[StoredTensor]:
    """The tensors of a model under their names in Transformers, integers with a `weight_scale` [N, 1] beside them."""
    stored: list[StoredTensor] = []
    for module in model.modules:
        name, order = stored_name(model, module.name), _order(model, module)
        weight = module.weight
        if isinstance(weight, Integers):
            rows = module.shape[0]
            stored.append(StoredTensor(f"{name}.weight", "int8", module.shape, partial(chunks, weight.integers, order)))
            stored.append(StoredTensor(f"{name}.weight_scale", "float32", (rows, 1), partial(chunks, weight.scales, order)))
        else:
            stored.append(StoredTensor(f"{name}.weight", model.float_dtype, module.shape, partial(chunks, weight, order)))
        if module.bias is not None:
            shape = tuple(module.bias.shape.numpy())
            stored.append(StoredTensor(f"{name}.bias", model.float_dtype, shape, partial(chunks, module.bias, order)))
    return stored


def stored_name(model: ExportedModel, name: str) -> str:
    """The name of a module in Transformers."""
    return name if name == HEAD else model.release.prefix + name


def _order(model: ExportedModel, module: Module) -> Order | None:
    """The row of the graph that each row of the file holds; None where they are the same."""
    if not module.name.endswith(model.release.grouped or ("\0",)):
        return None
    heads = model.dimensions.num_heads
    rows = module.shape[0]
    order: Order = separated_parts(heads, rows // (3 * heads))(np.arange(rows))
    return order


def write_release(model: ExportedModel, folder: Path, quantization: Plain | None = None) -> None:
    """Write all files but the weights; `quantization` becomes quantization_config of config.json."""
    config = _config(model) | ({"quantization_config": quantization} if quantization else {})
    for name, text in ({"config.json": canonical_json(config)} | text_files(model)).items():
        (folder / name).write_text(text, encoding="utf-8")


def text_files(model: ExportedModel) -> dict[str, str]:
    """The contents of the files beside config.json: tokenizer, template and generation settings."""
    return {
        "generation_config.json": canonical_json(_generation(model)),
        "tokenizer.json": _with_bos(model.tokenizer_json, model.special),
        "tokenizer_config.json": canonical_json(_tokenizer_config(model)),
        "chat_template.jinja": model.template.jinja,
    }


def _config(model: ExportedModel) -> Plain:
    special = model.special
    ids = {"bos_token_id": special["bos_token_id"], "pad_token_id": special["pad_token_id"]}
    stated = model.release.config(model.config)
    kept = {key: value for key, value in stated.items() if key not in _DROPPED}
    return kept | ids | {
        "architectures": [model.release.architecture or model.family.architectures[0]],
        "model_type": model.release.model_type or model.family.name,
        "dtype": model.float_dtype,
        "tie_word_embeddings": model.tied_head,
        "eos_token_id": _one_or_all(special["eos_token_ids"]),
    }  # fmt: skip


def _generation(model: ExportedModel) -> Plain:
    """generation_config.json, with the ids of special tokens."""
    special = model.special
    ids = {"bos_token_id": special["bos_token_id"], "pad_token_id": special["pad_token_id"]}
    ids["eos_token_id"] = _one_or_all(special["eos_token_ids"])
    return {key: value for key, value in ids.items() if value is not None} | generation_config(model.generation)


def _one_or_all(ids: list[int]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def _with_bos(text: str, special: Mapping[str, Any]) -> str:
    """The text of a tokenizer.json that puts BOS before raw texts where the checkpoint does: Transformers 5 looks at nothing
    else."""
    bos, word = special["bos_token_id"], special["bos_token"]
    tokenizer = tokenizers.Tokenizer.from_str(text)
    if not special["add_bos_raw"] or not word or tokenizer.encode("a").ids[:1] == [bos]:
        return text
    plain = json.loads(text)
    parts = [[{"Sequence": {"id": name, "type_id": index}} for index, name in enumerate(names)] for names in ("A", "AB")]
    single, pair = ([{"SpecialToken": {"id": word, "type_id": 0}}, *part] for part in parts)
    tokens = {word: {"id": word, "ids": [bos], "tokens": [word]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
    before = [plain["post_processor"]] if plain.get("post_processor") else []
    plain["post_processor"] = {"type": "Sequence", "processors": [*before, template]} if before else template
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def _tokenizer_config(model: ExportedModel) -> Plain:
    """tokenizer_config.json of the class that takes tokenizer.json as it is."""
    words = _words(model.tokenizer_json, model.special)
    return words | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(model.special["add_bos_raw"]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.facts["max_position"],
        "padding_side": "left",
    }


def _words(tokenizer_json: str, special: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by their names in tokenizer_config.json, without those that a checkpoint lacks."""
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    pad = special["pad_token_id"]
    words = {
        "bos_token": special["bos_token"],
        "eos_token": special["eos_token"],
        "pad_token": "" if pad is None else tokenizer.id_to_token(pad),
        "unk_token": getattr(tokenizer.model, "unk_token", None),
    }
    return {name: word for name, word in words.items() if word}


def tokenizer_notes(text: str, runtime: str = "Transformers") -> list[str]:
    """A note if the ids of a text depend on sentencepiece's rule, which Transformers and others do not apply."""
    if RANKS_KEY not in text:
        return []
    ours, plain = load(text), tokenizers.Tokenizer.from_str(text)
    for sample in SAMPLES:
        if ours.encode(sample, add_special_tokens=False).ids != plain.encode(sample, add_special_tokens=False).ids:
            return [f"pieces of the tokenizer share a score: texts such as {sample!r} get other ids from {runtime} than here"]
    return []
