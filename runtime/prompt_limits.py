"""Limits of time, output and memory for prompt templates, which are data: one may loop or multiply for ever.

Everything in a template that may take long or much memory passes through `Budget`: loops and calls a step at a time, operators
and filters with the size of what they are about to make. What remains between two checks works on values of limited size, and
so takes limited time.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any, cast

import jinja2
import jinja2.nodes as nodes
import jinja2.parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 1.0  # of processor time, so that a loaded host refuses no template
LARGEST = 16 << 20  # characters of a text, or elements of a list
TOTAL = 128 << 20  # characters and elements of all texts and lists that a rendering makes, the prompt included
_BITS = 1 << 16  # of an integer
_DIGITS = len(str(LARGEST))
# Widths in format strings that are as long as the largest text, or that come from arguments.
_WIDE_PERCENT = re.compile(rf"%[^%a-zA-Z]*(?:\d{{{_DIGITS},}}|\*)")
_WIDE_BRACES = re.compile(rf"\{{[^{{}}]*:[^{{}}]*(?:\d{{{_DIGITS},}}|\{{)")
_STEPS = "belle_steps"  # names of filters that the syntax tree gets, which no template can name: they are no default ones
_JOINED = "belle_joined"


class TemplateLimit(jinja2.TemplateError):
    """A template that takes too long, or makes too much."""


class Budget:
    """What a rendering may still use."""

    def __init__(self) -> None:
        self._end = time.thread_time() + SECONDS
        self._left = TOTAL

    def step(self) -> None:
        """Take notice of one step: of a loop, or a call."""
        if time.thread_time() > self._end:
            raise TemplateLimit(f"it takes more than {SECONDS:g} s")

    def take(self, size: int) -> None:
        """Take room for a text or list of `size` characters or elements, before it is made or right after."""
        self._left -= size
        if size > LARGEST or self._left < 0:
            raise TemplateLimit(f"it makes a text or list of more than {LARGEST} characters or elements, or {TOTAL} in all")


_current: ContextVar[Budget] = ContextVar("budget of the rendering under way")


@contextmanager
def limited() -> Iterator[Budget]:
    """Give what is compiled or rendered in the `with` block a budget."""
    token = _current.set(budget := Budget())
    try:
        yield budget
    except (MemoryError, RecursionError) as error:
        raise TemplateLimit("it needs too much memory, or calls itself too deeply") from error
    finally:
        _current.reset(token)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that charges a budget. Templates are compiled and rendered within `limited`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_charge_output, **options)
        self.filters = {name: _limited_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {_STEPS: _steps, _JOINED: _joined}
        self.globals["lipsum"] = _no_lipsum

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, or replace one."""
        self.filters[name] = _limited_filter(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = jinja2.parser.Parser(self, source, name, filename).parse()
        charging: nodes.Template = _Charging().visit(tree)
        charging.set_environment(self)
        return charging

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator whose result has a size that fits."""
        budget = _current.get()
        budget.step()
        _charge_operator(budget, operator, left, right)
        return self.binop_table[operator](left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method."""
        budget = _current.get()
        budget.step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int, float)):
            _charge_method(budget, owner, str(getattr(method, "__name__", "")), args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        _charge(budget, result)
        return result


class _Charging(NodeTransformer):
    """Lets each loop charge its steps, and each concatenation its size."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = cast(nodes.For, self.generic_visit(node))
        constant = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        constant += sum(len(const.value) for const in node.find_all(nodes.Const) if isinstance(const.value, str))
        node.iter = _filter(cast(nodes.Expr, node.iter), _STEPS, nodes.Const(constant))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = cast(nodes.Concat, self.generic_visit(node))
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)


def _filter(value: nodes.Expr, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(arguments), [], None, None, lineno=value.lineno)


def _steps(values: Iterable[Any], constant: int) -> Iterable[Any]:
    """Charge each step of a loop, with the `constant` text in its body. What has a length keeps it, for `loop.length`."""
    return _Sized(values, constant) if hasattr(values, "__len__") else _charged(values, constant)


class _Sized:
    """An iterable with a length whose steps are charged."""

    def __init__(self, values: Any, constant: int) -> None:
        self._values, self._constant = values, constant

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return _charged(self._values, self._constant)


def _charged(values: Iterable[Any], constant: int) -> Iterator[Any]:
    budget = _current.get()
    for value in values:
        budget.step()
        budget.take(constant)
        yield value


def _joined(parts: list[Any]) -> str:
    """What the operator ~ makes of its operands."""
    texts = [str(part) for part in parts]
    _current.get().take(sum(map(len, texts)))
    return "".join(texts)


def _charge_output(value: Any) -> Any:
    """Charge what an expression adds to the prompt."""
    text = value if isinstance(value, str) else str(value)
    budget = _current.get()
    budget.step()
    budget.take(len(text))
    return text


def _charge(budget: Budget, result: Any) -> None:
    if isinstance(result, (str, bytes, list, tuple, dict)):
        budget.take(len(result))


def _charge_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge the result of an operator before it is computed."""
    integers = isinstance(left, int) and isinstance(right, int)
    if integers and operator == "*" and left.bit_length() + right.bit_length() > _BITS:
        raise TemplateLimit(f"it computes an integer of more than {_BITS} bits")
    if integers and operator == "**" and left.bit_length() * right > _BITS:
        raise TemplateLimit(f"it computes an integer of more than {_BITS} bits")
    sized = [value for value in (left, right) if isinstance(value, (str, bytes, list, tuple))]
    if operator == "+" and len(sized) == 2:
        budget.take(len(left) + len(right))
    elif operator == "*" and len(sized) == 1:
        count = right if sized[0] is left else left
        budget.take(len(sized[0]) * max(0, count) if isinstance(count, int) else 0)
    elif operator == "%" and isinstance(left, (str, bytes)):
        _charge_format(budget, _WIDE_PERCENT, left, right if isinstance(right, (tuple, dict)) else (right,))


def _charge_format(budget: Budget, wide: re.Pattern[str], text: str | bytes, arguments: Iterable[Any]) -> None:
    """Refuse widths that are too large, and charge the format with its arguments, each as often as there are fields."""
    if wide.search(text if isinstance(text, str) else text.decode("latin-1")):
        raise TemplateLimit("a format string has a width that is too large, or comes from an argument")
    values = arguments.values() if isinstance(arguments, Mapping) else arguments
    longest = max((len(value) for value in values if isinstance(value, (str, bytes))), default=0)
    fields = len(re.findall(rb"[%{]" if isinstance(text, bytes) else "[%{]", text))  # type: ignore[arg-type]
    budget.take(len(text) + fields * longest)


def _charge_method(
    budget: Budget, owner: str | bytes | int | float, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Charge the result of a method of a text or number before it is computed."""
    values = [*args, *kwargs.values()]
    if name in ("format", "format_map"):
        fields = values[0] if name == "format_map" and values and isinstance(values[0], Mapping) else values
        _charge_format(budget, _WIDE_BRACES, cast(str, owner), fields)
        return
    widths = [value for value in values if isinstance(value, int)]
    if isinstance(owner, (int, float)):
        budget.take(max(0, *widths) if name == "to_bytes" and widths else 0)
    elif name in ("center", "ljust", "rjust", "zfill"):
        budget.take(max(len(owner), *widths, 0))
    elif name == "expandtabs":
        budget.take(len(owner) + max(0, *widths, 8) * owner.count(b"\t" if isinstance(owner, bytes) else "\t"))  # type: ignore[arg-type]
    elif name == "replace" and len(values) > 1:
        _charge_replacement(budget, owner, values[0], values[1])
    elif name == "join" and values:
        _charge_join(budget, owner, values[0])
    elif name == "translate" and values and isinstance(values[0], Mapping):
        longest = max((len(value) for value in values[0].values() if isinstance(value, str)), default=1)
        budget.take(len(owner) * max(1, longest))


def _charge_replacement(budget: Budget, text: Any, old: Any, new: Any) -> None:
    if isinstance(text, (str, bytes)) and isinstance(old, type(text)) and isinstance(new, type(text)):
        places = text.count(old)  # type: ignore[arg-type]
        budget.take(len(text) + places * len(new))


def _charge_join(budget: Budget, separator: Any, values: Any) -> None:
    if isinstance(values, (list, tuple)):
        length = sum(len(value) for value in values if isinstance(value, (str, bytes)))
        budget.take(length + len(values) * len(separator))


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that charges a step, what it is about to make, and what it has made."""
    charge, signature = _CHARGES.get(name), inspect.signature(function)

    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = _current.get()
        budget.step()
        if charge is not None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            charge(budget, bound.arguments)
            args, kwargs = bound.args, bound.kwargs
        result = function(*args, **kwargs)
        _charge(budget, result)
        return result

    return update_wrapper(charged, function)


# What filters charge before they make it, given their arguments by Jinja's names.


def _charge_center(budget: Budget, given: dict[str, Any]) -> None:
    budget.take(max(len(str(given["value"])), given["width"]))


def _charge_indent(budget: Budget, given: dict[str, Any]) -> None:
    text, width = str(given["s"]), given["width"]
    budget.take(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else max(0, width)))


def _charge_replace(budget: Budget, given: dict[str, Any]) -> None:
    _charge_replacement(budget, *(str(given[name]) for name in ("s", "old", "new")))


def _charge_joined(budget: Budget, given: dict[str, Any]) -> None:
    given["value"] = list(given["value"])
    length = 0 if given["attribute"] else sum(len(value) for value in given["value"] if isinstance(value, str))
    budget.take(length + len(given["value"]) * len(str(given["d"])))


def _charge_formatted(budget: Budget, given: dict[str, Any]) -> None:
    _charge_format(budget, _WIDE_PERCENT, str(given["value"]), given.get("kwargs") or given.get("args", ()))


def _charge_wrapped(budget: Budget, given: dict[str, Any]) -> None:
    text = str(given["s"])
    lines = text.count("\n") + 1 + 2 * len(text) // max(1, given["width"])
    budget.take(len(text) + lines * len(given["wrapstring"] or "\n"))


def _charge_sum(budget: Budget, given: dict[str, Any]) -> None:
    if not isinstance(given["start"], (int, float)):
        raise TemplateLimit("it sums what are no numbers")


def _charge_round(budget: Budget, given: dict[str, Any]) -> None:
    if abs(given["precision"]) > _BITS.bit_length():
        raise TemplateLimit(f"it rounds to {given['precision']} digits")


def _charge_json(budget: Budget, given: dict[str, Any]) -> None:
    if isinstance(given["indent"], int) and given["indent"] > _BITS.bit_length():
        raise TemplateLimit(f"it indents JSON by {given['indent']} characters")


_CHARGES: dict[str, Callable[[Budget, dict[str, Any]], None]] = {
    "batch": lambda budget, given: budget.take(max(0, given["linecount"])),
    "center": _charge_center,
    "format": _charge_formatted,
    "indent": _charge_indent,
    "join": _charge_joined,
    "replace": _charge_replace,
    "round": _charge_round,
    "slice": lambda budget, given: budget.take(max(0, given["slices"])),
    "sum": _charge_sum,
    "tojson": _charge_json,
    "wordwrap": _charge_wrapped,
}


def _no_lipsum(*args: Any, **kwargs: Any) -> str:
    raise jinja2.TemplateError("lipsum makes random text, which no prompt template needs")
