"""Tables and a plot of the side-by-side runs: benchmarks/results/peers/README.md and speed.svg, from SHAPE.jsonl.

python -m benchmarks.peers.report [--results benchmarks/results/peers]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.engines import SHAPES
from benchmarks.peers.home import PeersError
from benchmarks.peers.rows import OURS
from benchmarks.report import import_pyplot, save

RESULTS = Path("benchmarks/results/peers")
NOISY_CORES = 0.2  # others used more than this during a noisy sample
DECODE = "decode"  # the task whose share of the read bandwidth is given
Line = dict[str, Any]

HEAD = """# Side by side with other engines

Written by `make bench-peers` (`python -m benchmarks.peers`, which ends with `python -m benchmarks.peers.report`); do not edit.
The same checkpoints and cores for all, rounds interleaved, every sample a new process on a machine that is quiet; how it is
measured and how the peers are set up: [benchmarks/peers](../../peers/README.md). Shapes but SmolLM2's have random weights.

Tokens per second: median (best) of n samples; batch 8 is all sequences together. Of bandwidth: the weight bytes a step reads
over the memory's read bandwidth measured around that sample, median, at batch 1; caches may keep part of a small model.
Load: the median time until an engine can be asked, its libraries' import included, file cache warm. Peak memory includes mapped
weights: at batch 1, and of all tasks. Samples during which others used more than 0.2 of a core are noisy and are left out where
there are others. Bits are nominal bits of a weight.
"""


@dataclass
class Engine:
    """Samples of one row."""

    name: str
    peer: str
    bits: float
    samples: list[Line] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)  # of a task, or of all under ""

    def quiet(self, task: str) -> list[Line]:
        """The samples that count: the quiet ones, or all where none was quiet."""
        found = [sample for sample in self.samples if task in sample["tasks"]]
        return [sample for sample in found if sample["tasks"][task][1] <= NOISY_CORES] or found

    def rates(self, task: str) -> list[float]:
        return [sample["tasks"][task][0] for sample in self.quiet(task)]

    def share(self) -> float | None:
        """Of the read bandwidth, when decoding at batch 1."""
        shares = [s["tasks"][DECODE][0] * s["bytes_per_token"] / 1e9 / s["bandwidth"] for s in self.quiet(DECODE)]
        return median(shares) if shares else None

    def noisy(self) -> int:
        return sum(others > NOISY_CORES for sample in self.samples for _, others in sample["tasks"].values())


@dataclass
class Comparison:
    """One shape."""

    shape: str
    runs: list[Line]
    engines: list[Engine]  # in the order of peers.toml

    @property
    def tasks(self) -> list[str]:
        return list(self.runs[-1]["tasks"])

    def measured(self) -> list[Engine]:
        return [engine for engine in self.engines if engine.samples]


def read(path: Path) -> Comparison:
    """The runs of one file; raises PeersError where it holds none."""
    lines: list[Line] = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    runs = [line for line in lines if line["kind"] == "run"]
    if not runs:
        raise PeersError(f"{path} has no run: measure with python -m benchmarks.peers {path.stem}")
    engines: dict[str, Engine] = {}
    for line in lines:
        if line["kind"] == "run":
            continue
        engine = engines.setdefault(line["name"], Engine(line["name"], line["peer"], line["bits"]))
        if "error" in line:
            engine.errors[""] = line["error"]
        else:
            engine.samples.append(line)
            engine.errors |= line["errors"]
    ordered = sorted(engines.values(), key=lambda engine: (engine.peer != OURS, engine.bits != 8, engine.bits))
    return Comparison(path.stem, runs, ordered)


def read_all(folder: Path) -> list[Comparison]:
    """All files of a folder, in the order of the shapes."""
    paths = sorted(
        folder.glob("*.jsonl"), key=lambda path: (SHAPES.index(path.stem) if path.stem in SHAPES else len(SHAPES), path)
    )
    if not paths:
        raise PeersError(f"no results in {folder}: run make bench-peers")
    return [read(path) for path in paths]


def page(comparisons: Sequence[Comparison], extra: str = "") -> str:
    """README.md."""
    parts = [HEAD, "![Tokens per second](speed.svg)\n", *(section(comparison) for comparison in comparisons), extra]
    return "\n".join(parts).rstrip() + "\n"


def section(comparison: Comparison) -> str:
    """Machine, speeds, ratios and failures of a shape."""
    tasks = comparison.tasks
    header = ["engine", "bits", "n", *tasks, "of bandwidth", "load s", "peak MB", "noisy"]
    parts = [f"## {comparison.shape}", *conditions(comparison)]
    parts.append(table(header, [_row(engine, tasks) for engine in comparison.engines]))
    if rows := ratios(comparison):
        parts.append("Ours over the best peer, by medians:")
        parts.append(
            table(["task", "ours", "tokens/s", "best peer at the same bits", "ratio", "best peer of all", "ratio"], rows)
        )
    partly = [
        f"- {engine.name}: {task or 'failed in a round'}: {_cell(error)}"
        for engine in comparison.measured()
        for task, error in engine.errors.items()
    ]
    if partly:
        parts += ["Failed:", "\n".join(partly)]
    return "\n\n".join(parts) + "\n"


def conditions(comparison: Comparison) -> list[str]:
    """Paragraphs: where and when, with what, by which command."""
    runs, last = comparison.runs, comparison.runs[-1]
    machine = last["machine"]
    readings = [sample["bandwidth"] for engine in comparison.engines for sample in engine.samples]
    sets = ", ".join(machine["instruction_sets"])
    where = (
        f"{machine['processor']}, {machine['cores']} cores ({sets}), {last['threads']} threads, {machine['memory_gib']} GiB, "
        f"last-level cache {machine['last_level_cache_mib']} MiB, {machine['system']}"
    )
    if readings:
        where += f". Memory read: median {median(readings):.1f} GB/s, {min(readings):.1f} to {max(readings):.1f}"
    versions = machine["versions"]
    ours = f"belle-compile {versions.get('belle-compile', 'from the checkout')}"
    ours += f" (commit {last['commit']}, sources {last['sources']})" if last["commit"] else f" (sources {last['sources']})"
    peers = {peer: version for run in runs for peer, version in run["peers"].items()}
    times = "; ".join(dict.fromkeys(f"{run['time']}, {_rounds(run['rounds'])}, `{run['machine']['command']}`" for run in runs))
    return [f"{where}.", f"{ours}; {'; '.join(peers.values())}.", f"{times}."]


def _rounds(count: int) -> str:
    return f"{count} round{'s' * (count != 1)}"


def _row(engine: Engine, tasks: Sequence[str]) -> list[str]:
    cells = [engine.name, f"{engine.bits:g}"]
    if not engine.samples:
        return [*cells, "0", f"failed: {_cell(engine.errors[''])}", *["-"] * (len(tasks) + 3)]
    rates = [engine.rates(task) for task in tasks]
    cells += [str(max(map(len, rates))), *(f"{median(found):,.1f} ({max(found):,.1f})" if found else "-" for found in rates)]
    share, load = engine.share(), median(sample["load"] for sample in engine.samples)
    peaks = [max(sample["peak_mb"].get(task, 0) for sample in engine.samples) for task in tasks]
    cells += [
        f"{share:.0%}" if share is not None else "-",
        f"{load:.2f}",
        f"{peaks[0]:,} / {max(peaks):,}",
        str(engine.noisy()),
    ]
    return cells


def ratios(comparison: Comparison) -> list[list[str]]:
    """Each row of ours over the best peer at its bits and at any, for every task."""
    rows = []
    for ours in (engine for engine in comparison.measured() if engine.peer == OURS):
        for task in comparison.tasks:
            if not (rates := ours.rates(task)):
                continue
            speed = median(rates)
            cells = [task, ours.name, f"{speed:,.1f}"]
            for same in (True, False):
                best = best_peer(comparison, task, ours.bits if same else None)
                cells += [f"{best[0]}, {best[1]:,.1f}", f"{speed / best[1]:.2f}"] if best else ["-", "-"]
            rows.append(cells)
    return rows


def best_peer(comparison: Comparison, task: str, bits: float | None) -> tuple[str, float] | None:
    """Name and median of the fastest peer, of these bits if given."""
    rivals = [engine for engine in comparison.measured() if engine.peer != OURS and bits in (None, engine.bits)]
    speeds = {engine.name: median(rates) for engine in rivals if (rates := engine.rates(task))}
    name = max(speeds, key=lambda key: speeds[key], default=None)
    return None if name is None else (name, speeds[name])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _cell(text: str) -> str:
    """An error as one line that breaks no table."""
    return " ".join(text.split()).replace("|", "/")


def agreement(result: Line) -> str:
    """The section of benchmarks.peers.agree."""
    rows = []
    for row in result["rows"]:
        if "error" in row:
            rows.append([row["name"], f"failed: {_cell(row['error'])}", *["-"] * 7])
            continue
        cells = [
            row["name"],
            f"{row['greedy']:.3f}",
            f"{row['same_answers']}/{result['prompts']}",
            f"{row['before_difference']:.1f}",
        ]
        teacher, text = row["teacher"], row.get("text")
        cells += [f"{teacher['top1']:.3f}", f"{teacher['kl']:.4f}"] if teacher else ["-", "-"]
        cells += [f"{text['top1']:.3f}", f"{text['kl']:.4f}", f"{exp(text['loss']):.4f}"] if text else ["-"] * 3
        rows.append(cells)
    about = (
        f"{result['prompts']} chat prompts, greedy answers of at most {result['longest']} tokens, {result['date']}: share of "
        "equal tokens, answers equal throughout, tokens before the first difference; along the reference's answers, the same "
        "most likely token and KL divergence in nats, and so along windows of Python's documentation, with the ratio of "
        "perplexities. The weights were expanded from 4 bits, so rows of 4 bits quantise twice."
    )
    header = ["engine", "greedy", "same answer", "before the first difference", "teacher-forced top-1", "KL"]
    header += ["text: top-1", "KL", "perplexity ratio"]
    return f"## Agreement with Transformers fp32, {result['shape']}\n\n{about}\n\n{table(header, rows)}\n"


def plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """Bars of the medians, a panel for every shape and task; ours and the peers in two colours, other than 8 bits paler."""
    pyplot = import_pyplot()
    tasks = comparisons[0].tasks
    heights = [0.25 * len(comparison.measured()) + 0.9 for comparison in comparisons]
    figure, panels = pyplot.subplots(
        len(comparisons), len(tasks), figsize=(3.1 * len(tasks) + 1.5, sum(heights)), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for line, comparison in zip(panels, comparisons, strict=True):
        engines = comparison.measured()
        for axes, task in zip(line, tasks, strict=True):
            speeds = [median(engine.rates(task) or [0.0]) for engine in engines]
            bars = axes.barh(range(len(engines)), speeds, color=[_colour(engine) for engine in engines])
            axes.bar_label(bars, [f"{speed:,.4g}" if speed else "-" for speed in speeds], fontsize=7, padding=2)
            axes.set_yticks(range(len(engines)), [engine.name for engine in engines] if axes is line[0] else [], fontsize=8)
            axes.set_xlim(0, 1.25 * max([*speeds, 1.0]))
            axes.tick_params(axis="x", labelsize=7)
            axes.invert_yaxis()
            axes.set_title(f"{comparison.shape}: {task}, tokens/s", fontsize=9, loc="left")
    save(figure, path)


def _colour(engine: Engine) -> str:
    if engine.peer == OURS:
        return "#c44e52"
    return "#4c72b0" if engine.bits == 8 else "#a9bcd9"


def write(folder: Path) -> Path:
    """README.md and speed.svg of a folder of results."""
    comparisons = read_all(folder)
    path = folder / "README.md"
    agreed = folder / "agreement.json"
    extra = agreement(json.loads(agreed.read_text(encoding="utf-8"))) if agreed.is_file() else ""
    path.write_text(page(comparisons, extra), encoding="utf-8")
    plot(comparisons, folder / "speed.svg")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    try:
        print(write(parser.parse_args().results))
    except PeersError as error:
        raise SystemExit(f"peers: {error}.") from None


if __name__ == "__main__":
    main()
