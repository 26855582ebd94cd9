"""Checkpoints and TorchScript engines for tests, built once, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.runtime import Engine
from belle_compile.runtime.host import host_isas
from tests import kernel_cache
from tests.parity.engines import EngineStepper
from tests.parity.variants import VARIANTS

kernel_cache.install()

Floats = npt.NDArray[np.float32]
FIXTURE = Path(__file__).parents[3] / "fixtures" / "tiny-bloom-trained"

needs_avx2 = pytest.mark.skipif("avx2" not in host_isas(), reason="the engines have kernels for AVX2")


class Engines:
    """Checkpoints of the variants and their engines below a directory, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def checkpoint(self, variant: str) -> Path:
        """A variant's checkpoint, or the trained BLOOM."""
        path = self.root / variant
        if variant == "trained":
            return FIXTURE
        return path if path.exists() else VARIANTS[variant](path)

    def engine(self, variant: str, quantization: str = "none", kv_cache: str = "auto", backend: str = "torchscript") -> Path:
        """The engine of a variant."""
        out = self.root / "-".join([variant, quantization, kv_cache, backend])
        if not out.exists():
            build(
                BuildRequest(
                    self.checkpoint(variant), out, quantization=quantization, kv_cache=kv_cache, backend=backend,
                    isas=("avx2",), drift=False,
                )
            )  # fmt: skip
        return out


@contextmanager
def stepping(directory: Path, sequences: int, threads: int = 1) -> Iterator[EngineStepper]:
    """Steps of an engine."""
    with Engine.load(directory, threads=threads, kv_tokens=512) as engine:
        yield EngineStepper(engine, sequences)


def logits_of(directory: Path, steps: Sequence[Mapping[int, Sequence[int]]], sequence: int, threads: int = 1) -> Floats:
    """The logits of a sequence's tokens over several steps."""
    with stepping(directory, 1 + max(number for step in steps for number in step), threads) as stepper:
        found = [stepper.step(step) for step in steps]
    return np.concatenate([logits[sequence] for logits in found if sequence in logits])
