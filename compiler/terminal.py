"""What the commands print: aligned text for people, and progress bars on stderr when that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from belle_compile.compiler.units import size


class Progress(Protocol):
    """Hears of a stage's work: `done` of `total`; a total of 0 is a stage of unknown length."""

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None: ...


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Draws what it hears, one bar a stage; says nothing when stderr is no terminal or rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskID,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ModuleNotFoundError:
        yield lambda stage, done=0, total=0: None
        return
    if not sys.stderr.isatty():
        yield lambda stage, done=0, total=0: None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def hear(stage: str, done: int = 0, total: int = 0) -> None:
            if stage not in tasks:
                for task in tasks.values():  # a new stage begins when the last one is over
                    length = bars.tasks[task].total or 1
                    bars.update(task, total=length, completed=length)
                tasks[stage] = bars.add_task(stage, total=None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield hear


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Lines of two columns, the first as wide as its longest entry."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lines of right-aligned columns, the first row being their names."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def kernel_rows(kernels: Mapping[str, Any], *, each: bool = False) -> list[tuple[str, str]]:
    """What machine code takes of a GPU, by kind or of `each` kernel: registers of a thread, shared memory of a block, bytes of
    registers that spilled or lie in arrays, tensor-core instructions."""
    groups: dict[str, list[Any]] = {}
    for name, launch in kernels.items():
        groups.setdefault(name if each else launch["kind"], []).append(launch)
    rows = []
    for name, some in groups.items():
        registers, local = [launch["registers"] for launch in some], max(launch["local"] for launch in some)
        cores = sorted({core for launch in some for core in launch["tensor_cores"]})
        count = [] if each else [f"{len(some)} kernels"]
        between = f"{min(registers)}" if len(set(registers)) == 1 else f"{min(registers)} to {max(registers)}"
        facts = [f"{between} registers", f"{size(max(launch['shared'] for launch in some))} shared", f"{size(local)} local"]
        rows.append((f"kernel {name}", ", ".join([*count, *facts, *cores])))
    return rows


def engine_rows(engine: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of `inspect` for what `compiler.inspection.inspect` returns."""
    model, target, requires = engine["model"], engine["target"], engine["target"]["requires"]
    each = f" for each of {target['ranks']} ranks" if target["ranks"] > 1 else ""
    calls, template, generation = engine["kernel_calls"], engine["prompt_template"], engine["generation"]
    host = f"{requires['arch'] or 'a GPU'} with one of {', '.join(requires['isa'])}"
    rows = [
        ("engine", f"{engine['engine']} (format {engine['format_version']}, {size(engine['bytes'])})"),
        ("model", f"{model['name']}: {model['family']}, {model['parameters'] / 1e6:,.1f} M parameters"),
        ("dimensions", ", ".join(f"{name} {value}" for name, value in model["dimensions"].items())),
        ("target", f"{target['name']}, kernels for {', '.join(target['isas'])}"),
        (
            "needs",
            f"{host}; {size(requires['memory_bytes'])} of memory{each}",
        ),
        ("quantization", ", ".join(f"{name} {_phrase(value)}" for name, value in engine["quantization"].items())),
        ("kernel calls", f"{calls['after']} a step; {calls['before']} before fusion"),
        ("prompt template", template["name"]),
        ("generation", ", ".join(f"{name} {value:g}" for name, value in generation.items())),
        ("accuracy", "not measured" if engine["accuracy"] is None else _phrase(engine["accuracy"])),
    ]
    rows += [("report", f"{engine['engine']}/report.html")] if "report.html" in engine["files"] else []
    rows += kernel_rows(engine.get("kernels", {}))
    rows += [(f"size of {part}", size(count)) for part, count in engine["bytes_by_part"].items()]
    if each:
        weights = [engine["files"][f"rank{rank}/weights.safetensors"]["bytes"] for rank in range(target["ranks"])]
        rows += [(f"weights of rank {rank}", size(count)) for rank, count in enumerate(weights)]
    for record in engine["passes"]:
        tuned = record["options"].get("entries") if record["name"] == "tune-kernels" else None
        rows += tiling_rows(tuned) if tuned else [(f"pass {record['name']}", _pass_line(record))]
    rows += [(f"built with {name}", version) for name, version in engine["toolchain"].items()]
    return rows


def device_rows(devices: Sequence[dict[str, Any]], aliases: Mapping[str, str]) -> list[tuple[str, str]]:
    """The lines of `targets`: a table whose first column is the device's name; what depends on the host is a dash."""
    heads = ("builds", "backends", "memory", "GB/s", "link GB/s", "link us", "ranks", "compute", "what it is")
    lines = [heads]
    for device in devices:
        figures = (device["memory_bandwidth"] / 1e9, device["link_bandwidth"] / 1e9, device["link_latency"] * 1e6)
        lines.append((
            "now" if device["builds"] else "not yet", ", ".join(device["backends"]) or "-",
            f"{device['memory'] / 2**30:.0f} GiB" if device["memory"] else "-",
            *(f"{figure:.0f}" if figure else "-" for figure in figures), f"1-{device['max_ranks']}",
            device["compute_capability"] or "-", device["description"],
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rows = list(zip(["device", *(device["name"] for device in devices)], texts, strict=True))
    return rows + [(alias, f"the same as {name}") for alias, name in aliases.items()]


_PLAN_HEADS = ("ranks", "weights", "KV cache", "activations", "needed", "fits", "ms a token", "tokens/s", "memory",
               "arithmetic", "calls", "sums", "first token, ms")  # fmt: skip


def plan_text(plan: dict[str, Any]) -> str:
    """The lines of `plan` for what `compiler.plan.table.plan` returns; a dash stands for a time that is not predicted."""
    memory = plan["device"]["memory"]
    device = plan["device"]["description"] + (f" with {size(memory)} of memory each" if memory else "")
    head = [
        f"{plan['model']}, {plan['quantization']}, on {device}",
        f"batch {plan['batch']}, context {plan['context']} tokens; rates {plan['rates'] or 'not known'}",
        "",
    ]
    rows = [_plan_row(line) for line in plan["plan"] if "refused" not in line]
    notes = [f"{line['ranks']} ranks: {line['refused']}" for line in plan["plan"] if "refused" in line]
    return "\n".join([*head, columns([_PLAN_HEADS, *rows]), *notes])


def _plan_row(line: dict[str, Any]) -> tuple[str, ...]:
    sizes = [size(line[f"{part}_bytes"]) for part in ("weight", "kv", "workspace", "needed")]
    fits = {True: "yes", False: "no", None: "-"}[line["fits"]]
    if line["token_s"] is None:
        return (str(line["ranks"]), *sizes, fits, *["-"] * 7)
    shares = [f"{100 * line[f'{part}_s'] / line['token_s']:.0f}%" for part in ("memory", "arithmetic", "calls", "sums")]
    token, first = f"{1e3 * line['token_s']:.2f}", f"{1e3 * line['first_token_s']:,.0f}"
    return (str(line["ranks"]), *sizes, fits, token, f"{line['tokens_per_second']:,.0f}", *shares, first)


def set_rows(made: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of `calibrate-set` for what `compiler.requests.write_set` returns, with the set's path."""
    source, coverage = made["source"], made["coverage"]
    requests, length, tokens = coverage["requests"], coverage["length"], coverage["tokens"]
    kept, unit = length["calibration"], length["unit"]
    rows = [
        ("set", made["set"]),
        ("from", f"{source['name']}: {requests['read']:,} requests, {size(source['bytes'])}"),
        *((f"dropped: {reason}", f"{count:,}") for reason, count in made["dropped"].items() if count),
        ("kept", f"{requests['kept']:,} in {coverage['strata']['kept']:,} strata of length and labels"),
        ("calibration", f"{requests['calibration']:,} of {coverage['asked_for']['calibration']:,} asked for"),
        ("held out", f"{requests['holdout']:,} of {coverage['asked_for']['holdout']:,} asked for"),
        ("length", f"{kept['least']:,} to {kept['greatest']:,} {unit}, median {kept['median']:,}"),
        (
            "coverage",
            f"{100 * tokens['calibration']['distinct_share']:.1f}% of {tokens['distinct']:,} {unit}, "
            f"{100 * tokens['calibration']['occurrence_share']:.1f}% of their {tokens['occurrences']:,} occurrences",
        ),
    ]
    if made["redacted"] is not None:
        rows.append(("redacted", ", ".join(f"{count:,} {kind}" for kind, count in made["redacted"].items())))
    return [*rows, ("digest", made["digest"]), ("report", f"{made['set']}/coverage.html")]


def tiling_rows(entries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """A line for each range of row counts of each tuned shape, and the time against the built-in choice at each count measured:
    ("tuned 2048x5632, up to 4 rows", "4x6 prefetch 2048: 2 rows 310 us (-4%), ...")."""
    rows = []
    for entry in entries:
        shape, least = f"{entry['outputs']}x{entry['inputs']}", 1
        bounds = sorted(entry["walks"], key=lambda bound: (bound == "any", int(bound) if bound != "any" else 0))
        tiles_from = entry.get("tiles_from", 1 << 30)
        for bound in bounds:
            most = int(bound) if bound != "any" else 1 << 30
            times = [(int(count), *pair) for count, pair in entry["microseconds"].items() if least <= int(count) <= most]
            shown = [
                f"{n} {'row' if n == 1 else 'rows'} {ours:g} us ({(ours / built_in - 1) * 100:+.0f}%)"
                for n, ours, built_in in sorted(times)
            ]
            line = ": ".join(filter(None, (_walk_phrase(entry["walks"][bound]), ", ".join(shown))))
            rows.append((f"tuned {shape}, {_rows_phrase(least, bound)}", line))
            least = most + 1
        if "tiles_from" in entry and tiles_from < 1 << 20:
            wide, panels = entry.get("tile_wide", 3), entry.get("tile_panels", 6)
            rows.append(
                (f"tuned {shape}, {tiles_from} rows or more", f"tile products, {panels} panels a task, {wide} at a time")
            )
    return rows


def _rows_phrase(least: int, bound: str) -> str:
    return f"{least} rows or more" if bound == "any" else "1 row" if bound == "1" else f"up to {bound} rows"


def _walk_phrase(walk: dict[str, Any]) -> str:
    rest = [f"{name} {value}" for name, value in walk.items() if name not in ("wide", "tall")]
    return ", ".join([f"{walk['wide']}x{walk['tall']}", *rest])


def _pass_line(record: dict[str, Any]) -> str:
    options = ", ".join(f"{name}={_phrase(value)}" for name, value in record["options"].items() if value not in ([], {}))
    line = f"{record['changes']} changes" + (f" ({options})" if options else "")
    first, count = next(iter(record["refusals"]), ""), len(record["refusals"])
    return line + (f"; {count} {'notes, the first' if count > 1 else 'note'}: {first}" if count else "")


def _phrase(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {_phrase(item)}" for name, item in value.items())
    return ", ".join(map(_phrase, value)) if isinstance(value, list) else str(value)
