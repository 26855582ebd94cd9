"""CpuExecutor with real kernels: a table lookup, a cache write and a head of two variants."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from belle_compile.runtime import Engine, SamplingParams, host
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import cpu
from belle_compile.runtime.executors.cpu import CpuExecutor, choose_isa
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.program import KV, WEIGHTS_NAME, Arena, Call, FusionCalls, Input, KVLayout, Logits, Program, Weight
from tests.runtime.fakes import VOCABULARY, byte_tokenizer, make_directory
from tests.runtime.rank_files import change_program, write_rank

pytest.importorskip("tvm")

from belle_compile.compiler.backends.tvm import library
from belle_compile.compiler.backends.tvm.isa import AVX2

pytestmark = pytest.mark.skipif("avx2" not in host.host_isas(), reason="needs AVX2")

HIDDEN, STRIDE, MAX_TOKENS, MAX_ROWS = 64, 320, 24, 8
LOGITS = MAX_TOKENS * HIDDEN * 4
X, OUT = Arena(0, 4 * HIDDEN, "T"), Arena(LOGITS, 4 * STRIDE, "R")
PROGRAM = Program(
    max_tokens=MAX_TOKENS, max_rows=MAX_ROWS, max_sequences=3, max_blocks=4, arena_bytes=LOGITS + MAX_ROWS * STRIDE * 4,
    vocab_size=VOCABULARY, logits=Logits(LOGITS, STRIDE, 0, VOCABULARY), kv=KVLayout(2, 1, 16, "float32"),
    calls=(
        Call("embedding", "embed", "T", (Input("T"), Input("token_ids"), Weight("table"), X), kernel="lookup"),
        Call("cache", "h.1", "T", (Input("T"), Input("positions"), Input("token_ids"), KV(1, "v")), kernel="mark"),
        Call("linear", "head", "R", (Input("R"), Input("logit_rows"), X, Weight("head"), OUT),
             variants=((1, "head_one"), (None, "head_any"))),
    ),
    kernel_calls=FusionCalls(3, 3),
)  # fmt: skip


def lookup() -> Any:
    """x[t, :] = table[token_ids[t], :]"""

    def body(T: Any, count: Any, ids: Any, table: Any, x: Any) -> None:
        with T.parallel(0, count[0]) as t, T.serial(0, HIDDEN) as i:
            T.buffer_store(x, table[ids[t] * HIDDEN + i], [t * HIDDEN + i])

    return kernel("lookup", ["int32", "int32", "float32", "float32"], body)


def mark() -> Any:
    """v[positions[t]] = token_ids[t]"""

    def body(T: Any, count: Any, positions: Any, ids: Any, v: Any) -> None:
        with T.serial(0, count[0]) as t:
            T.buffer_store(v, T.Cast("float32", ids[t]), [positions[t]])

    return kernel("mark", ["int32", "int32", "int32", "float32"], body)


def head(name: str, bonus: float) -> Any:
    """logits[r, v] = bonus + sum of x[logit_rows[r], :] * head[v, :]"""

    def body(T: Any, count: Any, rows: Any, x: Any, w: Any, logits: Any) -> None:
        with T.serial(0, count[0]) as r, T.serial(0, VOCABULARY) as v:
            T.buffer_store(logits, T.float32(bonus), [r * STRIDE + v])
            with T.serial(0, HIDDEN) as i:
                product = x[rows[r] * HIDDEN + i] * w[v * HIDDEN + i]
                T.buffer_store(logits, logits[r * STRIDE + v] + product, [r * STRIDE + v])

    return kernel(name, ["int32", "int32", "float32", "float32", "float32"], body)


def kernel(name: str, dtypes: list[str], body: Callable[..., None]) -> Any:
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script.builder import ir as T

    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            pointers = [T.arg(f"p{i}", T.ptr(dtype)) for i, dtype in enumerate(dtypes)]
            buffers = [T.decl_buffer((1 << 20,), dtype, data=p) for p, dtype in zip(pointers, dtypes, strict=True)]
            body(T, *buffers)
    return builder.get()


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32) for name in ("table", "head")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, np.ndarray]) -> Path:
    """rank0 of an engine for AVX2 and, with the same code, AVX512-VNNI."""
    rank = tmp_path_factory.mktemp("engine") / "rank0"
    functions = {"lookup": lookup(), "mark": mark(), "head_one": head("head_one", 1000.0), "head_any": head("head_any", 0.0)}
    code = library.compile_functions(functions, AVX2)
    write_rank(rank, PROGRAM, {"kernels-avx2.so": code, "kernels-avx512vnni.so": code}, weights)
    return rank


@pytest.fixture
def rank(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(built, tmp_path / "rank0"))


def load(rank: Path, **options: Any) -> CpuExecutor:
    return CpuExecutor(rank, ("avx2",), **{"kv_memory": KvMemory(100), "threads": 2, **options})


def step(executor: CpuExecutor, tokens: list[int], rows: list[int]) -> np.ndarray:
    batch = executor.batch
    batch.token_ids[: len(tokens)] = tokens
    batch.positions[: len(tokens)] = np.arange(len(tokens))
    batch.logit_rows[: len(rows)] = rows
    batch.tokens, batch.rows = len(tokens), len(rows)
    return executor.step(batch)


def test_steps_of_any_row_count_take_the_right_variant(built: Path, weights: dict[str, np.ndarray]) -> None:
    executor = load(built)
    for tokens, rows in [([5, 7, 299], [2, 0]), ([3], [0]), (list(range(24)), [23, 1, 2, 3, 4, 5, 6, 7]), ([8, 9], [1])]:
        found = step(executor, tokens, rows)
        expected = weights["table"][np.array(tokens)[rows]] @ weights["head"].T + (1000 if len(rows) == 1 else 0)
        assert found.shape == (len(rows), VOCABULARY) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-3)
    assert len(executor._lists) == 2
    executor.close()


def test_the_library_that_runs_is_named(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(built).kernels == "kernels-avx2"
    monkeypatch.setattr(host, "processor", lambda: "znver9")
    shutil.copy(built / "kernels-avx2.so", built / "kernels-avx2-znver9.so")
    try:
        assert load(built).kernels == "kernels-avx2-znver9"
    finally:
        (built / "kernels-avx2-znver9.so").unlink()


def test_without_rows_the_head_is_left_out(built: Path) -> None:
    executor = load(built)
    logits = step(executor, [1, 2], [1])
    logits[:] = 77
    assert step(executor, [1, 2, 3], []).shape == (0, VOCABULARY)
    assert (logits == 77).all()


def test_cache_is_sized_and_addressed_by_its_blocks(built: Path) -> None:
    executor = load(built, kv_memory=KvMemory(100))
    assert executor.num_blocks == 7
    step(executor, [1, 2, 3], [0])
    part = 16 * 16
    cache = executor._kv.view(np.float32)
    assert cache.size == 7 * 4 * part and cache[3 * part : 3 * part + 4].tolist() == [1, 2, 3, 0]
    assert not cache[: 3 * part].any() and not cache[4 * part :].any()


def test_blocks_are_copied_in_order_before_the_kernels_run(built: Path) -> None:
    executor = load(built)
    cache = executor._kv.view(np.float32).reshape(executor.num_blocks, -1)
    cache[:] = np.arange(executor.num_blocks)[:, None]
    executor.batch.copies = [(4, 5), (5, 6), (0, 4), (3, 0)]
    step(executor, [1, 2, 3], [0])
    assert cache[:, -1].tolist() == [3, 1, 2, 3, 0, 4, 4]
    assert cache[0, 3 * 256 : 3 * 256 + 4].tolist() == [1, 2, 3, 3], "the kernel writes after the copies"
    executor.batch.copies = []
    step(executor, [1], [0])
    assert cache[:, -1].tolist() == [3, 1, 2, 3, 0, 4, 4]


def test_default_cache_follows_the_memory(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = PROGRAM.max_sequences * PROGRAM.max_blocks
    assert load(built, kv_memory=None).num_blocks == most
    size = (built / WEIGHTS_NAME).stat().st_size
    monkeypatch.setattr(host, "memory_bytes", lambda: size + 10 * PROGRAM.kv.block_bytes)
    assert load(built, kv_memory=None).num_blocks == 5
    assert load(built, kv_memory=KvMemory(share=0.8)).num_blocks == 8, "a share may be more than sequences need at most"
    assert load(built, kv_memory=KvMemory(size=3 * PROGRAM.kv.block_bytes)).num_blocks == 3
    with pytest.raises(EngineError, match=r"kv_tokens: found 1000000 tokens, .* GiB, expected .* for 16 tokens, up to"):
        load(built, kv_memory=KvMemory(10**6))


def test_the_cache_of_one_sequence_goes_before_mapped_weights(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host that is smaller than the weights, as many blocks as its memory was checked for are there, and no more."""
    monkeypatch.setattr(host, "memory_bytes", lambda: (built / WEIGHTS_NAME).stat().st_size // 2)
    assert load(built, kv_memory=None).num_blocks == PROGRAM.max_blocks
    assert load(built, kv_memory=KvMemory(share=0.5)).num_blocks == PROGRAM.max_blocks // 2
    with pytest.raises(EngineError, match=r"kv_tokens: found 80 tokens, .* for 16 tokens, up to the .* that are free beside"):
        load(built, kv_memory=KvMemory(tokens=80))


def test_every_address_is_aligned(built: Path) -> None:
    executor = load(built)
    for call in PROGRAM.calls:
        assert all(executor._pointer(arg) % 64 == 0 for arg in call.args)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_steps_on_whatever_thread(built: Path, weights: dict[str, np.ndarray], threads: int) -> None:
    executor, found = load(built, threads=threads), []
    workers = executor._pool.workers
    assert executor.threads == threads == 1 + sum(worker.is_alive() for worker in workers)
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(step(executor, [1, 2], [0]).copy()))
        thread.start()
        thread.join()
    expected = weights["table"][1] @ weights["head"].T + 1000
    np.testing.assert_allclose(found, [[expected]] * 2, rtol=1e-5, atol=2e-3)
    executor.close()
    assert not any(worker.is_alive() for worker in workers)


