"""Tables and a plot of the committed speed results: benchmarks/results/README.md and speed.svg.

python -m benchmarks.report [--results benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
Result = dict[str, Any]

HEAD = """# Results

Written by `make bench` (`python -m benchmarks.speed`, then `python -m benchmarks.report`); do not edit. Speeds are medians,
with the least and the greatest sample in brackets; percentages are shares of the limit measured beside each sample: for
decoding the memory's read bandwidth against the weights, keys and values a step reads, for prefill the rate of int8 products
in registers with the same instruction set against the int8 operations of the prompt. Decoding starts from a 32-token prompt
where nothing else is said; batch 8 is all sequences together. First token: from `Engine.load` in a fresh process to the first
token after a 32-token prompt, file cache warm. Peak memory includes the mapped weights.
"""


_KERNELS = {"qlinear T": "linear layers", "qlinear R": "head", "attention T": "attention (keys and values)"}


def read_files(folder: Path, pattern: str, benchmark: str) -> list[Result]:
    """The results of a benchmark by name; raises SystemExit when there is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))]
    if not found:
        raise SystemExit(f"{benchmark}: no {pattern} in {folder}: run python -m benchmarks.{benchmark} first.")
    return found


def read_results(folder: Path, pattern: str = "speed-*.json") -> list[Result]:
    """Results of one kind, smallest model first; raises SystemExit when there is none."""
    found = read_files(folder, pattern, "speed")
    return sorted(found, key=lambda result: (result["cost"]["weight_bytes_per_step"], result["threads"]))


def markdown(results: list[Result], extra: str = "") -> str:
    """The whole page."""
    return (
        "\n".join([HEAD, "![Share of the limit](speed.svg)\n", *(_section(result) for result in results), extra]).rstrip()
        + "\n"
    )


def _section(result: Result) -> str:
    tasks, cost = result["tasks"], result["cost"]
    weights, kv = cost["weight_bytes_per_step"] / 1e6, cost["kv_bytes_per_token"] / 1e3
    about = f"{weights:,.0f} MB of weights a step, {_cache_note(cost)}; {kv:.1f} kB of keys and values a token."
    lines = [f"## {result['engine']}", "", f"{_machine(result)}. {about}", ""]
    loads = result.get("loads", {})
    header = ["instruction set", *(f"{task}, tokens/s" for task in tasks), *(["first token, s", "peak MB"] if loads else [])]
    rows = []
    for isa in _isas(result):
        cells = [isa, *(_cell(result, task, isa) for task in tasks)]
        if loads:
            median = loads[isa]["median"]
            cells += [f"{median['load_to_first_token_s']:.2f}", f"{median['peak_mb']:,.0f}"]
        rows.append(cells)
    lines += [*table(header, rows), ""]
    lines += table(["limit, median", *tasks], [_limits(result, isa) for isa in _isas(result)])
    outside = [f"{task}: {by_isa[isa]['outside_kernels']:.1%}" for task, by_isa in result.get("profiles", {}).items()
               for isa in _isas(result)[:1]]  # fmt: skip
    if outside:
        lines += ["", f"Outside of kernels ({_isas(result)[0]}): {', '.join(outside)}.", *_kernel_shares(result)]
    return "\n".join([*lines, ""])


def _kernel_shares(result: Result) -> list[str]:
    """What the kernels that read weights or the cache reach each by itself, in decoding."""
    isa = _isas(result)[0]
    found = []
    for task, by_isa in result["profiles"].items():
        kernels = by_isa[isa]["kernels"].items() if result["tasks"][task]["steps"] else ()
        read = [(name, kernel) for name, kernel in kernels if name in ("qlinear T", "qlinear R", "attention T")]
        each = [f"{_KERNELS[name]} {k['gb_per_second']:.1f} GB/s in {k['share_of_step']:.0%} of the time" for name, k in read]
        found += [f"- {task}: {', '.join(each)}"] if each else []
    return ["", f"What kernels read by themselves ({isa}, one profiled run each):", "", *found] if found else []


def _isas(result: Result) -> list[str]:
    return list(next(iter(result["median"].values())))


def _cell(result: Result, task: str, isa: str) -> str:
    median = result["median"][task][isa]
    rates = [sample["tokens_per_second"] for sample in result["samples"][task][isa]]
    return f"{median['tokens_per_second']:,.1f} [{min(rates):,.1f}, {max(rates):,.1f}], {median['share']:.0%}"


