"""Chats: at a terminal, with commands that begin with a slash, and over a pipe, a turn a line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from belle_compile.runtime.cli.options import Encoding
from belle_compile.runtime.engine import Engine, Prompt, Result
from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.prompt import Message
from belle_compile.runtime.serving.request import SamplingParams

Show = Callable[[Engine, Prompt, SamplingParams, Encoding], Result | None]  # see `answers.Answer`

_BLOCK = '"""'  # begins and ends a turn of several lines
_WHOLE, _REAL = ("top_k", "seed", "max_new_tokens", "min_tokens", "prompt_lookup"), (
    "temperature", "top_p", "repetition_penalty", "min_p", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_HELP = """\
/help                shows this
/clear               forgets the turns so far
/system [TEXT]       shows the system message, or sets it and forgets the turns so far; /system none removes it
/set [NAME VALUE]    shows the sampling settings, or changes one; the value default takes the engine's
/save FILE           writes the chat to a new JSON file
/quit                leaves, as Ctrl-D does and Ctrl-C twice; Ctrl-C once stops an answer
A turn of several lines begins and ends with \"\"\", or is pasted. A turn that begins with // begins with one slash."""


class Conversation:
    """The turns of a chat, which each prompt holds. A raw prompt is the turn alone."""

    def __init__(
        self, engine: Engine, params: SamplingParams, encoding: Encoding, show: Show, system: Sequence[Message]
    ) -> None:
        self.engine, self.params, self._encoding, self._show = engine, params, encoding, show
        self.system, self.turns = list(system), list[Message]()

    @property
    def messages(self) -> list[Message]:
        return [*self.system, *self.turns]

    def ask(self, text: str) -> Result | None:
        """Answer a turn, and remember both. An answer that the user stopped is forgotten with its question."""
        question: Message = {"role": "user", "content": text}
        prompt: Prompt = text if self._encoding.raw else [*self.messages, question]
        result = self._show(self.engine, prompt, self._fitted(prompt), self._encoding)
        if result is not None:
            self.turns += [question, {"role": "assistant", "content": result.text.strip()}]
        return result

    def _fitted(self, prompt: Prompt) -> SamplingParams:
        """The parameters with `max_new_tokens` cut to the room that the chat so far leaves."""
        room = self.engine.max_context - len(self.engine.encode(prompt, **self._encoding._asdict()))
        if self.params.max_new_tokens is None or self.params.max_new_tokens <= room or room < 1:
            return self.params  # with no room at all, the engine says so
        return dataclasses.replace(self.params, max_new_tokens=room)


def pipe(engine: Engine, params: SamplingParams, encoding: Encoding, show: Show, system: Sequence[Message]) -> None:
    """Answer each line of stdin that is not empty as a turn of one chat, up to /exit or the end; /reset begins a new one."""
    conversation = Conversation(engine, params, encoding, show, system)
    while line := sys.stdin.readline():
        match line.strip():
            case "/reset" | "/clear":
                conversation.turns.clear()
            case "/exit" | "/quit":
                return
            case "":
                pass
            case text:
                conversation.ask(text)


class Chat:
    """A chat at a terminal."""

    def __init__(
        self, engine: Engine, params: SamplingParams, encoding: Encoding, show: Show, system: Sequence[Message]
    ) -> None:
        self._conversation = Conversation(engine, params, encoding, show, system)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(_HELP),
            "/clear": self._clear,
            "/reset": self._clear,
            "/system": self._system,
            "/set": self._set,
            "/save": self._save,
        }

    def run(self) -> int:
        """Answer turns until the user leaves; returns the exit code."""
        model = self._conversation.engine.manifest.model
        context = self._conversation.engine.max_context
        _say(f"{model.name}: {model.parameters / 1e6:,.1f} M parameters, context {context:,} tokens. /help shows the commands.")
        try:
            for turn in _turns():
                if turn in ("/quit", "/exit"):
                    return 0
                with _errors_said():
                    self._take(turn)
        except KeyboardInterrupt:
            return 130
        return 0

    def _take(self, turn: str) -> None:
        if turn.startswith("//"):
            turn = turn[1:]
        elif turn.startswith("/"):
            name, _, argument = turn.partition(" ")
            command = self._commands.get(name)
            if command is None:
                _say(f"{name} is no command; /help shows all. A turn that begins with // begins with one slash.")
            else:
                command(argument.strip())
            return
        if self._conversation.ask(turn) is None:
            _say("(stopped; this turn is forgotten)")

    def _clear(self, _: str) -> None:
        self._conversation.turns.clear()
        _say("(a new chat)")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = [] if text == "none" else [{"role": "system", "content": text}]
            self._conversation.turns.clear()
        _say(self._conversation.system[0]["content"] if self._conversation.system else "(no system message)")

    def _set(self, argument: str) -> None:
        name, _, text = argument.partition(" ")
        if name := name.replace("-", "_"):
            values = {name: _value(name, text.strip())}
            self._conversation.params = dataclasses.replace(self._conversation.params, **values)
        defaults = self._conversation.engine.manifest.generation
        for setting in (name,) if name else (*_REAL, *_WHOLE):
            value = getattr(self._conversation.params, setting)
            shown = f"{getattr(defaults, setting, 'random')} (the engine's)" if value is None else value
            _say(f"{setting} = {shown}")

    def _save(self, argument: str) -> None:
        if not argument:
            raise EngineError("chat", "/save", found="no file", expected="/save FILE")
        text = json.dumps({"messages": self._conversation.messages}, ensure_ascii=False, indent=1)
        try:
            with Path(argument).expanduser().open("x", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise EngineError("chat", f"{argument} cannot be written", found=error.strerror or str(error)) from None
        _say(f"(saved to {argument})")


def _value(name: str, text: str) -> Any:
    """The value of a sampling setting; raises `EngineError` for an unknown name or another type."""
    if name not in (*_WHOLE, *_REAL):
        raise EngineError("chat", "unknown setting", found=name, expected=f"one of {', '.join((*_REAL, *_WHOLE))}")
    if text == "default":
        return next(field.default for field in dataclasses.fields(SamplingParams) if field.name == name)
    kind, expected = (int, "a whole number") if name in _WHOLE else (float, "a number")
    try:
        return kind(text)
    except ValueError:
        raise EngineError("chat", name, found=repr(text), expected=f"{expected}, or default") from None


def _turns() -> Iterator[str]:
    """Yield what the user types, up to the end of the input. Raises KeyboardInterrupt after Ctrl-C twice."""
    _edit_lines()
    interrupted = False
    while True:
        try:
            turn = _read_turn()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            if interrupted:
                click.echo(err=True)
                raise
            interrupted = True
            _say("\n(Ctrl-C again leaves)")
            continue
        interrupted = False
        if turn:
            yield turn


def _read_turn() -> str:
    line = input("> ")
    if not line.lstrip().startswith(_BLOCK):
        return line.strip()
    lines = [line.lstrip().removeprefix(_BLOCK)]
    while not lines[-1].rstrip().endswith(_BLOCK):
        lines.append(input("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(_BLOCK)
    return "\n".join(lines).strip("\n")


def _edit_lines() -> None:
    """Give input() line editing and history, and let it take what is pasted as one turn, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")


@contextlib.contextmanager
def _errors_said() -> Iterator[None]:
    """Say what is wrong with a turn, and go on."""
    try:
        yield
    except BelleError as error:
        _say(f"{error} /clear starts a new chat." if error.stage == "request" else str(error))


def _say(text: str) -> None:
    click.echo(text, err=True)
