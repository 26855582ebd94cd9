"""Options that several commands have, and options whose values become one record."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from belle_compile.compiler.cli.progress import NORMAL, QUIET, VERBOSE, Run
from belle_compile.compiler.kv_types import AUTO, AUTO_SUMMARY, KV_CHOICES, KV_TYPES
from belle_compile.compiler.reading import AdapterChoice, Reading
from belle_compile.compiler.self_written import DEFAULT_WITHIN_S, LEAST_PARAMETERS, SELF, SelfWritten
from belle_compile.passes.presets import DEFAULT_PRESET, METHODS, PRESETS, Preset
from belle_compile.runtime.artifact import GenerationDefaults
from belle_compile.runtime.usage import json_option

if TYPE_CHECKING:
    from belle_compile.compiler.backends.base import LibraryChoice
    from belle_compile.compiler.gate import Gate

    _ParamType = click.ParamType[str]
else:
    _ParamType = click.ParamType  # generic in newer versions of click only

Command = Callable[..., None]
Decorator = Callable[[Command], Command]

PATH = click.Path(path_type=Path)


checkpoint = click.argument("checkpoint", type=PATH)
engine = click.argument("engine", type=PATH)
as_json = json_option("Print one JSON object instead of text; of a command that fails too.")
raw_requests = click.option(
    "--raw-requests", is_flag=True, help="Take the texts of the requests as they are, without the prompt template."
)

template = click.option(
    "--template", metavar="NAME|FILE", help="Prompt template in place of the checkpoint's, by name or as a Jinja file."
)


def together(*options: Decorator) -> Decorator:
    """One decorator for several options, which the help shows in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def collected(parameter: str, make: Callable[..., Any], *options: Decorator) -> Decorator:
    """Options whose values reach the command as one argument, the result of `make`, whose parameters are the options' names."""
    names = tuple(inspect.signature(make).parameters)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_record(**values: Any) -> None:
            record = make(**{name: values.pop(name) for name in names})
            command(**values, **{parameter: record})

        return together(*options)(with_record)

    return decorate


def _reading(
    ignored_config_keys: tuple[str, ...],
    ignore_adapter: bool,
    adapters: tuple[str, ...],
    scales: tuple[float, ...],
    key: Path | None,
    save_decrypted: Path | None,
) -> Reading:
    if scales and len(scales) != len(adapters):
        found = f"{len(scales)} --adapter-scale for {len(adapters)} --adapter: give a scale for each adapter, in their order"
        raise click.UsageError(found, click.get_current_context())
    chosen = tuple(map(AdapterChoice, adapters, scales or (1.0,) * len(adapters)))
    return Reading(ignored_config_keys, ignore_adapter, chosen, key, save_decrypted)


reading = collected(
    "reading",
    _reading,
    click.option(
        "--adapter", "adapters", multiple=True, metavar="DIR",
        help="Merge a LoRA adapter of PEFT, by its directory or its name on the Hugging Face Hub. Repeatable: adapters are "
        "merged in turn.",
    ),
    click.option(
        "--adapter-scale", "scales", multiple=True, type=float, metavar="FACTOR",
        help="Multiply the changes of an adapter by this; once for each --adapter, in their order.  [default: 1]",
    ),
    click.option(
        "--ignore-config-key", "ignored_config_keys", multiple=True, metavar="NAME",
        help="Take a key of config.json that this compiler does not know as absent; repeatable. An engine's manifest records "
        "it.",
    ),
    click.option(
        "--ignore-adapter", is_flag=True,
        help="Read the base model where a LoRA adapter (adapter_config.json) lies beside its weights. An engine's manifest "
        "records it.",
    ),
    click.option(
        "--key", type=PATH, metavar="FILE",
        help="Decrypt an XOR-encrypted release (.enc files) while it is read: consolidated.00.pth of the original LLaMA-7B.",
    ),
    click.option(
        "--save-decrypted", type=PATH, metavar="DIR", help="Write the plaintext of the release to a new directory too."
    ),
)  # fmt: skip


def _run(verbose: bool, quiet: bool, log: Path | None) -> Run:
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet exclude each other", click.get_current_context())
    run = click.get_current_context().ensure_object(Run)
    run.verbosity, run.log = VERBOSE if verbose else QUIET if quiet else NORMAL, log
    return run