def _limits(result: Result, isa: str) -> list[str]:
    cells = [f"{result['median'][task][isa]['limit']:.2f} {about['limit_unit']}" for task, about in result["tasks"].items()]
    return [isa, *cells]


def _machine(result: Result) -> str:
    machine = result["machine"]
    samples = len(next(iter(next(iter(result["samples"].values())).values())))
    host = f"{machine['processor']}, {result['threads']} threads, {machine['memory_gib']} GiB, {machine['system']}"
    return f"{host}, {machine['date']}; {samples} sample{'s' * (samples != 1)}"


def _cache_note(cost: dict[str, Any]) -> str:
    times = cost["weights_over_last_level_cache"]
    if times is None:
        return "size of the last-level cache unknown"
    if times >= 2:
        return f"{times:g} times the last-level cache"
    return f"{times:g} times the last-level cache, which may lift decoding above the memory's share"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]


def presets_section(results: list[Result]) -> str:
    """What other presets cost in time beside the default, one table a preset."""
    lines = []
    for preset in sorted({result["preset"] for result in results}):
        mine = [result for result in results if result["preset"] == preset]
        tasks = list(mine[0]["tasks"])
        rows = [[f"{result['shape']}, {result['machine']['date']}",
                 *(f"{found['ratio']:.3f} [{found['ratio_lowest']:.3f}, {found['ratio_highest']:.3f}]" for found in
                   (result["tasks"][task] for task in tasks)), str(result["rounds"])] for result in mine]  # fmt: skip
        about = f"Time of a step (of the whole prompt in prefill) over that of `int8` taken next to it, on {_processors(mine)}."
        lines += [f"## {preset} beside int8", "", about, "", *table(["shape", *tasks, "rounds"], rows), ""]
    return "\n".join(lines)


def _processors(results: list[Result]) -> str:
    return ", ".join(sorted({f"{r['machine']['processor']} with {r['threads']} threads" for r in results}))


def plot(results: list[Result], path: Path) -> None:
    """Bars of the share of the limit for every task, one panel a model; speeds are written on the bars."""
    pyplot = import_pyplot()
    figure, panels = pyplot.subplots(len(results), 1, figsize=(9, 2.6 * len(results)), squeeze=False, layout="constrained")
    for axes, result in zip(panels[:, 0], results, strict=True):
        isas, tasks = _isas(result), list(result["tasks"])
        width = 0.8 / len(isas)
        for i, isa in enumerate(isas):
            medians = [result["median"][task][isa] for task in tasks]
            places = [t + (i - (len(isas) - 1) / 2) * width for t in range(len(tasks))]
            bars = axes.bar(places, [median["share"] for median in medians], width * 0.95, label=isa)
            axes.bar_label(bars, [f"{median['tokens_per_second']:,.0f}/s" for median in medians], fontsize=8, padding=2)
        axes.set_xticks(range(len(tasks)), tasks)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylim(0, max(1.15, *axes.get_ylim()))
        axes.set_ylabel("share of the limit")
        axes.set_title(f"{result['engine']}, {result['threads']} threads", fontsize=10, loc="left")
        axes.legend(fontsize=8, loc="upper right", ncols=len(isas))
    save(figure, path)


def import_pyplot() -> Any:
    """matplotlib without a display, writing the same SVG for the same data."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("report: matplotlib is missing; pip install -c constraints.txt -e '.[bench]'.") from None
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "belle", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write an SVG without the date."""
    figure.savefig(path, metadata={"Date": None})
    import_pyplot().close(figure)
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))


def page(folder: Path) -> str:
    """The tables of a folder of results; what other notes there are is linked."""
    presets = [json.loads(path.read_text()) for path in sorted(folder.glob("presets-*.json"))]
    notes = [presets_section(presets)] if presets else []
    notes += ["Also here: [scaling](SCALING.md)."] if (folder / "SCALING.md").exists() else []
    return markdown(read_results(folder), "\n".join(notes))


def write(folder: Path) -> Path:
    """README.md and speed.svg of a folder of results."""
    path = folder / "README.md"
    path.write_text(page(folder))
    plot(read_results(folder), folder / "speed.svg")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(write(parser.parse_args().results))


if __name__ == "__main__":
    main()
