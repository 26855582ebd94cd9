"""Prompt templates: the BELLE families' as data, and which one a build uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from belle_compile.compiler.errors import CompileError

STAGE = "template"


@dataclass(frozen=True)
class PromptTemplate:
    """A Jinja chat template over `messages`, `add_generation_prompt`, `bos_token` and `eos_token`.

    It is written for Transformers' environment: ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True) with
    loop controls, `tojson`, `raise_exception` and `strftime_now`; see `environment`.
    """

    name: str
    jinja: str


def _turns(human: str, assistant: str) -> str:
    """Jinja of a conversation: `human` is a Jinja expression over `text`, `assistant` one over `message`.

    A system message has no place in BELLE's training data (LianjiaTech/BELLE, train/src/sample_generator.py): it goes in
    front of the first human message.
    """
    return (
        "{%- set ns = namespace(system='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'system' -%}{%- set ns.system = ns.system + message['content'] + '\\n' -%}"
        "{%- elif message['role'] == 'user' -%}{%- set text = ns.system + message['content'] -%}{%- set ns.system = '' -%}"
        "{{- " + human + " -}}"
        "{%- elif message['role'] == 'assistant' -%}{{- " + assistant + " -}}"
        "{%- else -%}{{- raise_exception('BELLE prompts know the roles system, user and assistant') -}}"
        "{%- endif -%}{%- endfor -%}"
    )


# A human turn already ends in the words that start the answer, so add_generation_prompt has nothing to add. An earlier answer
# is closed as the model has seen it: by EOS where it was trained on conversations (the LLaMA ones, sample_generator.py); the
# cards of the others say to concatenate the turns, which leaves an empty line between them.
TEMPLATES = {
    "belle-bloom": _turns("'Human: ' + text + '\\n\\nAssistant:'", "message['content'] + '\\n\\n'"),
    "belle-llama": _turns("'Human: \\n' + text + '\\n\\nAssistant: \\n'", "message['content'] + eos_token"),
    "belle-llama-ext": _turns("'Human: ' + text + '\\n\\nBelle: '", "message['content'] + '\\n\\n'"),
    "raw": "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}",
}
EXT_VOCAB_SIZE = 79458  # BELLE-LLaMA-EXT: LLaMA's 32000 pieces and BELLE's Chinese ones


def environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment chat templates are written for; a template cannot reach files or attributes of Python objects."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    env.filters["tojson"] = _tojson
    return env


def family_template(family: str, config: dict[str, Any]) -> PromptTemplate:
    """The template BELLE trained this family with."""
    name = "belle-bloom" if family == "bloom" else "belle-llama"
    if family == "llama" and config.get("vocab_size") == EXT_VOCAB_SIZE:
        name = "belle-llama-ext"
    return PromptTemplate(name, TEMPLATES[name])


def choose_template(argument: str | None, own: PromptTemplate | None, family: str, config: dict[str, Any]) -> PromptTemplate:
    """The argument's template, else the checkpoint's own, else the family's; verified to compile as Jinja.

    `argument` is a name in `TEMPLATES`, the path of a .jinja file, Jinja text (it contains `{{` or `{%`), or a format for one
    message with {x} in the place of the user's words, such as "Human: {x}\\n\\nAssistant:".
    """
    template = _from_argument(argument) if argument is not None else own or family_template(family, config)
    words = "the words of the user"
    try:
        prompt = render(template, [{"role": "user", "content": words}], bos_token="", eos_token="")
        problem = "" if words in prompt else f"that it leaves out the user's message: {prompt[:80]!r}"
    except Exception as e:  # a template can fail in any way that Python can
        problem = f"Jinja that fails ({e})"
    if problem:
        raise CompileError(
            STAGE,
            f"prompt template {template.name}",
            found=problem,
            expected="a chat template as in Transformers, over messages with role and content",
            remedy=f"correct it, or choose one with --template: {', '.join(TEMPLATES)}",
        )
    return template


def render(template: PromptTemplate, messages: list[dict[str, str]], *, bos_token: str, eos_token: str) -> str:
    """The prompt for these messages, up to where the answer begins."""
    return (
        environment()
        .from_string(template.jinja)
        .render(messages=messages, add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token)
    )


def read_template(file: Path) -> str:
    """The text of a Jinja file."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CompileError(
            STAGE,
            f"template {file}",
            found=f"a file that cannot be read ({e})",
            expected="a Jinja file",
            remedy="check the path",
        ) from e


def _from_argument(argument: str) -> PromptTemplate:
    if argument in TEMPLATES:
        return PromptTemplate(argument, TEMPLATES[argument])
    if "{{" in argument or "{%" in argument:
        return PromptTemplate("inline", argument)
    if "{x}" in argument:
        return PromptTemplate("format", _from_format(argument))
    file = Path(argument)
    if file.suffix in {".jinja", ".jinja2", ".j2"}:
        return PromptTemplate(file.name, read_template(file))
    raise CompileError(
        STAGE,
        f"--template {argument!r}",
        found="an unknown name",
        expected=f"one of {', '.join(TEMPLATES)}, a .jinja file, Jinja text with {{{{, or a format with {{x}}",
        remedy=f"say for example --template {next(iter(TEMPLATES))}",
    )


def _from_format(text: str) -> str:
    """A format such as `Human: {x}\\n\\nAssistant:` as Jinja; backslash-n and -t in it are read as a shell user means them."""
    before, after = text.replace("\\n", "\n").replace("\\t", "\t").split("{x}", 1)
    return _turns(f"{before!r} + text + {after!r}", "message['content'] + eos_token")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(format)


def _tojson(value: Any, indent: int | None = None) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=indent)
