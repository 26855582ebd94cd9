"""belle-run batch: answers a file of requests, JSON Lines in and out, and goes on where an earlier run ended.

While it runs, answers are appended in the order in which they end; at the end the file is put into the order of the requests.
Each line has the key of what its answer depends on, so that answers of another input, engine or setting are not taken over.
"""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from belle_compile.runtime.cli import options
from belle_compile.runtime.errors import PROGRAM, BelleError, EngineError
from belle_compile.runtime.options_file import config_option, name_variables
from belle_compile.runtime.usage import json_option, show_error, version_option

if TYPE_CHECKING:
    from belle_compile.runtime.engine import Engine, Prompt
    from belle_compile.runtime.serving.request import SamplingParams

STAGE = "batch"
_IN_FLIGHT = 64  # requests under way; the engine computes as many of them at a time as it was built for
_LINE_S = 30.0  # between two lines of progress
_EPILOG = """
\b
A line of IN is a text, or an object with "prompt" (a text), "messages" or "token_ids". It may have an "id", which its answer
then has, a "system" message, and sampling settings of its own, such as "temperature" or "max_new_tokens". A line of OUT has
"index" (of the line of IN, from 0), "id", "text", "finish_reason", "prompt_tokens" and "generated_tokens", or "error".
\b
Examples:
  belle-run batch artifacts/belle-7b-cpu questions.jsonl -o answers.jsonl
  belle-run batch artifacts/belle-7b-cpu questions.jsonl -o answers.jsonl --temperature 0 --max-new-tokens 64
"""


@cache  # the decorators of `_batch` hand their options over once
def command() -> click.Command:
    """The command `belle-run batch`."""
    decorated = click.command(
        "batch", epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
    )(_batch)
    decorated.params += [config_option("options"), version_option()]
    name_variables(decorated, "BELLE_BATCH")
    return decorated


@options.engine
@click.argument("requests", metavar="IN", type=options.PATH)
@click.option("-o", "--output", required=True, type=options.PATH, metavar="OUT", help="Write an answer a line to OUT.")
@click.option("--force", is_flag=True, help="Begin OUT anew, instead of going on where an earlier run ended.")
@options.system
@options.sampling
@options.encoding
@options.loading
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on stderr but errors.")
@json_option("Print one JSON object in the end: how many answers there are, and the error of a command that fails.")
def _batch(engine: Path, requests: Path, output: Path, force: bool, **given: Any) -> None:
    """Answer the requests in the file IN with the engine in directory ENGINE; each answer is a line of OUT.

    A run that was stopped goes on when the same command is given again. An answer depends on its request alone, so that OUT is
    the same however often that happened. A request that cannot be answered has an "error", and the exit code is 1 in the end.
    """
    options.check_engine(engine)
    if not requests.is_file():
        raise click.UsageError(f"{requests}: there is no such file")
    if given["system"] is not None and given["raw"]:
        raise click.UsageError("--system is a message of a chat, and --raw has none")
    from belle_compile.runtime.distributed.command import run_command

    code = run_command(
        engine,
        lambda: _answer_all(engine, requests, output, force, given),
        ranks_requested=given["count"],
        rank_timeout_s=given["rank_timeout"],
        as_json=given["as_json"],
    )
    sys.exit(code)


def _answer_all(directory: Path, requests: Path, output: Path, force: bool, given: dict[str, Any]) -> int:
    from belle_compile.runtime.engine import Engine

    params, encoding = options.sampling_params(given), options.encoding_of(given)
    with Engine.load(directory, **options.load_arguments(given)) as engine:
        settings = [engine.manifest.digest, repr(params), given["system"], *encoding]
        run = _Run(engine, requests, params, given["system"], encoding, json.dumps(settings))
        with Answers(output, run.key, requests, force) as answers:
            try:
                asyncio.run(run.answer(answers, not given["quiet"]))
            except KeyboardInterrupt:
                message, remedy = f"{len(answers)} answers are in {output}", "the same command goes on from there"
                show_error(EngineError("interrupted", message, remedy=remedy), given["as_json"])
                return 130
            answers.sort()
    if answers.failed:
        message, remedy = f"{answers.failed} of {len(answers)} requests failed", f'see "error" in {output}'
        show_error(EngineError(STAGE, message, remedy=remedy), given["as_json"])
        return 1
    if given["as_json"]:
        click.echo(json.dumps({"answers": len(answers), "output": str(output)}, ensure_ascii=False))
    return 0


