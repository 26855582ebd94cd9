"""Options that several commands of belle-run have, and what is checked before an engine is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.errors import EngineError

if TYPE_CHECKING:
    from belle_compile.runtime.serving.grammar.source import Grammar
    from belle_compile.runtime.serving.request import SamplingParams


class Encoding(NamedTuple):
    """How prompts become tokens; the arguments of the engine's methods."""

    raw: bool
    parse_special: bool | None
    chat_template_kwargs: Mapping[str, Any] | None


Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

_ADAPTER = "lora"  # the name of the one adapter that a command loads
PATH = click.Path(path_type=Path)

engine = click.argument("engine", type=PATH)
system = click.option("--system", metavar="TEXT", help="The system message of the chat, if the engine's template has one.")


def _together(*parameters: Decorator) -> Decorator:
    def decorate(command: Command) -> Command:
        for parameter in reversed(parameters):
            command = parameter(command)
        return command

    return decorate


encoding = _together(
    click.option("--raw", is_flag=True, help="Take the prompt as it is, without the engine's prompt template."),
    click.option(
        "--parse-special/--no-parse-special", default=None,
        help="Take names of special tokens in the prompt as these tokens.  [default: only with --raw]",
    ),
    click.option(
        "--chat-template-kwargs", metavar="JSON",
        help="Variables of the engine's prompt template, such as '{\"enable_thinking\": false}'.",
    ),
)  # fmt: skip
sampling = _together(
    click.option("--temperature", type=float, help="0 takes the most likely token."),
    click.option("--top-k", type=int, help="Sample among the k likeliest tokens; 0 is off."),
    click.option("--top-p", type=float, help="Sample among the likeliest tokens of this mass; 1 is off."),
    click.option("--repetition-penalty", type=float, help="Above 1 makes tokens of prompt and answer less likely."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the best one's probability; 0 is off."),
    click.option("--presence-penalty", type=float, default=0.0, help="Above 0 makes tokens that the answer has less likely."),
    click.option("--frequency-penalty", type=float, default=0.0, help="The same, as many times as the answer has the token."),
    click.option("--seed", type=int, help="The same seed gives the same answer."),
    click.option("--max-new-tokens", type=int, help="End the answer after this many tokens."),
    click.option("--min-tokens", type=int, help="Do not choose an end-of-sequence token before this many tokens."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given several times."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token."),
    click.option("--prompt-lookup", type=int, default=0, metavar="N", help="Guess up to N tokens a step from earlier text."),
    click.option("--json-schema", metavar="FILE|TEXT", help="Answer with JSON that this schema describes."),
    click.option("--regex", metavar="PATTERN", help="Answer with a text that matches this regular expression as a whole."),
    click.option("--grammar", "lark", type=PATH, metavar="FILE", help="Answer by this Lark grammar."),
)
loading = _together(
    click.option("--threads", type=int, help="Threads of the kernels of a rank.  [default: all usable cores]"),
    click.option("--isa", help="Instruction set: amx, avx512vnni or avx2.  [default: BELLE_ISA, else the best of this CPU]"),
    click.option("--kv-tokens", type=int, help="Tokens the KV cache holds.  [default: by the host's memory]"),
    click.option("--kv-cache-memory", metavar="SIZE", help="In its place, the cache's memory: 4GiB, or 50% of what is free."),
    click.option("--lora", metavar="DIR", help="Answer with this LoRA adapter, as PEFT saves it (engines of --lora-rank)."),
    click.option("--draft", type=PATH, metavar="DIR", help="Guess tokens with this smaller engine of the same vocabulary."),
    click.option("--draft-tokens", type=click.IntRange(min=1), metavar="N", help="Tokens it guesses.  [default: what pays]"),
    click.option("--ranks", "count", type=int, metavar="N", help="Processes that run it together.  [default: the engine's]"),
    click.option(
        "--rank-timeout", type=float, envvar=ranks.TIMEOUT, default=ranks.TIMEOUT_S, metavar="S", show_default=True,
        help="Seconds to wait for a rank that does not start or answer.",
    ),
    click.option("--verify", is_flag=True, help="Check the digest of every file, weights included, before loading."),
)  # fmt: skip


def check_engine(directory: Path) -> None:
    """Raise `EngineError` where there is no engine, before anything slow is imported. What one of several ranks finds is
    reported by `run_command`."""
    if ranks.place() is not None:
        return
    from belle_compile.runtime.artifact import read_manifest

    read_manifest(directory)


def encoding_of(given: dict[str, Any]) -> Encoding:
    """How prompts become tokens, for the options of `encoding`; raises `EngineError` for variables that are no JSON object."""
    from belle_compile.runtime.prompt import parse_variables

    text = given["chat_template_kwargs"]
    if text is not None and given["raw"]:
        raise click.UsageError("--chat-template-kwargs are variables of the prompt template, and --raw has none")
    return Encoding(given["raw"], given["parse_special"], None if text is None else parse_variables(text))


def load_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Engine.load` for the options of `loading`."""
    names = ("threads", "isa", "kv_tokens", "kv_cache_memory", "draft", "draft_tokens")
    lora = {} if given["lora"] is None else {"lora": {_ADAPTER: given["lora"]}}
    return {name: given[name] for name in names} | {"verify": "full" if given["verify"] else "header"} | lora


def sampling_params(given: dict[str, Any]) -> SamplingParams:
    """The parameters for the options of `sampling`; raises `EngineError` for values out of their ranges."""
    from dataclasses import fields

    from belle_compile.runtime.serving.request import SamplingParams

    names = {field.name for field in fields(SamplingParams)} - {"grammar", "adapter"}
    values = {name: value for name, value in given.items() if name in names}
    adapter = _ADAPTER if given["lora"] is not None else None
    return SamplingParams(**values, adapter=adapter, grammar=_grammar(given["json_schema"], given["regex"], given["lark"]))


def _grammar(schema: str | None, regex: str | None, lark: Path | None) -> Grammar | None:
    """Return what the answers must match: at most one of a JSON schema, in a file or as text, a pattern and a file."""
    from belle_compile.runtime.serving.grammar.source import Grammar

    if sum(option is not None for option in (schema, regex, lark)) > 1:
        raise click.UsageError("only one of --json-schema, --regex and --grammar can be given")
    if schema is not None:
        return Grammar("json_schema", schema if schema.lstrip().startswith("{") else read_text(Path(schema), "sampling"))
    if regex is not None:
        return Grammar("regex", regex)
    return Grammar("lark", read_text(lark, "sampling")) if lark else None


def read_text(path: Path | None, stage: str) -> str:
    """The text of a file, or of stdin for None, without a byte order mark; raises `EngineError` of `stage`."""
    try:
        content = sys.stdin.buffer.read() if path is None else path.read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise EngineError(stage, f"{path or 'stdin'} cannot be read", found=found) from error
