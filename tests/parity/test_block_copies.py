"""Blocks of the KV cache that are shared, and copied in the middle: the bits of a sequence that computed all of its tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.kv_types import KV_TYPES
from belle_compile.runtime import Engine
from tests.parity.copies import logits_over_copies
from tests.parity.engines import BEST_ISA, Builder
from tests.parity.variants import random_ids

ROOT = Path(__file__).parents[2]
ON_RANKS = """
import sys
from belle_compile.runtime import Engine
from tests.parity.copies import logits_over_copies
with Engine.load(sys.argv[1], threads=1, kv_tokens=512) as engine:
    pairs = logits_over_copies(engine, [int(token) for token in sys.argv[2].split()], 21)
print([bool((expected == found).all()) for expected, found in pairs])
"""


@pytest.mark.parametrize("kv_cache", KV_TYPES)
def test_logits_over_copied_blocks_have_the_same_bits(builder: Builder, kv_cache: str) -> None:
    ids = random_ids(builder.checkpoint("llama_gqa"), 200)
    with Engine.load(builder.engine("llama_gqa", "int8", kv_cache=kv_cache), threads=2, kv_tokens=512) as engine:
        for common in (17, 31):
            for expected, found in logits_over_copies(engine, ids, common):
                np.testing.assert_array_equal(found, expected)


def test_each_rank_copies_its_part(builder: Builder) -> None:
    pytest.importorskip("mpi4py")
    from belle_compile.runtime.distributed.launcher import mpiexec

    checkpoint = builder.checkpoint("llama_gqa")
    out = builder.root / "copies-cpux2"
    engine = build(BuildRequest(checkpoint, out, target="cpux2", quantization="none", isas=(BEST_ISA,)))
    ids = " ".join(map(str, random_ids(checkpoint, 200)))
    done = subprocess.run(
        [mpiexec(), "-n", "2", sys.executable, "-c", ON_RANKS, engine, ids], cwd=ROOT, capture_output=True, text=True,
        timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[True, True, True]\n", "")
