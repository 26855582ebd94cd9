"""The ladder as tables and a plot: a part of docs/performance.md, and an SVG beside the results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.report import Result, import_pyplot, read_files, save, table

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/performance.md")
BEGIN, END = (
    "<!-- python -m benchmarks.ladder --report writes this part -->",
    "<!-- end of the ladder -->",
)

_COLUMNS = (
    "step", "requests/s", "over the step before", "over the first", "request p50, p99", "first token p50, p99",
    "alone: request p50", "users held", "kernels busy",
)  # fmt: skip


def rows(result: Result) -> list[Result]:
    """One row a step: medians of its samples, and the medians of its ratios to the step before, taken in the same rounds."""
    found: list[Result] = []
    whole = 1.0
    for number, pair in enumerate(result["pairs"]):
        before, step = pair["steps"]
        ratios = [
            after["requests_per_second"] / earlier["requests_per_second"]
            for earlier, after in zip(pair["samples"][before], pair["samples"][step], strict=True)
            if earlier["requests_per_second"]
        ]
        if number == 0:
            found.append(_row(result, pair, before) | {"ratio": None, "whole": 1.0})
        ratio = statistics.median(ratios) if ratios else None
        whole *= ratio or 1.0
        found.append(_row(result, pair, step) | {"ratio": ratio, "whole": whole})
    return found


def _row(result: Result, pair: Result, step: str) -> Result:
    samples, alone = pair["samples"][step], pair["alone"][step]

    def median(name: str, taken: list[Result]) -> Any:
        values = [sample[name] for sample in taken if sample[name] is not None]
        return statistics.median(values) if values else None

    names = (
        "requests_per_second",
        "tokens_per_second",
        "latency_p50",
        "latency_p99",
        "first_token_p50",
        "first_token_p99",
        "busy",
    )
    held = next((each["held"][step]["users"] for each in result["pairs"] if step in each["held"]), None)
    return {
        "step": step, "title": result["titles"][step], **{name: median(name, samples) for name in names},
        "alone_p50": median("latency_p50", alone), "users_held": held,
    }  # fmt: skip


def _cells(row: Result) -> list[str]:
    return [
        row["title"], f"{row['requests_per_second']:,.2f}", "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        f"{row['whole']:,.1f}", f"{row['latency_p50']:,.0f}, {row['latency_p99']:,.0f}",
        f"{row['first_token_p50']:,.0f}, {row['first_token_p99']:,.0f}", f"{row['alone_p50']:,.0f}",
        "" if row["users_held"] is None else str(row["users_held"]), "" if row["busy"] is None else f"{row['busy']:.0%}",
    ]  # fmt: skip


def section(result: Result, picture: str) -> str:
    """The part of a model."""
    machine, limits = result["machine"], result["limits"]
    host = f"{machine['processor']}, {result['threads']} threads, {machine['system']}, {machine['date']}"
    lines = [
        f"### {result['model']}, {result['target']}", "",
        f"{host}; {result['rounds']} rounds of {result['seconds']:g} s with {result['users']} users. Times in milliseconds. "
        f"Users held: how many get {limits['share']:.0%} of their answers with the first token within "
        f"{limits['first_token_s']:g} s and {limits['token_s']:g} s a token.", "",
        *table(list(_COLUMNS), [_cells(row) for row in rows(result)]), "", f"![The ladder of {result['model']}]({picture})", "",
    ]  # fmt: skip
    return "\n".join([*lines, *_accuracy(result["accuracy"]), *_claims(result["claims"])])


def _accuracy(found: Result | None) -> list[str]:
    """What the accuracy gate found of the INT8 engine."""
    if found is None or found["accuracy_kept"] is None:
        return []
    return [
        f"- **Accuracy** of the INT8 engine for one rank, by the gate on {found['requests']} requests that were held out: "
        f"{found['accuracy_kept']:.2%} of the model's accuracy on their expected answers, perplexity ratio "
        f"{found['perplexity_ratio']:.4f}, top-1 agreement {found['top1_agreement']:.2%}."
    ]


def _claims(claims: Result) -> list[str]:
    """What single optimizations give, as sentences and a table."""
    lines = []
    if "kv_cache" in claims:
        cache = claims["kv_cache"]
        lines += [
            f"- **KV cache**, one more token after {cache['context']}: {cache['pairs_kept']:,} products of query and key a "
            f"head in place of {cache['pairs_again']:,}, {cache['work_saved']:.1%} saved; attention takes "
            f"{cache['attention_kept_ms']:.3f} ms in place of {cache['attention_again_ms']:.3f}, "
            f"{cache['time_saved']:.1%} saved."
        ]  # fmt: skip
    if "int8" in claims:
        words = ", ".join(
            f"{task} {found['ratio']:.2f} ({found['float32_ms']:.2f} and {found['int8_ms']:.2f} ms)"
            for task, found in claims["int8"].items()
        )
        lines += [f"- **INT8 over float32**, both fused: {words}."]
    for precision, found in claims.get("fusion", {}).items():
        calls = found["kernel_calls"]
        lines += [f"- **Fusion**, {precision}: {calls['before']} kernel calls a step before, {calls['after']} after it."]
    lines += _batching(claims["batching"]) if "batching" in claims else []
    groups = [
        [precision, group, *(f"{found[which]['calls']:.0f}" for which in ("unfused", "fused")),
         *(f"{found[which]['ms']:.3f}" for which in ("unfused", "fused"))]
        for precision, each in claims.get("fusion", {}).items()
        for group, found in each["groups"].items()
    ]  # fmt: skip
    if groups:
        header = ["decoding step, one sequence", "group", "calls before", "after", "ms before", "after"]
        lines += ["", *table(header, groups)]
    return [*lines, ""]


def _batching(found: Result) -> list[str]:
    """Continuous batches beside padded ones."""
    samples = found["samples"]

    def median(name: str, key: str) -> float:
        return float(statistics.median(sample[key] for sample in samples[name]))

    continuous = samples["continuous"]
    padded = [name for name in samples if name != "continuous"]
    ratio = statistics.median(
        ours["tokens_per_second"] / max(samples[name][number]["tokens_per_second"] for name in padded)
        for number, ours in enumerate(continuous)
    )
    words = "; ".join(
        f"{found['titles'][name]}: {median(name, 'tokens_per_second'):,.0f} tokens/s, "
        f"a request p50 {median(name, 'latency_p50'):,.0f} and p99 {median(name, 'latency_p99'):,.0f} ms"
        for name in samples
    )
    busy = f", kernels busy {median('continuous', 'busy'):.0%} of the time" if continuous[0]["busy"] is not None else ""
    return [
        f"- **Continuous over padded batches**, answers as long as in the file, up to 256 tokens: {ratio:.2f} times the "
        f"better of the padded ones ({words}){busy}."
    ]


def plot(result: Result, path: Path) -> None:
    """Requests a second and latency of every step, on logarithmic axes."""
    pyplot = import_pyplot()
    found = rows(result)
    places = range(len(found))
    figure, (rates, times) = pyplot.subplots(1, 2, figsize=(11, 0.5 * len(found) + 1.2), layout="constrained", sharey=True)
    bars = rates.barh(places, [row["requests_per_second"] for row in found], color="tab:blue")
    rates.bar_label(bars, [f"{row['requests_per_second']:,.2f}" for row in found], fontsize=8, padding=2)
    rates.set_yticks(places, [row["title"] for row in found], fontsize=8)
    rates.invert_yaxis()
    rates.set_xlabel("requests/s")
    for name, marker in (("latency_p50", "o"), ("latency_p99", "D"), ("first_token_p50", "x")):
        times.plot([row[name] for row in found], places, marker, label=name.replace("_", " "))
    times.set_xlabel("ms")
    times.legend(fontsize=8)
    for axes in (rates, times):
        axes.set_xscale("log")
    rates.margins(x=0.15)
    figure.suptitle(f"{result['model']}, {result['users']} users", fontsize=10)
    save(figure, path)


def check(page: Path) -> tuple[str, str]:
    """Return what the page has before and after the ladder; raises SystemExit where it has no place for it."""
    if not page.is_file():
        raise SystemExit(f"ladder: there is no page {page}; --page names one with a place for the ladder.")
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"ladder: {page} has no place for the ladder, between {BEGIN} and {END}.")
    return before, after


def write(folder: Path, page: Path) -> Path:
    """Write a plot beside each result, and the part of the page between its two comments; raises SystemExit without these."""
    before, after = check(page)
    parts = []
    for result in read_files(folder, "ladder-*.json", "ladder"):
        picture = folder / f"ladder-{result['model']}.svg"
        plot(result, picture)
        up = "../" * len(page.resolve().parent.relative_to(_common(page, picture)).parts)
        parts.append(section(result, up + picture.resolve().relative_to(_common(page, picture)).as_posix()))
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(parts).rstrip() + f"\n\n{END}{after}", encoding="utf-8")
    return page


def _common(page: Path, picture: Path) -> Path:
    """The deepest folder that holds both."""
    folders = set(picture.resolve().parents)
    return next(folder for folder in page.resolve().parents if folder in folders)
