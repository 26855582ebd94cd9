"""Templates render as in Transformers, and refuse in one sentence."""

from __future__ import annotations

import datetime

import pytest

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
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name: str) -> None:
    from transformers.utils import chat_template_utils

    jinja = TEMPLATES[name]
    found = ChatTemplate(PromptTemplate(name, jinja, "<s>", "</s>")).render(CHAT)
    (expected,), _ = chat_template_utils.render_jinja_template(
        [CHAT], chat_template=jinja, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert found == expected


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
    ],
)
def test_refusals(jinja: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        render(jinja)


def test_message_without_content() -> None:
    with pytest.raises(EngineError, match=r"a chat message does not fit: found \{'role': 'user'\}, expected"):
        ChatTemplate(PromptTemplate("t", "", "", "")).render([{"role": "user"}])
