"""Golden answers: greedy answers that a build puts into its engine, and the test that a host still gives them.

`selftest.json` holds prompts and answers as token ids. The build keeps only tokens that every correct host chooses, whatever
its instruction set: their logits lead by more than kernels differ (`compiler/golden.py`). A host whose answers differ has a
damaged engine, or computes wrongly.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from belle_compile.runtime.artifact import Manifest
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.schema import canonical_json, from_plain, json_schema, refuse_from, to_plain
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.serving.result_cache.options import CachePolicy

if TYPE_CHECKING:
    from belle_compile.runtime.serving.generation import Result

SELF_TEST_NAME = "selftest.json"
FORMAT_VERSION = 1
STAGE = "self-test"
_REBUILD = "rebuild the engine with belle-compile build"
_ABSENT = f"the engine has no {SELF_TEST_NAME}: it was built before builds made one"


@dataclass(frozen=True)
class GoldenAnswer:
    """A prompt, and the tokens that greedy decoding adds to it; both are token ids."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class GoldenAnswers:
    """The content of selftest.json.

    The logit of each token of an answer led the second best by at least `lead` times the standard deviation of the logits after
    the prompt. Without answers, `reason` says why there are none.
    """

    lead: float
    answers: tuple[GoldenAnswer, ...]
    reason: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def tokens(self) -> int:
        """The number of tokens of all answers."""
        return sum(len(answer.tokens) for answer in self.answers)

    def to_text(self) -> str:
        """The text of selftest.json; the same answers give the same bytes."""
        return canonical_json(to_plain(self))


@dataclass(frozen=True)
class SelfTest:
    """A passed self-test: the prompts and the tokens that were compared, and the seconds that this took.

    Where both numbers are 0, nothing was tested, and `reason` says why the engine has no golden answers.
    """

    prompts: int
    tokens: int
    seconds: float
    reason: str = ""


def self_test_schema() -> dict[str, Any]:
    """JSON Schema of selftest.json."""
    return json_schema(GoldenAnswers, "belle-compile engine self-test")


def read_golden_answers(directory: Path, manifest: Manifest) -> GoldenAnswers:
    """Read and validate the golden answers of an engine; for an engine without the file, they are empty, with a reason.

    Raises `EngineError` for a file that cannot be read, and for one that does not fit this version of the format.
    """
    if SELF_TEST_NAME not in manifest.files:
        return GoldenAnswers(0.0, (), _ABSENT)
    path = directory / SELF_TEST_NAME
    try:
        plain = json.loads(path.read_bytes().decode())
    except (OSError, ValueError) as error:
        raise EngineError(STAGE, f"{path} cannot be read", found=str(error), remedy=_REBUILD) from None
    version = plain.get("format_version") if isinstance(plain, dict) else None
    if version != FORMAT_VERSION:
        found, expected = json.dumps(version), str(FORMAT_VERSION)
        remedy = "install the runtime that belongs to the engine"
        raise EngineError(STAGE, f"format version of {path}", found=found, expected=expected, remedy=remedy)
    refuse = refuse_from(f"{STAGE}: {path}", _REBUILD)
    golden = from_plain(GoldenAnswers, plain, refuse)
    for number, answer in enumerate(golden.answers):
        for name, ids in (("prompt", answer.prompt), ("tokens", answer.tokens)):
            if not ids or min(ids) < 0:
                raise refuse(f"answers[{number}].{name}", "a negative id" if ids else "no tokens", "token ids")
    if not golden.answers and not golden.reason:
        raise refuse("reason", "nothing", "why there are no answers")
    return golden


def run_self_test(generate: Callable[..., Sequence[Result]], golden: GoldenAnswers) -> SelfTest:
    """Answer the golden prompts with `generate`, all together, and compare the tokens.

    `generate` is `Engine.generate`; the result cache is neither read nor written. Raises `EngineError` at the first token that
    differs.
    """
    if not golden.answers:
        return SelfTest(0, 0, 0.0, golden.reason)
    started = time.perf_counter()
    params = [greedy(len(answer.tokens)) for answer in golden.answers]
    results = generate(
        [list(answer.prompt) for answer in golden.answers], params, cache=CachePolicy(no_cache=True, no_store=True)
    )
    for number, (answer, result) in enumerate(zip(golden.answers, results, strict=True), 1):
        if tuple(result.token_ids) != answer.tokens:
            raise _differs(number, len(golden.answers), answer.tokens, result.token_ids)
    return SelfTest(len(golden.answers), golden.tokens, time.perf_counter() - started)


def greedy(tokens: int) -> SamplingParams:
    """The parameters of golden answers: the likeliest token, so many times, whatever the engine's defaults are."""
    return SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=tokens, ignore_eos=True)


def _differs(number: int, prompts: int, expected: Sequence[int], found: Sequence[int]) -> EngineError:
    """The error of an answer that is not the golden one."""
    pairs = zip(expected, [*found, *[None] * len(expected)], strict=False)
    place, (wanted, given) = next((place, pair) for place, pair in enumerate(pairs) if pair[0] != pair[1])
    return EngineError(
        STAGE,
        f"token {place + 1} of {len(expected)} of the answer to prompt {number} of {prompts} is not the one of the build",
        found="the answer's end" if given is None else f"token {given}",
        expected=f"token {wanted}",
        remedy="check the files with --verify or copy the engine again; if they are whole, this host computes wrongly",
    )
