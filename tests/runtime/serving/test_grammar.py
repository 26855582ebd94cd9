"""Answers that are held to a grammar: they match it, and depend on the request alone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from belle_compile.runtime import Engine, EngineError, Grammar, Result, ResultCacheOptions, SamplingParams
from belle_compile.runtime.serving.grammar.source import MAX_SOURCE_BYTES
from belle_compile.runtime.serving.grammar.trial import Trial
from belle_compile.runtime.serving.logprobs import token_logprob
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import (
    EOS,
    VOCABULARY,
    CandidateExecutor,
    FakeExecutor,
    byte_tokenizer,
    hash_rule,
    make_request,
    manifest,
    sentencepiece_tokenizer,
    special_tokens,
)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["甲", "b", None]}, "maxItems": 3},
        "at": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[0-9]{2}:[0-9]{2}$"}]},
    },
    "required": ["name", "age", "tags", "at"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA, ensure_ascii=False))
WORD = Grammar("regex", "[a-d]{3,9}(你|好)+!")
SUM = Grammar("lark", 'start: term ("+" term)* "=" NUMBER\nterm: NUMBER | "(" term "-" term ")"\nNUMBER: /[0-9]{1,3}/')
GRAMMARS = pytest.mark.parametrize("grammar", [JSON, WORD, SUM], ids=["schema", "regex", "lark"])
KINDS = pytest.mark.parametrize("tokens", [byte_tokenizer, sentencepiece_tokenizer], ids=["byte-level", "sentencepiece"])
GREEDY, SEEDED = {"temperature": 0.0}, {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "seed": 5}


def start(executor: FakeExecutor | None = None, tokens: Any = byte_tokenizer, cache: str | None = None) -> Engine:
    changed = manifest()
    executor = executor or FakeExecutor(num_blocks=96, max_blocks=32)
    return Engine(changed, Tokenizer(tokens(), changed.special_tokens), executor, ResultCacheOptions.of(cache))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with start() as engine:
        yield engine


def params(grammar: Grammar | None, **changes: Any) -> SamplingParams:
    return SamplingParams(grammar=grammar, **{"max_new_tokens": 250, "repetition_penalty": 1.1, **GREEDY, **changes})


def answer(engine: Engine, prompt: str, asked: SamplingParams) -> Result:
    (result,) = engine.generate(prompt, asked)
    return result


@KINDS
@pytest.mark.parametrize("how", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_answers_match_and_depend_on_the_request_alone(tokens: Any, how: dict[str, Any]) -> None:
    asked = [params(grammar, **how) for grammar in (JSON, JSON, WORD, SUM, None)]
    prompts = ["hello", "world", "hello", "你好", "there"]
    with start(tokens=tokens) as engine, start(CandidateExecutor(num_blocks=96, max_blocks=32), tokens) as candidates:
        alone = [answer(engine, prompt, p) for prompt, p in zip(prompts, asked, strict=True)]
        expected = [(result.token_ids, result.text, result.finish_reason) for result in alone]
        guessing = [dataclasses.replace(p, prompt_lookup=3) for p in asked]
        for together in (
            engine.generate(prompts, asked),
            engine.generate(prompts, guessing),
            candidates.generate(prompts, asked),
        ):
            assert [(result.token_ids, result.text, result.finish_reason) for result in together] == expected
        streams = [engine.stream(prompt, p) for prompt, p in zip(prompts, guessing, strict=True)]  # the last is no UTF-8
        assert ["".join(stream) for stream in streams[:4]] == [result.text for result in alone[:4]]
    assert [result.finish_reason for result in alone] == ["stop"] * 4 + ["length"]
    for result in alone[:2]:
        jsonschema.validate(json.loads(result.text), SCHEMA)
        assert list(json.loads(result.text)) == list(SCHEMA["properties"])
    assert re.fullmatch(WORD.source, alone[2].text)
    assert re.fullmatch(r"[-+()=0-9]+", alone[3].text) and "=" in alone[3].text
    assert alone[0].text != alone[1].text


def test_prompt_lookup_confirms_guesses_under_a_grammar(engine: Engine) -> None:
    repeated = Grammar("regex", "(hello there, ){12}")
    plain = answer(engine, "hello there, hello there, hello", params(repeated))
    guessed = answer(engine, "hello there, hello there, hello", params(repeated, prompt_lookup=4))
    assert guessed.token_ids == plain.token_ids and guessed.accepted > 0 and plain.text == "hello there, " * 12


def test_any_json_object(engine: Engine) -> None:
    likely = params(Grammar("json_object"), logit_bias={engine.tokenizer.encode("}")[0]: 30.0})
    assert isinstance(json.loads(answer(engine, "hello", likely).text), dict)


@pytest.mark.parametrize(
    ("schema", "likely", "expected"),
    [
        ({"type": "array", "items": [{"const": 7}], "minItems": 1, "additionalItems": False}, ",", [7]),  # before draft 2020-12
        (
            {"type": "array", "items": [{"const": 7}], "minItems": 2, "additionalItems": {"const": 8}, "maxItems": 2},
            "9",
            [7, 8],
        ),
        ({"enum": ["no"], "nullable": True}, "n", "no"),
        ({"enum": ["no"], "contentMediaType": "application/json"}, "n", "no"),
    ],
)
def test_keywords_mean_what_json_schema_says(engine: Engine, schema: dict[str, Any], likely: str, expected: Any) -> None:
    asked = params(Grammar("json_schema", json.dumps(schema)), logit_bias={engine.tokenizer.encode(likely)[0]: 50.0})
    assert json.loads(answer(engine, "hello", asked).text) == expected


def test_white_space_is_bounded(engine: Engine) -> None:
    space = engine.tokenizer.encode("  ")[0]
    result = answer(engine, "hello", params(JSON, logit_bias={space: 100.0, engine.tokenizer.encode("\n")[0]: 100.0}))
    outside = re.sub(r'"[^"]*"', '""', result.text)
    assert max(map(len, re.findall(r"\s+", outside))) == 33 and result.finish_reason == "stop"


def test_the_answer_ends_without_a_token_for_its_end(engine: Engine) -> None:
    exact = Grammar("regex", "abc")
    with_end = answer(engine, "x", params(exact))
    assert with_end.token_ids[-1] == EOS and (with_end.text, with_end.finish_reason) == ("abc", "stop")
    for changes in ({"ignore_eos": True}, {"min_tokens": 50}, {"ignore_eos": True, "stop": ("z",)}):
        result = answer(engine, "x", params(exact, **changes))
        assert (result.token_ids, result.text, result.finish_reason) == (with_end.token_ids[:-1], "abc", "stop")
    assert answer(engine, "x", params(exact, max_new_tokens=3)).finish_reason == "length"


def test_ends_wait_for_min_tokens_while_something_else_may_come(engine: Engine) -> None:
    result = answer(engine, "x", params(Grammar("regex", "a{1,20}"), min_tokens=7, logit_bias={EOS: 100.0}))
    assert result.text == "aaaaaaa" and result.token_ids[-1] == EOS


def test_stop_tokens_and_stop_strings_end_an_answer(engine: Engine) -> None:
    digits = Grammar("regex", "[0-9]{30}")
    text = answer(engine, "x", params(digits)).text
    seventh = engine.tokenizer.encode(text[6])[0]
    assert answer(engine, "x", params(digits, stop_token_ids=(seventh,))).text == text[: text.index(text[6])]
    assert answer(engine, "x", params(digits, stop=(text[5:8],))).text == text[: text.index(text[5:8])]
    only = answer(engine, "x", params(Grammar("regex", "a+"), stop_token_ids=(0,), ignore_eos=True, logit_bias={0: 100.0}))
    assert only.token_ids[-1] == 0 and only.text == "a" and only.finish_reason == "stop"


def test_an_answer_may_be_empty(engine: Engine) -> None:
    a = engine.tokenizer.encode("a")[0]
    with start(cache="memory") as cached:
        for which in (engine, cached, cached):
            result = answer(which, "x", params(Grammar("regex", "a+"), stop_token_ids=(a,), min_tokens=2))
            assert (result.token_ids, result.text, result.finish_reason) == ([], "", "stop")
            assert result.timings.first_token_s >= 0
        assert result.cached


def test_log_probabilities_are_those_of_the_model(engine: Engine) -> None:
    result = answer(engine, "hello", params(WORD, logprobs=2, logit_bias={EOS: 1.0}))
    assert result.logprobs is not None and len(result.logprobs) == len(result.token_ids)
    context = list(result.prompt_token_ids)
    for entry in result.logprobs:
        assert entry == token_logprob(hash_rule(context), entry.token_id, 2)
        context.append(entry.token_id)


def test_tokens_without_logits_are_not_chosen_nor_padding() -> None:
    known = byte_tokenizer().get_vocab_size()
    assert known < VOCABULARY
    logits = np.arange(VOCABULARY, dtype=np.float32)  # the likeliest are not the tokenizer's
    for size, best in ((VOCABULARY, known - 1), (known - 9, known - 10)):
        for grammar in (Grammar("regex", "(?s:.)+"), Grammar("regex", f"[{chr(0x4E00)}-{chr(0x9FFF)}a-z ]+")):
            with start(FakeExecutor(rule=lambda context, size=size: logits[:size].copy())) as engine:
                tokens = answer(engine, "x", params(grammar, max_new_tokens=9)).token_ids
            assert max(tokens) <= best
    # There is no logit for a letter.
    with start(FakeExecutor(rule=lambda context: np.zeros(5, np.float32))) as engine, pytest.raises(EngineError) as caught:
        answer(engine, "x", params(Grammar("regex", "[a-z]+"), max_new_tokens=9))
    assert "found the vocabulary has no token with which the answer could go on" in str(caught.value)


@pytest.mark.parametrize("store", ["memory", None], ids=["cache", "no cache"])
def test_answers_of_the_cache(store: str | None) -> None:
    asked = [params(grammar, ignore_eos=True, **SEEDED) for grammar in (JSON, WORD, Grammar("regex", "abc"))]
    with start() as plain, start(cache=store) as engine:
        expected = [answer(plain, "hello", p).token_ids for p in asked]
        together = engine.generate(["hello"] * 6, [p for p in asked for _ in range(2)])  # each is computed once
        again = engine.generate(["hello"] * 3, asked)
        assert [result.token_ids for result in together[::2]] == [result.token_ids for result in together[1::2]] == expected
        assert [result.token_ids for result in again] == expected
        assert {result.finish_reason for result in [*together, *again]} == {"stop"}
        assert [result.cached for result in [*together[1::2], *again]] == [store is not None] * 6
        assert ["".join(engine.stream("hello", p)) for p in asked] == [result.text for result in again]


def test_preempted_answers_go_on_where_they_were(engine: Engine) -> None:
    grammars = (JSON, Grammar("regex", "[a-z]{70,90}"), Grammar("regex", "(你|好){80}"))
    asked = [params(grammar, max_new_tokens=150, **how) for grammar in grammars for how in (GREEDY, SEEDED)]
    prompts = [f"{'hello there, ' * 3}{i}" for i in range(len(asked))]
    expected = [answer(engine, prompt, p).token_ids for prompt, p in zip(prompts, asked, strict=True)]
    with start(FakeExecutor(num_blocks=12, max_blocks=12)) as small:
        assert [result.token_ids for result in small.generate(prompts, asked)] == expected
        assert small.stats().preemptions > 0


def test_several_answers_have_matchers_of_their_own(engine: Engine) -> None:
    results = engine.generate("hello", params(WORD, n=3, **SEEDED))
    assert len({result.text for result in results}) == 3
    assert all(re.fullmatch(WORD.source, result.text) for result in results)


# Valid, and cheap to begin with; the matcher reaches a limit within the answer.
GROWING = Grammar("regex", "(?:a?){900}a{900}")


def test_an_answer_that_needs_too_much_fails_alone_and_at_the_same_token(engine: Engine) -> None:
    asked, expected = params(GROWING, ignore_eos=True), answer(engine, "hello", params(JSON)).token_ids
    texts: list[str] = []
    for _ in range(2):  # a limit that one answer has reached is not nearer for the next one
        streams = [engine.stream("hello", p) for p in (asked, params(JSON), asked)]
        for stream in (streams[0], streams[2]):
            texts.append("")
            with pytest.raises(EngineError, match=r"the answer cannot be held to its grammar: found .* too many expressions"):
                for piece in stream:
                    texts[-1] += piece
        assert "".join(streams[1]) and streams[1].result.token_ids == expected
    assert texts[0] and texts == [texts[0]] * 4


def chain(links: int) -> str:
    """A grammar of rules that refer to each other: each link is a call on llguidance's stack."""
    return "\n".join([*(f"r{i:x}:r{i + 1:x}" for i in range(links)), f'r{links:x}:"a"']).replace("r0:", "start:", 1)


