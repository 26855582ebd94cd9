"""LoRA adapters as PEFT saves them, merged into the tensors of their base while these are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from belle_compile.compiler.checkpoint.overlays import low_rank
from belle_compile.compiler.checkpoint.overlays.adapter_tensors import WEIGHTS, AdapterTensors, read_tensors, weights_of
from belle_compile.compiler.checkpoint.overlays.base import Overlaid
from belle_compile.compiler.checkpoint.sources.registry import fetch
from belle_compile.compiler.checkpoint.tensors import FLOAT_DTYPES, STAGE, LazyTensor
from belle_compile.compiler.checkpoint.tokenizers import has_tokenizer
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.layers import HEAD
from belle_compile.compiler.json_files import read_json
from belle_compile.compiler.reading import AdapterChoice
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.runtime.adapters.config import CONFIG, AdapterConfig, parse_config
from belle_compile.runtime.errors import EngineError

_A, _B, _BIAS, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
_TABLE_A, _TABLE_B, _ROWS = "lora_embedding_A", "lora_embedding_B", "token_adapter.trainable_tokens_delta"
_ANOTHER = "it belongs to another base, or was not saved whole"
_CORRECT = f"correct {CONFIG}, or save the adapter again"
_WEIGHT = ".weight"
_NAMED = 6  # modules that a note names


@dataclass(frozen=True)
class Adapter:
    """The adapter in a directory, called `name` in notes, for a base of `family` that goes by one of `base_names`.

    `scale` multiplies its changes of low rank, as `set_scale` of PEFT does. The result is the model that PEFT runs, in float32:
    that of `merge_and_unload`, except for a head that is the embedding. Where an adapter changes one of these two, PEFT runs
    them apart and merges them into one tensor; here they are taken apart. Adapters that are applied in turn are merged in turn.
    """

    name: str
    directory: StoredPath
    scale: float
    family: Family[Any]
    base_names: frozenset[str] = frozenset()

    def apply(self, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Overlaid:
        """Merge; raises CompileError for an adapter of another base, and for what PEFT would not load or merge."""
        values = read_json(self.directory / CONFIG)
        with _errors_of_builds():
            stated = parse_config(str(self.directory), values)
        file = weights_of(self.directory)
        own = read_tensors(file)
        merge = _Merge(self, stated, tensors, self.family.read_config(config).tied_head)
        merge.check_targets(own)
        merge.replace_whole(own.replaced)
        merge.add_low_rank(own.parts)
        merge.replace_rows(own.parts)
        changes = merge.config_changes()
        notes, tokenizer = [*merge.notes(), *self._notes(stated)], None
        if (rows := changes.get("vocab_size")) is not None:
            tokenizer = self.directory if has_tokenizer(self.directory) else None
            whose = "its own tokenizer" if tokenizer else "the tokenizer of the base, since it has none"
            notes.append(f"adapter {self.name} changes the vocabulary to {rows} rows, with {whose}")
        return Overlaid(merge.result(), tuple(notes), (self.directory / CONFIG, file), changes, tokenizer)

    def _notes(self, stated: AdapterConfig) -> list[str]:
        notes = []
        made_for = stated.base.rstrip("/").rpartition("/")[2]
        if made_for and made_for.lower() not in {name.lower() for name in self.base_names}:
            notes.append(f"adapter {self.name} was trained on {made_for}, by its {CONFIG}; its shapes and names fit this model")
        if stated.transposed:
            notes.append(f"fan_in_fan_out of adapter {self.name} is for layers with transposed weights, and was passed over")
        return notes


def fetch_adapter(choice: AdapterChoice, family: Family[Any], base_names: frozenset[str]) -> Adapter:
    """The adapter that the user chose, downloaded if it is on the Hub; raises CompileError if it is none as PEFT saves them."""
    files = fetch(choice.place, [(name,) for name, _ in WEIGHTS])
    if files.directory is None or not files.matching(CONFIG):
        found = "a file" if files.directory is None else f"a directory without {CONFIG}"
        remedy = "give the directory that PEFT saved it to (save_pretrained)"
        raise CompileError(STAGE, f"adapter {files.path}", found=found, expected="an adapter of PEFT", remedy=remedy)
    return Adapter(choice.name, files.directory, choice.scale, family, base_names)


@contextmanager
def _errors_of_builds() -> Iterator[None]:
    """What the runtime's reader of adapters refuses is refused in the name of the build."""
    try:
        yield
    except EngineError as error:
        raise CompileError(**(error.parts() | {"stage": STAGE})) from None


