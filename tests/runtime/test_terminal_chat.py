"""The chat of belle-run at a terminal: a pseudo-terminal types, a fake engine answers."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.fakes import make_directory

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0

# An engine that answers with the number of lines of the last turn, at most 8 tokens a default answer. `long` never ends.
CHILD = """
    import sys
    from belle_compile.runtime import Engine
    from belle_compile.runtime.cli import main
    from belle_compile.runtime.artifact import GenerationDefaults
    from tests.runtime.fakes import EOS, FakeExecutor, make_engine
    import numpy as np, time

    def load(directory, **options):
        tokenizer = make_engine().tokenizer
        def rule(context):
            text = tokenizer.decode(context)
            turn, _, answer = text.rpartition("user: ")[2].partition("\\nassistant:")
            logits = np.zeros(300, np.float32)
            if "long" in turn:
                time.sleep(0.05)
                logits[tokenizer.encode("x")[0]] = 50
                return logits
            wanted = tokenizer.encode(f"<{turn.count(chr(10)) + 1} lines>")
            said = len(tokenizer.encode(answer)) if answer else 0
            logits[wanted[said] if said < len(wanted) else EOS] = 50
            return logits
        executor = FakeExecutor(rule, max_tokens=64, max_blocks=40, num_blocks=60)
        return make_engine(executor, generation=GenerationDefaults(max_new_tokens=20))

    Engine.load = load
    main(sys.argv[1:])
"""


class Terminal:
    """A chat at a pseudo-terminal; every wait ends after WAIT_S seconds."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._fd, child = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), "INPUTRC": "/dev/null"}
        command = [sys.executable, "-c", textwrap.dedent(CHILD), *arguments]
        self.process = subprocess.Popen(
            command, cwd=cwd, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(child)
        self._text = ""

    def expect(self, pattern: str) -> str:
        """Wait for output that matches; returns all up to its end."""
        deadline = time.monotonic() + WAIT_S
        while not (match := re.search(pattern, self._text)):
            remaining = deadline - time.monotonic()
            assert remaining > 0, f"no {pattern!r} in {self._text!r}"
            if select.select([self._fd], [], [], remaining)[0]:
                try:
                    self._text += os.read(self._fd, 4096).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"the chat ended without {pattern!r}: {self._text!r}") from None
        found, self._text = self._text[: match.end()], self._text[match.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def say(self, line: str, pattern: str) -> str:
        """Type a line, and wait for output that matches and for the next prompt."""
        self.type(line + "\r")
        found = self.expect(pattern)
        self.expect(r"> ")
        return found

    def interrupt(self) -> None:
        """Press Ctrl-C at a prompt. Python notices one that comes before readline waits for a key with the next key only."""
        time.sleep(0.3)
        self.type("\x03")

    def close(self) -> int:
        """Wait for the end; returns the exit code."""
        try:
            return self.process.wait(timeout=WAIT_S)
        finally:
            os.close(self._fd)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which shells ignore in background jobs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_directory(tmp_path / "engine", {"tokenizer.json": b"{}"})
    return tmp_path


@pytest.fixture
def chat(folder: Path) -> Iterator[Terminal]:
    terminal = Terminal("engine", "--temperature", "0", cwd=folder)
    try:
        terminal.expect(r"tiny: 0\.0 M parameters, context [\d,]+ tokens\. /help shows the commands\.")
        terminal.expect(r"> ")
        yield terminal
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.process.wait(timeout=WAIT_S)


def test_commands(chat: Terminal, folder: Path) -> None:
    shown = chat.say("/help", r"begins with one slash\.")
    assert all(command in shown for command in ("/clear", "/system", "/set", "/save FILE", "/quit", '"""'))
    chat.say("hello", r"<1 lines>")
    chat.say("/system Be brief.", r"Be brief\.\r\n")
    chat.say("there", r"<1 lines>")
    chat.say("/save chat.json", r"\(saved to chat\.json\)")
    chat.say("/save chat.json", r"chat\.json cannot be written: found File exists")
    messages = json.loads((folder / "chat.json").read_text())["messages"]
    assert messages == [  # /system forgot the turn before it
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "there"},
        {"role": "assistant", "content": "<1 lines>"},
    ]
    chat.say("/clear", r"a new chat")
    chat.say("/system none", r"no system message")
    chat.say("/oops", r"/oops is no command; /help shows all")
    chat.say("//slash", r"<1 lines>")
    chat.type("/quit\r")
    assert chat.close() == 0


def test_settings_and_an_answer_that_was_cut(chat: Terminal) -> None:
    assert "temperature = 0.0" in chat.say("/set", r"prompt_lookup = 0")
    chat.say("/set max-new-tokens 2", r"max_new_tokens = 2")
    chat.say("hello", r"\(cut at 2 tokens\)")
    chat.say("/set max_new_tokens 5000", r"max_new_tokens = 5000")
    chat.say("hello", r"<1 lines>")  # 5000 is more than the context has: the chat fits it
    chat.say("/set max_new_tokens default", r"max_new_tokens = 20 \(the engine's\)")
    chat.say("/set top_p 3", r"top_p: found 3\.0, expected above 0 and at most 1")
    chat.say("/set top_k few", r"top_k: found 'few', expected a whole number, or default")
    chat.say("/set colour red", r"unknown setting: found colour")
    chat.type("\x04")
    assert chat.close() == 0


def test_several_lines_are_one_turn(chat: Terminal) -> None:
    chat.type('"""first\r')
    chat.expect(r"\.\.\. ")
    chat.type("second\r")
    chat.expect(r"\.\.\. ")
    chat.say('third"""', r"<3 lines>")
    chat.type("\x1b[200~pasted\nin\nfour\nlines\x1b[201~")
    chat.say("", r"<4 lines>")
    chat.say("one line", r"<1 lines>")
    chat.type("/quit\r")
    assert chat.close() == 0


def test_ctrl_c_stops_an_answer_and_twice_leaves(chat: Terminal) -> None:
    chat.say("/set max_new_tokens 500", r"500")
    chat.type("long\r")
    chat.expect(r"xx")
    chat.type("\x03")
    chat.expect(r"\(stopped; this turn is forgotten\)")
    chat.expect(r"> ")
    chat.interrupt()
    chat.expect(r"\(Ctrl-C again leaves\)")
    chat.expect(r"> ")
    chat.say("hello", r"<1 lines>")  # begins the count again
    chat.interrupt()
    chat.expect(r"\(Ctrl-C again leaves\)")
    chat.expect(r"> ")
    chat.interrupt()
    assert chat.close() == 130