def doubled(times: int) -> str:
    """A terminal that is written out 2 ** `times` times."""
    return "\n".join(["start: A0", *(f"A{i}: A{i + 1} A{i + 1}" for i in range(times)), f"A{times}: /.?/"])


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", '{"not": {"type": "string"}}', r'a JSON schema that cannot be used \(Unimplemented keys: \["not"\]\)'),
        ("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}', r'Unimplemented keys: \["not"\]'),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"type": "text"}', "text"),
        ("json_schema", '{"$ref": "https://example.com/schema"}', "example.com"),
        ("json_schema", '{"type": "string", "format": "secret"}', "Unknown format: secret"),
        ("json_schema", '{"enum": []}', "Unsatisfiable schema"),
        ("json_schema", '{"$ref": "#"}', "it matches no text"),
        ("json_schema", '{"type": "array", "items": ' * 1500 + "{}" + "}" * 1500, "nests too deeply|recursion limit"),
        ("json_schema", '{"type": "integer", "multipleOf": 1000000007}', "fuel|it takes more than"),
        ("json_schema", '{"a": "\\ud800"}', "cannot be used"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "", "nothing but the empty text"),
        ("regex", "(" * 30000 + "a" + ")" * 30000, "cannot be used"),
        ("regex", ".?" * 30000, "it takes more than 0.5 s to compile"),
        ("lark", "start[temperature=0.5]: /a+/", "the attribute temperature of a rule"),
        ("lark", "nonsense", "Expected token ':'"),
        ("lark", "start: start", "it matches no text"),
        ("lark", "start: " + "(" * 30000 + '"a"' + ")" * 30000, "too deeply nested"),
        ("lark", doubled(16), "it takes more than"),
        ("lark", doubled(60), "cannot be used"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(engine: Engine, kind: Any, source: str, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        engine.resolve("hello", SamplingParams(grammar=Grammar(kind, source)))
    assert (caught.value.stage, caught.value.what) == ("sampling", "grammar")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_long_chains_of_rules_fit_on_the_stack(engine: Engine) -> None:
    source = chain(6100)
    assert 60_000 < len(source) <= MAX_SOURCE_BYTES
    assert answer(engine, "hello", params(Grammar("lark", source))).text == "a"


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("yaml", "a", "found kind 'yaml', expected json_object or json_schema or regex or lark"),
        ("regex", 5, "found a source of type int, expected text"),
        ("regex", "\ud800", "half of a surrogate pair"),
        ("regex", "a" * (MAX_SOURCE_BYTES + 1), "found a source of 65537 bytes, expected at most 65536"),
        ("json_object", "{}", "use the kind json_schema"),
        ("json_schema", "{", "a JSON schema that is not JSON"),
        ("json_schema", "[]", "a JSON schema of type list, expected an object"),
        ("json_schema", "[" * 60000, "nests too deeply"),
    ],
)
def test_sources_are_checked_at_once(kind: Any, source: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Grammar(kind, source)


def test_grammars_are_in_the_key() -> None:
    sources = ['{"a":1,"b":2}', '{"b":2,"a":1}', "{}"]
    grammars = [None, WORD, *(Grammar("json_schema", source) for source in sources), Grammar("regex", "{}")]
    with start() as engine:
        keys = {make_request([1], params(grammar)).key(engine.identity) for grammar in grammars}
    assert len(keys) == len(grammars)
    with pytest.raises(EngineError, match="grammar: found 'abc'"):
        SamplingParams(grammar="abc")  # type: ignore[arg-type]


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with start() as engine:
        for load in (engine.tokenizer.grammars.load, lambda: engine.resolve("hello", params(WORD))):
            with pytest.raises(EngineError, match=r"grammars need the package llguidance; install belle-compile\[serve\]"):
                load()


def test_a_tokenizer_that_llguidance_cannot_read() -> None:
    trial = Trial("{}", [EOS])
    for _ in range(2):  # the process is started anew
        with pytest.raises(EngineError, match="the process that tries out grammars has failed: found ValueError: it has ended"):
            trial.judge("regex", "a")


def children() -> set[int]:
    lists = Path("/proc/self/task").glob("*/children")
    return {int(pid) for path in lists for pid in path.read_text().split()}


def test_the_process_is_replaced_and_ends_with_its_owner() -> None:
    before = children()
    trial = Trial(byte_tokenizer().to_str(), [EOS])
    assert trial.judge("regex", "a")[0] == ""
    (process,) = children() - before
    os.kill(process, signal.SIGKILL)
    assert trial.judge("regex", "b")[0] == "" and trial.judge("regex", "(b")[0] == "unclosed group"
    assert len(children() - before) == 1
    del trial
    assert children() <= before


def test_no_end_of_sequence_token() -> None:
    changed = manifest(special_tokens=special_tokens(eos=()))
    with Engine(changed, Tokenizer(byte_tokenizer(), changed.special_tokens), FakeExecutor()) as engine:
        result = answer(engine, "x", params(WORD, max_new_tokens=60))
    assert re.fullmatch(WORD.source, result.text) and result.finish_reason == "stop"
