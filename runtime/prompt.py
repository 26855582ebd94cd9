"""Chat templates: Jinja in the sandbox and with the helpers that Transformers gives them."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from belle_compile.runtime.artifact import PromptTemplate
from belle_compile.runtime.errors import EngineError

Message = Mapping[str, str]


class ChatTemplate:
    """An engine's prompt template, compiled once."""

    def __init__(self, template: PromptTemplate) -> None:
        self._template = template
        try:
            self._compiled = _environment().from_string(template.jinja)
        except jinja2.TemplateError as error:
            raise EngineError("prompt", f"template {template.name} does not parse", found=str(error)) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt for `messages`, each {"role": "user" | "assistant" | …, "content": text}, ready for the answer."""
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                expected = '{"role": …, "content": …}'
                raise EngineError("prompt", "a chat message does not fit", found=repr(message)[:80], expected=expected)
        try:
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self._template.bos_token,
                eos_token=self._template.eos_token,
            )
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise EngineError("prompt", f"template {self._template.name} refused the messages", found=str(error)) from error


class _Generation(Extension):
    """{% generation %} … {% endgeneration %} marks answers for training; here its content is only rendered."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(helpers)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters, which a prompt must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