class _Run:
    """The requests of a file, and how they are answered. `settings` is what answers depend on besides their line."""

    def __init__(
        self,
        engine: Engine,
        requests: Path,
        params: SamplingParams,
        system: str | None,
        encoding: options.Encoding,
        settings: str,
    ) -> None:
        self._engine, self._requests, self._params, self._encoding = engine, requests, params, encoding
        self._system, self._settings = system, settings.encode()

    def key(self, line: bytes) -> str:
        """A digest of all that the answer to a line depends on."""
        return hashlib.sha256(self._settings + b"\0" + line.strip()).hexdigest()[:16]

    async def answer(self, answers: Answers, shown: bool) -> None:
        """Answer every line that has no answer yet."""
        started = line_at = time.perf_counter()
        before, pending = len(answers), set[asyncio.Task[None]]()
        for index, line in _lines(self._requests):
            if index in answers:
                continue
            if len(pending) == _IN_FLIGHT:
                pending = await _some_ended(pending)
            pending.add(asyncio.create_task(self._answer_one(answers, index, line)))
            if shown and (now := time.perf_counter()) - line_at >= _LINE_S:
                line_at = now
                rate = (len(answers) - before) / (now - started)
                click.echo(f"{PROGRAM}: batch: {len(answers):,} answers, {now - started:.0f} s, {rate:.1f} a second", err=True)
        while pending:
            pending = await _some_ended(pending)
        if shown:
            kept = f", {before:,} of them by earlier runs" if before else ""
            seconds = time.perf_counter() - started
            click.echo(f"{PROGRAM}: batch: {len(answers):,} answers{kept}, {seconds:.1f} s", err=True)

    async def _answer_one(self, answers: Answers, index: int, line: bytes) -> None:
        answers.add(index, self.key(line), await self._result(line))

    async def _result(self, line: bytes) -> dict[str, Any]:
        """The answer to a line, or the error of a request that cannot be answered."""
        identity: dict[str, Any] = {}
        try:
            request = _parse(line)
            identity = {"id": request["id"]} if "id" in request else {}
            prompt, params = self._prompt(request), self._params_of(request)
            (result,) = await self._engine.agenerate([prompt], params, **self._encoding._asdict())
        except BelleError as error:
            return identity | {"error": error.to_plain()}
        counts = {"prompt_tokens": len(result.prompt_token_ids), "generated_tokens": len(result.token_ids)}
        return identity | {"text": result.text, "finish_reason": result.finish_reason} | counts

    def _prompt(self, request: Mapping[str, Any]) -> Prompt:
        given = [name for name in ("prompt", "messages", "token_ids") if name in request]
        if len(given) != 1:
            expected = 'one of "prompt", "messages" and "token_ids"'
            raise EngineError(STAGE, "a request", found=" and ".join(given) or "none of them", expected=expected)
        value: Any = request[given[0]]
        if not isinstance(value, str if given[0] == "prompt" else list):
            expected = "a text" if given[0] == "prompt" else "a list"
            raise EngineError(STAGE, given[0], found=type(value).__name__, expected=expected)
        system = request.get("system", self._system)
        if given[0] == "token_ids" or self._encoding.raw or system is None:
            prompt: Prompt = value
            return prompt
        messages = [{"role": "user", "content": value}] if given[0] == "prompt" else value
        return [{"role": "system", "content": system}, *messages]

    def _params_of(self, request: Mapping[str, Any]) -> SamplingParams:
        names = {field.name for field in dataclasses.fields(self._params)} - {"grammar", "n", "logprobs", "prompt_logprobs"}
        unknown = request.keys() - names - {"id", "prompt", "messages", "token_ids", "system"}
        if unknown:
            raise EngineError(STAGE, "a request", found=f"the key {min(unknown)!r}", expected="a prompt and sampling settings")
        return dataclasses.replace(self._params, **{name: request[name] for name in names & request.keys()})


async def _some_ended(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Wait for one of the tasks; returns those that have not ended."""
    ended, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in ended:
        task.result()
    return others


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not empty, numbered from 0, without a byte order mark."""
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        yield from enumerate(filter(bytes.strip, file))


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EngineError(STAGE, "a request is no JSON", found=str(error)) from None
    if isinstance(request, str):
        return {"prompt": request}
    if not isinstance(request, dict):
        raise EngineError(STAGE, "a request", found=type(request).__name__, expected="a text or an object")
    return request


class Answers:
    """The file of answers: those of earlier runs, to which new ones are appended. `len` counts its lines."""

    def __init__(self, path: Path, key: Callable[[bytes], str], requests: Path, force: bool) -> None:
        self._path, self._key, self._requests, self._force = path, key, requests, force
        self._places: dict[int, tuple[int, int]] = {}  # offset and length of an answer by the index of its request
        self.failed = 0

    def __enter__(self) -> Answers:
        """Read what an earlier run has written, a last line that is not whole is dropped; raises `EngineError` where that is
        of other requests or settings."""
        try:
            self._file = self._path.open("w+b" if self._force or not self._path.exists() else "r+b")
        except OSError as error:
            raise EngineError(STAGE, f"{self._path} cannot be written", found=error.strerror or str(error)) from None
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def add(self, index: int, key: str, answer: Mapping[str, Any]) -> None:
        """Append an answer, in one write of a whole line."""
        text = json.dumps({"index": index, "key": key, **answer}, ensure_ascii=False)
        line = text.encode("utf-8", "surrogatepass") + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise EngineError(STAGE, f"{self._path} cannot be written", found=error.strerror or str(error)) from None
        self._place(index, self._end, line, answer)

    def sort(self) -> None:
        """Put the answers into the order of the requests, in one step."""
        if list(self._places) == sorted(self._places):
            return
        fresh = self._path.with_name(f".{self._path.name}.sorted")
        with fresh.open("wb") as file:
            for _, (offset, length) in sorted(self._places.items()):
                self._file.seek(offset)
                file.write(self._file.read(length))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)

    def _read(self) -> None:
        keys: dict[int, str] = {}
        self._end = 0
        for line in self._file:
            try:
                answer = json.loads(line)
                index, keys[index] = answer["index"], answer["key"]
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n"):
                    raise self._foreign() from None
                break
            self._place(index, self._end, line, answer)
        self._file.seek(self._end)
        self._file.truncate()
        if keys:
            found = 0
            for index, line in _lines(self._requests):
                if index in keys:
                    found += 1
                    if keys[index] != self._key(line):
                        raise self._foreign()
            if found != len(keys):
                raise self._foreign()

    def _place(self, index: int, offset: int, line: bytes, answer: Mapping[str, Any]) -> None:
        self._places[index] = offset, len(line)
        self._end = offset + len(line)
        self.failed += "error" in answer

    def _foreign(self) -> EngineError:
        what = f"{self._path} has answers to other requests, or by another engine or other settings"
        return EngineError(STAGE, what, remedy="choose another -o, or begin it anew with --force")
