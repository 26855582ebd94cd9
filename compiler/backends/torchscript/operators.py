"""Kernels as operators of libtorch: their schemas, and the C source that registers them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from belle_compile.compiler.backends.program.kernel import Kernel
from belle_compile.runtime.program import KV, Arena, Program

_SOURCE = Path(__file__).parent / "native" / "operators.c"
ARENA, CACHE = "arena", "cache"
# By type of a program's argument: the letter in native/operators.c, and the type in a schema. All others are tensors.
_OFFSETS = {Arena: "o", KV: "c"}


@dataclass(frozen=True)
class Operator:
    """A kernel as an operator.

    Its arguments are the arena, the KV cache if the kernel uses it, and one for each of the kernel's pointers: a byte offset in
    one of the two, or a tensor. `kinds` has a letter for each argument, as in native/operators.c.
    """

    kernel: str
    names: tuple[str, ...]
    kinds: str

    @property
    def schema(self) -> str:
        """The operator's schema, which says that it writes to arena and cache."""
        types = {"a": "Tensor(a!)", "k": "Tensor(b!)", "t": "Tensor", "o": "int", "c": "int"}
        arguments = ", ".join(f"{types[kind]} {name}" for kind, name in zip(self.kinds, self.names, strict=True))
        return f"{self.kernel}({arguments}) -> ()"


def operators_of(program: Program, kernels: Sequence[Kernel]) -> list[Operator]:
    """The operators of the kernels that a program calls, in the order of their names."""
    pointers = {kernel.name: [name for name, _ in kernel.pointers()] for kernel in kernels}
    found: dict[str, Operator] = {}
    for call in program.calls:
        for _, kernel in call.kernels():
            kinds = "".join(_OFFSETS.get(type(arg), "t") for arg in call.args)
            memories = {ARENA: "a"} | ({CACHE: "k"} if "c" in kinds else {})
            operator = Operator(kernel, (*memories, *pointers[kernel]), "".join(memories.values()) + kinds)
            assert found.setdefault(kernel, operator) == operator, f"calls of {kernel} differ in the kinds of their arguments"
    return [found[kernel] for kernel in sorted(found)]


def source_of(operators: Sequence[Operator], namespace: str) -> str:
    """The C source that registers operators in a namespace."""
    lines = [f'  X({one.kernel}, "{one.schema}", "{one.kinds}") \\' for one in operators]
    head = [f'#define NAMESPACE "{namespace}"', "#define OPERATORS(X) \\", *lines, ""]
    return "\n".join(head) + "\n" + _SOURCE.read_text(encoding="utf-8")


def namespace_of(operators: Sequence[Operator], *depends: str) -> str:
    """A namespace for the operators of one library, named after all that the library and its module `depends` on.

    A process may load several libraries, in which kernels of the same name are other code. And kernels trust the offsets in a
    module, so a module of another program must not find the operators that it names.
    """
    texts = [one.schema for one in operators] + [_SOURCE.read_text(encoding="utf-8"), *depends]
    return "belle_" + hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
