"""How decoding time grows with model size, context, batch and threads: measured points, a line through them, larger models.

    python -m benchmarks.scaling --measure llama-1b      # sweeps at 1, 2, 4, ... threads first (minutes), then the note
    python -m benchmarks.scaling                         # the note from the results that are there

A step reads its weights once and the keys and values of every sequence, so its time is modelled as fixed + bytes / bandwidth,
fitted to the batch-1 points of all models (least squares of the relative error) at the greatest number of threads.
Writes SCALING.md and scaling.svg beside the results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.runtime import host
from benchmarks.checkpoints import SHAPES
from benchmarks.report import RESULTS, Result, import_pyplot, read_results, save

# Only extrapolated to: BELLE-LLaMA-13B. Others are those of SHAPES, of which bloom-7b1 is BELLE-7B.
LLAMA_13B = {"model_type": "llama", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
             "num_key_value_heads": 40, "intermediate_size": 13824, "vocab_size": 32000}  # fmt: skip
LARGER = {"llama-7b": SHAPES["llama-7b"], "bloom-7b1": SHAPES["bloom-7b1"], "llama-13b": LLAMA_13B}
CONTEXTS = (64, 2000)
HEAD = """# How decoding scales

Written by `python -m benchmarks.scaling` from the results in this folder; do not edit. A step reads its weights once and the
keys and values of every sequence, so its time is modelled as fixed + bytes / bandwidth, fitted to the batch-1 points of all
models. Bytes of the larger models follow from their shapes, int8 weights and a cache of 16 bits; what the line says about them
is a prediction.
"""


@dataclass(frozen=True)
class Point:
    """Median time of a decoding step, by the best instruction set of its result."""

    shape: str
    isa: str
    threads: int
    batch: int
    context: float
    bytes: float
    seconds: float
    limit: float  # GB/s

    @property
    def share(self) -> float:
        """Of the read bandwidth beside it."""
        return self.bytes / self.seconds / 1e9 / self.limit


@dataclass(frozen=True)
class Line:
    """seconds = fixed + bytes / bandwidth."""

    fixed_s: float
    bandwidth: float  # bytes a second
    worst: float  # greatest relative error of the points it was fitted to

    def seconds(self, size: float) -> float:
        """Predicted time of a step that reads `size` bytes."""
        return self.fixed_s + size / self.bandwidth


def points(results: list[Result]) -> list[Point]:
    """Every decoding task of every result."""
    found = []
    for result in results:
        cost = result["cost"]
        for name, task in result["tasks"].items():
            if not task["steps"]:
                continue
            isa, median = min(result["median"][name].items(), key=lambda item: float(item[1]["seconds"]))
            size = cost["weight_bytes_per_step"] + task["batch"] * task["context"] * cost["kv_bytes_per_token"]
            found.append(Point(result["engine"], isa, result["threads"], task["batch"], task["context"], size,
                               median["seconds"], median["limit"]))  # fmt: skip
    return found


def fit(measured: list[Point]) -> Line:
    """The line with the least squared relative errors; without the fixed part when sizes are alike or it would be below 0."""
    sizes, seconds = (np.array([getattr(point, name) for point in measured]) for name in ("bytes", "seconds"))
    columns = np.stack([np.ones_like(sizes), sizes / 1e9]) / seconds
    (fixed, per_gigabyte), *_ = np.linalg.lstsq(columns.T, np.ones_like(seconds), rcond=None)
    if fixed < 0 or np.ptp(sizes) < 0.5 * sizes.max():
        fixed, per_gigabyte = 0.0, float(columns[1].sum() / (columns[1] ** 2).sum())
    line = Line(float(fixed), 1e9 / float(per_gigabyte), 0.0)
    worst = max(abs(line.seconds(point.bytes) / point.seconds - 1) for point in measured)
    return Line(line.fixed_s, line.bandwidth, worst)


def step_bytes(config: dict[str, Any]) -> tuple[int, int]:
    """(weight bytes of a step, keys and values of a token in 16 bits) of an int8 engine of this shape."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    if config["model_type"] == "llama":
        layers, head = config["num_hidden_layers"], hidden // config["num_attention_heads"]
        kv_width, inner = config["num_key_value_heads"] * head, config["intermediate_size"]
        linears = [(hidden + 2 * kv_width, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
        per_output = 8  # scale and correction
    else:
        layers, kv_width = config["n_layer"], hidden
        linears = [(3 * hidden, hidden), (hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden)]
        per_output = 12  # and bias
    layer = sum(prod(linear) + per_output * linear[0] for linear in linears)
    return layers * layer + vocabulary * (hidden + 8), layers * 2 * kv_width * 2


def markdown(measured: list[Point], line: Line, threads: int) -> str:
    """The note."""
    widest = [point for point in measured if point.threads == threads]
    single = [point for point in widest if point.batch == 1]
    of = _sweep_shape(measured)
    fitted = f"{1e3 * line.fixed_s:.2f} ms + bytes / {line.bandwidth / 1e9:.1f} GB/s, the worst point {line.worst:.0%} off"
    out = [HEAD, f"Fitted at {threads} threads: {fitted}.", "", "![Time of a decoding step](scaling.svg)", ""]
    out += _section("Model size and context, batch 1", single, lambda point: (point.bytes, point.shape))
    batches = [p for p in widest if p.shape == of and p.context < 100]
    out += _section(f"Batch, {of}", batches, lambda point: (point.batch, point.context))
    counts = _thread_counts_of(measured, of)
    short = [p for p in measured if p.shape == of and p.batch == 1 and len(counts[p.context]) > 1]
    out += _section(f"Threads, {of}, batch 1", short, lambda point: (point.context, point.threads))
    out += ["## Larger models, batch 1", "", "| model | context | GB a step | predicted, ms a token | tokens/s | measured |"]
    out += ["| --- " * 6 + "|"]
    for shape, config in LARGER.items():
        weights, kv = step_bytes(config)
        for context in CONTEXTS:
            seconds = line.seconds(weights + kv * context)
            near = [p for p in single if p.shape == shape and abs(p.context - context) < 0.1 * context]
            found = f"{1e3 * near[0].seconds:.1f} ms" if near else "-"
            size = f"{(weights + kv * context) / 1e9:.2f}"
            out.append(f"| {shape} | {context} | {size} | {1e3 * seconds:.1f} | {1 / seconds:.2f} | {found} |")
    return "\n".join(out) + "\n"


def _section(title: str, chosen: list[Point], order: Any) -> list[str]:
    rows = [f"| {p.shape} | {p.isa} | {p.threads} | {p.batch} | {p.context:.0f} | {p.bytes / 1e9:.3f} | {1e3 * p.seconds:.2f} "
            f"| {1e3 * p.seconds / p.batch:.2f} | {p.share:.0%} |" for p in sorted(chosen, key=order)]  # fmt: skip
    head = ["| model | instruction set | threads | batch | context | GB a step | ms a step | ms a token | of read bandwidth |"]
    return [f"## {title}", "", *head, "| --- " * 9 + "|", *rows, ""] if rows else []


def _sweep_shape(measured: list[Point]) -> str:
    """The model with the most points."""
    names = [point.shape for point in measured]
    return max(sorted(set(names)), key=names.count)


def _thread_counts_of(measured: list[Point], shape: str) -> dict[float, set[int]]:
    """Context -> thread counts that its batch-1 points were taken with."""
    found: dict[float, set[int]] = {}
    for point in measured:
        if point.shape == shape and point.batch == 1:
            found.setdefault(point.context, set()).add(point.threads)
    return found


def plot(measured: list[Point], line: Line, threads: int, path: Path) -> None:
    """Time against bytes of a step, batch and threads."""
    figure, (size, batch, cores) = import_pyplot().subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    single = [point for point in measured if point.batch == 1 and point.threads == threads]
    for shape in dict.fromkeys(point.shape for point in single):
        mine = [point for point in single if point.shape == shape]
        size.plot([p.bytes / 1e9 for p in mine], [1e3 * p.seconds for p in mine], "o", label=shape, markersize=4)
    ends = [0.0, max(point.bytes for point in single) * 1.05]
    size.plot([end / 1e9 for end in ends], [1e3 * line.seconds(end) for end in ends], "k:", linewidth=1, label="fit")
    size.set(xlabel="GB a step (model and context)", ylabel="ms a token, batch 1", xlim=0, ylim=0)
    size.legend(fontsize=8)
    of = _sweep_shape(measured)
    mine = sorted((p for p in measured if p.shape == of and p.threads == threads and p.context < 100), key=lambda p: p.batch)
    batch.plot([p.batch for p in mine], [p.batch / p.seconds for p in mine], "o", markersize=4)
    batch.set(xlabel=f"batch ({of})", ylabel="tokens/s, all sequences", xlim=0, ylim=0)
    counts = _thread_counts_of(measured, of)
    for context in sorted(counts):
        mine = sorted((p for p in measured if (p.shape, p.batch, p.context) == (of, 1, context)), key=lambda p: p.threads)
        if len(counts[context]) > 1:
            cores.plot(
                [p.threads for p in mine], [1e3 * p.seconds for p in mine], "o-", label=f"context {context:.0f}", markersize=4
            )
            cores.legend(fontsize=8)
    cores.set(xlabel=f"threads ({of})", ylabel="ms a token, batch 1", ylim=0, xticks=sorted(set().union(*counts.values())))
    save(figure, path)


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all usable cores."""
    cores = len(host.usable_cores())
    return sorted({min(1 << i, cores) for i in range(cores.bit_length() + 1)})


def write(folder: Path) -> Path:
    """SCALING.md and scaling.svg from the results of a folder."""
    sweeps = read_results(folder, "sweep-*.json") if list(folder.glob("sweep-*.json")) else []
    measured = points(read_results(folder) + sweeps)
    threads = max(point.threads for point in measured)
    line = fit([point for point in measured if point.batch == 1 and point.threads == threads])
    page = folder / "SCALING.md"
    page.write_text(markdown(measured, line, threads))
    plot(measured, line, threads, folder / "scaling.svg")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="SHAPE", help="sweep this shape first, its engine as it is")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.measure:
        for threads in thread_counts():
            sweep = [sys.executable, "-m", "benchmarks.speed", arguments.measure, "--sweep", "--reuse", "--loads", "0"]
            options = ["--rounds", str(arguments.rounds), "--threads", str(threads), "--out", str(arguments.results)]
            subprocess.run([*sweep, *options], check=True)
    print(write(arguments.results))


if __name__ == "__main__":
    main()
