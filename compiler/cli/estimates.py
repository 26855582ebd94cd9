"""`sensitivity` and `plan`: the commands that predict a build's damage to a model, and its engine's memory and times."""

from __future__ import annotations

from pathlib import Path

import click

from belle_compile.compiler.cli import layer_ranking, options, terminal
from belle_compile.compiler.cli.progress import Run
from belle_compile.compiler.cli.rows import plan_text
from belle_compile.compiler.reading import Reading
from belle_compile.passes.presets import PRESETS

_SHOWN = 20  # layers of the ranking that are printed


def _ranking_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file name whose suffix has no writer, before anything is computed."""
    if path is not None and path.suffix not in layer_ranking.WRITERS:
        raise click.BadParameter(f"{path.name}: expected a name that ends in {' or '.join(layer_ranking.WRITERS)}")
    return path


@click.command(short_help="Rank layers by the damage that INT8 does to each.")
@options.checkpoint
@click.option(
    "--calibration", required=True, type=options.PATH, metavar="FILE|SET", help="Requests that the layers are ranked by."
)
@options.raw_requests
@options.template
@options.preset(
    (preset for preset in PRESETS.values() if preset.recipe.quantizes),
    help="The preset whose rotations and widths of weights and activations are tried.",
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=2048, show_default=True, help="Run at most this many tokens of requests."
)
@click.option("--output-errors", is_flag=True, help="Measure only the error of each layer's outputs, in one run; no KL.")
@options.reading
@click.option(
    "-o", "--output", type=options.PATH, callback=_ranking_file, help="Write all layers to a .json file, or as an .svg plot."
)
@options.reporting()
@options.as_json
def sensitivity(
    checkpoint: Path,
    calibration: Path,
    raw_requests: bool,
    template: str | None,
    quantization: str,
    tokens: int,
    output_errors: bool,
    reading: Reading,
    output: Path | None,
    run: Run,
    as_json: bool,
) -> None:
    """Rank the linear layers of CHECKPOINT by the damage that INT8 does to each alone.

    Each layer in turn is quantized in an otherwise unquantized model; its damage is the KL divergence of the predictions, in
    nats a token. This takes half a run of the model for each layer: minutes at 135 M parameters, hours at 7 B, where
    --output-errors is the quick way.

    \b
    Examples:
      belle-compile sensitivity model.gguf --calibration requests.jsonl
      belle-compile sensitivity /models/BELLE-7B-2M --calibration set/ --output-errors -o layers.svg
    """
    from belle_compile.compiler.places import check_checkpoint, check_file, check_reading, check_template

    check_checkpoint(checkpoint)
    check_template(template)
    check_reading(reading)
    check_file("calibration", calibration, "requests, or a set made by belle-compile calibrate-set")
    from belle_compile.compiler import layers

    with run.following() as progress:
        ranked = layers.rank(
            checkpoint, calibration, quantization=quantization, raw_requests=raw_requests, template=template,
            tokens=tokens, alone=not output_errors, reading=reading, on_progress=progress,
        )  # fmt: skip
    ranking = [layer_ranking.to_plain(layer) for layer in ranked]
    if output is not None:
        layer_ranking.WRITERS[output.suffix](ranking, output)
    terminal.show({"layers": ranking, "run": run.to_plain()}, layer_ranking.rows(ranking[:_SHOWN]), as_json)


def _load(batch: int, context: int, measured: Path | None) -> tuple[int, int, Path | None]:
    return batch, context, measured


@click.command(short_help="Predict an engine's memory and the time of a token.")
@options.checkpoint
@options.target()
@options.preset(help="The preset, as for build.")
@options.methods
@options.kv_cache(help="Type of the KV cache, as for build.")
@options.backend("the device's, as for build")
@options.reading
@options.collected(
    "load",
    _load,
    click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences answered at a time."),
    click.option("--context", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens each has on average."),
    click.option(
        "--measured", type=click.Path(path_type=Path), metavar="FILE",
        help="Show what belle-run benchmark measured (ENGINE/capacity.json) beside the prediction for the same load.",
    ),
)  # fmt: skip
@options.as_json
def plan(
    checkpoint: Path,
    target: str,
    quantization: str,
    methods: tuple[str, ...] | None,
    kv_cache: str,
    backend: str | None,
    reading: Reading,
    load: tuple[int, int, Path | None],
    as_json: bool,
) -> None:
    """Predict memory and time of a token on 1, 2, 4 and 8 devices, before anything is built.

    CHECKPOINT is a directory, a .gguf or a .pt file, or a config.json alone: no weight is read. The time of a step follows from
    what it reads, computes and exchanges, at rates that kernels were measured to reach; the output names their source. The
    target cpu is this host.

    \b
    Examples:
      belle-compile plan /models/BELLE-7B-2M --target a100-80g --batch 32
      belle-compile plan bloom-176b/config.json --target a100-80gx8 --context 1024
      belle-compile plan /models/BELLE-LLaMA-7B --target ours.toml --quant int4 --json
      belle-compile plan /models/BELLE-7B-2M --target cpu --measured artifacts/belle-7b-cpu/capacity.json
      belle-compile plan /models/BELLE-LLaMA-7B --target rtx5090 --backend tensorrt --methods rotate,static
    """
    from belle_compile.compiler.places import check_checkpoint, check_reading

    check_checkpoint(checkpoint)
    check_reading(reading)
    from belle_compile.compiler.plan import table
    from belle_compile.runtime.capacity.curve import read_capacity

    batch, context, measured = load
    load_to_serve = table.Load(batch, context, None if measured is None else read_capacity(measured))
    predicted = table.plan(checkpoint, target, quantization, load_to_serve, kv_cache, backend, reading, methods)
    terminal.write(terminal.to_json(predicted) if as_json else plan_text(predicted))
