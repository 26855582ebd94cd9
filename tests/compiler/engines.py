"""A small engine directory made by the writer alone, for tests that need one and no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.compiler.backends import Footprint, Payload
from belle_compile.compiler.backends.base import KVCache
from belle_compile.compiler.writer import EngineWriter, write_ranks
from belle_compile.runtime.artifact import (
    GenerationDefaults,
    KernelCalls,
    Manifest,
    ModelInfo,
    PassRecord,
    PromptTemplate,
    Requirements,
    SpecialTokens,
    TargetInfo,
)

MANIFEST = Manifest(
    model=ModelInfo("llama", "tiny", 1234, {"hidden_size": 32, "num_layers": 2}, {"model.safetensors": "0" * 64}),
    target=TargetInfo("cpu", "tvm", ("amx", "avx512vnni", "avx2"), Requirements("x86_64", ("avx2",), 1 << 20)),
    passes=(
        PassRecord("open-checkpoint", {"template": "belle-llama"}, 0, ("the tokenizer was converted",)),
        PassRecord("fuse-add-norm", {}, 4, ("h.1: the sum has another reader",)),
    ),
    quantization={"scheme": "w8a8", "weights": "int8 per output channel"},
    kernel_calls=KernelCalls(before=70, after=30),
    prompt_template=PromptTemplate("belle-llama", "{{ messages }}", "<s>", "</s>"),
    special_tokens=SpecialTokens(1, (2,), None, False),
    generation=GenerationDefaults(),
    toolchain={"belle-compile": "0.1.0"},
    files={},
)


@dataclass(frozen=True)
class Tensor:
    name: str
    array: npt.NDArray[Any]
    before: Callable[[], None] = lambda: None  # called when the tensor's turn comes

    @property
    def dtype(self) -> str:
        return str(self.array.dtype.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def pack(self) -> npt.NDArray[Any]:
        self.before()
        return self.array


def tensors() -> list[Tensor]:
    return [
        Tensor("layer.weight", np.arange(2 * 4 * 16 * 4, dtype=np.int8).reshape(2, 4, 16, 4)),
        Tensor("layer.weight.scale", np.linspace(0, 1, 32, dtype=np.float32)),
    ]


def payload(weights: Sequence[Tensor]) -> Payload:
    footprint = Footprint(640, 0, 0, KVCache("float32", 64, 16, 64))
    files = {"program.json": b"{}", "kernels-avx2.so": b"\x7fELF"}
    return Payload(files, [weights], footprint, KernelCalls(70, 30))


def nothing() -> None:
    pass


def write_engine(out: Path, *, force: bool = False, before: Callable[[], None] = nothing, tokenizer: bytes = b"{}") -> Path:
    """Writes an engine of some kilobytes; `before` is called with everything but its last tensor written."""
    first, last = tensors()
    with EngineWriter(out, force=force) as writer:
        writer.write("tokenizer.json", tokenizer)
        write_ranks(writer, [payload([first, Tensor(last.name, last.array, before)])])
        return writer.finish(MANIFEST)
