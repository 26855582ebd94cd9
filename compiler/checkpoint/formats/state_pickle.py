"""Read the pickle of a state dict without unpickling it: an interpreter of the few instructions that such a pickle needs.

Python's unpickler calls what a pickle names. This one calls nothing: of the names that may occur, each stands for an entry in a
table here, and values are plain data. So no pickle can run code, whatever it holds, and its memory is bounded by its length.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

_STEPS = 1 << 18  # of a pickle; a tensor takes about 40
MOST_BYTES = 8 << 20  # of a pickle
_MOST_AXES = 8
_MOST = 1 << 62  # of a size or an offset
# The types of storages, of which a tensor of type _rebuild_tensor_v3 states a dtype beside bytes.
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip
_STORAGE = re.compile(r"torch(?:\.storage)?\.(\w+Storage)")
_DTYPE = re.compile(r"torch\.((?:u?int|b?float)\d+\w*|bool)")
_HASHABLE = (str, int, float, bytes, type(None))


class MoreThanTensors(Exception):
    """A pickle that asks for something else than tensors; the message names it."""


@dataclass(frozen=True, eq=False)
class Storage:
    """The reference to values that a file holds elsewhere: `count` values of `dtype` from value `start` of those under
    `key`."""

    key: str
    dtype: str
    count: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """A tensor over values of a storage; `offset` and `strides` count values of `dtype`, which may differ from the
    storage's."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Name:
    """A function or type that a pickle names."""

    text: str


class _Mark:
    """The place on the stack that an instruction for several values reaches back to."""


def read_pickle(stream: IO[bytes]) -> tuple[Any, list[Storage]]:
    """Read one pickle, up to its end; returns its value, in which tensors are `PickledTensor`s, and all storages in it.

    Raises ValueError for what is no pickle or too large, and `MoreThanTensors`.
    """
    machine = _Machine()
    for step, (opcode, argument, _) in enumerate(pickletools.genops(_Bounded(stream))):  # type: ignore[arg-type]
        if step == _STEPS:
            raise ValueError(f"a pickle of more than {_STEPS} instructions")
        machine.follow(opcode.name, argument)
    return machine.result(), machine.storages


