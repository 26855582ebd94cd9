"""adapter_config.json: what PEFT says of an adapter, checked against LoraConfig of PEFT 0.21."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from belle_compile.runtime.adapters.targets import STAGE, Targets, by_module
from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.json_reader import JsonReader

CONFIG = "adapter_config.json"
_MERGE = "merge it with PEFT (merge_and_unload), save the model and give that"
_LORA = "LORA"
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
_USED = frozenset(
    """peft_type task_type base_model_name_or_path r lora_alpha target_modules exclude_modules bias use_rslora modules_to_save
    layers_to_transform layers_pattern rank_pattern alpha_pattern use_dora lora_bias trainable_token_indices ensure_weight_tying
    init_lora_weights fan_in_fan_out
    """.split()
)
# Keys that change nothing in a merged model: bookkeeping, training, and how PEFT computes. `fan_in_fan_out` concerns modules
# that store transposed weights, which PEFT corrects it for; merge_weights is of PEFT 0.2.
_HARMLESS = frozenset(
    """auto_mapping revision peft_version inference_mode lora_dropout loftq_config eva_config corda_config lora_ga_config
    runtime_config megatron_config megatron_core qalora_group_size merge_weights
    """.split()
)
# Variants whose weights are no sum of the base and one product, each with what it is.
_VARIANTS = {
    "use_qalora": "QA-LoRA",
    "kasa_config": "KaSA, which changes the weights of the base",
    "arrow_config": "Arrow, which chooses among adapters token by token",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA, which changes only the tokens after its invocation",
    "layer_replication": "replicated layers",
    "target_parameters": "changes of parameters that are no modules",
    "enable_lora": "LoRA on parts of a fused layer, as PEFT 0.2 wrote it",
}
# Ways to begin training that change the base too: PEFT changes it again when it loads such an adapter.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")
_CONVERT = "save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain adapter of it"


@dataclass(frozen=True)
class AdapterConfig:
    """The content of an adapter_config.json of LoRA.

    `base` is the name of the model that it was trained on. `targets` says which modules have changes of low rank. Their `rank`
    and `alpha` may be others in modules whose names end as a key of `ranks` or `alphas`, a regular expression, says.
    `scaled_by_root` is rank-stabilized LoRA, `has_magnitudes` DoRA, and `has_biases` says that products have biases. `saved`
    are the modules whose tensors are replaced, and `tokens` the rows of tables that are, by the end of the module's name. With
    `keeps_tied`, a head that is the embedding changes with it. `transposed` is fan_in_fan_out.
    """

    base: str
    targets: Targets
    rank: int
    alpha: float
    scaled_by_root: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    has_magnitudes: bool = False
    has_biases: bool = False
    saved: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    keeps_tied: bool = False
    transposed: bool = False

    def sizes(self, modules: Collection[str]) -> dict[str, tuple[int, float]]:
        """The rank of each module, and what the product of its factors is multiplied with."""
        ranks, alphas = by_module(self.ranks, modules), by_module(self.alphas, modules)
        sizes = {}
        for module in modules:
            rank, alpha = ranks.get(module, self.rank), alphas.get(module, self.alpha)
            sizes[module] = rank, alpha / math.sqrt(rank) if self.scaled_by_root else alpha / rank
        return sizes

    def is_saved(self, module: str) -> bool:
        """Whether the tensors of a module are replaced by those in the adapter: it, or one that it lies in, is named."""
        parts = module.split(".")
        above = [".".join(parts[: end + 1]) for end in range(len(parts))]
        return any(name.endswith(saved) for saved in self.saved for name in above)

    def rows_of(self, table: str) -> tuple[int, ...]:
        """The rows of a table that are replaced; none of them for a module that has none."""
        return next((rows for module, rows in self.tokens.items() if table.endswith(module)), ())


class _Reader(JsonReader):
    stage: ClassVar[str] = STAGE
    failure: ClassVar[type[BelleError]] = EngineError


def parse_config(place: str, values: Mapping[str, Any]) -> AdapterConfig:
    """The content of an adapter_config.json, from its JSON object; `place` is the adapter's directory, for errors.

    Raises EngineError for other methods than LoRA, for variants of it that no merged weight expresses, and for keys that are
    unknown and say something.
    """
    read = _Reader(values, CONFIG)
    _check_method(place, read)
    _check_keys(read)
    rank = read.integer("r", default=8)
    base, layers = values.get("base_model_name_or_path"), read.get("layers_to_transform")
    targets = read.get("target_modules")
    if layers is not None and isinstance(targets, str):
        raise read.error("layers_to_transform", "layers beside a regular expression", "names in target_modules")
    saved = _names(read, "modules_to_save")
    return AdapterConfig(
        base=base if isinstance(base, str) and base.isprintable() else "",
        targets=Targets(
            targets=targets if isinstance(targets, str) else _names(read, "target_modules") or None,
            excluded=excluded if isinstance(excluded := read.get("exclude_modules"), str) else _names(read, "exclude_modules"),
            saved=saved,
            layers=None if layers in (None, []) else _integers(read, "layers_to_transform", layers),
            patterns=_names(read, "layers_pattern"),
        ),
        rank=rank,
        alpha=read.number("lora_alpha", default=8.0),
        scaled_by_root=read.flag("use_rslora", default=False),
        ranks=_pattern(read, "rank_pattern", (int,)),
        alphas=_pattern(read, "alpha_pattern", (int, float)),
        has_magnitudes=read.flag("use_dora", default=False),
        has_biases=read.flag("lora_bias", default=False),
        saved=saved,
        tokens=_tokens(read),
        keeps_tied=read.flag("ensure_weight_tying", default=False),
        transposed=read.flag("fan_in_fan_out", default=False),
    )


def _check_method(place: str, read: _Reader) -> None:
    """Raise EngineError for an adapter of another method than LoRA, for another task, or begun in a way that changes the
    base."""
    method, task = read.get("peft_type"), read.get("task_type")
    if method != _LORA:
        found = f"an adapter of {method}" if method else "no peft_type"
        raise EngineError(STAGE, f"adapter {place}", found=found, expected="a LoRA adapter", remedy=_MERGE)
    if task not in _TASKS:
        expected = "an adapter for text generation (CAUSAL_LM)"
        raise EngineError(STAGE, f"adapter {place}", found=f"an adapter for the task {task}", expected=expected)
    begun = str(read.get("init_lora_weights")).lower()
    if begun.startswith(_OTHER_BASE):
        expected = "an adapter of the model itself"
        found = f"an adapter begun with {begun}, which is one of other weights than its base has"
        raise EngineError(STAGE, f"adapter {place}", found=found, expected=expected, remedy=_CONVERT)


def _check_keys(read: _Reader) -> None:
    for key, value in read.values.items():
        if key in _USED or key in _HARMLESS or not value:
            continue
        if key in _VARIANTS:
            raise read.error(key, _VARIANTS[key], "plain LoRA, rank-stabilized LoRA or DoRA", _MERGE)
        remedy = f"remove the key if the adapter gives the same results without it, or {_MERGE}"
        raise read.error(key, repr(value)[:100], "a key this compiler knows", remedy)


def _names(read: _Reader, key: str) -> tuple[str, ...]:
    value = read.get(key)
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(name, str) and name for name in values):
        raise read.error(key, repr(value)[:100], "names of modules")
    return tuple(values)


def _integers(read: _Reader, key: str, value: Any) -> tuple[int, ...]:
    values = [value] if type(value) is int else value
    if not isinstance(values, list) or not all(type(item) is int and item >= 0 for item in values):
        raise read.error(key, repr(value)[:100], "whole numbers")
    return tuple(values)


def _pattern(read: _Reader, key: str, kinds: tuple[type, ...]) -> dict[str, Any]:
    value = read.get(key) or {}
    if not isinstance(value, dict) or not all(type(number) in kinds and number > 0 for number in value.values()):
        raise read.error(key, repr(value)[:100], "an object of positive numbers")
    return value


def _tokens(read: _Reader) -> dict[str, tuple[int, ...]]:
    value = read.get("trainable_token_indices") or {}
    by_module = value if isinstance(value, dict) else {"": value}  # those of the embedding
    found = {module: _integers(read, "trainable_token_indices", indices) for module, indices in by_module.items()}
    if twice := [module for module, indices in found.items() if len({*indices}) != len(indices)]:
        raise read.error("trainable_token_indices", f"a token twice for {twice[0]}", "each once")
    return found
