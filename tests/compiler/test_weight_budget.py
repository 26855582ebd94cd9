"""INT4 weights within a number of bytes: which layers get more bits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from belle_compile.compiler import cli
from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.errors import CompileError
from belle_compile.compiler.weight_budget import parse_size
from belle_compile.runtime.artifact import read_manifest
from tests.parity.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("no_kernels")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS["llama_tied"](tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    path.write_text("".join(json.dumps({"question": f"the dogs run {i}", "std_answer": f"{i} cats"}) + "\n" for i in range(40)))
    return path


def request(checkpoint: Path, out: Path, requests: Path | None, budget: int | None, **changes: Any) -> BuildRequest:
    return BuildRequest(
        checkpoint, out, **{"quantization": "int4", "isas": ("avx2",), "calibration": requests, "gate": None} | changes,
        weight_budget=budget,
    )  # fmt: skip


def weight_bytes(engine: Path) -> int:
    with safe_open(engine / "rank0" / "weights.safetensors", "numpy") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())


def more_bits(engine: Path) -> dict[str, int]:
    """The linears with more than 4 bits, and their bits, by the manifest."""
    options = [record.options for record in read_manifest(engine).passes if record.name == "use-more-bits"]
    return {name: bits for each in options for bits in (6, 8) for name in each[f"int{bits}"]}


def test_layers_get_more_bits_within_the_budget(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    """A budget of any size is kept, a larger one gives more bits, and no layer loses some by it."""
    least = weight_bytes(build(request(checkpoint, tmp_path / "least", requests, None)))
    most = weight_bytes(build(request(checkpoint, tmp_path / "most", requests, 10**9)))
    assert least < most and set(more_bits(tmp_path / "most").values()) == {8}
    chosen: list[dict[str, int]] = []
    for part in (0.0, 0.3, 0.7):
        budget = int(least + part * (most - least))
        engine = build(request(checkpoint, tmp_path / f"engine-{part}", requests, budget))
        assert weight_bytes(engine) <= budget
        chosen.append(more_bits(engine))
    assert not chosen[0] and 6 in chosen[1].values() and set(chosen[2].values()) == {6, 8}
    assert all(chosen[2][name] >= bits for name, bits in chosen[1].items()) and chosen[1] != chosen[2]
    with pytest.raises(CompileError, match=r"a weight budget below what 4 bits need: found .*B, expected at least .*B; give a"):
        build(request(checkpoint, tmp_path / "none", requests, least - 1))
    assert not (tmp_path / "none").exists()


def test_linears_that_are_fused_stay_together(checkpoint: Path, requests: Path, tmp_path: Path) -> None:
    least = weight_bytes(build(request(checkpoint, tmp_path / "least", requests, None)))
    chosen = more_bits(build(request(checkpoint, tmp_path / "engine", requests, least + 8000)))
    assert chosen
    for name, bits in chosen.items():
        for one, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            assert not name.endswith(one) or all(chosen[name.replace(one, other)] == bits for other in others)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quantization": "int8"}, "a weight budget: found weights that are int8 per output channel, expected INT4 weights; "
         "build with --quant int4."),
        ({"calibration": None}, "a weight budget: found no requests to rank layers by, expected requests; give some with "
         "--calibration, or let the model write them with --calibration self."),
        ({"size_budget": 1.2}, "a weight budget: found a size budget too; leave one of them out."),
    ],
)  # fmt: skip
def test_budgets_that_nothing_can_be_done_with(
    checkpoint: Path, requests: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(CompileError) as error:
        build(request(checkpoint, tmp_path / "engine", requests, 10**9, **changes))
    assert str(error.value) == f"quantization: {sentence}"


@pytest.mark.parametrize(("text", "count"), [("104MB", 104_000_000), ("3.6 gb", 3_600_000_000), ("2GiB", 2**31), ("12", 12)])
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "0", "MB", "-3MB", "3XB", "nan", "1e9", "0.1B"])
def test_what_is_no_size(checkpoint: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["build", str(checkpoint), "-o", str(tmp_path / "engine"), "--quant", "int4", f"--weight-budget={text}"])
    assert end.value.code == 1
    assert f"a weight budget: found {text!r}, expected bytes, such as 3.6GB, 104MB or 2GiB." in capsys.readouterr().err
