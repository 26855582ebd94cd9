"""`build` and `repartition`: the commands that make engines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from belle_compile.compiler.cli import options, terminal
from belle_compile.compiler.cli.rows import engine_rows

if TYPE_CHECKING:
    from belle_compile.compiler.gate import Gate

# Parameters are named after the fields of `BuildRequest`, which holds the defaults of options that are left out.
_WHAT = options.together(
    options.target(),
    options.output("engine"),
    options.preset(),
    options.methods,
    options.kv_cache(),
    options.backend("the first that `belle-compile targets` lists for the device"),
    click.option("--isa", "isas", multiple=True, metavar="NAME", help="Compile for this instruction set only; repeatable."),
    click.option(
        "--template", metavar="NAME|FILE", help="Prompt template in place of the checkpoint's, by name or as a Jinja file."
    ),
    options.generation_defaults(),
    options.ignored_config_keys,
)  # fmt: skip
_CALIBRATION = options.together(
    click.option(
        "--calibration", type=options.PATH, metavar="FILE|SET",
        help="Requests to calibrate with (JSON Lines or text, .gz or .zst), or a set made by `belle-compile calibrate-set`. "
        "Some are held out, and the engine must pass the gate on them.",
    ),
    options.raw_requests,
    options.gate,
    click.option(
        "--size-budget", type=click.FloatRange(min=1), default=1.0, metavar="FACTOR",
        help="Let the INT8 weights grow by this factor: the layers that INT8 hurts most stay float32. Needs --calibration.",
    ),
)  # fmt: skip
_HOW = options.together(
    click.option("--dump-ir", type=options.PATH, metavar="DIR", help="Write the graph after each pass, as text and as ONNX."),
    click.option("--tune", is_flag=True, help="Measure on this host which kernel variants are fastest; takes some minutes."),
    click.option(
        "--drift/--no-drift", default=None,
        help="Report how far each pass moves the logits. By default for models of up to 20 M parameters; at 135 M it takes a "
        "minute.",
    ),
    click.option(
        "--verbose", is_flag=True,
        help="Print on stderr by which steps each weight is computed, back to the checkpoint's files.",
    ),
)  # fmt: skip


@click.command(short_help="Compile a checkpoint to an engine directory.")
@options.checkpoint
@_WHAT
@_CALIBRATION
@_HOW
@options.as_json
def build(checkpoint: Path, gate: Gate | None, verbose: bool, as_json: bool, **request: Any) -> None:
    """Compile CHECKPOINT, a directory or a .gguf file, to an engine directory.

    The engine appears at OUTPUT complete or not at all, with a report.html that shows what was built and what each pass did.
    The same checkpoint, options and toolchain give the same bytes.
    With --tune they do not: kernels then suit the host of the build, and the manifest records what was measured.

    With --calibration, weights are rounded so that outputs on these requests change least, and the finished engine runs the
    held-out ones beside the unquantized model. If it misses a limit of this gate, there is no engine. A build that was killed
    continues where calibration stopped.

    \b
    Examples:
      belle-compile build /models/BELLE-7B-2M -o artifacts/belle-7b-cpu
      belle-compile build model.gguf --target cpu -o artifacts/model --force
      belle-compile build /models/BELLE-7B-2M --calibration requests.jsonl.zst -o artifacts/belle-7b-cpu
      belle-compile build model.gguf --tune -o artifacts/model-tuned
      belle-compile build /models/BELLE-7B-2M --target a100x4 --backend triton -o artifacts/belle-7b-a100x4
      belle-compile build /models/my-llama --template belle-llama -o artifacts/my-llama --dump-ir /tmp/ir
    """
    from belle_compile.compiler import driver, inspection

    stopwatch = terminal.Stopwatch()
    on_weight = partial(click.echo, err=True) if verbose else None
    with terminal.progress_bars() as progress:
        build_request = driver.BuildRequest(checkpoint, gate=gate, on_progress=progress, on_weight=on_weight, **request)
        path = driver.build(build_request)
    engine = inspection.inspect(path)
    engine["build"], taken = stopwatch.read()
    terminal.show(engine, [*engine_rows(engine), ("built in", taken)], as_json)


@click.command(short_help="Make an engine for another number of ranks.")
@options.engine
@options.target(required=True)
@options.backend("the engine's, or the device's where that one does not serve it")
@options.output("engine")
@options.as_json
def repartition(engine: Path, as_json: bool, **request: Any) -> None:
    """Make an engine for another number of ranks from ENGINE, without its checkpoint; nothing is quantized again.

    Weights, programs and kernels are those of a build for this target, byte for byte, if that build would choose the same
    block size for the online rotation (see docs/ranks.md).

    \b
    Examples:
      belle-compile repartition artifacts/belle-7b-cpu --target cpux2 -o artifacts/belle-7b-cpux2
      belle-compile repartition artifacts/belle-7b-cpux2 --target cpu -o artifacts/belle-7b-cpu
    """
    from belle_compile.compiler import inspection
    from belle_compile.compiler.repartition import RepartitionRequest
    from belle_compile.compiler.repartition import repartition as run

    with terminal.progress_bars() as progress:
        made = inspection.inspect(run(RepartitionRequest(engine=engine, on_progress=progress, **request)))
    terminal.show(made, engine_rows(made), as_json)