class _Merge:
    """The tensors of a base while an adapter's changes are added. Where the head is the embedding, both names stand for one
    tensor until a change of one of them takes them apart."""

    def __init__(self, adapter: Adapter, stated: AdapterConfig, tensors: Mapping[str, LazyTensor], tied: bool) -> None:
        self._adapter, self._stated, self._base, self._tied = adapter, stated, tensors, tied
        self._table = f"{adapter.family.embedding}{_WEIGHT}"
        self._step = f"adapter {adapter.name}"
        self._tensors = dict(tensors)
        tables = [tensors[name] for name in (self._table, HEAD) if name in tensors]
        if not tables:
            raise self._error("a base without an embedding", "the whole model that it changes", "download the whole base")
        self._original = tables[0]  # the embedding, or the head that is it
        if tied:
            self._tensors |= {self._table: self._original, HEAD: self._original}
        self._low_rank: list[str] = []
        self._replaced: list[str] = []
        self._rows: list[str] = []

    def check_targets(self, own: AdapterTensors) -> None:
        """Raise CompileError if the adapter changes other modules than its config says, or the base lacks one of them."""
        found = {self._weight(name) for name, parts in own.parts.items() if set(parts) != {_ROWS}}
        for name in own.parts:
            self._weight(name)
        weights = {self._named(name): name for name, tensor in self._tensors.items() if _is_matrix(name, tensor)}
        linears = [name for name, weight in weights.items() if weight != self._table]
        tables = weights.keys() - {*linears}
        with _errors_of_builds():
            targeted = self._stated.targets.among(linears, tables, _module(HEAD))
        if targeted is None:
            return
        # PEFT ties the head's change to the embedding's, whichever of them is named.
        either = {self._table, HEAD} if self._stated.keeps_tied and self._tied else set()
        wanted = {weights[name] for name in targeted}
        if missing := sorted(wanted - found - either):
            whole = f"those of all modules that target_modules of {CONFIG} names"
            raise self._error(f"no changes of {_listed(map(_module, missing))}", whole, _ANOTHER)
        if extra := sorted(found - wanted - either):
            expected = f"only modules that target_modules of {CONFIG} names"
            raise self._error(f"changes of {_listed(map(_module, extra))}", expected, _CORRECT)

    def replace_whole(self, replaced: Mapping[str, LazyTensor]) -> None:
        """Put whole weights and biases in the place of the base's: those of `modules_to_save`, and biases that were trained."""
        stated = self._stated
        names = {self._adapter.family.canonical_name(name): name for name in replaced}
        # Modules to save replace what the base has after other tensors did. Of two tied tables, PEFT loads the head last.
        for canonical in sorted(names, key=lambda name: (stated.is_saved(_module(names[name])), name == HEAD, name)):
            name, tensor, base = names[canonical], replaced[names[canonical]], self._tensors.get(canonical)
            if base is None:
                raise self._error(f"a tensor {name}", "tensors that the base has", _ANOTHER)
            resized = canonical in (self._table, HEAD) and tensor.shape[1:] == base.shape[1:]
            if tensor.shape != base.shape and not resized:
                raise self._misfit(tensor, base.shape)
            own = replace(tensor, name=canonical, steps=(self._step, *tensor.steps))
            own = replace(own, dtype=base.dtype) if base.dtype in FLOAT_DTYPES else own
            self._put(canonical, own, alone=stated.is_saved(_module(name)) and not stated.keeps_tied)
            self._replaced.append(name)
        saved = [name for name in self._tensors if stated.is_saved(self._named(name)) and name not in names]
        if lacking := [name for name in saved if not (name == HEAD and self._tied and stated.keeps_tied)]:
            raise self._error(f"no tensor {lacking[0]}", f"those of modules_to_save in {CONFIG}", _ANOTHER)

    def add_low_rank(self, parts: Mapping[str, Mapping[str, LazyTensor]]) -> None:
        """Add the products of factors to the weights that they belong to."""
        changes = {name: dict(part) for name, part in parts.items() if set(part) != {_ROWS}}
        with _errors_of_builds():
            sizes = self._stated.sizes(sorted(changes))
        self._drop_tied_head(changes)
        for name, part in changes.items():
            weight, (rank, scaling) = self._weight(name), sizes[name]
            base, is_table = self._tensors[weight], weight == self._table
            outputs, inputs = base.shape[::-1] if is_table else base.shape
            a, b = (_TABLE_A, _TABLE_B) if is_table else (_A, _B)
            shapes: dict[str, tuple[int, ...]] = {a: (rank, inputs), b: (outputs, rank)}
            shapes |= {_MAGNITUDE: (outputs,)} if self._stated.has_magnitudes else {}
            shapes |= {_BIAS: (outputs,)} if self._stated.has_biases and not is_table else {}
            self._check_parts(name, part, shapes)
            factors = low_rank.Factors(part[a], part[b], scaling * self._adapter.scale, part.get(_MAGNITUDE))
            merged = (low_rank.embedding if is_table else low_rank.linear)(base, factors, self._step)
            self._put(weight, merged, alone=not self._stated.keeps_tied or self._stated.has_magnitudes)
            if _BIAS in part:
                self._shift_bias(name, part[_BIAS], factors.scaling)
            self._low_rank.append(name)

    def replace_rows(self, parts: Mapping[str, Mapping[str, LazyTensor]]) -> None:
        """Replace the rows of tables that were trained alone (`trainable_token_indices`)."""
        tables = {name: part[_ROWS] for name, part in parts.items() if _ROWS in part}
        # PEFT keeps a head that is the embedding so, unless other rows of the two were trained.
        alone = len({self._stated.rows_of(name) for name in tables}) > 1
        for name, values in tables.items():
            weight, rows = self._weight(name), self._stated.rows_of(name)
            base = self._tensors[weight]
            if not rows or values.shape != (len(rows), *base.shape[1:]):
                raise self._misfit(values, (len(rows), *base.shape[1:]))
            if max(rows) >= base.shape[0]:
                raise self._error(f"row {max(rows)} of {name}", f"one of the {base.shape[0]} rows of the base", _ANOTHER)
            places = {row: place for place, row in enumerate(rows)}
            merged = low_rank.replaced_rows(base, places, values, self._step)
            self._put(weight, merged, alone=alone or weight == HEAD)
            self._rows.append(f"{len(rows)} rows of {name} replaced")
        tied = [_module(HEAD)] if self._tied and tables else []  # PEFT saves its rows with the embedding's
        if lacking := [each for each in self._stated.tokens if not any(name.endswith(each) for name in [*tables, *tied])]:
            raise self._error(f"no rows of {lacking[0] or 'the embedding'}", f"those that {CONFIG} names", _ANOTHER)

    def config_changes(self) -> dict[str, Any]:
        """The keys of config.json that the changes make others: the size of the vocabulary, and whether the head is the
        embedding; raises CompileError for tables of two sizes."""
        table, head = self._tensors.get(self._table), self._tensors.get(HEAD)
        if table is None or head is None:
            return {}  # the graph's error says which is missing
        if table.shape != head.shape:
            found = f"an embedding of {table.shape[0]} rows and a head of {head.shape[0]}"
            raise self._error(found, "both of one size", "save both with the adapter (modules_to_save)")
        resized = {"vocab_size": table.shape[0]} if table.shape != self._original.shape else {}
        return resized | ({"tie_word_embeddings": False} if self._separated else {})

    def result(self) -> dict[str, LazyTensor]:
        """All tensors. Of two tables that are one, there are those of the base, or the embedding alone if it changed."""
        if not self._tied or self._separated:
            return self._tensors
        others = {name: tensor for name, tensor in self._tensors.items() if name not in (self._table, HEAD)}
        if self._tensors[HEAD] is self._original:
            return others | {name: self._base[name] for name in (self._table, HEAD) if name in self._base}
        return others | {self._table: self._tensors[self._table]}

    def notes(self) -> list[str]:
        """Sentences on what was changed."""
        adapter, texts = self._adapter, [*self._rows]
        if self._low_rank:
            kind = "DoRA" if self._stated.has_magnitudes else "LoRA"
            texts.append(f"{kind} of rank {self._stated.rank} in {len(self._low_rank)} modules ({_kinds(self._low_rank)})")
        if self._replaced:
            texts.append(f"{len(self._replaced)} tensors replaced ({_kinds(map(_module, self._replaced))})")
        scale = "" if adapter.scale == 1 else f", its changes of low rank multiplied by {adapter.scale:g}"
        notes = [f"adapter {adapter.name} was merged{scale}: {'; '.join(texts)}"]
        if self._separated:
            notes.append(f"the head is a table of its own, since adapter {adapter.name} changes it or the embedding alone")
        return notes

    @property
    def _separated(self) -> bool:
        """Whether changes took the embedding and a head that was the embedding apart."""
        return self._tied and self._tensors[self._table] is not self._tensors[HEAD]

    def _drop_tied_head(self, changes: dict[str, dict[str, LazyTensor]]) -> None:
        """Remove the changes of a tied head that are those of the embedding, which PEFT saves too.

        Raises CompileError for others: PEFT would let the head's overwrite the embedding's."""
        head, stated = _module(HEAD), self._stated
        table = next((name for name in changes if self._weight(name) == self._table), None)
        if not (stated.keeps_tied and self._tied) or stated.has_magnitudes or table is None or head not in changes:
            return
        own, theirs = changes.pop(head), changes[table]
        for mine, other in ((own.get(_A), theirs.get(_TABLE_B)), (own.get(_B), theirs.get(_TABLE_A))):
            if mine is None or other is None or not np.array_equal(mine.read(), other.read().T):
                raise self._error(f"other changes of {head} than of {table}", "the same, by ensure_weight_tying", _ANOTHER)

    def _shift_bias(self, module: str, addend: LazyTensor, scaling: float) -> None:
        name = _module(self._weight(module)) + ".bias"
        if name not in self._tensors:
            found, expected = f"a bias for {module} (lora_bias)", "biases for layers of the base that have one"
            raise self._error(found, expected, "train it without lora_bias: PEFT cannot merge it either")
        self._tensors[name] = low_rank.shifted(self._tensors[name], addend, scaling, self._step)

    def _put(self, name: str, tensor: LazyTensor, *, alone: bool) -> None:
        """Take `tensor` as the tensor `name` and, unless it is changed `alone`, as the other table of a tied pair too."""
        both = self._tied and not alone and name in (self._table, HEAD)
        self._tensors |= dict.fromkeys((self._table, HEAD) if both else (name,), tensor)

    def _weight(self, module: str) -> str:
        """The canonical name of a module's weight; raises CompileError if the base has no such module."""
        weight = self._adapter.family.canonical_name(module + _WEIGHT)
        if weight not in self._tensors:
            raise self._error(f"changes of {module}", "changes of modules that the base has", _ANOTHER)
        return weight

    def _named(self, canonical: str) -> str:
        """The name in Transformers of the module with this tensor."""
        release = self._adapter.family.release
        return ("" if canonical == HEAD or release is None else release.prefix) + _module(canonical)

    def _check_parts(self, name: str, parts: Mapping[str, LazyTensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        for part in sorted({*parts, *shapes} - {_ROWS}):
            if part not in parts:
                raise self._error(f"no {part} of {name}", "all parts of its changes", _ANOTHER)
            if part not in shapes:
                raise self._error(f"{part} of {name}", f"{', '.join(sorted(shapes))} alone, by {CONFIG}", _CORRECT)
            if parts[part].shape != shapes[part]:
                raise self._misfit(parts[part], shapes[part])

    def _misfit(self, tensor: LazyTensor, expected: tuple[int, ...]) -> CompileError:
        found, wanted = f"shape {list(tensor.shape)}", f"{list(expected)}, by the base and {CONFIG}"
        what = f"tensor {tensor.name} of adapter {self._adapter.directory}"
        return CompileError(STAGE, what, found=found, expected=wanted, remedy=_ANOTHER)

    def _error(self, found: str, expected: str, remedy: str) -> CompileError:
        return CompileError(STAGE, f"adapter {self._adapter.directory}", found=found, expected=expected, remedy=remedy)


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _is_matrix(name: str, tensor: LazyTensor) -> bool:
    return len(tensor.shape) == 2 and name.endswith(_WEIGHT)


def _kinds(modules: Iterable[str]) -> str:
    """The last parts of modules' names."""
    return _listed(dict.fromkeys(name.rpartition(".")[2] for name in modules))


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