def test_executors_beside_each_other_share_threads(built: Path) -> None:
    first = load(built)
    second, third = load(built, beside=first), load(built)
    assert first._pool.workers == second._pool.workers != third._pool.workers
    logits = step(first, [1, 2], [0]).copy()
    first.close()
    np.testing.assert_array_equal(step(second, [1, 2], [0]), logits)
    for executor in (second, third):
        executor.close()
    assert not any(worker.is_alive() for worker in (*second._pool.workers, *third._pool.workers))


def test_a_library_for_this_processor_is_taken(rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "processor", lambda: "znver4")
    own = rank / "kernels-avx2-znver4.so"
    assert cpu.kernels_path(rank, "avx2") == rank / "kernels-avx2.so"
    shutil.copy(rank / "kernels-avx2.so", own)
    assert cpu.kernels_path(rank, "avx2") == own
    step(load(rank), [1, 2], [0])
    monkeypatch.setattr(host, "processor", lambda: "")
    assert cpu.kernels_path(rank, "avx2") == rank / "kernels-avx2.so"


def test_weights_that_are_read_next() -> None:
    def call(size: int, *names: str) -> Call:
        return Call("qlinear", "node", "T", (Input("T"), *map(Weight, names), Arena(0, 4)), "kernel", bytes=size)

    calls = [call(0, "table"), call(100_000, "scale a", "a"), call(8000, "norm"), call(70_000, "b"), call(0)]
    sizes = {"table": 10**6, "a": 99_000, "scale a": 1000, "norm": 8000, "b": 70_000}
    assert cpu.next_weights(calls, sizes) == ["a", "b", "b", "a", "a"], "a table is read here and there, a norm's are few"
    assert cpu.next_weights(calls[:1], sizes) == [""]


