"""The rows of peers.toml: which engines are measured, in which settings, on which shapes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.home import FOLDER, PeersError

OURS = "belle"
CONFIG = FOLDER / "peers.toml"
# The class of adapters.py, or of ours.py, and the formats that convert.py can make; none where the checkpoint is read as it is.
ADAPTERS = {
    "belle": "Belle",
    "llama": "LlamaCpp",
    "ct2": "CTranslate2",
    "ort": "OrtGenAI",
    "ov": "OpenVINO",
    "hf": "Transformers",
}
FORMATS: dict[str, tuple[str, ...]] = {
    "belle": ("int8", "int8-accurate", "int8-plain"),
    "llama": ("q8_0", "q4_0", "q4_k_m"),
    "ct2": ("int8", "int8_bfloat16", "float32"),
    "ort": ("int8", "int4"),
    "ov": ("int8",),
    "hf": ("",),
}


@dataclass(frozen=True)
class Row:
    """One line of the tables."""

    name: str
    peer: str
    bits: float  # nominal, of a weight
    format: str = ""
    option: str = ""
    only_for: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    backend: str = ""  # of ours, where it is not the default one

    @property
    def is_ours(self) -> bool:
        return self.peer == OURS

    @property
    def adapter(self) -> str:
        """FILE:CLASS."""
        return f"{FOLDER / ('ours.py' if self.is_ours else 'adapters.py')}:{ADAPTERS[self.peer]}"

    def fits(self, shape: str) -> bool:
        """Whether the row is for a shape."""
        return shape not in self.skip and (not self.only_for or shape in self.only_for)


def read_rows(config: Path = CONFIG) -> list[Row]:
    """All rows of a configuration; raises PeersError where one is wrong."""
    try:
        toml: Any = importlib.import_module("tomllib")
    except ImportError:
        raise PeersError("side-by-side runs need Python 3.11 or later: run make with PYTHON=/path/to/python3") from None
    try:
        specs = toml.loads(config.read_text(encoding="utf-8")).get("row", [])
    except (OSError, toml.TOMLDecodeError) as error:
        raise PeersError(f"{config}: {error}") from error
    rows = [_row(spec, config) for spec in specs]
    _check_names(rows, config)
    return rows


def choose(rows: Sequence[Row], shape: str, only: Sequence[str] = (), ours: Sequence[str] = ()) -> list[Row]:
    """The rows for a shape: of these peers or names only, if any, and our first row again with each option of `ours`."""
    known = {word for row in rows for word in (row.name, row.peer)}
    if unknown := [word for word in only if word not in known]:
        raise PeersError(f"unknown {unknown}; peers and rows are {sorted(known)}")
    chosen = [row for row in rows if row.fits(shape) and (not only or row.name in only or row.peer in only)]
    first = next((row for row in rows if row.is_ours), None)
    if ours and first is None:
        raise PeersError(f"no row of peer {OURS!r} that could be run with {list(ours)}")
    extra = [replace(first, name=f"{first.name}, {option}", option=option) for option in ours if first is not None]
    _check_names([*chosen, *extra], "the rows chosen")
    if not chosen + extra:
        raise PeersError(f"no row is for {shape}")
    return chosen + extra


def _row(spec: dict[str, Any], config: Path) -> Row:
    keys = {
        "name": str,
        "peer": str,
        "bits": (int, float),
        "format": str,
        "backend": str,
        "option": str,
        "only_for": list,
        "skip": list,
    }
    name = spec.get("name", "without a name")
    for key, value in spec.items():
        if key not in keys or not isinstance(value, keys[key]):  # type: ignore[arg-type]
            raise PeersError(f"{config}: row {name!r}: {key} = {value!r}; expected some of {', '.join(keys)}")
    if missing := [key for key in ("name", "peer", "bits") if key not in spec]:
        raise PeersError(f"{config}: row {name!r} has no {' and no '.join(missing)}")
    if spec["peer"] not in ADAPTERS:
        raise PeersError(f"{config}: row {name!r}: unknown peer {spec['peer']!r}; known: {', '.join(ADAPTERS)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}
    row = Row(**values)
    if row.backend and not row.is_ours:
        raise PeersError(f"{config}: row {name!r}: only rows of peer {OURS!r} have a backend")
    if row.format not in FORMATS[row.peer]:
        known = ", ".join(map(repr, FORMATS[row.peer]))
        raise PeersError(f"{config}: row {name!r}: {row.peer} has no format {row.format!r}; it has {known}")
    return row


def _check_names(rows: Sequence[Row], where: object) -> None:
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PeersError(f"{where}: two rows are called {twice}")
