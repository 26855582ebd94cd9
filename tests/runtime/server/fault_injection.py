"""Faults at chosen points of the program: at every `await` and every allocation of the modules of the server's request path.

The points are found in the source. While `Instrumented` is active, the code of each function of these modules asks `Faults` at
each of its points, before and after, whether it is to fail there.
"""

from __future__ import annotations

import ast
import asyncio
import gc
import importlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType, TracebackType
from typing import Any

_SERVER, _SERVING = "belle_compile.runtime.server.", "belle_compile.runtime.serving."
MODULES = (
    *(_SERVER + name for name in ("connections", "middleware", "calls", "answers", "formats", "served_engine", "engine_swap")),
    *(_SERVER + name for name in ("service", "context")),
    *(_SERVER + f"routes.{name}" for name in ("chat", "completions", "tokenize", "adapters", "admin")),
    *(_SERVING + name for name in ("async_streams", "asynchronous", "streams", "step_loop", "scheduler", "kv_blocks")),
    *(_SERVING + name for name in ("prefix_cache", "generation", "admission", "waiting")),
    *(_SERVING + f"result_cache.{name}" for name in ("cache", "single_flight", "background", "memory", "sqlite")),
)
# The last names of what is called to get something that must be given back: blocks, rows, slots, places in queues and counts,
# tasks, timers, and jobs of threads.
ALLOCATING = frozenset(
    "take grow share acquire replace adopt keep chain publish BlockTable _announce _place _take insort heappush schedule step "
    "ensure_future create_task create_future call_later call_soon call_soon_threadsafe submit run_in_executor to_thread Thread "
    "put put_nowait hold enter begin announce lead_alone watch accompany channel Generation Flight".split()
)
# The same, where the last name stands for other calls too.
_ALLOCATING_SOURCES = frozenset({"self.scheduler.add", "self.waiting.add", "self._deadlines.add", "self._free_slots.pop"})
_HOOK = "__faults__"
BEFORE, AFTER = "before", "after"
_MOST_SOURCE = 60  # characters of a point's source in its name


@dataclass(frozen=True)
class Point:
    """An `await` or a call that allocates: `module: function: source`, with a number where a function has equal ones."""

    name: str
    awaits: bool


class _Injected:
    """What marks an exception as injected."""


class InjectedError(RuntimeError, _Injected):
    """An error at an `await`."""


class InjectedReset(ConnectionResetError, _Injected):
    """A connection that breaks where something is sent."""


class InjectedShortage(MemoryError, _Injected):
    """Memory that runs out at an allocation."""


@dataclass(frozen=True)
class Fault:
    """An exception at the `occurrence`-th passage of a point. `error` None cancels the task that passes it."""

    point: str
    position: str  # BEFORE or AFTER
    occurrence: int
    error: type[BaseException] | None