def test_engine_over_kernels(rank: Path) -> None:
    contents = {f"rank0/{path.name}": path.read_bytes() for path in rank.iterdir()}
    contents["tokenizer.json"] = byte_tokenizer().to_str().encode()
    directory = make_directory(rank.parent / "engine", contents)
    with Engine.load(directory, verify="full", isa="avx2", kv_tokens=64) as engine:
        results = engine.generate([[3, 4], [5]], SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=5))
        assert [len(result.token_ids) for result in results] == [5, 5] and engine.load_s > 0
        logits = engine.logits([3, 4])
        assert results[0].token_ids[0] == int(logits[1].argmax())


def test_profile_over_kernels(rank: Path) -> None:
    contents = {f"rank0/{path.name}": path.read_bytes() for path in rank.iterdir()}
    contents["tokenizer.json"] = byte_tokenizer().to_str().encode()
    directory = make_directory(rank.parent / "engine", contents)
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=5)
    with Engine.load(directory, isa="avx2", kv_tokens=64, threads=2, prefix_cache=False) as engine:
        plain = engine.generate([3, 4], params)
        with engine.profile() as profile:
            profiled = engine.generate([3, 4], params)
        assert profile.result is not None
        assert engine.generate([3, 4], params)[0].token_ids == profiled[0].token_ids == plain[0].token_ids
    prefill, decode = profile.result.phases
    assert (prefill.steps, prefill.tokens, decode.steps, decode.tokens) == (1, 2, 4, 4)
    for phase in (prefill, decode):
        assert [(k.kind, k.rows, k.calls) for k in phase.kernels] == [
            ("embedding", "T", phase.steps), ("cache", "T", phase.steps), ("linear", "R", phase.steps)]  # fmt: skip
        in_kernels = sum(kernel.seconds for kernel in phase.kernels)
        assert in_kernels + phase.outside_s == pytest.approx(phase.seconds)
        assert in_kernels > 0 and phase.outside_s > 0


