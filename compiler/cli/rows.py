"""The results of commands as rows of text: each function takes what a command prints with --json."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from belle_compile.compiler.tables import columns
from belle_compile.compiler.tilings import tiling_rows
from belle_compile.compiler.units import memory_words, size

Rows = list[tuple[str, str]]


def engine_rows(engine: dict[str, Any]) -> Rows:
    """The rows of `inspect`, for the result of `compiler.inspection.inspect`."""
    model, target, requires = engine["model"], engine["target"], engine["target"]["requires"]
    each = f" for each of {target['ranks']} ranks" if target["ranks"] > 1 else ""
    calls, template = engine["kernel_calls"], engine["prompt_template"]
    host = f"{requires['arch'] or 'a GPU'} with one of {', '.join(requires['isa'])}"
    memory = memory_words(requires["memory_bytes"], requires.get("mapped_bytes", 0))
    rows = [
        ("engine", f"{engine['engine']} (format {engine['format_version']}, {size(engine['bytes'])})"),
        ("model", f"{model['name']}: {model['family']}, {model['parameters'] / 1e6:,.1f} M parameters"),
        ("dimensions", ", ".join(f"{name} {value}" for name, value in model["dimensions"].items())),
        ("target", f"{target['name']}, kernels for {', '.join(target['isas'])}"),
        ("needs", f"{host}; {memory}{each}"),
        ("quantization", ", ".join(f"{name} {_phrase(value)}" for name, value in engine["quantization"].items())),
        ("kernel calls", f"{calls['after']} a step; {calls['before']} before fusion"),
        ("prompt template", template["name"]),
        ("generation", generation_words(engine["generation"])),
        ("accuracy", "not measured" if engine["accuracy"] is None else _phrase(engine["accuracy"])),
    ]
    rows.append(("self-test", _self_test(engine["self_test"])))
    rows += [("report", f"{engine['engine']}/report.html")] if "report.html" in engine["files"] else []
    rows += kernel_rows(engine.get("kernels", {})) + layer_rows(engine.get("layers", {}))
    rows += [(f"size of {part}", size(count)) for part, count in engine["bytes_by_part"].items()]
    if each:
        weights = [engine["files"][f"rank{rank}/weights.safetensors"]["bytes"] for rank in range(target["ranks"])]
        rows += [(f"weights of rank {rank}", size(count)) for rank, count in enumerate(weights)]
    for record in engine["passes"]:
        rows += _pass_rows(record)
    return rows + [(f"built with {name}", version) for name, version in engine["toolchain"].items()]


def headline(engine: dict[str, Any], spent: str) -> Rows:
    """The rows that a build ends with, for the result of `compiler.inspection.inspect`: what was made, whether it passed, and
    the next commands to type. `spent` is the build's time in words."""
    model, target, directory = engine["model"], engine["target"], shlex.quote(engine["engine"])
    ranks = f" on {target['ranks']} ranks" if target["ranks"] > 1 else ""
    rows = [
        ("engine", f"{engine['engine']}, {size(engine['bytes'])}, built in {spent}"),
        ("model", f"{model['name']}: {model['family']}, {model['parameters'] / 1e6:,.1f} M parameters"),
        ("target", f"{target['name']}{ranks}, kernels for {', '.join(target['isas'])}"),
        ("accuracy", _verdict(engine["accuracy"])),
    ]
    rows += [("report", f"{engine['engine']}/report.html")] if "report.html" in engine["files"] else []
    rows += [("details", f"belle-compile inspect {directory}"), ("next", f"belle-run {directory}")]
    return rows


def export_headline(made: dict[str, Any], spent: str) -> Rows:
    """The rows that an export ends with, for its record with the path of its directory."""
    total = sum(file["bytes"] for file in made["files"].values())
    quantization = ", ".join(f"{name} {_phrase(value)}" for name, value in made["quantization"].items())
    accuracy = made["accuracy"]
    verdict = f"{_verdict(accuracy)}; {accuracy['how']}" if "limits" in accuracy else accuracy["how"]
    rows = [
        ("export", f"{made['export']}, {size(total)}, made in {spent}"),
        ("format", f"{made['format']}, for {made['runtimes']}"),
        ("model", f"{made['model']['name']}: {made['model']['family']}"),
        ("quantization", quantization),
        ("accuracy", verdict),
    ]
    return [*rows, *(("note", note) for note in made["notes"])]


