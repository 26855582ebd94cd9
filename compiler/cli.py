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

from compiler import terminal
from compiler.version import __version__
from runtime.errors import BelleError

_OURS = {"compiler", "passes", "runtime"}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="belle-compile")
def cli() -> None:
    """Compiles BELLE checkpoints (BLOOM and LLaMA families) to INT8 engines for CPUs.

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
@click.option("--target", default="cpu", show_default=True, help="What to build for; see `belle-compile targets`.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The engine directory to make.")
@click.option(
    "--quant", type=click.Choice(["int8", "int8-a16", "int8-plain", "none"]), default="int8", show_default=True,
    help="int8: weights per output channel, activations per token, rotations. int8-a16: the same with activations of 16 bits, "
    "for more accuracy at more arithmetic. int8-plain: without rotations. none: float32, for comparison.",
)  # fmt: skip
@click.option(
    "--kv-cache", type=click.Choice(["auto", "float32", "float16", "int8"]), default="auto", show_default=True,
    help="Type of the KV cache. auto: float16, or float32 with --quant none. int8: half of that, a scale per token and head.",
)  # fmt: skip
@click.option("--isa", "isas", multiple=True, metavar="NAME", help="Carry kernels for this instruction set only; repeatable.")
@click.option("--template", metavar="NAME|FILE", help="Prompt template, by name or as a Jinja file, if not the checkpoint's.")
@click.option("--dump-ir", type=click.Path(path_type=Path), metavar="DIR", help="Write the graph after each pass, as text.")
@click.option("--tune", is_flag=True, help="Measure here which kernel variants suit the model best; takes some minutes.")
@click.option(
    "--drift/--no-drift", default=None,
    help="Let the report say how far each pass moves the logits. By default up to 500 M parameters, where it takes seconds.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the engine at OUTPUT, once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def build(
    checkpoint: Path,
    target: str,
    output: Path,
    quant: str,
    kv_cache: str,
    isas: tuple[str, ...],
    template: str | None,
    dump_ir: Path | None,
    tune: bool,
    drift: bool | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compiles CHECKPOINT, a directory or a .gguf file, to an engine directory.

    The engine appears at OUTPUT complete or not at all, with a report.html that says what was built and what each pass did.
    The same checkpoint, options and toolchain give the same bytes.
    With --tune they do not: kernels then suit the host of the build, and the manifest says what was measured.

    \b
    Examples:
      belle-compile build /models/BELLE-7B-2M -o artifacts/belle-7b-cpu
      belle-compile build model.gguf --target cpu -o artifacts/model --force
      belle-compile build model.gguf --tune -o artifacts/model-tuned
      belle-compile build /models/my-llama --template belle-llama -o artifacts/my-llama --dump-ir /tmp/ir
    """
    from compiler import driver, inspection

    started = time.perf_counter()
    with terminal.progress_bars() as progress:
        request = driver.BuildRequest(
            checkpoint=checkpoint, output=output, target=target, quantization=quant, kv_cache=kv_cache, isas=isas,
            template=template, dump_ir=dump_ir, force=force, tune=tune, drift=drift, on_progress=progress,
        )  # fmt: skip
        engine = inspection.inspect(driver.build(request))
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    engine["build"] = {"seconds": round(seconds, 3), "peak_memory_bytes": peak}
    rows = [*terminal.engine_rows(engine), ("built in", f"{seconds:.1f} s, with at most {terminal.size(peak)} of memory")]
    _show(engine, rows, as_json)


@cli.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def inspect(engine: Path, as_json: bool) -> None:
    """Says what ENGINE is and what it needs, from its manifest; reads no weights.

    \b
    Examples:
      belle-compile inspect artifacts/belle-7b-cpu
      belle-compile inspect artifacts/belle-7b-cpu --json | jq .kernel_calls
    """
    from compiler import inspection

    found = inspection.inspect(engine)
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
    from compiler import inspection

    with terminal.progress_bars() as progress:
        found = inspection.verify(engine, lambda path, done, total: progress("verify", done, total))
    good = f"{found['files']} files, {terminal.size(found['bytes'])}: all digests match"
    _show(found, [("engine", str(engine)), ("content", good), ("kernels here", found["isa"])], as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def targets(as_json: bool) -> None:
    """Lists what --target accepts.

    \b
    Examples:
      belle-compile targets
      belle-compile targets --json
    """
    from dataclasses import asdict

    from compiler.targets import SUPPORTED

    rows = [(target.name, target.description) for target in SUPPORTED]
    _show({"targets": [asdict(target) for target in SUPPORTED]}, rows, as_json)


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
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in _OURS:
        return f"build: the Python package {error.name} is not installed; run `pip install 'belle-compile[build]'`."
    if isinstance(error, MemoryError):
        return "memory: the host has too little of it for this checkpoint; free some or use a larger host."
    if isinstance(error, OSError):
        return f"file: {error.strerror or error}" + (f": {error.filename}" if error.filename else "") + "."
    return f"internal error: {type(error).__name__}: {error}; run again with BELLE_TRACEBACK=1 and report what it prints."


def _fail(sentence: str, status: int) -> NoReturn:
    click.echo(f"belle-compile: {' '.join(sentence.split())}", err=True)
    sys.exit(status)
