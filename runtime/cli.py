"""belle-run: answers prompts on the command line, one or a chat."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

from belle_compile import __version__
from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.distributed.command import run_command
from belle_compile.runtime.engine import Engine, Prompt, Result, Stream
from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.profiling import ProfileHandle
from belle_compile.runtime.serving.grammar.source import Grammar
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.standard_streams import standard_streams

EXAMPLES = """
\b
Examples:
  belle-run artifacts/belle-7b-cpu "写一首关于春天的诗"
  belle-run artifacts/belle-7b-cpu                        chat; /reset forgets, /exit or Ctrl-D leaves
  belle-run artifacts/belle-7b-cpu --temperature 0 --json "1+1=?"
  belle-run artifacts/belle-7b-cpu --profile "你好"         shows where the time went
  belle-run artifacts/belle-7b-cpu < questions.txt        each line is a turn of one chat
  belle-run artifacts/belle-7b-cpu --self-test            checks that this host answers as the build did
  belle-run serve artifacts/belle-7b-cpu                  serves it over HTTP; see belle-run serve --help
"""
SERVE = "serve"


class _Command(click.Command):
    """The command, and its only subcommand: `belle-run serve`. A directory of that name is ./serve."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] != [SERVE]:
            return super().make_context(info_name, args, parent, **extra)
        from belle_compile.runtime.server.cli import command

        return command().make_context(f"{info_name} {SERVE}", args[1:], parent, **extra)

    def main(self, *arguments: Any, **options: Any) -> Any:
        with standard_streams("belle-run"):
            return super().main(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@click.command(
    cls=_Command, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="belle-run")
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--temperature", type=float, help="0 takes the most likely token.")
@click.option("--top-k", type=int, help="Sample among the k likeliest tokens; 0 is off.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens of this mass; 1 is off.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes tokens of prompt and answer less likely.")
@click.option("--min-p", type=float, default=0.0, help="Drop tokens below this share of the best one's probability; 0 is off.")
@click.option("--presence-penalty", type=float, default=0.0, help="Above 0 makes tokens that the answer has less likely.")
@click.option("--frequency-penalty", type=float, default=0.0, help="The same, as many times as the answer has the token.")
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--max-new-tokens", type=int, help="End the answer after this many tokens.")
@click.option("--min-tokens", type=int, default=0, help="Do not choose an end-of-sequence token before this many tokens.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token.")
@click.option("--prompt-lookup", type=int, default=0, metavar="N", help="Guess up to N tokens a step from earlier text.")
@click.option("--json-schema", metavar="FILE|TEXT", help="Answer with JSON that this schema describes.")
@click.option("--regex", metavar="PATTERN", help="Answer with a text that matches this regular expression as a whole.")
@click.option("--grammar", "lark", type=click.Path(path_type=Path), metavar="FILE", help="Answer by this Lark grammar.")
@click.option("--logprobs", type=int, metavar="N", help="With --json: log probabilities, and N alternatives a token.")
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without the engine's prompt template.")
@click.option(
    "--parse-special/--no-parse-special", default=None,
    help="Take names of special tokens in the prompt as these tokens.  [default: only with --raw]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per answer instead of streaming it.")
@click.option("--profile", is_flag=True, help="Show on stderr where the time went; with --json, in the object.")
@click.option("--threads", type=int, help="Threads of the kernels of a rank.  [default: all usable cores]")
@click.option("--isa", help="Instruction set: amx, avx512vnni or avx2.  [default: BELLE_ISA, else the best of this CPU]")
@click.option("--kv-tokens", type=int, help="Tokens the KV cache holds.  [default: by the host's memory]")
@click.option("--kv-cache-memory", metavar="SIZE", help="In its place, the cache's memory: 4GiB, or 50% of what is free.")
@click.option("--ranks", "count", type=int, metavar="N", help="Processes that run it together.  [default: the engine's]")
@click.option(
    "--rank-timeout", type=float, envvar=ranks.TIMEOUT, default=ranks.TIMEOUT_S, metavar="S", show_default=True,
    help="Seconds to wait for a rank that does not start or answer.",
)  # fmt: skip
@click.option("--verify", is_flag=True, help="Check the digest of every file, weights included, before loading.")
@click.option("--self-test", is_flag=True, help="Check that this host gives the golden answers of the build, and do no more.")
def main(engine: Path, prompt: str | None, **options: Any) -> None:
    """Answer PROMPT with the engine in directory ENGINE, or chat when no PROMPT is given.

    What is not set here comes from the engine's generation defaults.
    """
    if options["logprobs"] is not None and not options["as_json"]:
        raise click.UsageError("--logprobs needs --json")
    if options["self_test"] and prompt is not None:
        raise click.UsageError("--self-test answers the engine's own prompts, so give no PROMPT")
    code = run_command(
        engine,
        lambda: _answer(engine, prompt, options),
        ranks_requested=options["count"],
        rank_timeout_s=options["rank_timeout"],
    )
    sys.exit(code)


class _Encoding(NamedTuple):
    """How prompts become tokens; the arguments of the engine's methods."""

    raw: bool
    parse_special: bool | None


def _answer(directory: Path, prompt: str | None, options: dict[str, Any]) -> int:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    params = SamplingParams(
        **{name: value for name, value in options.items() if name in fields},
        grammar=_grammar(options["json_schema"], options["regex"], options["lark"]),
    )
    load = {name: options[name] for name in ("threads", "isa", "kv_tokens", "kv_cache_memory")}
    with Engine.load(directory, verify="full" if options["verify"] else "header", **load) as engine:
        if options["self_test"]:
            _self_test(engine)
            return 0
        answer = partial(_answer_json if options["as_json"] else _answer_streamed, profiled=options["profile"])
        encoding = _Encoding(options["raw"], options["parse_special"])
        if prompt is not None:
            answer(engine, prompt, params, encoding)
        else:
            _chat(engine, params, encoding, answer)
    return 0


def _self_test(engine: Engine) -> None:
    """Print what was tested; raises `EngineError` if the engine fails, or has no golden answers: that is no success."""
    result = engine.self_test()
    if not result.prompts:
        remedy = "rebuild the engine with belle-compile build, or send it requests of your own"
        raise EngineError("self-test", "nothing was tested", found=result.reason, expected="golden answers", remedy=remedy)
    click.echo(f"self-test: {result.prompts} prompts, {result.tokens} tokens, as built")


def _grammar(schema: str | None, regex: str | None, lark: Path | None) -> Grammar | None:
    """Return what the answers must match: at most one of a JSON schema, in a file or as text, a pattern and a file."""
    if sum(option is not None for option in (schema, regex, lark)) > 1:
        raise click.UsageError("only one of --json-schema, --regex and --grammar can be given")
    if schema is not None:
        return Grammar("json_schema", schema if schema.lstrip().startswith("{") else _read(Path(schema)))
    if regex is not None:
        return Grammar("regex", regex)
    return Grammar("lark", _read(lark)) if lark else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EngineError("sampling", f"{path} cannot be read", found=str(error)) from error


def _chat(engine: Engine, params: SamplingParams, encoding: _Encoding, answer: Callable[..., Result | None]) -> None:
    """Answer lines of input until it ends. Each prompt holds the turns before it; raw ones are the line alone."""
    history: list[dict[str, str]] = []
    interactive = sys.stdin.isatty()
    for line in _turns(interactive):
        if line == "/reset":
            history.clear()
            continue
        question = {"role": "user", "content": line}
        prompt: Prompt = line if encoding.raw else [*history, question]
        try:
            result = answer(engine, prompt, params, encoding)
        except BelleError as error:
            if not interactive:
                raise
            click.echo(f"{error} /reset starts a new chat.", err=True)
            continue
        if result is not None:
            history += [question, {"role": "assistant", "content": result.text.strip()}]


def _turns(interactive: bool) -> Iterator[str]:
    """Yield the lines of input that are not empty, up to /exit or the end."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and history)
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            click.echo()
            return
        if not interactive and not line:
            return
        line = line.strip()
        if line == "/exit":
            return
        if line:
            yield line


def _answer_streamed(
    engine: Engine, prompt: Prompt, params: SamplingParams, encoding: _Encoding, *, profiled: bool
) -> Result | None:
    """Print the answer as it is generated, and its speed on stderr. Returns None after Ctrl-C at a terminal."""
    stream: Stream
    with _profile(engine, profiled) as profile, engine.stream(prompt, params, **encoding._asdict()) as stream:
        try:
            for piece in stream:
                click.echo(piece, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo()
            return None
    click.echo()
    timings, count = stream.result.timings, len(stream.result.token_ids)
    speed = f"{timings.tokens_per_second:.1f} tokens/s, " if timings.tokens_per_second else ""
    drafts = f", {stream.result.accepted} of {stream.result.drafted} drafts accepted" if stream.result.drafted else ""
    click.echo(f"[{count} token{'s' * (count != 1)}, {speed}first after {timings.first_token_s:.2f} s{drafts}]", err=True)
    if profile.result:
        click.echo(f"\n{profile.result.table()}", err=True)
    return stream.result


def _answer_json(engine: Engine, prompt: Prompt, params: SamplingParams, encoding: _Encoding, *, profiled: bool) -> Result:
    """Print the answer as one line of JSON."""
    with _profile(engine, profiled) as profile:
        (result,) = engine.generate([prompt], params, **encoding._asdict())
    plain = dataclasses.asdict(result)
    plain["timings"]["load_s"] = engine.load_s
    if profile.result:
        plain["profile"] = profile.result.to_plain()
    click.echo(json.dumps(plain, ensure_ascii=False))
    return result


def _profile(engine: Engine, enabled: bool) -> contextlib.AbstractContextManager[ProfileHandle]:
    """Return the engine's profile, or a handle that stays empty."""
    return engine.profile() if enabled else contextlib.nullcontext(ProfileHandle())
