"""Checkpoints of integers, in every layout that is read: values, integers, and the logits of Transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from belle_compile.compiler.checkpoint import open_checkpoint
from belle_compile.compiler.families import build_graph
from tests.parity.stepping import Stepper, relative_error
from tests.parity.variants import hf_logits, make_bloom, make_llama, random_ids
from tests.quantized_releases import Release, awq, compressed_tensors, gptq, gptq_file

TOLERANCE = 1e-5  # float32 sums in another order

LAYOUTS: dict[str, Callable[[Path, Path], Release]] = {
    "BELLE's 8 bits": lambda source, out: gptq_file(source, out, bits=8, group=128),
    "BELLE's 4 bits": lambda source, out: gptq_file(source, out, "bloom7b-2m-4bit-128g.pt", bits=4, group=128),
    "BELLE's per channel": lambda source, out: gptq_file(source, out, bits=8, group=-1),
    "GPTQ, 2 bits": lambda source, out: gptq(source, out, bits=2, group=32, symmetric=False),
    "GPTQ, 3 bits": lambda source, out: gptq(source, out, bits=3, group=64),
    "GPTQ, act-order": lambda source, out: gptq(source, out, bits=4, group=32, act_order=True, symmetric=False),
    "GPTQ, uneven groups": lambda source, out: gptq(source, out, bits=8, group=96),
    "GPTQ, version 2": lambda source, out: gptq(source, out, "gptq_v2", bits=4, group=128, symmetric=False),
    "AWQ": lambda source, out: awq(source, out, group=64),
    "W8A8": compressed_tensors,
    "W8A8, zero points": lambda source, out: compressed_tensors(source, out, symmetric=False),
    "W8A8, groups": lambda source, out: compressed_tensors(source, out, group=32),
    "W4A16": lambda source, out: compressed_tensors(source, out, "pack-quantized", bits=4, group=32, symmetric=False),
    "W8A16": lambda source, out: compressed_tensors(source, out, "pack-quantized", bits=8),
}
MODELS: dict[str, Callable[..., Path]] = {
    "bloom": lambda directory: make_bloom(directory, hidden_size=128, n_layer=1, n_head=4),
    "llama": lambda directory: make_llama(
        directory, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=2
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    for name in MODELS:
        (root / name).mkdir()
    return {name: make(root / name) for name, make in MODELS.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_stands_for_its_weights(layout: str, model: str, sources: dict[str, Path], tmp_path: Path) -> None:
    release = LAYOUTS[layout](sources[model], tmp_path / "release")
    checkpoint = open_checkpoint(release.directory)
    family = load_file(release.plain / "model.safetensors")
    expected = {name.removeprefix("transformer."): tensor.numpy() for name, tensor in family.items()}
    for name, values in expected.items():
        tensor = checkpoint.tensors[name]
        np.testing.assert_array_equal(tensor.read(), values, err_msg=name)
        if len(tensor.shape) > 1:
            np.testing.assert_array_equal(tensor.rows(3, 21), values[3:21], err_msg=name)
    ids = random_ids(release.plain, 12)
    found = Stepper(build_graph(checkpoint)).step({0: ids})[0]
    assert relative_error(found, hf_logits(release.plain, ids)) < TOLERANCE
