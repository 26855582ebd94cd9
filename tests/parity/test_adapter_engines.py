"""Engines of a base with merged adapters against PEFT, unquantized and in INT8."""

from __future__ import annotations

from pathlib import Path

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.reading import AdapterChoice, Reading
from belle_compile.runtime import Engine
from tests.compiler.checkpoint.overlays.adapters import QKV, Floats, make_adapter, peft_logits
from tests.parity.engines import BEST_ISA, Builder
from tests.parity.stepping import relative_error
from tests.parity.variants import hf_logits, random_ids

TOLERANCE = 1e-5  # of the largest logit
INT8_TOLERANCE = 0.1  # rounding of weights and activations: 0.06 is seen, and 0.05 without an adapter


def engine_logits(base: Path, out: Path, quantization: str, adapters: list[tuple[Path, float]], ids: list[int]) -> Floats:
    reading = Reading(adapters=tuple(AdapterChoice(str(adapter), scale) for adapter, scale in adapters))
    request = BuildRequest(base, out, quantization=quantization, isas=(BEST_ISA,), reading=reading)
    with Engine.load(build(request), threads=2, kv_tokens=128) as engine:
        logits: Floats = engine.logits(ids)
    return logits


def test_an_unquantized_engine_with_two_adapters(builder: Builder, tmp_path: Path) -> None:
    base = builder.checkpoint("llama_gqa")
    config = {"r": 16, "lora_alpha": 32, "target_modules": QKV["llama"], "use_dora": True}
    adapters = [(make_adapter(base, tmp_path / f"adapter-{seed}", seed=seed, **config), 1 - 0.5 * seed) for seed in (0, 1)]
    ids = random_ids(base, 21)
    found = engine_logits(base, tmp_path / "engine", "none", adapters, ids)
    assert relative_error(found, peft_logits(base, adapters, ids)) < TOLERANCE


def test_an_int8_engine_whose_head_is_a_table_of_its_own(builder: Builder, tmp_path: Path) -> None:
    """The adapter changes the embedding alone."""
    base = builder.checkpoint("bloom")
    targets = [*QKV["bloom"], "word_embeddings"]
    adapter = make_adapter(base, tmp_path / "adapter", r=16, lora_alpha=32, target_modules=targets)
    ids = random_ids(base, 21)
    found = engine_logits(base, tmp_path / "engine", "int8", [(adapter, 1.0)], ids)
    assert relative_error(found, peft_logits(base, [(adapter, 1.0)], ids)) < INT8_TOLERANCE
    assert relative_error(found, hf_logits(base, ids)) > 3 * INT8_TOLERANCE, "the adapter changes something"