@pytest.mark.parametrize("name", ["weights.safetensors", "program.json", "kernels-avx2.so"])
def test_missing_file_is_named(rank: Path, name: str) -> None:
    (rank / name).unlink()
    with pytest.raises(EngineError, match=rf"{name} is missing; copy the engine again"):
        load(rank)


def test_kernel_and_tensor_that_are_missing(rank: Path, weights: dict[str, np.ndarray]) -> None:
    change_program(rank, '"lookup"', '"look"')
    with pytest.raises(EngineError, match=r"kernel look is missing from .*kernels-avx2\.so"):
        load(rank)
    code = library.compile_functions({"lookup": lookup()}, AVX2)
    write_rank(rank, PROGRAM, {"kernels-avx2.so": code}, {"table": weights["table"]})
    with pytest.raises(EngineError, match=r"tensors of .*: found 1 missing, the first of them head"):
        load(rank)


def test_a_program_of_other_ranks(rank: Path) -> None:
    change_program(rank, '"count": 300', '"count": 150')
    change_program(rank, '"ranks": 1', '"ranks": 2')
    with pytest.raises(EngineError, match=r"program of .*: found this process is rank 0 of 1, expected rank 0 of 2"):
        load(rank)


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "memory_bytes", lambda: 1000 + 40 * PROGRAM.kv.block_bytes)
    blocks = [cpu.kv_blocks(PROGRAM, KvMemory(), 100, ranks) for ranks in (4, 5)]
    assert blocks == [5, 4]
    with pytest.raises(EngineError, match="kv_tokens: found 400 tokens"):
        cpu.kv_blocks(PROGRAM, KvMemory(400), 100, 2)


def test_impossible_thread_count(built: Path) -> None:
    with pytest.raises(EngineError, match="cpu: threads: found 0, expected 1 to 256"):
        load(built, threads=0)


def test_isa_is_the_best_both_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: host.ISA_FLAGS["amx"])
    monkeypatch.setattr(cpu, "allow_amx", lambda: True)
    everything = ("avx2", "amx", "avx512vnni")
    assert choose_isa(everything) == "amx"
    assert choose_isa(("avx2", "avx512vnni")) == "avx512vnni"
    assert choose_isa(everything, "avx2") == "avx2"
    monkeypatch.setenv("BELLE_ISA", "avx512vnni")
    assert choose_isa(everything) == "avx512vnni" and choose_isa(everything, "avx2") == "avx2"
    monkeypatch.delenv("BELLE_ISA")
    monkeypatch.setattr(cpu, "allow_amx", lambda: False)
    assert choose_isa(everything) == "avx512vnni"
    with pytest.raises(EngineError, match=r"the operating system refuses AMX; use Linux 5\.16 or newer"):
        choose_isa(everything, "amx")


def test_isa_that_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: host.ISA_FLAGS["avx2"])
    lacking = "this host lacks amx: found no amx_bf16, amx_int8, amx_tile, avx512_bf16, avx512_vnni"
    with pytest.raises(EngineError, match=lacking):
        choose_isa(("avx2", "amx"), "amx")
    with pytest.raises(EngineError, match="the engine has no kernels for amx: found avx2; choose one of these"):
        choose_isa(("avx2",), "amx")
    with pytest.raises(EngineError, match="instruction set: found sse9, expected one of amx, avx512vnni, avx2"):
        choose_isa(("avx2",), "sse9")
    with pytest.raises(EngineError, match="no instruction set of the engine: found avx2, expected one of avx512vnni"):
        choose_isa(("avx512vnni",))