def _verdict(accuracy: Mapping[str, Any] | None) -> str:
    """The measured accuracy of an engine, with the limits, and whether it keeps them: an engine that was calibrated without
    being asked may miss some."""
    if accuracy is None:
        return "not measured, since that needs requests and the model's own answers"
    limits, share = accuracy["limits"], accuracy["accuracy_kept"]
    measured = [
        f"perplexity ratio {accuracy['perplexity_ratio']:.4f} (at most {limits['max_perplexity_ratio']:g})",
        f"top-1 agreement {accuracy['top1_agreement']:.4f} (at least {limits['min_top1']:g})",
    ]
    passed = accuracy["perplexity_ratio"] <= limits["max_perplexity_ratio"] and accuracy["top1_agreement"] >= limits["min_top1"]
    if share is not None:
        measured.append(f"accuracy kept {share:.4f} (at least {limits['min_accuracy_kept']:g})")
        passed = passed and share >= limits["min_accuracy_kept"]
    origin = f" written by {accuracy['requests_written_by']}" if "requests_written_by" in accuracy else ""
    verdict = f"{'passed' if passed else 'limits missed'} on {accuracy['requests']} held-out requests{origin}"
    return f"{verdict}: {', '.join(measured)}"


def _self_test(golden: Mapping[str, Any]) -> str:
    """The size of an engine's self-test, or why it has none."""
    return f"{golden['prompts']} prompts, {golden['tokens']} tokens" if golden["prompts"] else f"none: {golden['reason']}"


def generation_words(defaults: Mapping[str, Any]) -> str:
    """The generation defaults in words."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {' '.join(map(repr, value))}"
        for name, value in defaults.items()
    )


def kernel_rows(kernels: Mapping[str, Any], *, each: bool = False) -> Rows:
    """The resources of a GPU that kernels use: a row for each kind of kernel, or with `each` for every kernel.

    Registers and local memory (spilled registers and arrays, in bytes) are those of a thread, shared memory is that of a block.
    """
    groups: dict[str, list[Any]] = {}
    for name, launch in kernels.items():
        groups.setdefault(name if each else launch["kind"], []).append(launch)
    rows = []
    for name, launches in groups.items():
        registers, local = [launch["registers"] for launch in launches], max(launch["local"] for launch in launches)
        cores = sorted({core for launch in launches for core in launch["tensor_cores"]})
        count = [] if each else [f"{len(launches)} kernels"]
        used = f"{min(registers)}" if len(set(registers)) == 1 else f"{min(registers)} to {max(registers)}"
        shared = max(launch["shared"] for launch in launches)
        facts = [f"{used} registers", f"{size(shared)} shared", f"{size(local)} local"]
        rows.append((f"kernel {name}", ", ".join([*count, *facts, *cores])))
    return rows


def layer_rows(layers: Mapping[str, Mapping[str, int]]) -> Rows:
    """The numbers of kernels of each kind, a row for each thing that is run."""
    return [
        (f"layers of {run}", ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items() if count))
        for run, counts in layers.items()
    ]


def device_rows(devices: Sequence[dict[str, Any]], aliases: Mapping[str, str]) -> Rows:
    """The rows of `targets`: a table whose first column is the device's name. The first of several backends is the default. A
    dash stands for a missing figure, or for one that depends on the host."""
    lines = [("builds", "backends", "memory", "GB/s", "link GB/s", "link us", "ranks", "compute", "what it is")]
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


def carrying_rows(listing: Mapping[str, Sequence[Mapping[str, Any]]]) -> Rows:
    """The rows of `targets --backends`: for each backend and format what it carries, and a row for each reason why not."""
    rows = []
    for kind, members in (("backend", listing["backends"]), ("format", listing["formats"])):
        for member in members:
            carried = [
                f"{title} {', '.join(name for name, reason in member[title].items() if not reason) or 'none'}"
                for title in ("presets", "methods")
            ]
            scales = member.get("granularities", ())
            carried += [f"a scale for each {' or '.join(scales)} of weights"] if scales else []
            rows.append((f"{kind} {member['name']}", f"{member['runtimes']}: {'; '.join(carried)}"))
            reasons = [(name, reason) for title in ("presets", "methods") for name, reason in member[title].items() if reason]
            rows += [(f"  not {name}", reason) for name, reason in reasons]
    return rows


def set_rows(made: dict[str, Any]) -> Rows:
    """The rows of `calibrate-set`, for the result of `compiler.requests.write_set` with the set's path."""
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