def reporting(verbose: str = "") -> Decorator:
    """--verbose, --quiet and --log: what a command prints on stderr, passed as `run`. `verbose` describes what --verbose shows
    besides the memory of each stage."""
    return collected(
        "run",
        _run,
        click.option(
            "-v",
            "--verbose",
            is_flag=True,
            help="Print on stderr the memory of each stage too." + verbose,
        ),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing on stderr but errors."),
        click.option("--log", type=PATH, metavar="FILE", help="Append the stages with their times to FILE."),
    )


def output(what: str) -> Decorator:
    """--output and --force for a directory of the kind `what` ("engine")."""
    return together(
        click.option("-o", "--output", required=True, type=PATH, help=f"The {what} directory to make."),
        click.option("--force", is_flag=True, help=f"Replace the {what} at OUTPUT, once the new one is complete."),
    )


_REQUESTS = (
    "Requests to calibrate with (JSON Lines or text, .gz or .zst), or a set made by `belle-compile calibrate-set`.{} "
    "Some are held out, and {} must pass the gate on them."
)


_WRITTEN = f" {SELF}: the model writes them itself."


def _requests_or_self(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | SelfWritten | None:
    return SelfWritten() if str(value) == SELF else value


def calibration(what: str) -> Decorator:
    """--calibration: requests for methods that need some, and for the gate that `what` ("the export") must pass."""
    return click.option(
        "--calibration", type=PATH, callback=_requests_or_self, metavar=f"FILE|SET|{SELF}",
        help=_REQUESTS.format(_WRITTEN, what),
    )  # fmt: skip


def _calibration(calibration: Path | SelfWritten | None, no_calibration: bool) -> Path | SelfWritten | None:
    if calibration is not None and no_calibration:
        raise click.UsageError("--calibration and --no-calibration exclude each other", click.get_current_context())
    if no_calibration:
        return None
    return SelfWritten(within_s=DEFAULT_WITHIN_S) if calibration is None else calibration


calibration_or_self = collected(
    "calibration",
    _calibration,
    click.option(
        "--calibration", type=PATH, callback=_requests_or_self, metavar=f"FILE|SET|{SELF}",
        help=_REQUESTS.format(_WRITTEN, "the engine")
        + f"  [default: {SELF}, for presets that use requests and models of {LEAST_PARAMETERS / 1e6:.0f} M parameters or more, "
        f"where that should take at most {DEFAULT_WITHIN_S:.0f} s; the gate then only measures]",
    ),
    click.option("--no-calibration", is_flag=True, help="Build without requests, where the model would write its own."),
)  # fmt: skip


def target(*, required: bool = False) -> Decorator:
    """--target: the device and the number of ranks."""
    default: dict[str, Any] = {"required": True} if required else {"default": "cpu", "show_default": True}
    help = "The device and how many ranks of it: cpu, cpux2 for two ranks, or a .toml file; see `belle-compile targets`."
    return click.option("--target", metavar="NAME|FILE", help=help, **default)


def preset(presets: Iterable[Preset] = PRESETS.values(), *, help: str = "") -> Decorator:
    """--quant: the name of a preset, passed as `quantization`. Without a `help` of the command, the help describes each."""
    known = {preset.name: preset.summary for preset in presets}
    return click.option(
        "--quant", "quantization", type=click.Choice(list(known)), default=DEFAULT_PRESET, show_default=True,
        help=help or _sentences(known),
    )  # fmt: skip


def names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Split names at commas; "none" and "" are left out. The build checks that the methods exist."""
    return None if value is None else tuple(name for name in value.split(",") if name not in ("", "none"))


def size(context: click.Context, parameter: click.Parameter, value: str | int | None) -> int | None:
    """Bytes from text with a unit; a configuration file may give a number."""
    from belle_compile.compiler.weight_budget import parse_size

    return None if value is None else parse_size(str(value))


methods = click.option(
    "--methods", callback=names, metavar="NAMES",
    help="Methods in place of the preset's own, with commas between them: "
    + ", ".join(f"{method.name} ({method.summary})" for method in METHODS.values())
    + "; or none.",
)  # fmt: skip


def generation_defaults(*, required: bool = False) -> Decorator:
    """--generation-defaults: changes to the sampling settings that a request may leave open, passed as `generation`."""
    keys = ", ".join(field.name for field in fields(GenerationDefaults))
    return click.option(
        "--generation-defaults", "generation", multiple=True, required=required, metavar="FILE|KEY=VALUE",
        help=f"Sampling settings of requests that state none: KEY=VALUE changes one of {keys}; a file in the form of "
        "generation_config.json replaces all. Repeatable.",
    )  # fmt: skip


def kv_cache(*, help: str = "") -> Decorator:
    """--kv-cache: the type of the KV cache. Without a `help` of the command, the help describes each type."""
    summaries = {AUTO: AUTO_SUMMARY} | {kind.name: kind.summary for kind in KV_TYPES.values() if kind.summary}
    return click.option(
        "--kv-cache", type=click.Choice(KV_CHOICES), default=AUTO, show_default=True,
        help=help or f"Type of the KV cache. {_sentences(summaries)}",
    )  # fmt: skip


class _Registered(_ParamType):
    """A name in a registry, which is read when a name is given or `--help` shows the choices, not at every start."""

    def __init__(self, name: str, names: Callable[[], list[str]]) -> None:
        self.name, self._names = name, names

    @property
    def _choice(self) -> Any:
        return click.Choice(self._names())

    def get_metavar(self, *arguments: Any, **named: Any) -> Any:
        return self._choice.get_metavar(*arguments, **named)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self._choice.convert(value, param, ctx)


def _backends() -> list[str]:
    from belle_compile.compiler.backends.base import registered

    return [backend.name for backend in registered()]


def _formats() -> list[str]:
    from belle_compile.compiler import exports

    return [format.name for format in exports.registered()]


def export_format() -> Decorator:
    """--format: the format of an export."""
    help = "What is written; `belle-compile targets --backends` lists the formats and what they carry."
    return click.option("--format", "format", type=_Registered("format", _formats), required=True, help=help)


def backend(default: str) -> Decorator:
    """--backend: the backend that compiles or that a plan is for. `default` describes in the help the one used without it."""
    return click.option(
        "--backend", type=_Registered("backend", _backends), help=f"The backend that compiles.  [default: {default}]"
    )


def _library(library: str | None, version_compatible: bool, timing_cache: Path | None) -> LibraryChoice:
    from belle_compile.compiler.backends.base import LibraryChoice

    return LibraryChoice(library, version_compatible, timing_cache)


def _libraries() -> list[str]:
    from belle_compile.compiler.backends.base import registered

    return list(dict.fromkeys(name for backend in registered() for name in backend.libraries))


library = collected(
    "library",
    _library,
    click.option(
        "--library", type=_Registered("library", _libraries),
        help="The library that builds the engine, for a backend that has several.  [default: the one that is installed]",
    ),
    click.option(
        "--version-compatible", is_flag=True, help="Let the engine run with later versions of the library that builds it too."
    ),
    click.option(
        "--timing-cache", type=PATH, metavar="FILE",
        help="Take the times of kernels that a library measures in builds from FILE, which is written: with them, builds are "
        "the same again.",
    ),
)  # fmt: skip


def _sentences(summaries: dict[str, str]) -> str:
    return " ".join(f"{name}: {summary}." for name, summary in summaries.items())


def _gate(max_ppl_ratio: float, min_top1: float, min_accuracy_kept: float, no_gate: bool) -> Gate | None:
    from belle_compile.compiler.gate import Gate

    return None if no_gate else Gate(max_ppl_ratio, min_top1, min_accuracy_kept)


gate = collected(
    "gate",
    _gate,
    click.option(
        "--max-ppl-ratio", type=click.FloatRange(min=0), default=1.01, show_default=True, metavar="RATIO",
        help="The gate fails if the engine's perplexity on the held-out requests is more than this times the unquantized "
        "model's.",
    ),
    click.option(
        "--min-top1", type=click.FloatRange(0, 1), default=0.95, show_default=True, metavar="SHARE",
        help="The gate fails if both predict the same next token after less than this share of the tokens.",
    ),
    click.option(
        "--min-accuracy-kept", type=click.FloatRange(min=0), default=0.98, show_default=True, metavar="SHARE",
        help="The gate fails if the engine keeps less than this share of the accuracy on expected answers, where requests have "
        "them.",
    ),
    click.option("--no-gate", is_flag=True, help="Do not run the engine on the held-out requests."),
)  # fmt: skip
