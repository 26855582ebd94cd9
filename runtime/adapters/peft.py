"""Reads a LoRA adapter as PEFT saves it, for an engine: its factors in the basis of the engine's linears."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.adapters.basis import EngineBasis
from belle_compile.runtime.adapters.config import CONFIG, AdapterConfig, parse_config
from belle_compile.runtime.adapters.factors import Factors
from belle_compile.runtime.adapters.names import PART, PICKLED_WEIGHTS, PREFIX, WEIGHTS
from belle_compile.runtime.adapters.targets import STAGE
from belle_compile.runtime.adapters.tensors import parse_tensors, read_file
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.schema import parse_json

_A, _B = "lora_A.weight", "lora_B.weight"
_HEAD = "lm_head"
_MERGE = "merge it at build time with belle-compile build --adapter"
_ANOTHER = "it belongs to another base, or was not saved whole"


@dataclass(frozen=True)
class Adapter:
    """An adapter for an engine. `digest` is a SHA-256 in hex of its files and its scale; `changes` are those of linears, by
    name."""

    digest: str
    directory: Path
    rank: int
    changes: Mapping[str, Factors]


def read_adapter(directory: Path, basis: EngineBasis, most_rank: int, scale: float = 1.0) -> Adapter:
    """Read the adapter in a directory; `scale` multiplies its changes.

    Raises `EngineError`, in one sentence, for an adapter that is damaged, that belongs to another base, or that has what an
    engine cannot apply beside its weights: ranks above `most_rank`, DoRA, whole tensors, changes of embedding or head.
    """
    config_file, weights_file = directory / CONFIG, directory / WEIGHTS
    if not weights_file.is_file() and (directory / PICKLED_WEIGHTS).is_file():
        raise _refusal(directory, PICKLED_WEIGHTS, WEIGHTS, "save it again with save_pretrained of a recent PEFT")
    config_text, weights = read_file(config_file), read_file(weights_file)
    stated = parse_config(str(directory), _object(config_file, config_text))
    _check_method(directory, stated)
    tensors, _ = parse_tensors(weights, weights_file)
    parts = _parts(directory, tensors)
    names = {module: _linear(directory, module, basis) for module in parts}
    _check_whole(directory, stated, names, basis)
    sizes = stated.sizes(sorted(parts))
    changes = {}
    for module, (a, b) in parts.items():
        rank, scaling = sizes[module]
        if rank > most_rank:
            raise _refusal(directory, f"rank {rank} in {module}", f"at most {most_rank}, what the engine was built for")
        linear = basis.linears[names[module]]
        for part, found, shape in ((_A, a, (rank, linear.inputs)), (_B, b, (linear.outputs, rank))):
            if found.shape != shape:
                expected = f"{list(shape)}, by the engine and {CONFIG}"
                raise _refusal(directory, f"shape {list(found.shape)} of {module}.{part}", expected, _ANOTHER)
            if not np.isfinite(found).all():
                raise _refusal(directory, f"NaN or infinity in {module}.{part}", "finite numbers")
        changes[names[module]] = basis.factors(names[module], a, np.float32(scaling * scale) * b)
    digest = hashlib.sha256(json.dumps([len(config_text), len(weights), float(scale)]).encode() + config_text + weights)
    return Adapter(digest.hexdigest(), directory, max((len(change.a) for change in changes.values()), default=0), changes)


def _object(file: Path, text: bytes) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise EngineError(STAGE, f"file {file}", found=f"text that is not JSON ({error})", expected="a JSON object") from None
    if not isinstance(value, dict):
        raise EngineError(STAGE, f"file {file}", found=f"a JSON {type(value).__name__}", expected="a JSON object")
    return value


def _check_method(directory: Path, stated: AdapterConfig) -> None:
    """Raise `EngineError` for what is no sum of the engine's results and products of two factors."""
    kinds = {
        "DoRA": stated.has_magnitudes,
        "biases of its factors": stated.has_biases,
        f"modules_to_save ({', '.join(stated.saved)})": bool(stated.saved),
        "trained rows of tables (trainable_token_indices)": bool(stated.tokens),
    }
    if kind := next((kind for kind, has in kinds.items() if has), None):
        raise _refusal(directory, kind, "factors of linear layers alone", _MERGE)


def _parts(directory: Path, tensors: Mapping[str, NDArray[Any]]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """The factors a and b of each module."""
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for name, tensor in tensors.items():
        match = PART.fullmatch(name.removeprefix(PREFIX))
        if not name.startswith(PREFIX) or match is None or match["part"] not in (_A, _B):
            raise _refusal(directory, f"a tensor {name}", "factors of linear layers alone", _MERGE)
        found.setdefault(match["module"], {})[match["part"]] = tensor
    if not found:
        raise _refusal(directory, "no tensors", "the weights of an adapter", "save it again with save_pretrained of PEFT")
    for module, parts in found.items():
        if lacking := {_A, _B} - {*parts}:
            raise _refusal(directory, f"no {module}.{min(lacking)}", "both factors of a module", _ANOTHER)
    return {module: (parts[_A], parts[_B]) for module, parts in found.items()}


def _linear(directory: Path, module: str, basis: EngineBasis) -> str:
    """The engine's linear that a module is: the engine's names may lack the first parts of the module's, or have more."""
    for name in basis.linears:
        if name == module or module.endswith(f".{name}") or name.endswith(f".{module}"):
            return name
    kinds = sorted({name.rpartition(".")[2] for name in basis.linears})
    remedy = f"rebuild the engine with --lora-targets for it, or {_MERGE}" if module != _HEAD else _MERGE
    raise _refusal(directory, f"changes of {module}", f"those of {', '.join(kinds)} in the engine's layers", remedy)


def _check_whole(directory: Path, stated: AdapterConfig, names: Mapping[str, str], basis: EngineBasis) -> None:
    """Raise `EngineError` if the adapter lacks changes of modules that its config names, or has others."""
    module, name = next(iter(names.items()))
    prefix = module.removesuffix(name) if len(module) >= len(name) else ""
    dropped = name.removesuffix(module) if len(module) < len(name) else ""
    modules = {prefix + linear.removeprefix(dropped): linear for linear in basis.linears}
    wanted = stated.targets.among(modules, (), _HEAD)
    if wanted is None:
        return
    linears, found = {modules[each] for each in wanted}, {*names.values()}
    if missing := sorted(linears - found):
        raise _refusal(directory, f"no changes of {missing[0]}", f"those that target_modules of {CONFIG} names", _ANOTHER)
    if extra := sorted(found - linears):
        raise _refusal(directory, f"changes of {extra[0]}", f"only those that target_modules of {CONFIG} names", _ANOTHER)


def _refusal(directory: Path, found: str, expected: str, remedy: str = "") -> EngineError:
    return EngineError(STAGE, f"adapter {directory}", found=found, expected=expected, remedy=remedy)