_PLAN_HEADER = (
    "ranks", "weights", "KV cache", "activations", "needed", "resident", "fits", "ms a token", "tokens/s", "memory",
    "arithmetic", "calls", "sums", "first token, ms",
)  # fmt: skip


def plan_text(plan: dict[str, Any]) -> str:
    """The text of `plan`, for the result of `compiler.plan.table.plan`: a head, a line for each number of ranks, and the
    reasons against numbers of ranks that the model cannot be divided among. A dash stands for a time that is not predicted."""
    memory = plan["device"]["memory"]
    device = plan["device"]["description"] + (f" with {size(memory)} of memory each" if memory else "")
    head = [
        f"{plan['model']}, {plan['quantization']}, on {device}",
        f"batch {plan['batch']}, context {plan['context']} tokens; rates {plan['rates'] or 'not known'}",
        "",
    ]
    lines = [_plan_line(line) for line in plan["plan"] if "refused" not in line]
    notes = [f"{line['ranks']} ranks: {line['refused']}" for line in plan["plan"] if "refused" in line]
    if any(line["resident_bytes"] < line["needed_bytes"] for line in plan["plan"] if "refused" not in line):
        notes.append("resident: without the weights, which are mapped and can be read from the disk again, as slow as that is")
    return "\n".join([*head, columns([_PLAN_HEADER, *lines]), *notes, *_measured_lines(plan["measured"])])


def _measured_lines(measured: dict[str, Any] | None) -> list[str]:
    """What `belle-run benchmark` measured, beside the predictions; none without a file of it."""
    if measured is None:
        return []
    lines = [
        (
            str(level["users"]),
            f"{1e3 * level['predicted_token_s']:.2f}",
            f"{1e3 * level['token_s']:.2f}",
            f"{level['tokens_per_second']:,.0f}",
        )
        for level in measured["levels"]
    ]
    head = f"measured on {measured['host']}, {measured['date']}, prompts of others included:"
    return ["", head, columns([("users", "predicted ms a token", "measured", "tokens/s"), *lines])]


def _plan_line(line: dict[str, Any]) -> tuple[str, ...]:
    sizes = [size(line[f"{part}_bytes"]) for part in ("weight", "kv", "workspace", "needed", "resident")]
    fits = {True: "yes", False: "no", None: "-"}[line["fits"]]
    if line["token_s"] is None:
        return (str(line["ranks"]), *sizes, fits, *["-"] * 7)
    shares = [f"{100 * line[f'{part}_s'] / line['token_s']:.0f}%" for part in ("memory", "arithmetic", "calls", "sums")]
    token, first = f"{1e3 * line['token_s']:.2f}", f"{1e3 * line['first_token_s']:,.0f}"
    return (str(line["ranks"]), *sizes, fits, token, f"{line['tokens_per_second']:,.0f}", *shares, first)


def _pass_rows(record: dict[str, Any]) -> Rows:
    """One row for a pass, with its changes, options and refusals; for the tuning of kernels, a row for each measured range."""
    if record["name"] == "tune-kernels" and record["options"].get("entries"):
        return tiling_rows(record["options"]["entries"])
    shown = {name: value for name, value in record["options"].items() if name != "relative_errors"}  # as many as weights
    options = ", ".join(f"{name}={_phrase(value)}" for name, value in shown.items() if value not in ([], {}))
    line = f"{record['changes']} changes" + (f" ({options})" if options else "")
    first, count = next(iter(record["refusals"]), ""), len(record["refusals"])
    line += f"; {count} {'notes, the first' if count > 1 else 'note'}: {first}" if count else ""
    return [(f"pass {record['name']}", line)]


def _phrase(value: Any) -> str:
    """A JSON value in words."""
    if isinstance(value, dict):
        return " ".join(f"{name} {_phrase(item)}" for name, item in value.items())
    return ", ".join(map(_phrase, value)) if isinstance(value, list) else str(value)
