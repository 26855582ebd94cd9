"""Matchers of llguidance, and the process that tries out grammars before they are used.

A few bytes of grammar can make llguidance compute for hours, allocate all memory or overflow a stack, which ends the process.
So each new grammar is compiled first by a process that is forked for it, under limits of processor time and memory. This file
is also the program of the process that forks (`belle_compile.runtime.serving.grammar.trial` starts it), and therefore imports
nothing but the standard library and llguidance.

A matcher is never copied: copies of llguidance's matchers share their lexer, and with it the error when one of them reaches a
limit. Answers would then depend on each other.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

# One space, or a line break with indentation: a model that is unsure would go on with white space for ever.
_WHITE_SPACE = r" |\n {0,32}"
STACK_BYTES = 256 << 20  # virtual; llguidance recurses along chains of rules, 16 kB a link and less
# The first mask is part of compiling. One processor of a server compiles a usual schema in 1 ms.
CPU_S = 0.5
MEMORY_BYTES = 512 << 20  # besides the tokenizer
# Limits of an answer: of what it may compute for a token, in llguidance's units, and of the states that its matcher keeps.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 400_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 5_000,
    "max_lexer_states": 10_000,
    "verbose_errors": False,
}
# llguidance reads the attribute and ignores it.
_TEMPERATURE = re.compile(r"^[ \t?!]*\w+\s*\[[^\]\n]*\btemperature\b", re.MULTILINE)
_LONGEST_REASON = 200  # characters


class GrammarError(Exception):
    """What llguidance says about a grammar, as one line."""


def make_tokenizer(tokenizer_json: str, eos_ids: list[int]) -> Any:
    """Return the vocabulary as llguidance needs it; raises what that raises for a tokenizer that it does not know."""
    import llguidance

    return llguidance.LLTokenizer(tokenizer_json, eos_token=eos_ids or None)


def make_matcher(tokenizer: Any, kind: str, source: str) -> Any:
    """Compile a grammar; raises `GrammarError` when it is not valid."""
    import llguidance

    matchers: Any = llguidance.LLMatcher
    try:
        match kind:
            case "regex":
                text = matchers.grammar_from_regex(source)
            case "lark":
                if _TEMPERATURE.search(source):
                    raise GrammarError("the attribute temperature of a rule, which is not supported")
                text = matchers.grammar_from_lark(source)
            case _:
                schema = '{"type":"object"}' if kind == "json_object" else source
                defaults, overrides = {"whitespace_pattern": _WHITE_SPACE}, {"lenient": False}
                text = matchers.grammar_from_json_schema(schema, defaults=defaults, overrides=overrides)
    except ValueError as error:
        raise GrammarError(_reason(str(error))) from None
    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = matchers(tokenizer, text, log_level=0, limits=limits)
    check(matcher)
    if warnings := matcher.get_grammar_warnings():
        raise GrammarError(_reason(warnings[0]))
    return matcher


def check(matcher: Any) -> None:
    """Raise `GrammarError` when a matcher has failed, after which it is of no use."""
    if matcher.is_error():
        raise GrammarError(_reason(matcher.get_error()))


def _reason(message: str) -> str:
    """Shorten a message of llguidance to what it says: without its excerpt of the source, its state or a trace."""
    if message.startswith("NoExtension"):  # the name of a state: no token can follow
        return "it matches no text"
    _, _, cause = message.rpartition("\nerror: ")
    line = next((line.strip() for line in (cause or message).splitlines() if line.strip()), "unknown error")
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 3]}..."


def on_deep_stack(function: Callable[[], None], name: str = "belle-grammar") -> threading.Thread:
    """Start a thread with a stack of `STACK_BYTES`."""
    before = threading.stack_size(STACK_BYTES)  # of the process; a thread that another starts meanwhile has it too
    try:
        thread = threading.Thread(target=function, name=name, daemon=True)
        thread.start()
    finally:
        threading.stack_size(before)
    return thread


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Try out grammars until there are no more requests.

    The first line holds tokenizer.json and the ids that end a sequence, each other line a kind and a source. Replies are what
    is wrong, or empty, and the processor time in seconds that it took to know, in lines as well; all in JSON.
    """
    tokenizer = make_tokenizer(*json.loads(requests.readline()))
    _write(replies, "", 0.0)
    for line in requests:
        kind, source = json.loads(line)
        _write(replies, *_try_out(tokenizer, kind, source))


def _write(replies: IO[str], reason: str, seconds: float) -> None:
    replies.write(json.dumps((reason, seconds)) + "\n")
    replies.flush()


def _try_out(tokenizer: Any, kind: str, source: str) -> tuple[str, float]:
    """Compile a grammar in a process of its own; returns what is wrong, or nothing, and the processor time in seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _limit()
            thread = on_deep_stack(lambda: _report(tokenizer, kind, source, writing))
            thread.join()
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        reply = pipe.read()
    _, status = os.waitpid(child, 0)
    if reply:
        reason, seconds = json.loads(reply)
        return reason, seconds
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"it takes more than {CPU_S} s to compile", CPU_S
    return f"it takes more than {MEMORY_BYTES >> 20} MiB to compile, or nests too deeply", CPU_S


def _limit() -> None:
    """Let this process end when it has taken too much time or memory."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize() + STACK_BYTES + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)


def _report(tokenizer: Any, kind: str, source: str, pipe: int) -> None:
    reason = ""
    try:
        matcher = make_matcher(tokenizer, kind, source)
        mask = bytearray(matcher.compute_bitmask())
        check(matcher)
        for token in tokenizer.eos_tokens:
            mask[token // 8] &= ~(1 << token % 8)
        if not any(mask):
            reason = "it matches nothing but the empty text"
    except GrammarError as error:
        reason = str(error)
    os.write(pipe, json.dumps((reason, time.thread_time())).encode())
    os._exit(0)


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
