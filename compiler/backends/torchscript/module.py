"""A rank's program as a torch.nn.Module, and its trace as the file that libtorch loads.

torch.jit is deprecated. So the module is the smallest thing around the program: it calls one operator for each kernel call, and
holds nothing else. What follows torch.jit, such as torch.export, can take the same module.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import torch

from belle_compile.compiler.backends.base import PackedTensor
from belle_compile.compiler.backends.torchscript.operators import ARENA, CACHE, Operator
from belle_compile.runtime.executors.torchscript_model import INPUTS, attribute_of
from belle_compile.runtime.program import KV, Arena, Arg, Call, Input, Program, Weight

Tensor = torch.Tensor

_TRACED = "belle_traced"  # namespace of the operators while they are traced
_DEBUGGING = (".debug_pkl", ".data/serialization_id")  # members with paths of sources, and a digest of these
_MANGLED = re.compile(rb"[./]___torch_mangle_\d+")  # part of the name of a type that the process has traced before


class ProgramModule(torch.nn.Module):
    """The program of one rank. Its weights are buffers, as rows of bytes; a module file holds empty ones, which are replaced.

    `forward` takes the tensors that `INPUTS` names: the arena (float32) and the KV cache (uint8), which it writes to, and the
    program's inputs (int32). It returns the float32 logits [most rows, vocabulary], of which the first R are those of the
    step: a view of the arena.
    """

    def __init__(self, program: Program, operators: Sequence[Operator], weights: Sequence[PackedTensor]) -> None:
        super().__init__()
        self._program = program
        self._operators = {operator.kernel: operator for operator in operators}
        attributes = [attribute_of(weight.name) for weight in weights]
        assert len(set(attributes)) == len(attributes), "names that differ in punctuation alone"
        for attribute in attributes:
            self.register_buffer(attribute, torch.empty(0))

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(INPUTS, tensors, strict=True))
        for call in self._program.calls:
            self._run(call, given)
        logits = self._program.logits
        rows = given[ARENA].narrow(0, logits.offset // 4, logits.stride * self._program.max_rows)
        return rows.view(self._program.max_rows, logits.stride).narrow(1, 0, logits.count)

    def _run(self, call: Call, given: dict[str, Tensor]) -> None:
        assert call.kernel is not None, "one rank, and kernels without variants"
        operator = self._operators[call.kernel]
        memories = [given[name] for kind, name in zip(operator.kinds, operator.names, strict=True) if kind in "ak"]
        getattr(getattr(torch.ops, _TRACED), call.kernel)(*memories, *(self._argument(arg, given) for arg in call.args))

    def _argument(self, arg: Arg, given: dict[str, Tensor]) -> Tensor | int:
        match arg:
            case Arena(offset, _, _):
                return offset
            case KV():
                return self._program.kv.part_offset(arg)
            case Weight(name):
                weight: Tensor = getattr(self, attribute_of(name))
                return weight
            case Input(name):
                return given[name]
        raise AssertionError(f"kernels for processors have no argument {arg}")


def trace(program: Program, operators: Sequence[Operator], weights: Sequence[PackedTensor]) -> bytes:
    """The traced module of a program as an archive, whose operators `in_namespace` puts into a namespace. While it is
    traced, operators do nothing, so that no library has to be loaded here."""
    module = ProgramModule(program, operators, weights).eval()
    logits = program.logits
    arena = torch.empty(logits.offset // 4 + logits.stride * program.max_rows)
    number = torch.zeros(1, dtype=torch.int32)
    example = {name: number for name in INPUTS} | {ARENA: arena, CACHE: torch.empty(1, dtype=torch.uint8)}
    library: Any = torch.library.Library(_TRACED, "DEF")  # type: ignore[no-untyped-call]
    try:
        for operator in operators:
            library.define(operator.schema)
            library.impl(operator.kernel, lambda *arguments: None, "CPU")
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # torch.jit is deprecated, see above
            traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
                module, tuple(example[name] for name in INPUTS), check_trace=False, _store_inputs=False
            )
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer)
    finally:
        library._destroy()
    return buffer.getvalue()


def in_namespace(archive: bytes, namespace: str) -> bytes:
    """The archive with operators of that namespace, and without what depends on where and when it was made.

    Names in pickles end with a newline, so that they can be shortened.
    """
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            if not name.endswith(_DEBUGGING):
                content, (_, _, member) = source.read(name), name.partition("/")
                if member.startswith(("code/", "data.pkl")):
                    content, member = _MANGLED.sub(b"", content), _MANGLED.sub(b"", member.encode()).decode()
                    content = content.replace(f".{_TRACED}.".encode(), f".{namespace}.".encode())
                target.writestr(zipfile.ZipInfo(f"model/{member}"), content)
    return result.getvalue()
