"""Chat templates: the Jinja environment that Transformers gives them, for builds and for serving."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension
from jinja2.visitor import NodeVisitor

from belle_compile.runtime.artifact import PromptTemplate
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.prompt_limits import LimitedEnvironment, limited

Message = Mapping[str, str]
Variables = Mapping[str, Any]

VARIABLES = "chat_template_kwargs"  # what they are called in requests and in errors, as in vLLM and SGLang
_OBJECT = 'a JSON object, such as {"enable_thinking": false}'
_MOST_VARIABLES = 1 << 16  # characters of JSON
# What Transformers sets in every rendering, which no request may set.
_SET_HERE = frozenset(
    """messages tools documents add_generation_prompt bos_token eos_token unk_token sep_token pad_token cls_token mask_token
    additional_special_tokens
    """.split()
)


class ChatTemplate:
    """A prompt template, compiled once. Builds and the runtime both use this class, and so accept the same templates."""

    def __init__(self, template: PromptTemplate) -> None:
        """Raises `EngineError` for a template that is not Jinja."""
        self._template = template
        environment = chat_environment()
        try:
            with limited():
                self._compiled = environment.from_string(template.jinja)
                read = _variables(environment.parse(template.jinja))
        except Exception as error:  # Python's compiler refuses some of what Jinja lets through
            raise EngineError("prompt", f"template {template.name} does not parse", found=_words(error)) from error
        # The names of the variables that a request may set, because the template reads them, such as enable_thinking.
        self.variables = frozenset(read - _SET_HERE - environment.globals.keys())

    def check_variables(self, given: Any) -> dict[str, Any]:
        """Return a copy of the variables that a request sets, with the types of JSON.

        Raises `EngineError` for what is no object of JSON or too large, and for a variable that the template does not read:
        the prompt could not depend on it as the request asks for.
        """
        if not isinstance(given, Mapping):
            raise EngineError("prompt", VARIABLES, found=type(given).__name__, expected=_OBJECT)
        unread = next((name for name in given if name not in self.variables), None)
        if unread is not None:
            names = ", ".join(sorted(self.variables))
            expected = f"variables that template {self._template.name} reads: {names or 'none'}"
            raise EngineError("prompt", VARIABLES, found=repr(unread)[:80], expected=expected)
        try:
            text = json.dumps(given, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise EngineError("prompt", VARIABLES, found=_words(error), expected="values that JSON has") from None
        if len(text) > _MOST_VARIABLES:
            found = f"{len(text)} characters of JSON"
            raise EngineError("prompt", VARIABLES, found=found, expected=f"at most {_MOST_VARIABLES}")
        variables: dict[str, Any] = json.loads(text)
        return variables

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, variables: Variables | None = None
    ) -> str:
        """Return the prompt for `messages`, each {"role": "user" | "assistant" | …, "content": text}, ready for the answer.

        `variables` are those that `check_variables` returned. Raises `EngineError` for a message without these keys, and when
        the template fails or refuses the messages. Tools and documents are None, as in Transformers when there are none.
        """
        for message in messages:
            if not _fits(message):
                expected = '{"role": …, "content": …}'
                raise EngineError("prompt", "a chat message does not fit", found=repr(message)[:80], expected=expected)
        try:
            with limited():
                return self._compiled.render(
                    variables or {},
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    bos_token=self._template.bos_token,
                    eos_token=self._template.eos_token,
                )
        except Exception as error:  # a template can fail in any way that Python can
            name = self._template.name
            raise EngineError("prompt", f"template {name} refused the messages", found=_words(error)) from error


class _FirstUses(NodeVisitor):
    """Visits a template from top to bottom; `loaded` says of each name whether it is read before the template sets it."""

    def __init__(self) -> None:
        self.loaded: dict[str, bool] = {}

    def visit_Name(self, node: jinja2.nodes.Name) -> None:
        self.loaded.setdefault(node.name, node.ctx == "load")

    def visit_Assign(self, node: jinja2.nodes.Assign) -> None:
        self.visit(node.node)
        self.visit(node.target)

    def visit_For(self, node: jinja2.nodes.For) -> None:
        self.visit(node.iter)
        self.generic_visit(node)


def _variables(template: jinja2.nodes.Template) -> set[str]:
    """The names that a template reads from outside. Jinja alone also names those that are set in one branch only."""
    uses = _FirstUses()
    uses.visit(template)
    return {name for name in jinja2.meta.find_undeclared_variables(template) if uses.loaded.get(name)}


def parse_variables(text: str, what: str = f"--{VARIABLES.replace('_', '-')}", stage: str = "prompt") -> dict[str, Any]:
    """Return the template variables that an option has as JSON; raises `EngineError` of `stage` for what is no object."""
    try:
        variables = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineError(stage, what, found=_words(error), expected=_OBJECT) from None
    if not isinstance(variables, dict):
        raise EngineError(stage, what, found=type(variables).__name__, expected=_OBJECT)
    return variables


def _fits(message: Any) -> bool:
    """Whether a message has a role and a content: text, parts of text, or None beside calls of tools."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        return False
    content = message["content"]
    return isinstance(content, (str, list, tuple)) or (content is None and bool(message.get("tool_calls")))


def chat_environment() -> LimitedEnvironment:
    """Return the environment that chat templates are written for; Transformers' is in utils/chat_template_utils.py.

    It has `raise_exception`, `strftime_now`, the filter `tojson`, loop controls and the block `generation`. Being sandboxed, it
    lets no template reach files or the internals of Python objects. Time, output and memory are limited, see
    prompt_limits.py.
    """
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.add_filter("tojson", _tojson)
    environment.globals.update({"raise_exception": _raise_exception, "strftime_now": _strftime_now})
    return environment


class _GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %} marks answers for training. Only its content is rendered here.

    As in Transformers, where the content is a call block, variables that are set in the block end with it.
    """

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Scope:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


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


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
