"""Requests that use every field of `SamplingParams`, made from real questions; the same questions give the same requests."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from belle_compile.runtime import Engine, Grammar, SamplingParams
from belle_compile.runtime.artifact import read_manifest
from belle_compile.runtime.prompt import ChatTemplate
from belle_compile.runtime.serving.request import Request
from belle_compile.runtime.tokenizer import Tokenizer

SYSTEM = "你是一个乐于助人的助手。请用简短的句子回答下面的问题，只说你确定知道的事情，不要编造。"  # a prefix that many share
PROPERTIES = {"answer": {"type": "string", "maxLength": 12}, "sure": {"type": "boolean"}}
SCHEMA = json.dumps({"type": "object", "properties": PROPERTIES, "required": ["answer", "sure"], "additionalProperties": False})
REGEX = "[0-9]{1,3}(, [0-9]{1,3}){2,5}"


class Case(NamedTuple):
    """One call: a chat and its parameters, which may ask for several answers."""

    messages: list[dict[str, str]]
    params: SamplingParams


def read_questions(path: Path) -> list[str]:
    """Return the field `question` of a file of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines if line.strip()]


def cases(questions: Sequence[str], count: int, longest_answer: int) -> list[Case]:
    """Return `count` calls. Their lengths, seeds and fields follow from their numbers alone."""
    return [_case(number, questions[number % len(questions)], longest_answer) for number in range(count)]


def resolve(engine: Engine, calls: Sequence[Case]) -> list[Request]:
    """Return the requests of all calls, as many for each as it asks for answers."""
    return [request for call in calls for request in engine.resolve_all([call.messages], [call.params])]


def longest(directory: Path, calls: Sequence[Case]) -> int:
    """Return the largest number of tokens that prompt and answer of a call may have, without loading the engine."""
    manifest = read_manifest(directory)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json", manifest.special_tokens)
    template = ChatTemplate(manifest.prompt_template)
    return max(len(tokenizer.encode(template.render(call.messages))) + (call.params.max_new_tokens or 0) for call in calls)


def _case(number: int, question: str, longest_answer: int) -> Case:
    chance = random.Random(number)
    messages = [{"role": "user", "content": question[: chance.choice((40, 120, 1000))]}]
    if chance.random() < 0.4:
        messages.insert(0, {"role": "system", "content": SYSTEM})
    if chance.random() < 0.2:
        messages += [{"role": "assistant", "content": "好的。"}, {"role": "user", "content": "请继续。"}]
    fields: dict[str, Any] = {"max_new_tokens": chance.randint(1, longest_answer), "ignore_eos": chance.random() < 0.5}
    if chance.random() < 0.4:
        fields |= {"temperature": 0.0, "repetition_penalty": 1.0}
    else:
        fields |= {"temperature": chance.choice((0.3, 0.8, 1.5)), "seed": chance.randint(0, 2**62)}
        fields |= {
            "top_k": chance.choice((0, 1, 5, 40)),
            "top_p": chance.choice((1.0, 0.9, 0.5)),
            "n": chance.choice((1, 1, 1, 3)),
        }
    for name, value in _optional(chance, fields["max_new_tokens"]):
        if chance.random() < 0.15:
            fields[name] = value
    return Case(messages, SamplingParams(**fields))


def _optional(chance: random.Random, longest: int) -> Iterator[tuple[str, Any]]:
    """Yield values of the fields that most requests leave open."""
    yield "repetition_penalty", chance.choice((0.8, 1.3))
    yield "presence_penalty", chance.choice((-0.5, 1.0))
    yield "frequency_penalty", chance.choice((-0.2, 0.7))
    yield "min_p", 0.05
    yield "logit_bias", {chance.randint(3, 200): chance.choice((-5.0, 2.0)) for _ in range(3)}
    yield "min_tokens", chance.randint(1, longest)
    yield "stop", (chance.choice(("。", "的", "e", "1")),)
    yield "stop_token_ids", (chance.randint(3, 200),)
    yield "logprobs", chance.choice((0, 2, 5))
    yield "prompt_logprobs", chance.choice((0, 1))
    yield "prompt_lookup", chance.choice((2, 8))
    yield "grammar", chance.choice((Grammar("json_schema", SCHEMA), Grammar("regex", REGEX), Grammar("json_object", "")))
