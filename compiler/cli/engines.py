"""`inspect`, `verify` and `targets`: the commands that describe engines and devices."""

from __future__ import annotations

from pathlib import Path

import click

from belle_compile.compiler.cli import options, terminal
from belle_compile.compiler.cli.progress import Run
from belle_compile.compiler.cli.rows import carrying_rows, device_rows, engine_rows, generation_words, kernel_rows, layer_rows
from belle_compile.compiler.units import size


@click.command(short_help="Show what an engine is and what it needs.")
@options.engine
@click.option("--kernels", "only_kernels", is_flag=True, help="Show every kernel that the engine lists, and nothing else.")
@options.as_json
def inspect(engine: Path, only_kernels: bool, as_json: bool) -> None:
    """Show what ENGINE is and what it needs, from its manifest; no weights are read.

    \b
    Examples:
      belle-compile inspect artifacts/belle-7b-cpu
      belle-compile inspect artifacts/belle-7b-a100 --kernels
      belle-compile inspect artifacts/belle-7b-cpu --json | jq .kernel_calls
    """
    from belle_compile.compiler import inspection

    inspected = inspection.inspect(engine)
    if only_kernels:
        kernels, layers = inspected.get("kernels", {}), inspected.get("layers", {})
        backend = inspected["target"]["backend"]
        rows = kernel_rows(kernels, each=True) + layer_rows(layers)
        rows = rows or [("kernels", f"engines of the backend {backend} have no list of their kernels")]
        terminal.show({"kernels": kernels} | ({"layers": layers} if layers else {}), rows, as_json)
    else:
        terminal.show(inspected, engine_rows(inspected), as_json)


@click.command(short_help="Change an engine's generation defaults.")
@options.engine
@options.generation_defaults(required=True)
@options.as_json
def edit(engine: Path, generation: tuple[str, ...], as_json: bool) -> None:
    """Change the generation defaults of ENGINE, without building it again.

    They are the sampling settings of requests that state none. The manifest gets a new digest; weights, programs and kernels
    stay as they are.

    \b
    Examples:
      belle-compile edit artifacts/belle-7b-cpu --generation-defaults temperature=0
      belle-compile edit artifacts/belle-7b-cpu --generation-defaults top_p=0.9 --generation-defaults max_new_tokens=512
      belle-compile edit artifacts/belle-7b-cpu --generation-defaults generation_config.json
    """
    from belle_compile.compiler.generation import changed_defaults
    from belle_compile.runtime.artifact import read_manifest
    from belle_compile.runtime.schema import to_plain

    changed_defaults(read_manifest(engine).generation, generation)
    from belle_compile.compiler import editing

    manifest, notes = editing.edit(engine, generation)
    edited = {"engine": str(engine), "digest": manifest.digest, "generation": to_plain(manifest.generation), "notes": notes}
    rows = [("engine", str(engine)), ("generation", generation_words(edited["generation"])), ("digest", manifest.digest)]
    terminal.show(edited, [*rows, *(("note", note) for note in notes)], as_json)


@click.command(short_help="Check an engine's digests and this host.")
@options.engine
@options.reporting()
@options.as_json
def verify(engine: Path, run: Run, as_json: bool) -> None:
    """Check every digest of ENGINE, and that this host can run it.

    \b
    Examples:
      belle-compile verify artifacts/belle-7b-cpu
      belle-compile verify artifacts/belle-7b-cpu --json
    """
    from belle_compile.compiler import inspection

    with run.following() as progress:
        verified = inspection.verify(engine, lambda path, done, total: progress("verify", done, total))
    host = f"can run it, with {verified['isa']}"
    content = f"{verified['files']} files, {size(verified['bytes'])}: all digests match"
    terminal.show(verified, [("engine", str(engine)), ("content", content), ("this host", host)], as_json)


@click.command(short_help="List the devices that engines are built for.")
@click.option("--backends", "of_backends", is_flag=True, help="List what backends and export formats carry, and nothing else.")
@options.as_json
def targets(of_backends: bool, as_json: bool) -> None:
    """List the devices that --target names, which of them can be built for, and the backends that do.

    \b
    DEVICE is one of the ranks of an engine; DEVICExN is N of them ("cpux2"). A file NAME.toml describes one of your own:
      device = "cpu"
      ranks = 2              # all keys but the device may be left out
      memory_gib = 16.0      # of each rank; the error of a build that needs more names the ranks that would fit
      isas = ["avx512vnni"]  # others: max_ranks, memory_bandwidth_gb, link_bandwidth_gb (GB/s), link_latency_us

    \b
    Examples:
      belle-compile targets
      belle-compile targets --json
      belle-compile targets --backends
      belle-compile build /models/BELLE-7B-2M --target cpux4 -o artifacts/belle-7b-cpux4
      belle-compile build /models/BELLE-7B-2M --target server.toml -o artifacts/belle-7b
    """
    if of_backends:
        from belle_compile.compiler import carrying

        carried = carrying.listing()
        terminal.show(carried, carrying_rows(carried), as_json)
        return
    from belle_compile.compiler.devices import ALIASES
    from belle_compile.compiler.targets import listing

    devices = listing()
    terminal.show({"targets": devices, "aliases": dict(ALIASES)}, device_rows(devices, ALIASES), as_json)
