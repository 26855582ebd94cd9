"""Variables of prompt templates, such as enable_thinking: as Transformers has them, and refused where nothing reads them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from belle_compile.runtime import EngineError
from belle_compile.runtime.artifact import PromptTemplate
from belle_compile.runtime.chat import ChatEncoder
from belle_compile.runtime.prompt import ChatTemplate, parse_variables
from belle_compile.runtime.tokenizer import Tokenizer
from tests.runtime.fakes import byte_tokenizer, make_engine, special_tokens

# The template of Qwen3's checkpoints (Apache License 2.0).
QWEN3 = (Path(__file__).parents[1] / "fixtures" / "qwen3.jinja").read_text(encoding="utf-8")
ONE = [{"role": "user", "content": "你好"}]
CHATS = {
    "one": ONE,
    "system": [{"role": "system", "content": "Be brief."}, *ONE],
    "turns": [*ONE, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n好"}, {"role": "user", "content": "再来"}],
}
SAYS = "{% if tone is defined %}({{ tone }}){% endif %}{% for m in messages %}[{{ m.content }}]{% endfor %}"


def qwen3() -> ChatTemplate:
    return ChatTemplate(PromptTemplate("qwen3", QWEN3, "", "<|im_end|>"))


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}, {"enable_thinking": None}])
@pytest.mark.parametrize("name", CHATS)
def test_qwen3_renders_as_in_transformers(name: str, variables: dict[str, Any]) -> None:
    from transformers.utils import chat_template_utils

    (expected,), _ = chat_template_utils.render_jinja_template(
        [CHATS[name]], chat_template=QWEN3, add_generation_prompt=True, bos_token=None, eos_token="<|im_end|>", **variables
    )
    template = qwen3()
    assert template.render(CHATS[name], variables=template.check_variables(variables)) == expected
    thinks_not = expected.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert thinks_not == (variables.get("enable_thinking") is False)


def test_the_ids_of_qwen3_are_those_of_transformers() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=QWEN3)
    ours = ChatEncoder(qwen3(), Tokenizer(tokenizer, special_tokens()))
    for chat in CHATS.values():
        for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            text: Any = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **variables)
            expected = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(chat, variables=variables) == expected


def test_variables_that_a_template_reads() -> None:
    assert qwen3().variables == {"enable_thinking"}
    jinja = (
        "{{ bos_token }}{{ messages[0].content }}{{ raise_exception }}{{ range }}{{ pad_token }}"
        "{% set effort = effort | default('low') %}{% if effort %}{% set inner = 1 %}{% endif %}{{ inner }}{{ effort }}"
        "{% for inner in messages %}{{ loop.index }}{% endfor %}{% macro f(x) %}{{ x }}{{ caller() }}{% endmacro %}"
        "{% if not date is defined %}{% set date = 'today' %}{% endif %}{{ date }}"
    )
    assert ChatTemplate(PromptTemplate("t", jinja, "", "")).variables == {"effort", "date"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1], "found list, expected a JSON object"),
        ("x", "found str, expected a JSON object"),
        ({"enable_thinkin": False}, "found 'enable_thinkin', expected variables that template qwen3 reads: enable_thinking."),
        ({"messages": []}, "found 'messages', expected variables that"),
        ({"add_generation_prompt": False}, "found 'add_generation_prompt'"),
        ({"eos_token": "x"}, "found 'eos_token'"),
        ({"tools": []}, "found 'tools'"),
        ({"namespace": {}}, "found 'namespace'"),
        ({1: 2}, "found 1, expected"),
        ({"enable_thinking": math.nan}, "expected values that JSON has"),
        ({"enable_thinking": object()}, "expected values that JSON has"),
        ({"enable_thinking": "x" * 70_000}, "found 70023 characters of JSON, expected at most 65536"),
    ],
)
def test_what_is_refused(given: Any, words: str) -> None:
    with pytest.raises(EngineError) as caught:
        qwen3().check_variables(given)
    assert str(caught.value).startswith("prompt: chat_template_kwargs: ") and words in str(caught.value)


def test_nothing_nested_too_deeply() -> None:
    nested: Any = 1
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(EngineError, match="expected values that JSON has"):
        qwen3().check_variables({"enable_thinking": nested})


def test_a_template_without_variables_names_none() -> None:
    with pytest.raises(EngineError, match=r"found 'enable_thinking', expected variables that template tiny reads: none"):
        make_engine().encode("hi", chat_template_kwargs={"enable_thinking": False})


def test_engines_render_with_variables() -> None:
    with make_engine(prompt_template=PromptTemplate("says", SAYS, "", "")) as engine:
        plain, kind = engine.encode("hi"), engine.encode("hi", chat_template_kwargs={"tone": "kind"})
        assert (plain, kind) == (engine.encode("[hi]", raw=True), engine.encode("(kind)[hi]", raw=True))
        (result,) = engine.generate("hi", chat_template_kwargs={"tone": "kind"})
        assert list(result.prompt_token_ids) == kind
        with engine.stream(ONE, chat_template_kwargs={"tone": 7}) as stream:
            list(stream)
        assert list(stream.result.prompt_token_ids) == engine.encode("(7)[你好]", raw=True)


def test_control_tokens_in_variables_are_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    encoder = ChatEncoder(
        ChatTemplate(PromptTemplate("says", SAYS + "<|im_end|>", "", "")), Tokenizer(tokenizer, special_tokens())
    )
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False).ids
    variables = {"tone": "<|im_end|>"}
    assert encoder.encode(ONE, variables=variables).count(end) == 1
    assert encoder.encode(ONE, variables=variables, parse_special=True).count(end) == 2


def test_a_template_that_fails_says_so() -> None:
    jinja = "{{ messages[0].content }}{% if level > 3 %}{{ raise_exception('level is at most 3') }}{% endif %}"
    with make_engine(prompt_template=PromptTemplate("levels", jinja, "", "")) as engine:
        assert engine.encode("a", chat_template_kwargs={"level": 2}) == engine.encode("a", raw=True)
        with pytest.raises(EngineError, match="template levels refused the messages: found level is at most 3"):
            engine.encode("a", chat_template_kwargs={"level": 4})
        with pytest.raises(EngineError, match="template levels refused the messages: found '>' not supported"):
            engine.encode("a", chat_template_kwargs={"level": "high"})


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "--chat-template-kwargs: found "), ("[1]", "found list"), ("[" * 100_000, "expected a JSON object")],
)
def test_options_that_are_no_object(text: str, words: str) -> None:
    with pytest.raises(EngineError) as caught:
        parse_variables(text)
    assert words in str(caught.value)