class Faults:
    """The fault that is to happen next, and what was passed since it was set. Any thread may pass points."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self.passed: Counter[tuple[str, str]] = Counter()

    def set(self, fault: Fault | None) -> None:
        """Let a fault happen, once, and count anew."""
        with self._lock:
            self._fault, self.passed = fault, Counter()

    @property
    def waiting(self) -> bool:
        """Whether the fault has not happened."""
        return self._fault is not None

    def before(self, name: str) -> None:
        """Pass a point: what it waits for or allocates is asked for next."""
        self._pass(name, BEFORE)

    def made(self, _: None, made: Any, name: str) -> Any:
        """Pass a point whose call has returned `made`."""
        self._pass(name, AFTER)
        return made

    async def awaited(self, _: None, awaitable: Any, name: str) -> Any:
        """Pass a point once what it waits for is there."""
        result = await awaitable
        self._pass(name, AFTER)
        return result

    def _pass(self, name: str, position: str) -> None:
        with self._lock:
            self.passed[name, position] += 1
            fault = self._fault
            if fault is None or (fault.point, fault.position, fault.occurrence) != (
                name,
                position,
                self.passed[name, position],
            ):
                return
            self._fault = None
        if fault.error is not None:
            raise fault.error("injected")
        task = asyncio.current_task()
        assert task is not None, "only tasks wait"
        task.cancel()


class _Transformer(ast.NodeTransformer):
    """Puts hooks around the points of a module, and lists them."""

    def __init__(self, module: str) -> None:
        self._where = [module.removeprefix("belle_compile.runtime.")]
        self._seen: Counter[str] = Counter()
        self.points: list[Point] = []

    def _visit_scope(self, node: Any) -> Any:
        self._where.append(node.name)
        node.body = [self.visit(statement) for statement in node.body]
        self._where.pop()
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _visit_scope

    def visit_Await(self, node: ast.Await) -> ast.AST:
        name = self._add(ast.unparse(node), awaits=True)
        # The call that is awaited is no point of its own, but its arguments may be.
        value = self.generic_visit(node.value)
        return ast.copy_location(ast.Await(self._hook("awaited", name, value)), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        source = ast.unparse(function)
        allocates = (called in ALLOCATING and "lock" not in source) or source in _ALLOCATING_SOURCES
        if not allocates or len(self._where) == 1:
            return self.generic_visit(node)
        name = self._add(f"{source}()", awaits=False)
        return ast.copy_location(self._hook("made", name, self.generic_visit(node)), node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> ast.AST:
        raise AssertionError(f"{self._where}: line {node.lineno}: faults are not injected into asynchronous loops yet")

    visit_AsyncWith = visit_AsyncFor

    def _add(self, source: str, *, awaits: bool) -> str:
        module, *scopes = self._where
        name = f"{module}: {'.'.join(scopes)}: {source[:_MOST_SOURCE]}"
        self._seen[name] += 1
        if self._seen[name] > 1:
            name += f" #{self._seen[name]}"
        self.points.append(Point(name, awaits))
        return name

    @staticmethod
    def _hook(method: str, name: str, value: ast.AST) -> ast.Call:
        def call(method: str, *arguments: Any) -> ast.Call:
            function = ast.Attribute(ast.Name(_HOOK, ast.Load()), method, ast.Load())
            return ast.Call(function, list(arguments), [])

        return call(method, call("before", ast.Constant(name)), value, ast.Constant(name))


def _transformed(module: ModuleType) -> tuple[list[Point], CodeType]:
    """The points of a module, and its code with hooks around them."""
    assert module.__file__
    transformer = _Transformer(module.__name__)
    tree = transformer.visit(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
    code = compile(ast.fix_missing_locations(tree), module.__file__, "exec", dont_inherit=True)
    return transformer.points, code


def _functions_of(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _functions_of(constant)


def find_points() -> list[Point]:
    """Return the points of all modules of the request path."""
    return [point for name in MODULES for point in _transformed(importlib.import_module(name))[0]]


class Instrumented:
    """Lets the functions of the request path pass their points while the `with` block runs; gives the `Faults`."""

    def __init__(self) -> None:
        self._originals: list[tuple[FunctionType, CodeType]] = []
        self._modules = [importlib.import_module(name) for name in MODULES]

    def __enter__(self) -> Faults:
        faults = Faults()
        replaced: dict[tuple[str, str, int], CodeType] = {}
        for module in self._modules:
            vars(module)[_HOOK] = faults
            for code in _functions_of(_transformed(module)[1]):
                replaced[code.co_filename, code.co_qualname, code.co_firstlineno] = code
        for function in [each for each in gc.get_objects() if isinstance(each, FunctionType)]:
            original = function.__code__
            code = replaced.get((original.co_filename, original.co_qualname, original.co_firstlineno))
            if code is not None and code.co_freevars == original.co_freevars:
                self._originals.append((function, original))
                function.__code__ = code
        return faults

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for function, original in self._originals:
            function.__code__ = original
        for module in self._modules:
            del vars(module)[_HOOK]