class _Bounded:
    """A stream that refuses to give more bytes than a pickle may have, before it allocates them."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._left = stream, MOST_BYTES

    def read(self, count: int) -> bytes:
        self._take(count)
        return self._stream.read(count)

    def readline(self) -> bytes:
        line = self._stream.readline(self._left + 1)
        self._take(len(line))
        return line

    def _take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError(f"a pickle of more than {MOST_BYTES} bytes")


class _Machine:
    """The stack and the memory of a pickle's instructions."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.storages: list[Storage] = []

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise ValueError("a pickle that leaves no value")
        return self._stack[0]

    def follow(self, name: str, argument: Any) -> None:
        """Do what an instruction says; raises IndexError, KeyError or TypeError, which are no pickle's, for one that does not
        fit."""
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _ARGUMENTS:
            self._stack.append(argument)
        elif name in _EMPTY:
            self._stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            size = _TUPLES[name]
            values = self._stack[len(self._stack) - size :]
            if len(values) != size:
                raise ValueError("too few values for a tuple")
            self._stack[len(self._stack) - size :] = [tuple(values)]
        elif (instruction := _INSTRUCTIONS.get(name)) is not None:
            instruction(self, argument)
        elif name not in _IGNORED:
            raise MoreThanTensors(f"instruction {name}")

    def mark(self, _: object) -> None:
        self._stack.append(_Mark)

    def above_mark(self) -> list[Any]:
        """Remove the values above the topmost mark, and the mark."""
        values = []
        while (value := self._stack.pop()) is not _Mark:
            values.append(value)
        return values[::-1]

    def collect(self, make: Callable[[list[Any]], Any]) -> None:
        self._stack.append(make(self.above_mark()))

    def append(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise ValueError("elements of something that is no list")
        self._stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not dict:
            raise ValueError("entries of something that is no dict")
        self._stack[-1].update(_entries(values))

    def put(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: Any) -> None:
        self._stack.append(self._memo[index])

    def name(self, argument: Any) -> None:
        """Push a name: of two words in the instruction, or of two strings on the stack."""
        if argument is None:
            last, first = self._stack.pop(), self._stack.pop()
            argument = f"{_text(first)} {_text(last)}"
        text = str(argument).replace(" ", ".", 1)
        if text not in _CALLS and text not in _TYPES and not _STORAGE.fullmatch(text) and not _DTYPE.fullmatch(text):
            raise MoreThanTensors(f"GLOBAL {text[:100]}")
        self._stack.append(_Name(text))

    def call(self, _: object) -> None:
        """Push what a function returns: an entry of the table of those that make tensors and dicts."""
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(_called(function, arguments))

    def build(self, _: object) -> None:
        """Drop the attributes of a dict, such as the versions of modules."""
        self._stack.pop()
        if type(self._stack[-1]) is not dict:
            raise MoreThanTensors("attributes of something that is no dict")

    def storage(self, _: object) -> None:
        """Push the reference to a storage: ("storage", type, key, device, number of values, view)."""
        reference = self._stack.pop()
        if type(reference) is not tuple or len(reference) not in (5, 6) or _text(reference[0]) != "storage":
            raise MoreThanTensors("a reference to something that is no storage")
        _, stored, key, _device, count, *views = reference
        if type(stored) is not _Name or not (match := _STORAGE.fullmatch(stored.text)):
            raise MoreThanTensors("a storage of no type")
        if match[1] not in _STORAGES:
            raise MoreThanTensors(stored.text)
        start = 0
        if views and views[0] is not None:  # of a part of another storage, in the format before PyTorch 1.6
            _, start, count = views[0]
        whole = _whole(count, start)
        self.storages.append(Storage(_text(key), _STORAGES[match[1]], *whole))
        self._stack.append(self.storages[-1])


def _text(value: Any) -> str:
    """A string, which Python 2 wrote as bytes."""
    if not isinstance(value, str | bytes):
        raise ValueError("a number in the place of a text")
    return value.decode("ascii") if isinstance(value, bytes) else value


def _whole(*numbers: Any) -> tuple[int, ...]:
    if any(type(number) is not int or not 0 <= number < _MOST for number in numbers):
        raise ValueError("sizes that are no whole numbers")
    return numbers


def _entries(values: list[Any]) -> dict[Any, Any]:
    """A dict of keys and values that follow each other. Tuples as keys are refused: hashing nested ones takes any time."""
    keys = values[::2]
    if len(values) % 2 or any(not isinstance(key, _HASHABLE) for key in keys):
        raise MoreThanTensors("a dict with keys that are no names")
    return dict(zip(keys, values[1::2], strict=True))


def _called(function: Any, arguments: Any) -> Any:
    if type(function) is not _Name or function.text not in _CALLS or type(arguments) is not tuple:
        raise MoreThanTensors(f"a call of {function.text if type(function) is _Name else 'a value'}")
    return _CALLS[function.text](*arguments)


def _sizes(sizes: Any) -> tuple[int, ...]:
    if type(sizes) is not tuple or len(sizes) > _MOST_AXES:
        raise ValueError("a size that is no tuple of a few numbers")
    return sizes


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> PickledTensor:
    return _tensor_of_type(storage, offset, shape, strides, False, None, None)


def _tensor_of_type(
    storage: Any, offset: Any, shape: Any, strides: Any, _gradient: Any, _hooks: Any, dtype: Any, *_: Any
) -> PickledTensor:
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor without a storage, a shape and strides")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise ValueError(f"a tensor of {len(shape)} axes and {len(strides)} strides")
    stated = _DTYPE.fullmatch(dtype.text) if type(dtype) is _Name else None
    (first,) = _whole(offset)
    return PickledTensor(storage, stated[1] if stated else storage.dtype, first, _whole(*shape), _whole(*strides))


def _with_attributes(function: Any, _type: Any, arguments: Any, _attributes: Any) -> Any:
    return _called(function, arguments)


_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = frozenset(
    "BININT BININT1 BININT2 INT LONG LONG1 LONG4 BINFLOAT FLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE STRING "
    "BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_EMPTY: Mapping[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.collect(tuple),
    "LIST": lambda machine, _: machine.collect(list),
    "DICT": lambda machine, _: machine.collect(_entries),
    "APPEND": lambda machine, _: machine.append([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.above_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine._stack.pop(-2), machine._stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.above_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
# What may be called, and types that are arguments of calls.
_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch.Size": _sizes,
    "torch.device": lambda *device: None,
    "torch.serialization._get_layout": lambda name: None,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": lambda value, *_: value,
    "torch._utils._rebuild_parameter_with_state": lambda value, *_: value,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}
_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
