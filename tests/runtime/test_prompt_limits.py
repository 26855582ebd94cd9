"""Templates that take long or multiply strings end in a sentence; what a conversation of any real length needs does not."""

from __future__ import annotations

import resource

import pytest

from belle_compile.runtime.artifact import PromptTemplate
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.prompt import ChatTemplate

LONG = "{% set x = 'a' * 1000000 %}"
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "loops that print constants": "{% for a in range(99999) %}{{ '" + "y" * 9000 + "' }}{% endfor %}",
    "a recursive loop": "{% for a in [1] recursive %}{{ loop(range(9999)) }}{% endfor %}",
    "a recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "an endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "multiplication": "{{ ('a' * 2000000000)|length }}",
    "multiplication from the left": "{{ (2000000000 * 'a')|length }}",
    "a list": "{{ ([0] * 2000000000)|length }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "adding lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "powers": "{{ 10**(10**8) }}",
    "squares": "{% set n = namespace(x=7) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "percent": "{{ '%2000000000d' % 1 }}",
    "percent with a star": "{{ '%*d' % (2000000000, 1) }}",
    "format": "{{ '{:>2000000000}'.format(1) }}",
    "format with a field": "{{ '{:{}}'.format(1, 2000000000) }}",
    "format filter": "{{ '%2000000000s'|format('x') }}",
    "ljust": "{{ 'a'.ljust(2000000000) }}",
    "zfill": "{{ '1'.zfill(2000000000) }}",
    "center of bytes": "{{ 'a'.encode().center(2000000000) }}",
    "expandtabs": "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "to_bytes": "{{ (1).to_bytes(2000000000) }}",
    "replace": LONG + "{{ x.replace('a', x) }}",
    "join": LONG + "{{ x.join(range(99999)|map('string')|list) }}",
    "translate": LONG + "{{ x.translate({97: x}) }}",
    "center filter": "{{ 'a'|center(2000000000) }}",
    "center by keyword": "{{ 'a'|center(width=2000000000) }}",
    "indent filter": "{{ ('\\n' * 100000)|indent(100000) }}",
    "replace filter": LONG + "{{ x|replace('a', x) }}",
    "join filter": LONG + "{{ range(99999)|join(x) }}",
    "batch filter": "{{ [1]|batch(2000000000, 'x')|list }}",
    "slice filter": "{{ [1]|slice(2000000000)|list }}",
    "sum filter": "{{ ([range(99999)|list] * 99999)|sum(start=[])|length }}",
    "round filter": "{{ 1.5|round(2000000000, 'ceil') }}",
    "tojson filter": "{{ [[1]]|tojson(indent=2000000000) }}",
    "wordwrap filter": LONG + "{{ x|wordwrap(1, wrapstring=x) }}",
    "mapped filters": "{{ range(99999)|map('string')|map('center', 99999)|list|length }}",
    "captured output": LONG + "{% set y %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endset %}{{ y|length }}",
    "lipsum": "{{ lipsum(n=2000000000) }}",
    "many texts": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = n.x + ['a' * 99999] %}{% endfor %}",
}


def render(jinja: str, messages: list[dict[str, str]]) -> str:
    return ChatTemplate(PromptTemplate("t", jinja, "<s>", "</s>")).render(messages)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_a_sentence(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EngineError, match=r"^prompt: template t (refused the messages|does not parse): found "):
        render(HOSTILE[name] + "{{ messages[0]['content'] }}", [{"role": "user", "content": "hello"}])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10, "KiB"


def test_a_long_conversation_renders() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "你好，世界。" * 200} for i in range(2001)]
    jinja = (
        "{% for m in messages %}{% if loop.index0 < loop.length %}<|{{ m.role }}|>\n{{ m.content|trim }}{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    expected = "".join(f"<|{m['role']}|>\n{m['content']}" for m in messages) + "<|assistant|>\n"
    assert render(jinja, messages) == expected


def test_what_templates_do_with_loops_and_texts() -> None:
    jinja = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {{ 'a' ~ m.role ~ 1 }} "
        "{{ '%s-%03d' % (m.role, 7) }} {{ '{:>4}'.format(5) }} {{ m.content|replace('l', 'L')|indent(2) }} "
        "{{ [1, 2]|join(', ') }} {{ 2 ** 10 }} {{ 'ab' * 2 }}{% for k, v in m.items() %}{{ k }}{% else %}none{% endfor %}"
        "{% endfor %}{% for x in missing %}{% else %}empty{% endfor %}"
    )
    rendered = render(jinja, [{"role": "user", "content": "hello"}])
    assert rendered == "1/1True auser1 user-007    5 heLLo 1, 2 1024 ababrolecontentempty"
