"""Overlays: a low-rank product that is added to weights, as adapters do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from belle_compile.compiler.checkpoint import LazyTensor, open_checkpoint
from belle_compile.compiler.checkpoint.overlays.base import Overlaid
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.families import build_graph
from belle_compile.compiler.ir.lazy import describe, quantized_source
from tests.compiler.checkpoint.formats.test_gguf import write_gguf

UP = "model.layers.0.mlp.up_proj.weight"
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LowRank:
    """Adds a @ b to the tensor `target`; both factors are in one .npz file."""

    file: Path
    target: str = UP

    def apply(self, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Overlaid:
        base = tensors.get(self.target)
        if base is None:
            raise CompileError(
                "checkpoint", f"adapter {self.file}", found=f"{self.target}", expected="a tensor of the checkpoint"
            )

        def load(start: int, stop: int) -> Floats:
            factors = np.load(self.file)
            summed: Floats = base.rows(start, stop) + factors["a"][start:stop] @ factors["b"]
            return summed

        changed = {self.target: base.changed(f"low rank of {self.file.name}", load)}
        return Overlaid({**tensors, **changed}, (f"{self.file.name} changes {len(changed)} tensor",), (self.file,))


def factors(file: Path, rows: int, columns: int, seed: int = 0) -> Floats:
    """Write two factors; returns their product."""
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((rows, 2)).astype(np.float32), random.standard_normal((2, columns)).astype(np.float32)
    np.savez(file, a=a, b=b)
    product: Floats = a @ b
    return product


def test_an_overlay_changes_values_and_says_so(llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.npz"
    plain = open_checkpoint(llama)
    product = factors(adapter, *plain.tensors[UP].shape)
    checkpoint = open_checkpoint(llama, overlays=[LowRank(adapter)])
    np.testing.assert_array_equal(checkpoint.tensors[UP].read(), plain.tensors[UP].read() + product)
    np.testing.assert_allclose(checkpoint.tensors[UP].rows(3, 7), plain.tensors[UP].rows(3, 7) + product[3:7], rtol=1e-5)
    assert {name: tensor for name, tensor in checkpoint.tensors.items() if name != UP} == {
        name: tensor for name, tensor in plain.tensors.items() if name != UP
    }
    assert checkpoint.notes == (*plain.notes, "adapter.npz changes 1 tensor")
    assert checkpoint.digests().keys() == {*plain.digests(), "adapter.npz"}


def test_the_chain_of_a_weight_names_its_overlays_in_order(llama: Path, tmp_path: Path) -> None:
    files = tmp_path / "first.npz", tmp_path / "second.npz"
    shape = open_checkpoint(llama).tensors[UP].shape
    for seed, file in enumerate(files):
        factors(file, *shape, seed=seed)
    checkpoint = open_checkpoint(llama, overlays=[LowRank(file) for file in files])
    tensor = build_graph(checkpoint).graph.initializers[UP].const_value
    assert tensor is not None
    assert describe(tensor) == f"{UP} <- low rank of second.npz <- low rank of first.npz <- model.safetensors: {UP}"
    files[1].unlink()
    with pytest.raises(
        CompileError, match=r"while computing .*up_proj\.weight <- low rank of second\.npz <- low rank of first"
    ):
        tensor.numpy()


def test_an_overlaid_tensor_is_not_quantized_any_more(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    plain = open_checkpoint(tmp_path)
    factors(tmp_path / "adapter.npz", *plain.tensors[UP].shape)
    graph = build_graph(open_checkpoint(tmp_path, overlays=[LowRank(tmp_path / "adapter.npz")])).graph
    assert quantized_source(graph.initializers[UP]) is None
    assert quantized_source(graph.initializers["lm_head.weight"]) is not None


def test_an_overlay_for_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"adapter .*: found h\.0\.x, expected a tensor of the checkpoint"):
        open_checkpoint(llama, overlays=[LowRank(tmp_path / "adapter.npz", "h.0.x")])


def test_files_of_the_same_name_have_digests_of_their_own(llama: Path, tmp_path: Path) -> None:
    files = [tmp_path / folder / "adapter.npz" for folder in ("first", "second")]
    for seed, file in enumerate(files):
        file.parent.mkdir()
        factors(file, *open_checkpoint(llama).tensors[UP].shape, seed=seed)
    digests = open_checkpoint(llama, overlays=[LowRank(file) for file in files]).digests()
    assert digests["adapter.npz"] != digests["second/adapter.npz"]
