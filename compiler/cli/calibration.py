"""`calibrate-set`: requests for calibration, chosen from production requests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from belle_compile.compiler.cli import options, terminal
from belle_compile.compiler.cli.progress import Run
from belle_compile.compiler.cli.rows import set_rows
from belle_compile.compiler.reading import Reading

if TYPE_CHECKING:
    from belle_compile.compiler.requests import SelectOptions


def _select_options(
    size: int, holdout: int, seed: int, labels: tuple[str, ...], redact: bool, similarity: float, max_length: int
) -> SelectOptions:
    from belle_compile.compiler.requests import SelectOptions

    return SelectOptions(size, holdout, seed, labels, redact, similarity, max_length)


_SELECTION = options.collected(
    "selection",
    _select_options,
    click.option("--size", type=click.IntRange(min=1), default=512, show_default=True, help="Requests to calibrate with."),
    click.option(
        "--holdout", type=click.IntRange(min=0), default=128, show_default=True,
        help="Requests to hold out for the accuracy gate.",
    ),
    click.option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another seed gives another selection."
    ),
    click.option("--label", "labels", multiple=True, metavar="NAME", help="Keep the shares of the field's values; repeatable."),
    click.option(
        "--redact", is_flag=True, help="Replace phone numbers, e-mail addresses and Chinese ID numbers by placeholders."
    ),
    click.option(
        "--similarity", type=click.FloatRange(0, 1, min_open=True), default=0.8, show_default=True,
        help="Requests that share this part of their 4-grams are near duplicates; 1 drops exact duplicates only.",
    ),
    click.option(
        "--max-length", type=click.IntRange(min=1), default=32768, show_default=True,
        help="Drop longer requests; in tokens, or in characters without --tokenizer.",
    ),
)  # fmt: skip


@click.command("calibrate-set", short_help="Choose requests to calibrate with, and to hold out.")
@click.argument("file", type=options.PATH)
@options.output("set")
@click.option(
    "--field", metavar="NAME", help="The field with the request (text, messages or token ids), if it has no usual name."
)
@click.option("--answer", metavar="NAME", help="The field with the expected answer, if it has no usual name.")
@click.option(
    "--tokenizer", metavar="PATH", help="A tokenizer.json or a checkpoint: measure lengths in tokens instead of characters."
)
@options.reading
@_SELECTION
@options.reporting()
@options.as_json
def calibrate_set(
    file: Path, output: Path, reading: Reading, selection: SelectOptions, run: Run, as_json: bool, **source: Any
) -> None:
    """Choose requests for calibration, and others to hold out, from FILE with production requests.

    FILE is JSON Lines (a text, chat messages or token ids a line) or plain text with a request a line; .gz and .zst too.
    Exact and near duplicates are dropped, lengths and labels keep their shares, and the same file, options and seed give
    the same set. OUTPUT then holds the requests, a digest of them, and coverage.html, which shows what they cover and what
    was dropped and why.

    \b
    Examples:
      belle-compile calibrate-set requests.jsonl -o requests.set
      belle-compile calibrate-set logs.jsonl.zst -o logs.set --field prompt --label kind --redact
      belle-compile calibrate-set requests.jsonl -o requests.set --tokenizer /models/BELLE-7B-2M --size 256 --seed 7
      belle-compile calibrate-set requests.jsonl -o ours.set --tokenizer BELLE-LLaMA-EXT-7B-enc --key consolidated.00.pth
    """
    from belle_compile.compiler.places import check_file, check_reading

    check_file("requests", file, "a file of requests")
    check_reading(reading)
    from belle_compile.compiler import requests

    with run.following() as progress:
        made = requests.write_set(file, output, selection, reading=reading, on_progress=progress, **source)
    made |= {"set": str(output), "run": run.to_plain()}
    terminal.show(made, [*set_rows(made), ("made in", run.words())], as_json)
