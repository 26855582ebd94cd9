"""Sliding windows: how many tokens each layer attends to, from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from belle_compile.compiler.families.config import MOST_LAYERS, Reader

FULL, SLIDING = "full_attention", "sliding_attention"  # items of layer_types
DEFAULT_WINDOW = 4096  # of Transformers' classes, where config.json does not have the key
DEFAULT_FIRST_LAYER = 28  # of Transformers' classes for Qwen

# The keys of config.json that `qwen_windows` and `windows_of_graph` know.
KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def qwen_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The window of each layer, 0 where there is none, as Transformers' Qwen2Config and Qwen3Config have it.

    Without use_sliding_window there is none. Else the layers from max_window_layers on have one, unless layer_types says which.
    """
    read = Reader(config)
    layers, window = read.integer("num_hidden_layers", most=MOST_LAYERS), 0
    if read.flag("use_sliding_window", default=False) and config.get("sliding_window", DEFAULT_WINDOW) is not None:
        window = read.integer("sliding_window", default=DEFAULT_WINDOW)
    types = _layer_types(read, layers)
    if types is None:
        first = read.integer("max_window_layers", default=DEFAULT_FIRST_LAYER, least=0)
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if SLIDING in types and not window:
        raise read.error("layer_types", SLIDING, f"use_sliding_window and a sliding_window, or {FULL} alone")
    return tuple(window if kind == SLIDING else 0 for kind in types)


def same_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The window of each layer, 0 where there is none, of a model whose layers have all the same, as MistralConfig has it."""
    read = Reader(config)
    layers = read.integer("num_hidden_layers", most=MOST_LAYERS)
    window = 0
    if config.get("sliding_window", DEFAULT_WINDOW) is not None:
        window = read.integer("sliding_window", default=DEFAULT_WINDOW)
    types, expected = _layer_types(read, layers), SLIDING if window else FULL
    if types is not None and set(types) != {expected}:
        raise read.error("layer_types", ", ".join(sorted(set(types))), f"{expected} alone, which is what the architecture has")
    return (window,) * layers


def window_keys(windows: tuple[int, ...]) -> dict[str, Any]:
    """The keys of config.json from which `qwen_windows` reads these windows."""
    if not any(windows):
        return {"use_sliding_window": False, "sliding_window": None}
    types = [SLIDING if window else FULL for window in windows]
    return {"use_sliding_window": True, "sliding_window": max(windows), "layer_types": types}


def _layer_types(read: Reader, layers: int) -> list[str] | None:
    """The value of layer_types, if there is one; raises CompileError unless it has a known kind for each layer."""
    types = read.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers or not all(kind in (FULL, SLIDING) for kind in types):
        found = repr(types) if len(repr(types)) <= 100 else f"{repr(types)[:97]}..."
        raise read.error("layer_types", found, f"{FULL} or {SLIDING} for each of {layers} layers")
    return types
