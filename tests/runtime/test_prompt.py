"""Templates render as in Transformers, and refuse in one sentence."""

from __future__ import annotations

import datetime

import pytest

from belle_compile.compiler.checkpoint import templates
from belle_compile.runtime.artifact import PromptTemplate
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.prompt import ChatTemplate

CHAT = [
    {"role": "user", "content": "写一个 <b>标题</b> & more"},
    {"role": "assistant", "content": "好的"},
    {"role": "user", "content": "再来"},
]
TEMPLATES = {
    "belle-7b": "{% for m in messages %}{% if m.role == 'user' %}Human: {{ m.content }}\n\n{% else %}Assistant: {{ m.content }}"
    "\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
    "blocks": "{% for m in messages %}\n    {% if loop.first %}\n{{ bos_token }}\n    {% endif %}\n"
    "{{ m['content'] | tojson }}\n{% if m.role == 'user' %}\n{% continue %}\n{% endif %}\n{{ eos_token }}\n{% endfor %}",
    "generation": "{% for m in messages %}\n  {% generation %}\n  {{ m.content }}\n  {% endgeneration %}\n{% endfor %}\n.",
    "generation scope": "{% set a = 1 %}{% for m in messages %}{% generation %}{% set a = m.role %}{{ a }}{{ loop.index }}"
    "{% endgeneration %}{{ a }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}{% set ns.n = ns.n + 1 %}"
    "{% endgeneration %}{% endfor %}{{ ns.n }}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}"
    "{{ messages | tojson(separators=(',', ':')) }}{{ messages | tojson(ensure_ascii=true) }}",
    "break": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "no tools": "{% if tools is not none or documents is not none %}tools{% else %}{{ messages[0].content }}{% endif %}",
    "strftime_now": "{{ strftime_now('%Y') }}{% if false %}{{ raise_exception('no') }}{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_runtime_and_build_render_as_transformers(name: str) -> None:
    from transformers.utils import chat_template_utils

    jinja = TEMPLATES[name]
    (expected,), _ = chat_template_utils.render_jinja_template(
        [CHAT], chat_template=jinja, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert ChatTemplate(PromptTemplate(name, jinja, "<s>", "</s>")).render(CHAT) == expected
    assert templates.render(templates.PromptTemplate(name, jinja), CHAT, bos_token="<s>", eos_token="</s>") == expected


def render(jinja: str) -> str:
    return ChatTemplate(PromptTemplate("t", jinja, "", "")).render(CHAT)


def test_belle_prompt_text() -> None:
    template = ChatTemplate(PromptTemplate("belle-7b", TEMPLATES["belle-7b"], "", ""))
    assert template.render(CHAT[:1]) == "Human: 写一个 <b>标题</b> & more\n\nAssistant:"


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{% for %}", "template t does not parse: found "),
        ("{{ raise_exception('no system role') }}", "template t refused the messages: found no system role"),
        ("{{ messages.append(1) }}", "template t refused the messages: found access to attribute 'append'"),
        ("{{ messages[0].content + 1 }}", "template t refused the messages"),
        ("{{ ''.__class__.__mro__ }}", "template t refused the messages"),
        ("{{ 1 // 0 }}", "template t refused the messages: found integer division"),
        ("{% macro m() %}{% break %}{% endmacro %}", "template t does not parse: found 'break' outside loop"),
    ],
)
def test_refusals(jinja: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        render(jinja)


def test_message_without_content() -> None:
    with pytest.raises(EngineError, match=r"a chat message does not fit: found \{'role': 'user'\}, expected"):
        ChatTemplate(PromptTemplate("t", "", "", "")).render([{"role": "user"}])
