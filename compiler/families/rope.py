"""Rotary position embeddings: inverse frequencies from config.json, as in Transformers' modeling_rope_utils.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.families.config import Reader
from belle_compile.runtime.json_reader import MOST_INTEGER

Floats = npt.NDArray[np.float32]

MOST_HEAD_DIM = 1 << 13  # heads in use have at most 512 dimensions

# The parameters that each RoPE type has. Every type may also have those in GENERAL.
TYPES: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    # `finetuned` is a note of the first models with YaRN, which Transformers does not read.
    "yarn": frozenset("factor beta_fast beta_slow mscale mscale_all_dim truncate finetuned".split()),
}
GENERAL = frozenset("rope_type type rope_theta partial_rotary_factor attention_factor original_max_position_embeddings".split())
# Keys of config.json itself that this module reads.
KEYS = frozenset(
    """rope_theta rope_scaling rope_parameters max_position_embeddings partial_rotary_factor original_max_position_embeddings
    rope_divisors rope_attention_factor
    """.split()
)
BETA_FAST, BETA_SLOW = 32.0, 1.0  # of YaRN, unless config.json states others


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary frequencies: `inv_freq` is float32 [head_dim / 2], and `max_position` the longest sequence they are scaled for.

    Sines and cosines are multiplied by `attention_scaling`. `dynamic_factor` is 0 unless the frequencies depend on the length
    of the sequence; only then are `original_max` and `base` used.
    """

    inv_freq: Floats
    max_position: int
    attention_scaling: float = 1.0
    dynamic_factor: float = 0.0
    original_max: int = 0
    base: float = 0.0


