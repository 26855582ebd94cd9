"""Search for the best tiling of each shape on this host."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from belle_compile import __version__
from belle_compile.compiler.backends.program.kernel import View
from belle_compile.compiler.backends.tvm.isa import Isa
from belle_compile.compiler.backends.tvm.kernels.base import Kernel, rows_apart
from belle_compile.compiler.backends.tvm.kernels.panels import PANEL
from belle_compile.compiler.backends.tvm.kernels.quantized_linear import QuantizedLinear
from belle_compile.compiler.backends.tvm.kernels.tiling import LinearTiling, Walk, built_in
from belle_compile.compiler.backends.tvm.tuning.candidates import TILE_ROWS, TILES, Bucket, buckets, leaves_tasks
from belle_compile.compiler.backends.tvm.tuning.measure import Bench, Variant, last_level_cache, load_variants
from belle_compile.compiler.backends.tvm.tuning.table import Entry, Shape, TilingTable
from belle_compile.runtime import host

MARGIN = 0.01  # the smallest relative gain for which a walk is replaced; below it, noise would decide
NEVER = 1 << 20  # more rows than any kernel gets
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)  # row counts at which the result is measured

Progress = Callable[[int, int], None]


def shapes_of(kernels: Mapping[Kernel, int]) -> dict[Shape, int]:
    """The shapes of the int8 linear layers among kernels, each with its largest number of rows."""
    shapes: dict[Shape, int] = {}
    for kernel, max_rows in kernels.items():
        if isinstance(kernel, QuantizedLinear):
            shape = Shape.of(kernel)
            shapes[shape] = max(max_rows, shapes.get(shape, 0))
    return dict(sorted(shapes.items()))


def kernel_of(shape: Shape) -> QuantizedLinear:
    """A kernel of this shape whose activations fill their buffers."""
    x, out = View(shape.planes * rows_apart(shape.inputs, 1).stride), rows_apart(shape.outputs)
    return QuantizedLinear(shape.outputs, shape.inputs, False, x, out, shape.planes)


def search(
    shapes: Mapping[Shape, int], isa: Isa, *, threads: int | None = None, progress: Progress | None = None
) -> TilingTable:
    """Measure candidates for every shape; `shapes` maps each to its largest number of rows. `progress` is called with (done,
    total) for each shape."""
    threads = threads or len(host.usable_cores())
    entries = []
    for done, (shape, max_rows) in enumerate(shapes.items()):
        if progress:
            progress(done, len(shapes))
        entries.append(_Search(shape, max_rows, isa, threads).run())
    if progress:
        progress(len(shapes), len(shapes))
    versions = {"belle-compile": __version__, "apache-tvm": version("apache-tvm")}
    return TilingTable(isa.name, tuple(entries), _machine(threads), date.today().isoformat(), versions)


class _Search:
    """The search for one shape. The buckets of row counts are independent; they only share compilations."""

    def __init__(self, shape: Shape, max_rows: int, isa: Isa, threads: int) -> None:
        self.shape, self.isa, self.threads, self.max_rows = shape, isa, threads, max_rows
        self.kernel = kernel_of(shape)
        self.bench = Bench(self.kernel, max_rows)
        self.buckets = buckets(isa, shape.planes, max_rows)
        self.built_in = built_in(isa, shape.planes)

    def run(self) -> Entry:
        best = [self.built_in.walk_for(bucket.rows[-1]) for bucket in self.buckets]
        best = self._improve(best, [bucket.first() for bucket in self.buckets])
        for stage in range(max(len(bucket.stages) for bucket in self.buckets)):
            tried = [b.following(stage, w) if stage < len(b.stages) else () for b, w in zip(self.buckets, best, strict=True)]
            best = self._improve(best, tried)
        tiling = LinearTiling(_merge(self.buckets, best), tiles_from=NEVER if self.isa.amx else LinearTiling.tiles_from)
        if self.isa.amx:
            tiling = self._with_tiles(tiling)
        times = self._times({"tuned": tiling, "built_in": self.built_in}, [rows for rows in ROWS if rows <= self.max_rows])
        pairs = {rows: (round(tuned * 1e6, 1), round(before * 1e6, 1)) for rows, (tuned, before) in times.items()}
        return Entry(self.shape, tiling, pairs)

    def _improve(self, best: Sequence[Walk], tried: Sequence[Sequence[Walk]]) -> list[Walk]:
        """The best walk of each bucket among `best` and `tried`; the previous one stays unless another gains more than
        MARGIN."""
        panels = -(-self.shape.outputs // PANEL)
        trials = [
            list(dict.fromkeys((before, *(walk for walk in walks if leaves_tasks(walk, panels)))))
            for before, walks in zip(best, tried, strict=True)
        ]
        kernels = {}
        for index, (bucket, walks) in enumerate(zip(self.buckets, trials, strict=True)):
            for number, walk in enumerate(walks):
                tiling = LinearTiling(((None, walk),), tiles_from=NEVER, trial_rows=bucket.rows)
                kernels[f"trial_{index}_{number}"] = self._tiled(tiling)
        functions = load_variants(kernels, self.isa, self.threads)
        return [
            self._best(bucket, walks, [functions[f"trial_{index}_{number}"] for number in range(len(walks))])
            for index, (bucket, walks) in enumerate(zip(self.buckets, trials, strict=True))
        ]

    def _best(self, bucket: Bucket, walks: Sequence[Walk], functions: Sequence[Variant]) -> Walk:
        times = [self.bench.compare(functions, rows) for rows in bucket.rows]
        scores = [prod(by_walk) ** (1 / len(times)) for by_walk in zip(*times, strict=True)]
        fastest = min(range(len(walks)), key=scores.__getitem__)
        return walks[fastest] if scores[fastest] < scores[0] * (1 - MARGIN) else walks[0]

    def _with_tiles(self, tiling: LinearTiling) -> LinearTiling:
        """Set the row count from which tile products win at every measured count, and the panels that they multiply at a time
        and in a task."""
        tilings = {"walks": tiling} | {
            f"tiles_{wide}_{panels}": replace(tiling, tiles_from=1, tile_wide=wide, tile_panels=panels)
            for wide, panels in TILES
        }
        times = self._times(tilings, [rows for rows in TILE_ROWS if rows <= self.max_rows])
        fewest = NEVER
        for rows, (walks, *tiles) in sorted(times.items(), reverse=True):
            if min(tiles) >= walks:
                break
            fewest = rows
        counted = [tiles for rows, (_, *tiles) in times.items() if rows >= fewest]
        scores = [prod(by_size) for by_size in zip(*counted, strict=True)] or [0.0]
        wide, panels = TILES[scores.index(min(scores))]
        return replace(tiling, tiles_from=fewest, tile_wide=wide, tile_panels=panels)

    def _times(self, tilings: Mapping[str, LinearTiling], counts: Iterable[int]) -> dict[int, list[float]]:
        """Seconds per call of each tiling, by row count."""
        kernels = {f"whole_{name}": self._tiled(tiling) for name, tiling in tilings.items()}
        functions = load_variants(kernels, self.isa, self.threads)
        return {rows: self.bench.compare(list(functions.values()), rows, every=True) for rows in counts}

    def _tiled(self, tiling: LinearTiling) -> QuantizedLinear:
        return replace(self.kernel, tiling=tiling)


def _merge(every: Sequence[Bucket], best: Sequence[Walk]) -> tuple[tuple[int | None, Walk], ...]:
    """Join neighbouring buckets that chose the same walk."""
    pairs = list(zip(every, best, strict=True))
    return tuple((b.most, w) for i, (b, w) in enumerate(pairs) if i + 1 == len(pairs) or pairs[i + 1][1] != w)


def _machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info) if value}
    name, family, model = cpu.get("model name", platform.processor()), cpu.get("cpu family", "?"), cpu.get("model", "?")
    return {
        "processor": f"{name} (family {family}, model {model})",
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "last_level_cache_mib": last_level_cache() >> 20,
    }
