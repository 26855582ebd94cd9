"""`export`: checkpoints for other runtimes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from belle_compile.compiler.cli import options, terminal
from belle_compile.compiler.cli.progress import Run
from belle_compile.compiler.cli.rows import export_headline

if TYPE_CHECKING:
    from belle_compile.compiler.gate import Gate

# Parameters are named after the fields of `ExportRequest`, which holds the defaults of options that are left out.
_WHAT = options.together(
    options.export_format(),
    options.output("export"),
    options.preset(),
    options.methods,
    click.option(
        "--keep-tied/--untie", default=None,
        help="Keep a head tied to the embedding, which leaves the residual stream as it is, or let the rotation give it a "
        "table of its own; --untie also rotates the stream of a model whose head is its own.  [default: the format's]",
    ),
    click.option(
        "--granularity", type=click.Choice(["block", "channel"]), default=None,
        help="Which weights share a scale. block: each 32 of an output channel, as in llama.cpp's own Q8_0; with gguf only. "
        "channel: all of an output channel, with the integers of engines.  [default: the format's first: gguf block, others "
        "channel; an engine's integers keep their channels' scales]",
    ),
    click.option(
        "--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto", show_default=True,
        help="Type of tensors that keep floats. auto: the format's, or 16 bits as in the checkpoint.",
    ),
    options.template,
    options.generation_defaults(),
    options.reading,
)  # fmt: skip
_CALIBRATION = options.together(
    options.calibration("the export"),
    options.raw_requests,
    options.gate,
    click.option(
        "--runtime-python", type=options.PATH, metavar="FILE",
        help="The Python interpreter in whose environment the gate finds the format's runtime.  [default: this one]",
    ),
)  # fmt: skip


@click.command(short_help="Export a model for another runtime.")
@click.argument("source", type=options.PATH, metavar="CHECKPOINT|ENGINE")
@_WHAT
@_CALIBRATION
@options.reporting()
@options.as_json
def export(source: Path, gate: Gate | None, run: Run, as_json: bool, **request: Any) -> None:
    """Export a checkpoint, quantized as `build` would, or the integers of an engine, for another runtime.

    The export appears at OUTPUT complete or not at all. The same source, options and versions give the same bytes. Methods of
    the preset that the format cannot carry are left out and named; `belle-compile targets --backends` lists what each carries.

    With --calibration, weights are rounded by the requests, and the export runs the held-out ones in its own runtime, where
    that is installed, beside the unquantized model. If it misses a limit of this gate, there is no export.

    \b
    Examples:
      belle-compile export /models/BELLE-LLaMA-7B --format compressed-tensors --calibration requests.jsonl -o exports/vllm
      belle-compile export /models/BELLE-7B-2M --format gguf -o exports/llama-cpp
      belle-compile export model.gguf --format safetensors --quant none -o exports/float
      belle-compile export artifacts/belle-7b-cpu --format gguf -o exports/engine
    """
    from belle_compile.compiler.exports.request import ExportRequest, resolve

    export_request = ExportRequest(source, gate=gate, **request)
    resolve(export_request)  # what is wrong with the arguments is said before torch and onnx are imported, which takes seconds
    run.on_interrupt = partial(_kept, export_request.output)
    from belle_compile.compiler.exports import driver

    with run.following() as progress:
        record = driver.export(replace(export_request, on_progress=progress))
    made = record | {"export": str(export_request.output), "run": run.to_plain()}
    terminal.show(made, export_headline(made, run.words()), as_json)


def _kept(output: Path) -> str:
    """A phrase that says what an export to `output` that was stopped keeps, and how to go on."""
    from belle_compile.compiler.work_folder import folder_of, kept_words

    return kept_words(folder_of(output)) or "nothing is kept, since calibration had not finished a part"
