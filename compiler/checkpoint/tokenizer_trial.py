"""Tries out a tokenizer.json on hostile texts in another process, under limits of processor time and memory.

A tokenizer.json is data that may come from anywhere, and a few characters of it can make a short text take hours: regular
expressions whose matching takes quadratic or exponential time, and replacements that multiply the text. What encodes text in a
server cannot be stopped, so such a tokenizer is refused before this process, or an engine, uses it. Oniguruma, the library that
matches, gives up after ten million steps at one place, so that an exponential expression which a trial does not reveal ends the
request that does, with an error; nothing but a trial reveals quadratic time.

This file is also the program of that process, and imports nothing but the standard library and tokenizers for that.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

SAMPLE_S = 2.0  # of processor time, for one text
TOTAL_S = 60  # of processor time, for all: usual tokenizers take less than one second
_WALL_S = 300.0
MEMORY_BYTES = 2 << 30  # the address space of the process; it needs 300 MB
SHORT, LONG = 25_000, 100_000  # characters of a text
_SUSPICIOUS_S = 0.05  # of processor time for a short text: usual expressions take 0.005 s
# Times of a long text and a short one: 4 where time is linear, 16 where it is quadratic.
_MOST_RATIO = 8.0
GROWTH = 64  # characters that a normalizer may make of one; NFKD makes up to 18
_RANDOM_TEXTS, _RANDOM_LENGTH = 300, 400
_MOST_PARTS = 400  # characters, and pairs and words, of expressions that texts are made of
# One of each class that expressions of tokenizers tell apart.
_CHARACTERS = "aA1 \n\t\r.,'_-中é\u0301😀\u00a0\u200b"
# Parts that take linear time and grow a text by a constant factor.
_LINEAR = frozenset(
    "BertNormalizer BertPreTokenizer ByteFallback ByteLevel Digits Fuse Lowercase Metaspace NFC NFD NFKC NFKD Nmt Prepend "
    "Punctuation Replace Sequence Split Strip StripAccents UnicodeScripts Whitespace WhitespaceSplit".split()
)
# `-c` and not the file itself, whose directory would come first in the path of modules.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"


def reason_against(tokenizer: Mapping[str, Any]) -> str:
    """Why the content of a tokenizer.json cannot be used; empty if it can."""
    parts = {name: tokenizer.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    # Merging takes n log n steps, so that its vocabulary need not be copied; other models are tried out too.
    model = tokenizer.get("model") or {}
    tried = None if model.get("type", "BPE") == "BPE" else model
    if tried is None and not _may_be_slow(parts):
        return ""
    return _try_out(json.dumps({**parts, "model": tried}))


def _may_be_slow(parts: Any) -> bool:
    """Whether some part may take more than linear time, or multiply a text."""
    kinds = {str(part.get("type")) for part in _objects(parts) if "type" in part}
    patterns = [part for part in _objects(parts) if isinstance(part.get("pattern"), dict)]
    growth = 1.0
    for part in patterns:
        if "String" not in part["pattern"]:
            return True
        growth *= max(1.0, len(str(part.get("content", ""))) / max(1, len(str(part["pattern"]["String"]))))
    return not kinds <= _LINEAR or growth > GROWTH


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """The objects in a JSON value, itself included."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(item)


@lru_cache(maxsize=64)  # a build opens its tokenizer several times
def _try_out(text: str) -> str:
    command = [sys.executable, "-c", _PROGRAM, __file__, *(entry or os.getcwd() for entry in sys.path)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, env=environment, timeout=_WALL_S)
    except subprocess.TimeoutExpired:
        return f"it takes more than {_WALL_S:g} s to be tried out"
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode == 0 and lines:
        return str(json.loads(lines[-1]))
    what = json.loads(lines[-1]) if lines else "its regular expressions"
    if done.returncode in (-signal.SIGPROF, -signal.SIGXCPU):
        return f"it takes more than {SAMPLE_S:g} s of processor time for {what}"
    return f"it needs more than {MEMORY_BYTES >> 30} GiB of memory for {what}"


