"""Tables of measured tilings, looked up by shape; reading one measures nothing.

ISA.json is for every processor. ISA-PROCESSOR.json is for one that `runtime.host.processor` names, if its best tilings are not
the best elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import log2
from pathlib import Path
from typing import Any

from belle_compile.compiler.backends.tvm.kernels.quantized_linear import QuantizedLinear
from belle_compile.compiler.backends.tvm.kernels.tiling import LinearTiling, Walk
from belle_compile.compiler.errors import CompileError

FORMAT = 1
TABLES = Path(__file__).parent / "tables"
MOST_DISTANCE = 1.5  # the largest `Shape.distance` over which a tiling is reused


@dataclass(frozen=True, order=True)
class Shape:
    """The key of a tiling: outputs and inputs of a linear layer, and the number of planes of its activations."""

    outputs: int
    inputs: int
    planes: int = 1

    @classmethod
    def of(cls, kernel: QuantizedLinear) -> Shape:
        return cls(kernel.outputs, kernel.inputs, kernel.planes)

    def distance(self, other: Shape) -> float:
        """How different the memory accesses of two shapes are: 1 for a factor 2 in the inputs (length of a panel), 0.5 for a
        factor 2 in the outputs (number of panels)."""
        return abs(log2(self.inputs / other.inputs)) + abs(log2(self.outputs / other.outputs)) / 2

    def __str__(self) -> str:
        return f"{self.outputs}x{self.inputs}" + (f" in {self.planes} planes" if self.planes > 1 else "")


@dataclass(frozen=True)
class Entry:
    """The best measured tiling of a shape. `microseconds` maps row counts to the median times of this and of the built-in
    tiling."""

    shape: Shape
    tiling: LinearTiling
    microseconds: dict[int, tuple[float, float]] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        tiling, defaults = self.tiling, LinearTiling(self.tiling.walks)
        plain: dict[str, Any] = {"outputs": self.shape.outputs, "inputs": self.shape.inputs}
        plain |= {"planes": self.shape.planes} if self.shape.planes > 1 else {}
        plain["walks"] = {"any" if bound is None else str(bound): walk.to_plain() for bound, walk in tiling.walks}
        for name in ("tiles_from", "tile_wide", "tile_panels"):
            plain |= {name: getattr(tiling, name)} if getattr(tiling, name) != getattr(defaults, name) else {}
        plain["microseconds"] = {str(rows): list(times) for rows, times in self.microseconds.items()}
        return plain

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Entry:
        """The reverse of `to_plain`. Raises ValueError, TypeError, KeyError or AttributeError for anything that is no entry."""
        walks = [(None if bound == "any" else int(bound), Walk.from_plain(walk)) for bound, walk in plain["walks"].items()]
        walks.sort(key=lambda bound: (bound[0] is None, bound[0] or 0))
        tiles_from = int(plain.get("tiles_from", LinearTiling.tiles_from))
        tile_wide = int(plain.get("tile_wide", LinearTiling.tile_wide))
        tile_panels = int(plain.get("tile_panels", LinearTiling.tile_panels))
        times = {int(rows): (float(tuned), float(built_in)) for rows, (tuned, built_in) in plain["microseconds"].items()}
        shape = Shape(int(plain["outputs"]), int(plain["inputs"]), int(plain.get("planes", 1)))
        return cls(shape, LinearTiling(tuple(walks), tiles_from, tile_wide, tile_panels), times)


@dataclass(frozen=True)
class TilingTable:
    """Entries measured on one machine for one instruction set. Shapes without an entry nearby get the built-in tiling."""

    isa: str
    entries: tuple[Entry, ...] = ()
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    processor: str = ""  # the only processor that the table is for; empty: all

    def find(self, shape: Shape) -> Entry | None:
        """The entry of this shape, else the nearest one by `Shape.distance` with the same number of planes and at most
        `MOST_DISTANCE` away (the smallest shape of equally near ones), else None, which stands for the built-in tiling."""
        near = [
            (shape.distance(entry.shape), entry.shape, entry) for entry in self.entries if entry.shape.planes == shape.planes
        ]
        distance, _, entry = min(near, key=lambda candidate: candidate[:2], default=(MOST_DISTANCE + 1, shape, None))
        return entry if distance <= MOST_DISTANCE else None

    def describe(self) -> str:
        """The origin of the tilings, as the manifest's toolchain records it."""
        name = f"{self.isa} on {self.processor}" if self.processor else self.isa
        return f"{name}: measured {self.date} on {self.machine.get('processor', '?')}" if self.entries else f"{name}: built-in"

    @property
    def library(self) -> str:
        """The file name, in an engine, of the kernels with these tilings."""
        return f"kernels-{self.isa}-{self.processor}.so" if self.processor else f"kernels-{self.isa}.so"

    def to_plain(self) -> dict[str, Any]:
        entries = [entry.to_plain() for entry in sorted(self.entries, key=lambda entry: entry.shape)]
        head = {"format": FORMAT, "isa": self.isa, "machine": self.machine, "date": self.date, "versions": self.versions}
        return head | {"entries": entries}

    def to_json(self) -> str:
        """JSON with one line per entry, so that diffs are readable."""
        plain = self.to_plain()
        entries = ",\n".join(f"  {json.dumps(entry)}" for entry in plain.pop("entries"))
        head = json.dumps(plain, indent=1, ensure_ascii=False).removesuffix("\n}")
        return f'{head},\n "entries": [\n{entries}\n ]\n}}\n'


def processors(isa: str, folder: Path = TABLES) -> tuple[str, ...]:
    """The processors that have a table of their own for an instruction set."""
    return tuple(sorted(path.stem.removeprefix(f"{isa}-") for path in folder.glob(f"{isa}-*.json")))


def table_path(isa: str, processor: str = "", folder: Path = TABLES) -> Path:
    """The path of a table. The table of processor "" is for all processors that have no table of their own."""
    return folder / (f"{isa}-{processor}.json" if processor else f"{isa}.json")


def read_table(isa: str, processor: str = "", folder: Path = TABLES) -> TilingTable:
    """The table of an instruction set and processor, empty if there is no file. Raises CompileError for a damaged file."""
    path = table_path(isa, processor, folder)
    if not path.exists():
        return TilingTable(isa, processor=processor)
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if (plain["format"], plain["isa"]) != (FORMAT, isa):
            raise ValueError(f"format {plain['format']} for {plain['isa']}")
        entries = tuple(Entry.from_plain(entry) for entry in plain["entries"])
        return TilingTable(isa, entries, dict(plain["machine"]), str(plain["date"]), dict(plain["versions"]), processor)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        remedy = (
            f"run `python -m belle_compile.compiler.backends.tvm.tuning --isa {isa}`, or delete it to use the built-in tilings"
        )
        raise CompileError("tuning", f"table {path}", found=str(error), expected=f"format {FORMAT}", remedy=remedy) from None
