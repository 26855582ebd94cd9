"""The command `belle-compile`; each subcommand is one call into the compiler or the runtime, and how to print its result."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from belle_compile import __version__
from belle_compile.compiler import terminal
from belle_compile.compiler.units import size
from belle_compile.runtime.errors import BelleError

KV_CACHE = click.Choice(["auto", "float32", "bfloat16", "float16", "int8"])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="belle-compile")
def cli() -> None:
    """Compiles BELLE checkpoints (BLOOM and LLaMA families) to engines for CPUs and NVIDIA GPUs.

    \b
    Examples:
      belle-compile build /models/BELLE-7B-2M --target cpu -o artifacts/belle-7b-cpu
      belle-compile inspect artifacts/belle-7b-cpu
      belle-run artifacts/belle-7b-cpu "What is the capital of France?"

    A command that fails says why in one sentence on stderr and exits with 1 (2 when the command line is wrong). Set
    BELLE_TRACEBACK=1 to see where in the code it failed.
    """


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--target", default="cpu", show_default=True, metavar="NAME|FILE",
    help="What to build for: cpu, cpux2 for two ranks, or a .toml file; see `belle-compile targets`.",
)  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The engine directory to make.")
@click.option(
    "--quant", type=click.Choice(["int8", "int8-accurate", "int8-plain", "int4", "none"]), default="int8", show_default=True,
    help="int8: weights per output channel, activations per token, rotations. int8-accurate: the same with activations of 16 "
    "bits, for more accuracy at more arithmetic. int8-plain: without rotations. int4: the layers' weights with 4 bits, a scale "
    "for every 128 inputs: half the memory, for some accuracy. none: float32, for comparison.",
)  # fmt: skip
@click.option(
    "--methods",
    metavar="NAMES",
    help="Instead of the preset's own, comma-separated: smooth (SmoothQuant), rotate, rotate-online, gptq, static; or none.",
)
@click.option(
    "--kv-cache", type=KV_CACHE, default="auto", show_default=True,
    help="Type of the KV cache. auto: 16 bits (bfloat16 on CPUs, float16 on GPUs), or float32 with --quant none. int8: half of "
    "that, a scale per token and head.",
)  # fmt: skip
@click.option("--isa", "isas", multiple=True, metavar="NAME", help="Carry kernels for this instruction set only; repeatable.")
@click.option("--template", metavar="NAME|FILE", help="Prompt template, by name or as a Jinja file, if not the checkpoint's.")
@click.option("--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write the graph after each pass, as text.")
@click.option(
    "--calibration", type=click.Path(path_type=Path), metavar="FILE|SET",
    help="Requests to round the weights by (JSON Lines or text, .gz or .zst), or a set of `belle-compile calibrate-set`. Some "
    "are held out: the engine must pass on them.",
)  # fmt: skip
@click.option("--raw-requests", is_flag=True, help="Take the requests' texts as they are, without the prompt template.")
@click.option(
    "--max-ppl-ratio", type=click.FloatRange(min=0), default=1.01, show_default=True, metavar="RATIO",
    help="Greatest perplexity of the engine over the unquantized model's, on the requests held out.",
)  # fmt: skip
@click.option(
    "--min-top1", type=click.FloatRange(0, 1), default=0.95, show_default=True, metavar="SHARE",
    help="Least share of tokens after which both predict the same.",
)  # fmt: skip
@click.option(
    "--min-accuracy-kept", type=click.FloatRange(min=0), default=0.98, show_default=True, metavar="SHARE",
    help="Least share kept of the accuracy on expected answers, where requests have them.",
)  # fmt: skip
@click.option(
    "--size-budget", type=click.FloatRange(min=1), default=1.0, metavar="FACTOR",
    help="Let the INT8 weights grow by this factor: the layers that INT8 hurts most stay float32. Needs --calibration.",
)  # fmt: skip
@click.option("--no-gate", is_flag=True, help="Do not try the engine on the requests held out.")
@click.option("--tune", is_flag=True, help="Measure here which kernel variants suit the model best; takes some minutes.")
@click.option(
    "--drift/--no-drift", default=None,
    help="Let the report say how far each pass moves the logits. By default up to 20 M parameters; a minute at 135 M.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the engine at OUTPUT, once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def build(
    checkpoint: Path,
    target: str,
    output: Path,
    quant: str,
    methods: str | None,
    kv_cache: str,
    isas: tuple[str, ...],
    template: str | None,
    dump_ir: Path | None,
    calibration: Path | None,
    raw_requests: bool,
    size_budget: float,
    max_ppl_ratio: float,
    min_top1: float,
    min_accuracy_kept: float,
    no_gate: bool,
    tune: bool,
    drift: bool | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compiles CHECKPOINT, a directory or a .gguf file, to an engine directory.

    The engine appears at OUTPUT complete or not at all, with a report.html that says what was built and what each pass did.
    The same checkpoint, options and toolchain give the same bytes.
    With --tune they do not: kernels then suit the host of the build, and the manifest says what was measured.

    With --calibration, weights are rounded so that outputs on these requests change least, and the finished engine runs those
    held out beside the unquantized model. If it misses a limit, there is no engine. A build that was killed goes on where
    calibration stopped.

    \b
    Examples:
      belle-compile build /models/BELLE-7B-2M -o artifacts/belle-7b-cpu
      belle-compile build model.gguf --target cpu -o artifacts/model --force
      belle-compile build /models/BELLE-7B-2M --calibration requests.jsonl.zst -o artifacts/belle-7b-cpu
      belle-compile build model.gguf --tune -o artifacts/model-tuned
      belle-compile build /models/my-llama --template belle-llama -o artifacts/my-llama --dump-ir /tmp/ir
    """
    from belle_compile.compiler import driver, inspection
    from belle_compile.compiler.gate import Gate

    gate = None if no_gate else Gate(max_ppl_ratio, min_top1, min_accuracy_kept)
    started = time.perf_counter()
    with terminal.progress_bars() as progress:
        request = driver.BuildRequest(
            checkpoint=checkpoint, output=output, target=target, quantization=quant, kv_cache=kv_cache, isas=isas,
            methods=None if methods is None else tuple(name for name in methods.split(",") if name not in ("", "none")),
            template=template, dump_ir=dump_ir, force=force, tune=tune, calibration=calibration, raw_requests=raw_requests,
            size_budget=size_budget, gate=gate, drift=drift, on_progress=progress,
        )  # fmt: skip
        engine = inspection.inspect(driver.build(request))
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    engine["build"] = {"seconds": round(seconds, 3), "peak_memory_bytes": peak}
    rows = [*terminal.engine_rows(engine), ("built in", f"{seconds:.1f} s, with at most {size(peak)} of memory")]
    _show(engine, rows, as_json)


