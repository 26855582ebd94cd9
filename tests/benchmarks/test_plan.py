"""Which device a driver's name means."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")
pytest.importorskip("transformers")

from belle_compile.compiler.devices import GIB
from benchmarks.plan import device_of


@pytest.mark.parametrize(
    ("gpu", "gib", "name"),
    [
        ("NVIDIA H200", 139, "h200"),
        ("NVIDIA H100 80GB HBM3", 78, "h100"),
        ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39, "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", 79, "a100-80g"),
        ("NVIDIA GeForce RTX 4090", 23, "rtx4090"),
        ("NVIDIA L40S", 44, "l40s"),
        ("Tesla T4", 14, "t4"),
    ],
)
def test_names_of_drivers(gpu: str, gib: int, name: str) -> None:
    assert device_of(gpu, gib * GIB).name == name


def test_a_gpu_that_is_not_known() -> None:
    with pytest.raises(SystemExit, match="NVIDIA B200 is none of the devices"):
        device_of("NVIDIA B200", 180 * GIB)
