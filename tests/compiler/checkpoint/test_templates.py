"""Prompt templates: BELLE's texts, and which template a build uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from belle_compile.compiler.checkpoint.templates import TEMPLATES, PromptTemplate, choose_template, family_template, render
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.bloom import FAMILY as BLOOM
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.families.llama import FAMILY as LLAMA
from belle_compile.compiler.families.mistral import FAMILY as MISTRAL
from belle_compile.compiler.families.qwen2 import FAMILY as QWEN2

ONE = [{"role": "user", "content": "你好\n{x} {{ y }}"}]
MORE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
OWN = PromptTemplate("own", "{% for m in messages %}{{ m.content }}!{% endfor %}")


@pytest.mark.parametrize(
    ("name", "one", "more"),
    [
        (
            "belle-bloom",
            "Human: 你好\n{x} {{ y }}\n\nAssistant:",
            "Human: Be brief.\na\n\nAssistant:b\n\nHuman: c\n\nAssistant:",
        ),
        (
            "belle-llama",
            "Human: \n你好\n{x} {{ y }}\n\nAssistant: \n",
            "Human: \nBe brief.\na\n\nAssistant: \nb</s>Human: \nc\n\nAssistant: \n",
        ),
        ("belle-llama-ext", "Human: 你好\n{x} {{ y }}\n\nBelle: ", "Human: Be brief.\na\n\nBelle: b\n\nHuman: c\n\nBelle: "),
        (
            "chatml",
            "<|im_start|>user\n你好\n{x} {{ y }}<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("raw", "你好\n{x} {{ y }}", "Be brief.abc"),
    ],
)
def test_the_texts(name: str, one: str, more: str) -> None:
    template = PromptTemplate(name, TEMPLATES[name])
    assert render(template, ONE, bos_token="<s>", eos_token="</s>") == one
    assert render(template, MORE, bos_token="<s>", eos_token="</s>") == more


@pytest.mark.parametrize(
    ("family", "vocab_size", "name"),
    [
        (BLOOM, 250880, "belle-bloom"),
        (LLAMA, 32000, "belle-llama"),
        (LLAMA, 79458, "belle-llama-ext"),
        (QWEN2, 152064, "chatml"),
        (MISTRAL, 32000, "mistral"),
    ],
)
def test_families(family: Family[Any], vocab_size: int, name: str) -> None:
    assert family_template(family, {"vocab_size": vocab_size}).name == name
    assert choose_template(None, None, family, {"vocab_size": vocab_size}).name == name


def test_the_instructions_of_mistral() -> None:
    template = family_template(MISTRAL, {})
    assert render(template, ONE, bos_token="<s>", eos_token="</s>") == "<s>[INST] 你好\n{x} {{ y }} [/INST]"
    assert render(template, MORE, bos_token="<s>", eos_token="</s>") == "<s>[INST] Be brief.\n\na [/INST] b</s>[INST] c [/INST]"


def test_order() -> None:
    assert choose_template(None, OWN, LLAMA, {}) is OWN
    assert choose_template("belle-bloom", OWN, LLAMA, {}).name == "belle-bloom"


def test_arguments(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("File: {{ messages[-1]['content'] }}", encoding="utf-8")
    for argument, name, prompt in (
        (str(file), "mine.jinja", "File: hi"),
        ("Q: {{ messages[0].content }}", "inline", "Q: hi"),
        ("问: {x}\\n答: ", "format", "问: hi\n答: "),
        ('it\'s {x}\n"A":', "format", 'it\'s hi\n"A":'),
    ):
        template = choose_template(argument, OWN, BLOOM, {})
        assert template.name == name
        assert render(template, [{"role": "user", "content": "hi"}], bos_token="", eos_token="") == prompt


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "alpaca",
            r"--template 'alpaca': found an unknown name, expected one of belle-bloom, belle-llama, .*, chatml, raw",
        ),
        (
            "/nowhere/x.jinja",
            r"file /nowhere/x\.jinja: found No such file or directory, expected a file that can be read; check its path",
        ),
        ("{% for m in messages %}{{ m.content }}", "prompt template inline: found Jinja that fails .*; correct it, or choose"),
        ("{{ messages.nothing.here }}", "prompt template inline: found Jinja that fails"),
        ("{{ ''.__class__.__mro__ }}", "prompt template inline: found Jinja that fails"),
        ("Human: {{ x }}", "found that it leaves out the user's message: 'Human: '"),
    ],
)
def test_wrong_arguments(argument: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        choose_template(argument, None, BLOOM, {})


def test_unknown_role() -> None:
    with pytest.raises(Exception, match="BELLE prompts know the roles system, user and assistant"):
        render(family_template(BLOOM, {}), [{"role": "tool", "content": "x"}], bos_token="", eos_token="")
