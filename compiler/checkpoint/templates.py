"""Prompt templates: the built-in ones as data, and the choice of the one that a build uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families.family import Family
from belle_compile.compiler.lfs import refuse_pointer
from belle_compile.compiler.places import JINJA_SUFFIXES
from belle_compile.compiler.stored_path import StoredPath
from belle_compile.compiler.untrusted import explained, read_bounded
from belle_compile.runtime import artifact
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.prompt import ChatTemplate

STAGE = "template"
_MOST_BYTES = 1 << 20  # of a Jinja file; the longest ones in use have 20,000


@dataclass(frozen=True)
class PromptTemplate:
    """A Jinja chat template over `messages`, `add_generation_prompt`, `bos_token` and `eos_token`.

    It is written for Transformers' Jinja environment, which `chat_environment` of runtime/prompt.py reproduces.
    """

    name: str
    jinja: str


def _turns(human: str, assistant: str) -> str:
    """Make the template of a conversation from two Jinja expressions: `human` over `text`, `assistant` over `message`.

    BELLE's training data has no system messages (LianjiaTech/BELLE, train/src/sample_generator.py), so the text of one is put
    in front of the next human message.
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


RAW = "raw"
# A human turn ends with the words that start the answer, so add_generation_prompt adds nothing. An earlier answer ends as it
# did in training: with EOS and nothing else in models that were trained on conversations (BELLE-LLaMA, sample_generator.py).
# BELLE-7B was trained on single questions. Its card tells users to concatenate turns of the form
# Human:{input}\n\nAssistant:{output}, and does not say what separates them; here, as in other programs for BELLE, it is the
# empty line that also separates question and answer.
BELLE = {
    "belle-bloom": _turns("'Human: ' + text + '\\n\\nAssistant:'", "message['content'] + '\\n\\n'"),
    "belle-llama": _turns("'Human: \\n' + text + '\\n\\nAssistant: \\n'", "message['content'] + eos_token"),
    "belle-llama-ext": _turns("'Human: ' + text + '\\n\\nBelle: '", "message['content'] + '\\n\\n'"),
}
TEMPLATES = BELLE | {
    # Of Qwen, Yi, InternLM2 and many others.
    "chatml": (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    RAW: "{%- for message in messages -%}{{- message['content'] -}}{%- endfor -%}",
}
BELLE_TEMPLATES = frozenset(BELLE.values())


def family_template(family: Family[Any], config: Mapping[str, Any]) -> PromptTemplate:
    """The family's template for checkpoints without a template; raises CompileError if the family has none either."""
    size = config.get("vocab_size")
    stated = next((text for known, text in family.template_by_vocabulary.items() if known == size), family.template)
    if not stated:
        raise CompileError(
            STAGE,
            "prompt template",
            found=f"none in the checkpoint, and no default for the {family.title} family",
            expected="the template that this model was trained with",
            remedy=f"give it with --template NAME|FILE ({', '.join(TEMPLATES)}), or as chat_template.jinja beside the weights",
        )
    template = _from_text(stated)
    assert template is not None, f"family {family.name}: {stated!r} is no template"
    return template if template.name in TEMPLATES else replace(template, name=family.name)


def choose_template(
    argument: str | None, own: PromptTemplate | None, family: Family[Any], config: Mapping[str, Any]
) -> PromptTemplate:
    """Choose the argument's template, else the checkpoint's `own`, else the family's.

    `argument` is a name in `TEMPLATES`, the path of a .jinja file, Jinja text (it contains `{{` or `{%`), or a format for one
    message with {x} in the place of the user's words, such as "Human: {x}\\n\\nAssistant:". Raises CompileError if there is no
    template, and if rendering a test message fails or leaves its text out.
    """
    template = _from_argument(argument) if argument is not None else own or family_template(family, config)
    message = "the words of the user"
    try:
        prompt = render(template, [{"role": "user", "content": message}], bos_token="", eos_token="")
        problem = "" if message in prompt else f"that it leaves out the user's message: {prompt[:80]!r}"
    except EngineError as e:
        problem = f"Jinja that fails ({e.found})"
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
    """Render messages as a prompt, which ends where the answer begins."""
    return ChatTemplate(artifact.PromptTemplate(template.name, template.jinja, bos_token, eos_token)).render(messages)


def read_template(file: StoredPath) -> str:
    """Read a Jinja file; raises CompileError if it is too large, cannot be read or is not UTF-8."""
    with explained(STAGE, f"template {file}", expected="a Jinja file", remedy="check the path"):
        refuse_pointer(file)
        return read_bounded(STAGE, file, _MOST_BYTES).decode()


def _from_argument(argument: str) -> PromptTemplate:
    if template := _from_text(argument):
        return template
    file = Path(argument)
    if file.suffix in JINJA_SUFFIXES:
        return PromptTemplate(file.name, read_template(file))
    raise CompileError(
        STAGE,
        f"--template {argument!r}",
        found="an unknown name",
        expected=f"one of {', '.join(TEMPLATES)}, a .jinja file, Jinja text with {{{{, or a format with {{x}}",
        remedy=f"say for example --template {next(iter(TEMPLATES))}",
    )


def _from_text(text: str) -> PromptTemplate | None:
    """The template for a name, Jinja text or a format; None for other text."""
    if text in TEMPLATES:
        return PromptTemplate(text, TEMPLATES[text])
    if "{{" in text or "{%" in text:
        return PromptTemplate("inline", text)
    return PromptTemplate("format", _from_format(text)) if "{x}" in text else None


def _from_format(text: str) -> str:
    """Convert a format such as `Human: {x}\\n\\nAssistant:` to Jinja; \\n and \\t in it are a line feed and a tab."""
    before, after = text.replace("\\n", "\n").replace("\\t", "\t").split("{x}", 1)
    return _turns(f"{before!r} + text + {after!r}", "message['content'] + eos_token")