def _program() -> None:
    """Read a tokenizer; write a line with the name of each text before it is tried out, and in the end one with the reason
    against the tokenizer, or an empty one."""
    for limit, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, TOTAL_S), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    from tokenizers import Tokenizer

    state = json.load(sys.stdin)
    signal.setitimer(signal.ITIMER_PROF, SAMPLE_S)  # its signal ends the process
    model = state["model"] or {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}
    whole = {**state, "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None}
    try:
        tokenizer = Tokenizer.from_str(json.dumps({**whole, "model": model}))
    except BaseException:  # the reader of the tokenizer says what is wrong
        _say("")
        return
    _say(_reason(tokenizer, [part["pattern"] for part in _objects(state) if isinstance(part.get("pattern"), dict)]))


def _say(line: str) -> None:
    print(json.dumps(line), flush=True)


def _reason(tokenizer: Any, patterns: list[Mapping[str, str]]) -> str:
    steps: list[Callable[[str], object]] = [lambda text: tokenizer.encode(text, add_special_tokens=False)]
    if tokenizer.decoder is not None:
        steps.append(lambda text: tokenizer.decoder.decode([text]))
    expressions = [str(text) for pattern in patterns for text in pattern.values()]
    # What matches the rest of a text may fail at its end. Characters that a match needs are there, or it would not be tried.
    end = "\0" + "".join(dict.fromkeys("".join(expressions)))
    for unit, length in _texts(expressions):
        name = f"{length:,} characters of {unit[:20]!r} again and again"
        try:
            if tokenizer.normalizer is not None:
                _begin(name)
                text = _repeated(unit, min(length, 1000), end)
                made = len(tokenizer.normalizer.normalize_str(text))
                if made > GROWTH * len(text):
                    return f"its normalizer makes {made:,} characters of {len(text):,}"
            for step in steps:
                seconds = _seconds(step, name, _repeated(unit, length, end))
                if seconds > _SUSPICIOUS_S:
                    longer = _seconds(step, f"{LONG:,} characters of {unit[:20]!r} again and again", _repeated(unit, LONG, end))
                    if longer > _MOST_RATIO * seconds:
                        return f"its time grows faster than the text: {seconds:.2f} s for {name}, {longer:.2f} s for {LONG:,}"
        except BaseException as error:  # a panic of the library is no `Exception`
            line = next(iter(str(error).splitlines()), "")
            return f"it fails for {name} ({line or type(error).__name__})"
    return ""


def _begin(name: str) -> None:
    """Name the text that is tried out next, and give it its time."""
    _say(name)
    signal.setitimer(signal.ITIMER_PROF, SAMPLE_S)


def _seconds(step: Callable[[str], object], name: str, text: str) -> float:
    """The processor time of a step."""
    _begin(name)
    begun = time.process_time()
    step(text)
    return time.process_time() - begun


def _texts(patterns: list[str]) -> Iterator[tuple[str, int]]:
    """What hostile texts repeat, and how long they are."""
    characters = dict.fromkeys([*_CHARACTERS, *"".join(patterns)])
    pairs = dict.fromkeys(pattern[i : i + 2] for pattern in patterns for i in range(len(pattern) - 1))
    words = dict.fromkeys(word for pattern in patterns for word in re.findall(r"\w{3,100}", pattern))
    draw = random.Random(0)
    alphabet = [*characters]
    for _ in range(_RANDOM_TEXTS if patterns else 0):
        few = draw.sample(alphabet, min(len(alphabet), draw.choice((2, 3, 5, 20))))
        yield "".join(draw.choices(few, k=_RANDOM_LENGTH)), _RANDOM_LENGTH
    for unit in [*characters, *pairs, *words, *(pattern for pattern in patterns if 0 < len(pattern) <= 100)][:_MOST_PARTS]:
        yield unit, SHORT


def _repeated(unit: str, length: int, end: str) -> str:
    return (unit * (length // len(unit) + 1))[:length] + end


if __name__ == "__main__":
    _program()
