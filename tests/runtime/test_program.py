"""program.json: round trip and validation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.program import (
    KV,
    AllReduce,
    Arena,
    Call,
    Candidates,
    FusionCalls,
    Input,
    KVLayout,
    Launch,
    Logits,
    Program,
    Scratch,
    Weight,
)
from belle_compile.runtime.program_json import check_seal, program_from_json, program_to_json, read_program, seal

X = Arena(0, 128, "T")
CALLS = (
    Call("embedding", "embed", "T", (Input("token_ids"), Weight("table"), X, Input("T")), kernel="gather", bytes=512),
    Call("attention", "h.0", "T", (X, KV(0, "k"), KV(0, "v")), variants=((1, "a1"), (16, "a16"), (None, "a"))),
    Call("linear", "head", "R", (X, Weight("head")), variants=((4, "l4"), (8, "l8"))),
)
PROGRAM = Program(
    max_tokens=32, max_rows=8, max_sequences=4, max_blocks=4, arena_bytes=8192, vocab_size=100,
    logits=Logits(4096, 128, 0, 100), kv=KVLayout(2, 2, 16, "float16"), calls=CALLS, kernel_calls=FusionCalls(9, 3),
)  # fmt: skip


def test_round_trip_is_exact(tmp_path: Path) -> None:
    text = program_to_json(PROGRAM)
    (tmp_path / "program.json").write_text(text)
    read = read_program(tmp_path)
    assert read == PROGRAM and program_to_json(read) == text
    assert json.loads(text)["calls"][1]["variants"] == {"1": "a1", "16": "a16", "any": "a"}
    assert json.loads(text)["calls"][1]["args"][1] == {"kv": 0, "part": "k"}


def test_variants_come_in_row_order_whatever_the_order_in_the_file() -> None:
    call = program_from_json(program_to_json(PROGRAM)).calls[1]
    assert [call.kernel_for(rows) for rows in (1, 2, 16, 17, 400)] == ["a1", "a16", "a16", "a", "a"]
    assert CALLS[0].kernel_for(3) == "gather"


def test_names_and_sizes() -> None:
    assert PROGRAM.kernel_names() == ("a", "a1", "a16", "gather", "l4", "l8")
    assert PROGRAM.weight_names() == ("head", "table")
    assert PROGRAM.max_context == 64
    assert PROGRAM.kv.part_block_bytes == 2 * 16 * 16 * 2
    assert PROGRAM.kv.block_bytes == 4 * PROGRAM.kv.part_block_bytes


def test_an_int8_cache_has_aligned_scales_before_the_values() -> None:
    assert KVLayout(1, 2, 64, "int8").part_block_bytes == 2 * (16 * 4 + 64 * 16)
    assert KVLayout(1, 1, 10, "int8").part_block_bytes == 16 * 4 + 192
    assert KVLayout(3, 1, 10, "int8").block_bytes == 6 * 256
    assert [KVLayout(3, 1, 10, "int8").part_offset(KV(1, part)) for part in ("k", "v")] == [2 * 256, 3 * 256]


def spoil(change: Callable[[dict[str, Any]], object]) -> str:
    plain = json.loads(program_to_json(PROGRAM))
    change(plain)
    return json.dumps(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(format=1), r"format of program\.json: found 1, expected 6; rebuild"),
        (lambda p: p.update(extra=2), "field extra does not fit: found an unknown field"),
        (lambda p: p.pop("kv"), "field kv does not fit: found nothing, expected an object"),
        (lambda p: p.update(block_size=32), "field block_size does not fit: found 32, expected 16"),
        (lambda p: p.update(max_rows=0), "field max_rows does not fit: found 0, expected at least 1"),
        (
            lambda p: p["kv"].update(dtype="int4"),
            r"kv\.dtype does not fit: found int4, expected float32 or bfloat16 or float16 or int8",
        ),
        (lambda p: p["logits"].update(stride=64), "field logits does not fit: found bytes 4096 to 6144, stride 64"),
        (lambda p: p["logits"].update(offset=4160), "field logits does not fit"),
        (lambda p: p["logits"].update(count=64), "field logits does not fit: found tokens 0 to 64, expected this rank's part"),
        (lambda p: p.update(rank=1), "field rank does not fit: found 1 of 1, expected a rank below their number"),
        (lambda p: p["calls"][2].update(all_reduce={"width": 8, "stride": 8}), r"\(head\)\.all_reduce does not fit"),
        (lambda p: p["calls"][2].update(all_reduce={"width": 8}), r"calls\[2\]\.stride does not fit: found nothing"),
        (
            lambda p: p["calls"][0]["args"].append({"arena": 8, "bytes": 8}),
            r"calls\[0\] \(embed\)\.args does not fit: found arena off",
        ),
        (
            lambda p: p["calls"][0]["args"].append({"arena": 8128, "bytes": 65}),
            "found arena bytes 8128 to 8193, expected bytes wi",
        ),
        (lambda p: p["calls"][0]["args"].append({"arena": 64, "bytes": True}), r"calls\[0\]\.args\[4\] does not fit"),
        (lambda p: p["calls"][0]["args"].append({"arena": 64, "bytes": 0}), "found arena offset 64, 0 bytes, expected a mul"),
        (lambda p: p.update(max_tokens=65), "found arena bytes 0 to 8320, expected bytes within 8192"),
        (lambda p: p["kv"].update(head_dim=0), "kv.head_dim does not fit: found 0, expected at least 1"),
        (lambda p: p["calls"][0]["args"].append({"kv": 2, "part": "k"}), "found kv layer 2, expected a layer below 2"),
        (lambda p: p["calls"][0]["args"].append({"input": "mask"}), "found input mask, expected one of token_ids"),
        (lambda p: p["calls"][0]["args"].append({"kv": 0, "part": "q"}), r"calls\[0\]\.args\[4\] does not fit"),
        (lambda p: p["calls"][0].update(rows="B"), r"calls\[0\] \(embed\)\.rows does not fit: found B, expected T or R"),
        (lambda p: p["calls"][0].pop("kernel"), r"\(embed\)\.kernel does not fit: found none, expected a kernel for up to 32"),
        (lambda p: p["calls"][2]["variants"].pop("8"), r"\(head\)\.kernel does not fit: found l4, expected a kernel for up"),
        (lambda p: p["calls"][2]["variants"].update(many="x"), r"variants does not fit: found many: x, expected a row count"),
        (lambda p: p["calls"][0].update(bytes="1"), r"calls\[0\]\.bytes does not fit"),
        (lambda p: p["calls"][0].pop("node"), r"calls\[0\]\.node does not fit: found nothing"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        program_from_json(spoil(change))


SUM = Call("all-reduce", "h.0", "T", (Arena(64, 256, "T"),), all_reduce=AllReduce(60, 64))
SHARE = dataclasses.replace(PROGRAM, rank=1, ranks=2, logits=Logits(4096, 128, 50, 50), arena_bytes=8256, calls=(*CALLS, SUM))


def test_a_rank_has_its_part_of_the_vocabulary_and_sums_over_ranks() -> None:
    assert program_from_json(program_to_json(SHARE)) == SHARE
    assert SHARE.kernel_names() == PROGRAM.kernel_names()
    with pytest.raises(EngineError, match=r"\(h\.0\)\.args does not fit: found arena bytes 64 to 8256, expected"):
        program_to_json(dataclasses.replace(SHARE, arena_bytes=8192))
    with pytest.raises(EngineError, match="field logits does not fit: found tokens 51 to 101, expected this rank's part"):
        program_to_json(dataclasses.replace(SHARE, logits=Logits(4096, 128, 51, 50)))

    narrow = dataclasses.replace(SUM, args=(Arena(64, 128, "T"),))
    with pytest.raises(EngineError, match=r"all_reduce does not fit: found 60 of 64 elements, 32 rows, expected rows in"):
        program_to_json(dataclasses.replace(SHARE, calls=(*CALLS, narrow)))


def test_kernels_are_for_one_program(tmp_path: Path) -> None:
    text = program_to_json(PROGRAM)
    (tmp_path / "program.json").write_text(text)
    (tmp_path / "kernels").write_bytes(b"code" + seal(text))
    check_seal(tmp_path, tmp_path / "kernels")
    (tmp_path / "program.json").write_text(text.replace('"h.0"', '"h.1"'))
    with pytest.raises(EngineError, match=r"^engine: kernels was made for another program\.json than that of .*; copy"):
        check_seal(tmp_path, tmp_path / "kernels")
    (tmp_path / "kernels").write_bytes(b"short")
    with pytest.raises(EngineError, match=r"kernels was made for another program\.json"):
        check_seal(tmp_path, tmp_path / "kernels")
    (tmp_path / "kernels").unlink()
    with pytest.raises(EngineError, match="kernels is missing; copy the engine again"):
        check_seal(tmp_path, tmp_path / "kernels")


@pytest.mark.parametrize(
    ("text", "found"),
    [("[" * 200_000, "nested too deeply"), ('{"format": NaN}', "NaN, which is no number"), (b"\xff", "can't decode byte")],
)
def test_text_that_is_no_json(text: str | bytes, found: str) -> None:
    with pytest.raises(EngineError, match=rf"program\.json is not JSON: found .*{found}"):
        program_from_json(text)


def test_inconsistent_program_is_not_written() -> None:
    with pytest.raises(EngineError, match=r"program: field logits does not fit.*fix the backend"):
        program_to_json(dataclasses.replace(PROGRAM, arena_bytes=4096))


def test_missing_and_broken_file(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"program\.json is missing; copy the engine again"):
        read_program(tmp_path)
    (tmp_path / "program.json").write_text("{")
    with pytest.raises(EngineError, match=r"program\.json is not JSON"):
        read_program(tmp_path)


LAUNCH = Launch("fn", 128, 4096, (3, 2, 1), 16, 40, 0, ("IMMA",))
GPU = dataclasses.replace(
    PROGRAM,
    calls=(*CALLS[:2], dataclasses.replace(CALLS[2], args=(X, Scratch(256, 256)), when="runs")),
    launches=dict.fromkeys((*PROGRAM.kernel_names(), "l4b"), LAUNCH),
    alternatives={"l4": {"4": ("l4b",)}},
    scratch_bytes=512,
    candidates=Candidates(0, 64, 320, 8),
    kv=KVLayout(2, 2, 16, "float16", transposed_keys=False),
)


def test_programs_for_gpus() -> None:
    read = program_from_json(program_to_json(GPU))
    assert read == GPU and read.calls[2].when == "runs" and read.calls[0].when == "always"
    assert "l4b" in read.kernel_names()
    assert [LAUNCH.blocks(rows) for rows in (1, 16, 17)] == [(3, 2, 1), (3, 2, 1), (6, 2, 1)]
    assert dataclasses.replace(LAUNCH, rows=0).blocks(99) == (3, 2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["launches"].pop("l4b"), "launches does not fit: found none of l4b, expected one of every kernel"),
        (lambda p: p["launches"]["a"].update(grid=[1, 2]), r"launches\.a does not fit: found grid \(1, 2\), 128 threads"),
        (lambda p: p["launches"]["a"].update(threads=2048), "found grid .*, 2048 threads, expected a grid of three, 1 to 1024"),
        (lambda p: p["calls"][2].update(when="never"), r"when does not fit: found never, expected always or alone or runs"),
        (lambda p: p["calls"][2]["args"][1].update(scratch=512), "found scratch bytes 512 to 768, expected bytes within 512"),
        (
            lambda p: p["candidates"].update(capacity=4096),
            "candidates does not fit: found bytes up to .*, expected rows",
        ),
    ],
)
def test_what_does_not_fit_of_a_gpu_program_is_named(change: Callable[[dict[str, Any]], object], message: str) -> None:
    plain = json.loads(program_to_json(GPU))
    change(plain)
    with pytest.raises(EngineError, match=message):
        program_from_json(json.dumps(plain))
