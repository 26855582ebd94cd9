"""Answers on the command line: streamed as text, or as one JSON object each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click

from belle_compile.runtime.cli.chat import Chat, pipe
from belle_compile.runtime.cli.options import Encoding, encoding_of, load_arguments, read_text, sampling_params
from belle_compile.runtime.engine import Engine, Prompt, Result, Stream
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.profiling import ProfileHandle
from belle_compile.runtime.prompt import Message
from belle_compile.runtime.serving.request import SamplingParams


class Answer(Protocol):
    """Answers a prompt and shows the answer. Returns None where the user stopped it."""

    def __call__(self, engine: Engine, prompt: Prompt, params: SamplingParams, encoding: Encoding) -> Result | None: ...


def answer(directory: Path, prompt: str | None, given: dict[str, Any]) -> int:
    """Load the engine and answer one prompt or a chat, by the options of the command; returns the exit code."""
    params = sampling_params(given)
    if prompt == "-" or given["file"] is not None:
        prompt = read_text(given["file"], "prompt")
    system: list[Message] = [{"role": "system", "content": given["system"]}] if given["system"] is not None else []
    encoding = encoding_of(given)
    with Engine.load(directory, **load_arguments(given)) as engine:
        if given["self_test"]:
            self_test(engine, as_json=given["as_json"])
            return 0
        show: Answer = partial(answer_json if given["as_json"] else answer_streamed, profiled=given["profile"])
        if prompt is not None:
            question: Prompt = [*system, {"role": "user", "content": prompt}] if system else prompt
            show(engine, question, params, encoding)
        elif sys.stdin.isatty():
            return Chat(engine, params, encoding, show, system).run()
        else:
            pipe(engine, params, encoding, show, system)
    return 0


def self_test(engine: Engine, *, as_json: bool) -> None:
    """Print what was tested; raises `EngineError` if the engine fails, or has no golden answers: that is no success."""
    result = engine.self_test()
    if not result.prompts:
        remedy = "rebuild the engine with belle-compile build, or send it requests of your own"
        raise EngineError("self-test", "nothing was tested", found=result.reason, expected="golden answers", remedy=remedy)
    plain = {"self_test": {"prompts": result.prompts, "tokens": result.tokens}}
    click.echo(json.dumps(plain) if as_json else f"self-test: {result.prompts} prompts, {result.tokens} tokens, as built")


def answer_streamed(
    engine: Engine, prompt: Prompt, params: SamplingParams, encoding: Encoding, *, profiled: bool
) -> Result | None:
    """Print the answer as it is generated, and on stderr its speed and whether it was cut. Returns None after Ctrl-C at a
    terminal."""
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
    result = stream.result
    timings, count = result.timings, len(result.token_ids)
    if result.finish_reason == "length":
        click.echo(f"(cut at {count} tokens)", err=True)
    speed = f"{timings.tokens_per_second:.1f} tokens/s, " if timings.tokens_per_second else ""
    drafts = f", {result.accepted} of {result.drafted} drafts accepted" if result.drafted else ""
    click.echo(f"[{count} token{'s' * (count != 1)}, {speed}first after {timings.first_token_s:.2f} s{drafts}]", err=True)
    if profile.result:
        click.echo(f"\n{profile.result.table()}", err=True)
    return result


def answer_json(engine: Engine, prompt: Prompt, params: SamplingParams, encoding: Encoding, *, profiled: bool) -> Result:
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