def read_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Read the RoPE of a config.json of Transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    With linear and dynamic scaling, max_position_embeddings is the length before scaling (Transformers' documentation of
    `rope_scaling`), so `max_position` is `factor` times that. With llama3 it is the length after scaling. With yarn it may be
    either, and `max_position` is `factor` times the original length, as in vLLM. `rope_divisors`, which only GGUF files have,
    divide the frequencies before any scaling, and `rope_attention_factor` multiplies `attention_scaling`. Raises CompileError
    for parameters that the graph would not compute.
    """
    rope, outer = _read(config, head_dim), Reader(config)
    return replace(rope, attention_scaling=rope.attention_scaling * outer.number("rope_attention_factor", default=1.0))


def _read(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The RoPE without `rope_attention_factor`."""
    outer = Reader(config)
    scaling = outer.get("rope_scaling", "rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise outer.error("rope_scaling", repr(scaling), "an object with rope_type")
    inner = Reader(scaling, "the rope parameters in config.json")
    kind = inner.get("rope_type", "type") or "default"
    if kind not in TYPES:
        raise inner.error("rope_type", repr(kind), f"one of {', '.join(TYPES)}")
    _check_keys(outer, inner, kind)
    if head_dim % 2 or (kind == "dynamic" and head_dim < 4) or head_dim > MOST_HEAD_DIM:
        expected = f"an even head size of at most {MOST_HEAD_DIM}, as rotary embeddings turn pairs"
        raise outer.error("head_dim", str(head_dim), expected)
    max_position = outer.integer("max_position_embeddings", default=2048)
    base = _theta(outer, inner)
    inv_freq = _divided(inverse_frequencies(base, head_dim), outer, kind)
    if kind == "default":
        return Rope(inv_freq, max_position)
    factor = inner.number("factor")
    if factor < 1:
        raise inner.error("factor", f"{factor:g}", "a number >= 1")
    if kind == "linear":
        return Rope(inv_freq / np.float32(factor), _scaled(max_position, factor, inner))
    stating = outer if outer.get("original_max_position_embeddings") is not None else inner  # the order of Transformers 5
    original = stating.integer("original_max_position_embeddings", default=max_position)
    if kind == "yarn":
        if base <= 1:
            raise outer.error("rope_theta", f"{base:g}", "a number > 1 with rope_type yarn")
        frequencies, scaling = _yarn(inv_freq, inner, base, original)
        return Rope(frequencies, _scaled(original, factor, inner), attention_scaling=scaling)
    if kind == "dynamic":
        if original != max_position:  # Transformers ignores `original`, other programs do not
            expected = f"{max_position}, which is max_position_embeddings, with rope_type dynamic"
            raise stating.error("original_max_position_embeddings", str(original), expected)
        return Rope(inv_freq, _scaled(max_position, factor, inner), dynamic_factor=factor, original_max=original, base=base)
    low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
    if high <= low:
        raise inner.error("high_freq_factor", f"{high:g}", f"more than low_freq_factor, {low:g}")
    return Rope(_llama3(inv_freq, factor, low, high, original), max_position)


def _parameters(config: Mapping[str, Any]) -> tuple[Reader, Reader, str]:
    """The readers of a config.json and of its rope parameters, and the rope type."""
    outer = Reader(config)
    inner = Reader(outer.get("rope_scaling", "rope_parameters") or {}, "the rope parameters in config.json")
    return outer, inner, inner.get("rope_type", "type") or "default"


def stated_length(config: Mapping[str, Any]) -> int:
    """max_position_embeddings, which with linear scaling is the length before it."""
    return Reader(config).integer("max_position_embeddings", default=2048)


def stated_base(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies of a config that `read_rope` has read."""
    outer, inner, _ = _parameters(config)
    return _theta(outer, inner)


@dataclass(frozen=True)
class Scaling:
    """How a GGUF file scales rotary frequencies: `kind` is none, linear or yarn. `original` is the length before YaRN.

    Sines and cosines are multiplied by `attention_factor`, beside the factor that YaRN implies.
    """

    kind: str
    factor: float
    original: int
    attention_factor: float


def gguf_scaling(config: Mapping[str, Any], head_dim: int) -> Scaling:
    """The scaling of a config that `read_rope` has read, beside its `divisors`."""
    outer, inner, kind = _parameters(config)
    attention = read_rope(config, head_dim).attention_scaling
    if kind == "yarn" and _is_usual_yarn(inner):
        stating = outer if outer.get("original_max_position_embeddings") is not None else inner
        original = stating.integer("original_max_position_embeddings", default=stated_length(config))
        return Scaling(kind, inner.number("factor"), original, attention / yarn_magnitude(inner.number("factor")))
    return Scaling(kind, inner.number("factor"), 0, attention) if kind == "linear" else Scaling("none", 1.0, 0, attention)


def divisors(config: Mapping[str, Any], head_dim: int) -> list[float]:
    """What the rotary frequencies of a config are divided by beside its `gguf_scaling`; empty where they are not."""
    _, inner, kind = _parameters(config)
    if kind != "llama3" and (kind != "yarn" or _is_usual_yarn(inner)):
        return list(config.get("rope_divisors") or ())
    quotients: npt.NDArray[np.float32] = (
        inverse_frequencies(stated_base(config), head_dim) / read_rope(config, head_dim).inv_freq
    )
    return [float(value) for value in quotients]


def config_of(inv_freq: Floats, attributes: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    """The keys of config.json that give these frequencies and this longest sequence.

    Frequencies that no base gives, with linear scaling or YaRN's, become `rope_divisors`.
    """
    if factor := attributes["dynamic_factor"]:
        scaling = {"rope_type": "dynamic", "factor": factor}
        return {"rope_theta": attributes["base"], "rope_scaling": scaling} | {
            "max_position_embeddings": attributes["original_max"]
        }
    head_dim, linear = 2 * len(inv_freq), round(1 / float(inv_freq[0]), 6)
    unscaled = inv_freq.astype(np.float64) * linear
    exact = unscaled[1] ** (-head_dim / 2) if len(unscaled) > 1 else 10000.0
    candidates = [float(f"{exact:.{digits}g}") for digits in range(1, 8)]
    bases = [base for base in candidates if np.array_equal(inverse_frequencies(base, head_dim) / np.float32(linear), inv_freq)]
    attention = attributes["attention_scaling"]
    yarn = {} if bases else _config_of_yarn(inv_freq, candidates, attention, max_position)
    if yarn:
        return yarn
    base = bases[0] if bases else candidates[-1]
    config: dict[str, Any] = {"rope_theta": base, "max_position_embeddings": round(max_position / linear)}
    if linear != 1:
        config["rope_scaling"] = {"rope_type": "linear", "factor": linear}
    if not bases:
        config["rope_divisors"] = [float(value) for value in inverse_frequencies(base, head_dim) / inv_freq]
    return config if attention == 1 else config | {"rope_attention_factor": attention}


def _config_of_yarn(inv_freq: Floats, bases: Sequence[float], attention: float, max_position: int) -> dict[str, Any]:
    """The keys of config.json with YaRN's usual parameters that give these frequencies; empty if there are none."""
    factor = round(math.exp(10 * (attention - 1)), 6)  # the inverse of `yarn_magnitude`
    if factor <= 1 or round(max_position / factor) < 1:
        return {}
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": round(max_position / factor)}
    found = ({"rope_theta": base, "rope_scaling": scaling, "max_position_embeddings": max_position} for base in bases)
    return next((config for config in found if np.array_equal(read_rope(config, 2 * len(inv_freq)).inv_freq, inv_freq)), {})


def _scaled(length: int, factor: float, inner: Reader) -> int:
    if length * factor > MOST_INTEGER:
        raise inner.error("factor", f"{factor:g}", f"a number with which {length} positions become at most {MOST_INTEGER}")
    return int(length * factor)


def _divided(inv_freq: Floats, outer: Reader, kind: str) -> Floats:
    """The frequencies divided by `rope_divisors`, if there are some."""
    divisors = outer.get("rope_divisors")
    if divisors is None:
        return inv_freq
    if kind not in ("default", "linear"):
        raise outer.error("rope_divisors", f"some, with rope_type {kind}", "no value, or rope_type default or linear")
    numbers = isinstance(divisors, list) and all(type(value) in (int, float) and 0 < value < math.inf for value in divisors)
    if not numbers or len(divisors) != len(inv_freq):
        raise outer.error("rope_divisors", repr(divisors)[:60], f"{len(inv_freq)} numbers above 0")
    return np.divide(inv_freq, np.array(divisors, np.float32), dtype=np.float32)


def inverse_frequencies(base: float, head_dim: int) -> Floats:
    """The float32 [head_dim / 2] of base ** -(2i / head_dim), rounded to float32 once."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inv_freq: npt.NDArray[np.float64] = 1.0 / np.power(base, exponents.astype(np.float64))
    return inv_freq.astype(np.float32)


def _check_keys(outer: Reader, inner: Reader, kind: str) -> None:
    known = GENERAL.union(TYPES[kind])
    for key, value in inner.values.items():
        if value is not None and key not in known:
            raise inner.error(key, repr(value), f"no other keys than {', '.join(sorted(known))} with rope_type {kind}")
    for reader, key in ((outer, "partial_rotary_factor"), (inner, "partial_rotary_factor"), (inner, "attention_factor")):
        if reader.get(key) not in (None, 1) and (kind, key) != ("yarn", "attention_factor"):
            raise reader.error(key, repr(reader.get(key)), "no value or 1.0")


def _theta(outer: Reader, inner: Reader) -> float:
    inner_theta, outer_theta = inner.get("rope_theta"), outer.get("rope_theta")
    if None not in (inner_theta, outer_theta) and inner_theta != outer_theta:  # Transformers 5 reads the first, 4 the second
        both = f"{outer_theta!r}, and {inner_theta!r} in {inner.where}"
        raise outer.error("rope_theta", both, "one value", "remove the wrong one")
    return (outer if inner_theta is None else inner).number("rope_theta", default=10000.0)


def _llama3(inv_freq: Floats, factor: float, low: float, high: float, length: int) -> Floats:
    """Scale as Llama 3.1 does: long wavelengths grow by `factor`, short ones stay, those between are interpolated."""
    wavelengths = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(length) / wavelengths - np.float32(low)) / np.float32(high - low)
    smoothed = (1 - smooth) * inv_freq / np.float32(factor) + smooth * inv_freq
    between = np.where(wavelengths > length / low, inv_freq / np.float32(factor), smoothed)
    return np.where(wavelengths < length / high, inv_freq, between).astype(np.float32)


def _yarn(inv_freq: Floats, inner: Reader, base: float, length: int) -> tuple[Floats, float]:
    """Scale as YaRN does, and return the factor of sines and cosines too (https://huggingface.co/papers/2309.00071).

    A pair of dimensions that turns more than beta_fast times in `length` tokens keeps its frequency, one that turns less than
    beta_slow times has it divided by the factor, and those between are interpolated.
    """
    factor, half = inner.number("factor"), len(inv_freq)
    first, last = (_pair_that_turns(turns, 2 * half, base, length) for turns in _betas(inner))
    if inner.flag("truncate", default=True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    places = np.arange(half, dtype=np.float32)
    ramp = np.clip((places - np.float32(first)) / np.float32(last - first or 0.001), 0, 1)
    frequencies = inv_freq / np.float32(factor) * ramp + inv_freq * (1 - ramp)
    numerator, denominator = (inner.number(name, default=1.0) for name in ("mscale", "mscale_all_dim"))
    implied = yarn_magnitude(factor)
    if inner.get("mscale") is not None and inner.get("mscale_all_dim") is not None:
        implied = yarn_magnitude(factor, numerator) / yarn_magnitude(factor, denominator)
    return frequencies.astype(np.float32), inner.number("attention_factor", default=implied)


def _betas(inner: Reader) -> tuple[float, float]:
    fast, slow = inner.number("beta_fast", default=BETA_FAST), inner.number("beta_slow", default=BETA_SLOW)
    if fast <= slow:
        raise inner.error("beta_fast", f"{fast:g}", f"more than beta_slow, {slow:g}")
    return fast, slow


def _is_usual_yarn(inner: Reader) -> bool:
    """Whether the parameters are those with which llama.cpp computes YaRN."""
    return _betas(inner) == (BETA_FAST, BETA_SLOW) and inner.flag("truncate", default=True)


def _pair_that_turns(turns: float, head_dim: int, base: float, length: int) -> float:
    """The pair of dimensions, as a real number, that turns so many times in `length` tokens."""
    return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor of sines and cosines for a length that grows by `factor`."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