@cli.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME|FILE", help="What for: as cpux4; see `belle-compile targets`.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The engine directory to make.")
@click.option("--force", is_flag=True, help="Replace the engine at OUTPUT, once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def repartition(engine: Path, target: str, output: Path, force: bool, as_json: bool) -> None:
    """Makes an engine for another number of ranks from ENGINE, without its checkpoint; nothing is quantized again.

    Weights, programs and kernels are those that a build for this target gives, byte for byte.

    \b
    Examples:
      belle-compile repartition artifacts/belle-7b-cpu --target cpux2 -o artifacts/belle-7b-cpux2
      belle-compile repartition artifacts/belle-7b-cpux2 --target cpu -o artifacts/belle-7b-cpu
    """
    from belle_compile.compiler import inspection
    from belle_compile.compiler.repartition import RepartitionRequest
    from belle_compile.compiler.repartition import repartition as make

    with terminal.progress_bars() as progress:
        found = inspection.inspect(make(RepartitionRequest(engine, output, target, force, progress)))
    _show(found, terminal.engine_rows(found), as_json)


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--calibration", required=True, type=click.Path(path_type=Path), metavar="FILE|SET", help="Requests to judge by.")
@click.option("--raw-requests", is_flag=True, help="Take the requests' texts as they are, without the prompt template.")
@click.option(
    "--quant", type=click.Choice(["int8", "int8-accurate", "int8-plain", "int4"]), default="int8", show_default=True,
    help="Whose rotations and widths of weights and activations are tried.",
)  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=1), default=2048, show_default=True, help="Of requests to run, at most.")
@click.option("--output-errors", is_flag=True, help="Only the error of each layer's outputs, in one run; no KL.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write all layers there: a .json file, or an .svg plot.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def sensitivity(
    checkpoint: Path,
    calibration: Path,
    raw_requests: bool,
    quant: str,
    tokens: int,
    output_errors: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Ranks the linear layers of CHECKPOINT by the damage that INT8 does to each alone.

    Each layer in turn is quantized in an otherwise unquantized model; its damage is the KL divergence of the predictions, in
    nats a token. A run for each layer takes half the time of a whole one: minutes at 135 M parameters, hours at 7 B, where
    --output-errors is the quick way.

    \b
    Examples:
      belle-compile sensitivity model.gguf --calibration requests.jsonl
      belle-compile sensitivity /models/BELLE-7B-2M --calibration set/ --output-errors -o layers.svg
    """
    from belle_compile.compiler import layer_ranking, layers

    if output is not None and output.suffix not in layer_ranking.WRITERS:
        raise click.BadParameter(
            f"{output.name}: expected a name that ends in {' or '.join(layer_ranking.WRITERS)}", param_hint="-o"
        )
    with terminal.progress_bars() as progress:
        ranked = layers.rank(
            checkpoint, calibration, quantization=quant, raw_requests=raw_requests, tokens=tokens, alone=not output_errors,
            on_progress=progress,
        )  # fmt: skip
    found = [layer_ranking.to_plain(layer) for layer in ranked]
    if output is not None:
        layer_ranking.WRITERS[output.suffix](found, output)
    _show({"layers": found}, layer_ranking.rows(found[:20]), as_json)


@cli.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--kernels", is_flag=True, help="Every kernel of an engine for GPUs, in place of the rest.")
def inspect(engine: Path, as_json: bool, kernels: bool) -> None:
    """Says what ENGINE is and what it needs, from its manifest; reads no weights.

    \b
    Examples:
      belle-compile inspect artifacts/belle-7b-cpu
      belle-compile inspect artifacts/belle-7b-a100 --kernels
      belle-compile inspect artifacts/belle-7b-cpu --json | jq .kernel_calls
    """
    from belle_compile.compiler import inspection

    found = inspection.inspect(engine)
    if kernels:
        of_gpu = found.get("kernels", {})
        _show({"kernels": of_gpu}, terminal.kernel_rows(of_gpu, each=True) or [("kernels", "one library, for CPUs")], as_json)
    else:
        _show(found, terminal.engine_rows(found), as_json)


@cli.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line.")
def verify(engine: Path, as_json: bool) -> None:
    """Checks every digest of ENGINE and that this host can run it.

    \b
    Examples:
      belle-compile verify artifacts/belle-7b-cpu
      belle-compile verify artifacts/belle-7b-cpu --json
    """
    from belle_compile.compiler import inspection

    with terminal.progress_bars() as progress:
        found = inspection.verify(engine, lambda path, done, total: progress("verify", done, total))
    good = f"{found['files']} files, {size(found['bytes'])}: all digests match"
    _show(found, [("engine", str(engine)), ("content", good), ("kernels here", found["isa"])], as_json)


@cli.command("calibrate-set")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The directory to make of the set.")
@click.option("--size", type=click.IntRange(min=1), default=512, show_default=True, help="Requests to calibrate with.")
@click.option("--holdout", type=click.IntRange(min=0), default=128, show_default=True, help="Requests for the accuracy gate.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another seed, another selection.")
@click.option(
    "--field", metavar="NAME", help="The field with the request (text, messages, token ids), if it has no usual name."
)
@click.option("--answer", metavar="NAME", help="The field with the expected answer, if it has no usual name.")
@click.option("--label", "labels", multiple=True, metavar="NAME", help="Keep the shares of this field's values; repeatable.")
@click.option("--redact", is_flag=True, help="Replace phone numbers, e-mail addresses and Chinese ID numbers by placeholders.")
@click.option("--tokenizer", metavar="PATH", help="A tokenizer.json or a checkpoint: measure tokens instead of characters.")
@click.option(
    "--similarity", type=click.FloatRange(0, 1, min_open=True), default=0.8, show_default=True,
    help="Requests whose 4-grams overlap by this share are near duplicates; 1 drops exact ones only.",
)  # fmt: skip
@click.option(
    "--max-length", type=click.IntRange(min=1), default=32768, show_default=True,
    help="Drop longer requests: in tokens, in characters without --tokenizer.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the set at OUTPUT, once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def calibrate_set(
    file: Path,
    output: Path,
    field: str | None,
    answer: str | None,
    tokenizer: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Selects requests for calibration, and others to hold out, from FILE with production requests.

    FILE is JSON Lines (a text, chat messages or token ids a line) or plain text with a request a line; .gz and .zst too.
    Exact and near duplicates are dropped, lengths and labels keep their shares, and the same file, options and seed give
    the same set. OUTPUT then holds the requests, a digest of them, and coverage.html, which shows what they cover and what
    was dropped and why.

    \b
    Examples:
      belle-compile calibrate-set requests.jsonl -o requests.set
      belle-compile calibrate-set logs.jsonl.zst -o logs.set --field prompt --label kind --redact
      belle-compile calibrate-set requests.jsonl -o requests.set --tokenizer /models/BELLE-7B-2M --size 256 --seed 7
    """
    from belle_compile.compiler import requests

    started = time.perf_counter()
    with terminal.progress_bars() as progress:
        found = requests.write_set(
            file, output, requests.SelectOptions(**options), field=field, answer=answer, tokenizer=tokenizer, force=force,
            on_progress=progress,
        )  # fmt: skip
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    found |= {"set": str(output), "run": {"seconds": round(seconds, 3), "peak_memory_bytes": peak}}
    rows = [*terminal.set_rows(found), ("made in", f"{seconds:.1f} s, with at most {size(peak)} of memory")]
    _show(found, rows, as_json)


@cli.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, help="What to plan for; see `belle-compile targets`.")
@click.option("--quant", default="int8", show_default=True, help="A preset, as for build.")
@click.option("--kv-cache", type=KV_CACHE, default="auto", show_default=True, help="Type of the KV cache, as for build.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences answered at a time.")
@click.option("--context", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens each has on average.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def plan(checkpoint: Path, target: str, quant: str, kv_cache: str, batch: int, context: int, as_json: bool) -> None:
    """Predicts memory and time of a token on 1, 2, 4 and 8 devices, before anything is built.

    CHECKPOINT is what build takes, or a config.json alone: no weight is read. A step is what has to be read, computed and
    exchanged at the rates that kernels were measured to reach, which the first lines name. The target cpu is this host.

    \b
    Examples:
      belle-compile plan /models/BELLE-7B-2M --target a100-80g --batch 32
      belle-compile plan bloom-176b/config.json --target a100-80gx8 --context 1024
      belle-compile plan /models/BELLE-LLaMA-7B --target ours.toml --quant int4 --json
    """
    from belle_compile.compiler.plan.table import Load
    from belle_compile.compiler.plan.table import plan as predicted

    found = predicted(checkpoint, target, quant, Load(batch, context), kv_cache)
    click.echo(json.dumps(found, indent=2, sort_keys=True) if as_json else terminal.plan_text(found))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def targets(as_json: bool) -> None:
    """Lists the devices that --target names, and which ones can be built for.

    \b
    DEVICE is one of the ranks of an engine; DEVICExN is N of them ("cpux2"). A file NAME.toml describes one of your own:
      device = "cpu"
      ranks = 2              # all keys but the device may be left out
      memory_gib = 16.0      # of each rank; a build that needs more says how many ranks it takes
      isas = ["avx512vnni"]  # others: max_ranks, memory_bandwidth_gb, link_bandwidth_gb (GB/s), link_latency_us

    \b
    Examples:
      belle-compile targets
      belle-compile targets --json
      belle-compile build /models/BELLE-7B-2M --target cpux4 -o artifacts/belle-7b-cpux4
      belle-compile build /models/BELLE-7B-2M --target server.toml -o artifacts/belle-7b
    """
    from belle_compile.compiler.devices import ALIASES
    from belle_compile.compiler.targets import listing

    found = listing()
    _show({"targets": found, "aliases": dict(ALIASES)}, terminal.device_rows(found, ALIASES), as_json)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0, 1 with one sentence on stderr, 2 for wrong usage, 130 after Ctrl-C."""
    try:
        sys.exit(cli.main(args=arguments, prog_name="belle-compile", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted.", 130)
    except Exception as error:
        if os.environ.get("BELLE_TRACEBACK"):
            raise
        _fail(_sentence(error), 1)


def _show(found: dict[str, Any], rows: Sequence[tuple[str, str]], as_json: bool) -> None:
    click.echo(json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) if as_json else terminal.table(rows))


def _sentence(error: Exception) -> str:
    if isinstance(error, BelleError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "belle_compile":
        return f"build: the Python package {error.name} is not installed; run `pip install 'belle-compile[build]'`."
    if isinstance(error, MemoryError):
        return "memory: the host has too little of it for this checkpoint; free some or use a larger host."
    if isinstance(error, OSError):
        return f"file: {error.strerror or error}" + (f": {error.filename}" if error.filename else "") + "."
    return f"internal error: {type(error).__name__}: {error}; run again with BELLE_TRACEBACK=1 and report what it prints."


def _fail(sentence: str, status: int) -> NoReturn:
    click.echo(f"belle-compile: {' '.join(sentence.split())}", err=True)
    sys.exit(status)
