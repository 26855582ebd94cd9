"""`build` and `repartition`: the commands that make engines."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from belle_compile.compiler.cli import options, terminal
from belle_compile.compiler.cli.progress import VERBOSE, Run
from belle_compile.compiler.cli.rows import headline

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
    options.library,
    click.option("--isa", "isas", multiple=True, metavar="NAME", help="Compile for this instruction set only; repeatable."),
    options.template,
    options.generation_defaults(),
    options.reading,
    click.option(
        "--lora-rank", type=click.IntRange(min=0), default=0, metavar="N", show_default="none",
        help="Let the engine take LoRA adapters of up to this rank while it runs (belle-run serve --lora).",
    ),
    click.option(
        "--lora-targets", default="", callback=options.names, metavar="NAME,...",
        help="The linear layers that adapters may change, by their names' ends, as q_proj,v_proj.  [default: all but the head]",
    ),
)  # fmt: skip
_CALIBRATION = options.together(
    options.calibration_or_self,
    options.raw_requests,
    options.gate,
    click.option(
        "--size-budget", type=click.FloatRange(min=1), default=1.0, metavar="FACTOR",
        help="Let the INT8 weights grow by this factor: the layers that INT8 hurts most stay float32. Needs --calibration.",
    ),
    click.option(
        "--weight-budget", callback=options.size, metavar="SIZE",
        help="With --quant int4: the bytes that all weights may take, such as 3.6GB. The layers that 4 bits hurt most get 6 or "
        "8. Needs --calibration.  [default: 4 bits for all]",
    ),
)  # fmt: skip
_HOW = options.together(
    click.option("--dump-ir", type=options.PATH, metavar="DIR", help="Write the graph after each pass, as text and as ONNX."),
    click.option(
        "--fuse/--no-fuse", default=True, show_default=True,
        help="Fuse ops into fewer kernels. Without, for comparison, only where there is no kernel for the single op.",
    ),
    click.option("--tune", is_flag=True, help="Measure on this host which kernel variants are fastest; takes some minutes."),
    click.option(
        "--drift/--no-drift", default=None,
        help="Report how far each pass moves the logits. By default for models of up to 20 M parameters; at 135 M it takes a "
        "minute.",
    ),
    options.reporting(" And by which steps each weight is computed, back to the checkpoint's files."),
)  # fmt: skip


@click.command(short_help="Compile a checkpoint to an engine directory.")
@options.checkpoint
@_WHAT
@_CALIBRATION
@_HOW
@options.as_json
def build(checkpoint: Path, gate: Gate | None, run: Run, as_json: bool, **request: Any) -> None:
    """Compile CHECKPOINT, a directory, a .gguf or a .pt file, to an engine directory.

    The engine appears at OUTPUT complete or not at all, with a report.html that shows what was built and what each pass did.
    The same checkpoint, options and toolchain give the same bytes.
    With --tune they do not: kernels then suit the host of the build, and the manifest records what was measured.

    With --calibration, weights are rounded so that outputs on these requests change least, and the finished engine runs the
    held-out ones beside the unquantized model. If it misses a limit of this gate, there is no engine. A build that was killed
    continues where calibration stopped. With --calibration self, the model writes the requests itself.

    \b
    Examples:
      belle-compile build /models/BELLE-7B-2M -o artifacts/belle-7b-cpu
      belle-compile build BelleGroup/BELLE-LLaMA-7B-2M-enc --key llama-7B/consolidated.00.pth -o artifacts/belle-llama-7b
      belle-compile build model.gguf --target cpu -o artifacts/model --force
      belle-compile build /models/BELLE-7B-2M --calibration requests.jsonl.zst -o artifacts/belle-7b-cpu
      belle-compile build model.gguf --calibration self -o artifacts/model-calibrated
      belle-compile build model.gguf --quant int4 --weight-budget 104MB --calibration self -o artifacts/model-int4
      belle-compile build model.gguf --tune -o artifacts/model-tuned
      belle-compile build /models/BELLE-7B-2M --target a100x4 --backend triton -o artifacts/belle-7b-a100x4
      belle-compile build /models/my-llama --template belle-llama -o artifacts/my-llama --dump-ir /tmp/ir
    """
    from belle_compile.compiler.build_request import BuildRequest, resolve

    build_request = BuildRequest(checkpoint, gate=gate, **request)
    resolve(build_request)  # what is wrong with the arguments is said before torch and onnx are imported, which takes seconds
    run.on_interrupt = partial(_kept, build_request.output)
    from belle_compile.compiler import driver, inspection

    with run.following() as progress:
        on_weight = progress.say if run.verbosity == VERBOSE else None
        path = driver.build(replace(build_request, on_progress=progress, on_note=progress.say, on_weight=on_weight))
    engine = inspection.inspect(path)
    engine["build"] = run.to_plain()
    terminal.show(engine, headline(engine, run.words()), as_json)


def _kept(output: Path) -> str:
    """A phrase that says what a build of `output` that was stopped keeps, and how to go on."""
    from belle_compile.compiler.work_folder import folder_of, kept_words

    return kept_words(folder_of(output)) or "nothing is kept, since calibration had not finished a part"


@click.command(short_help="Make an engine for another number of ranks.")
@options.engine
@options.target(required=True)
@options.backend("the engine's, or the device's where that one does not serve it")
@options.library
@options.output("engine")
@options.reporting()
@options.as_json
def repartition(engine: Path, run: Run, as_json: bool, **request: Any) -> None:
    """Make an engine for another number of ranks from ENGINE, without its checkpoint; nothing is quantized again.

    Weights, programs and kernels are those of a build for this target, byte for byte, if that build would choose the same
    block size for the online rotation (see docs/ranks.md).

    \b
    Examples:
      belle-compile repartition artifacts/belle-7b-cpu --target cpux2 -o artifacts/belle-7b-cpux2
      belle-compile repartition artifacts/belle-7b-cpux2 --target cpu -o artifacts/belle-7b-cpu
    """
    from belle_compile.compiler import targets
    from belle_compile.compiler.engine_directory import check_output
    from belle_compile.runtime.artifact import read_manifest

    read_manifest(engine)
    targets.resolve(request["target"])
    check_output(request["output"], force=request["force"])
    from belle_compile.compiler import inspection, repartition

    with run.following() as progress:
        path = repartition.repartition(repartition.RepartitionRequest(engine=engine, on_progress=progress, **request))
    made = inspection.inspect(path)
    made["build"] = run.to_plain()
    terminal.show(made, headline(made, run.words()), as_json)
