"""What each way of quantizing keeps of SmolLM2-135M's accuracy: engines against the float32 model on held-out text.

    python -m benchmarks.methods                      # every row, on the model as it is and with outliers
    python -m benchmarks.methods --row int8 --row "int8-accurate: rotate" --out /tmp/methods
    python -m benchmarks.methods --row "int8: smooth" --add             # into the results that are there

Calibration and judging use different windows of Python's language documentation. Each row is an engine, built by the compiler
and run by the runtime. Writes methods.json and METHODS.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from belle_compile.compiler.accuracy import Comparison
from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.ir.stream import ActivationStream
from belle_compile.compiler.self_written import SelfWritten
from belle_compile.passes.presets import METHODS
from belle_compile.runtime import Engine
from benchmarks import machine, outliers
from benchmarks.fetch_smollm2 import fetch
from benchmarks.text import WINDOW, windows

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Row:
    """One way: a preset, and the methods in place of its own (None: its own, with calibration, by requests that the model
    writes where `self_written`)."""

    preset: str
    methods: tuple[str, ...] | None = None
    self_written: bool = False

    @property
    def name(self) -> str:
        """As the command line takes it."""
        own = f"{self.preset}, requests of its own" if self.self_written else self.preset
        return own if self.methods is None else f"{self.preset}: {'+'.join(self.methods) or 'plain'}"

    @property
    def calibrated(self) -> bool:
        """Whether it looks at calibration text."""
        return self.methods is None or any(METHODS[name].needs_requests for name in self.methods)


ROWS = (
    Row("int8", ()), Row("int8", ("smooth",)), Row("int8", ("gptq",)), Row("int8", ("smooth", "gptq")),
    Row("int8", ("rotate",)), Row("int8", ("rotate", "rotate-online")), Row("int8"),
    Row("int8", self_written=True), Row("int8", ("static",)), Row("int8", ("rotate", "rotate-online", "gptq", "static")),
    Row("int8-accurate", ()), Row("int8-accurate", ("rotate",)), Row("int8-accurate"),
    Row("int4", ()), Row("int4", ("rotate", "rotate-online")), Row("int4"),
)  # fmt: skip
HARD = (Row("int8", ()), Row("int8", ("smooth",)), Row("int8", ("rotate", "rotate-online")), Row("int8"))


def measure(checkpoint: Path, rows: tuple[Row, ...], calibration: int, held_out: int) -> dict[str, Any]:
    """Every row's engine against the float32 model."""
    opened = open_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory(dir="build") as name:
        folder, found = Path(name), dict[str, Any]()
        engines: dict[str, Path] = {}
        encode = encoder(opened)
        given, judged = windows(encode, calibration, held_out)
        requests = folder / "requests.jsonl"
        requests.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in given))
        for i, row in enumerate(rows):
            engines[row.name] = build(
                BuildRequest(
                    checkpoint, folder / f"engine-{i}", quantization=row.preset, methods=row.methods, gate=None,
                    calibration=SelfWritten() if row.self_written else requests if row.calibrated else None,
                )
            )  # fmt: skip
            print(f"{checkpoint.name}: built {row.name}", flush=True)
        exact = reference_logits(opened, judged, folder / "reference")
        for row in rows:
            comparison = Comparison()
            with Engine.load(engines[row.name]) as engine:
                for ids, logits in zip(judged, exact, strict=True):
                    comparison.add(logits, torch.from_numpy(np.array(engine.logits(ids))), ids)
            found[row.name] = comparison.means()
            print(f"{checkpoint.name}: {row.name}: {found[row.name]}", flush=True)
    return found


def reference_logits(opened: Any, judged: list[list[int]], folder: Path) -> list[torch.Tensor]:
    """The float32 model's, by the graph that a build starts from."""
    stream = ActivationStream(build_graph(opened), judged, folder)
    found: dict[int, torch.Tensor] = {}
    for number in range(len(stream.segments)):
        stream.forward(number, stream.load(number), on_logits=found.__setitem__)
        stream.drop(number)
    return [found[i] for i in range(len(judged))]


def encoder(opened: Any) -> Any:
    """Text to token ids, by the checkpoint's tokenizer."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(opened.tokenizer_json)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def markdown(report: dict[str, Any]) -> str:
    """The page."""
    about, lines = report["machine"], ["# What INT8 costs, by method", ""]
    lines += [f"Written by `python -m benchmarks.methods`; do not edit. {report['model']} against its float32 form, "
              f"{report['held_out']} held-out windows of {WINDOW} tokens of Python's language documentation; calibration with "
              f"{report['calibration']} other windows. Each row is an engine run by the runtime. {about['processor']}, "
              f"{about['date']}.", ""]  # fmt: skip
    for title, rows in report["results"].items():
        lines += [
            f"## {title}",
            "",
            "| preset: methods | top-1 agreement | KL | perplexity ratio |",
            "|---|---|---|---|",
        ]
        for name, row in rows.items():
            kept = f"{row['top1_agreement']:.4f} | {row['kl']:.5f} | {row['perplexity_ratio']:.4f}"
            lines.append(f"| {name} | {kept} |")
        lines.append("")
    return "\n".join(lines)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Tables with the rows of both, the new ones in place of old ones of their name, in the order of `ROWS`; raises SystemExit
    where they cannot stand in one table."""
    differing = [key for key in old if key != "results" and _what(old[key]) != _what(new[key])]
    if differing:
        raise SystemExit(f"the results that are there have another {', '.join(differing)}: measure all rows again")
    order = [row.name for row in ROWS]
    tables = {}
    for title in {**old["results"], **new["results"]}:
        rows = old["results"].get(title, {}) | new["results"].get(title, {})
        tables[title] = {name: rows[name] for name in sorted(rows, key=order.index)}
    return tables


def _what(value: Any) -> Any:
    return {**value, "command": ""} if isinstance(value, dict) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(row.name for row in (*ROWS, *HARD)))
    parser.add_argument("--row", action="append", choices=names, help="only this one; repeatable")
    parser.add_argument("--case", action="append", choices=["clean", "outliers"], help="only this one")
    parser.add_argument(
        "--calibration", type=int, default=40, help="windows to calibrate with, of which the compiler holds out a fifth"
    )
    parser.add_argument("--held-out", type=int, default=20, help="windows to judge by")
    parser.add_argument("--add", action="store_true", help="keep the results of other rows, of the same day and machine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    gguf = fetch(Path("build/smollm2"))
    results = {}
    for case, rows in (("clean", ROWS), ("outliers", HARD)):
        chosen = tuple(row for row in rows if row.name in (arguments.row or [row.name]))
        if chosen and case in (arguments.case or [case]):
            source = gguf if case == "clean" else outliers.make(gguf, Path("build/smollm2-outliers"))
            title = "The model as it is" if case == "clean" else "With outliers of up to 100x in six channels behind every norm"
            results[title] = measure(source, chosen, arguments.calibration, arguments.held_out)
    report = {"model": gguf.name, "calibration": arguments.calibration, "held_out": arguments.held_out, "results": results,
              "machine": machine.describe()}  # fmt: skip
    if arguments.add:
        report["results"] = merged(json.loads((arguments.out / "methods.json").read_text()), report)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "methods.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / "METHODS.md").write_text(markdown(report))
    print(arguments.out / "METHODS.md")


if __name__ == "__main__":
    main()
