"""Which engines a process loads, and by which executor."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from belle_compile.runtime import Engine, EngineError, SamplingParams, artifact
from belle_compile.runtime.distributed.ranks import Place
from belle_compile.runtime.executors import (
    EXECUTORS,
    Executor,
    ExecutorFactory,
    LoadRequest,
    ProfilableExecutor,
    RankExecutor,
    register_executor,
)
from belle_compile.runtime.executors.kv_memory import KvMemory
from tests.runtime.fakes import FakeExecutor, byte_tokenizer, make_directory, manifest

NO_FACTS = ("program", "isa", "threads")


class FakeFactory(ExecutorFactory):
    """A backend of one file: its engines run on a fake, which has no program."""

    def __init__(self) -> None:
        self.requests: list[LoadRequest] = []

    def load(self, request: LoadRequest) -> Executor:
        self.requests.append(request)
        executor = FakeExecutor()
        for name in NO_FACTS:
            delattr(executor, name)
        return executor


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> FakeFactory:
    monkeypatch.setattr("belle_compile.runtime.executors.EXECUTORS", dict(EXECUTORS))
    register_executor("fake", made := FakeFactory())
    return made


def directory_of(path: Path, backend: str, isas: tuple[str, ...] = (), ranks: int = 1, memory: int = 1 << 20) -> Path:
    target = artifact.TargetInfo("cpu", backend, isas, artifact.Requirements("", isas, memory), ranks)
    return make_directory(path / "engine", {"tokenizer.json": byte_tokenizer().to_str().encode()}, target=target)


def test_a_backend_of_one_file_is_loaded_and_served(tmp_path: Path, factory: FakeFactory) -> None:
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=5)
    with Engine.load(directory_of(tmp_path, "fake", ("any-word",)), kv_tokens=99, isa="any-word") as engine:
        (result,) = engine.generate([[5, 6]], params)
        assert len(result.token_ids) == 5
        assert not isinstance(engine.executor, (ProfilableExecutor, RankExecutor))
        message = (
            "^profile: this engine cannot be profiled: found the executor of backend fake, which runs no program of kernels"
        )
        with pytest.raises(EngineError, match=message), engine.profile():
            pass
    (request,) = factory.requests
    assert request.directory == tmp_path / "engine" / "rank0" and request.manifest.target.backend == "fake"
    assert (request.kv_memory, request.isa, request.threads, request.local_rank) == (KvMemory(99), "any-word", None, 0)


def test_the_memory_of_the_cache_is_read_before_anything_is_loaded(tmp_path: Path, factory: FakeFactory) -> None:
    directory = directory_of(tmp_path, "fake")
    with Engine.load(directory, kv_cache_memory="25%"):
        pass
    assert [request.kv_memory for request in factory.requests] == [KvMemory(share=0.25)]
    with pytest.raises(EngineError, match="kv_cache_memory: found 'much', expected bytes such as"):
        Engine.load(directory, kv_cache_memory="much")
    with pytest.raises(EngineError, match="found kv_tokens and kv_cache_memory, expected one of them"):
        Engine.load(directory, kv_tokens=64, kv_cache_memory="25%")
    assert len(factory.requests) == 1


def test_what_a_backend_of_one_file_needs_is_checked(tmp_path: Path, factory: FakeFactory) -> None:
    with pytest.raises(EngineError, match=r"this host cannot run the engine built for cpu: found .* GiB of memory, expected"):
        Engine.load(directory_of(tmp_path, "fake", memory=1 << 60))
    assert not factory.requests


def test_an_engine_of_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    message = (
        f"engine: this runtime does not know the engine's backend: found fpga, expected one of {', '.join(EXECUTORS)}; "
        "install the runtime that belongs to the engine, or rebuild it for one of these."
    )
    assert list(EXECUTORS)[:2] == ["tvm", "triton"]  # other tests register backends of their own
    with pytest.raises(EngineError, match=f"^{re.escape(message)}$"):
        Engine.load(directory_of(tmp_path, "fpga"))


class TwoRanks:
    """Rank 0's collectives; the other rank says nothing."""

    rank, ranks, ranks_here, rank_here, sharing, shared = 0, 2, 1, 0, 1, None

    def agree(self, report: bytes, judge: Callable[[dict[int, bytes]], bytes], timeout_s: float) -> bytes:
        return judge({0: report})


def test_an_executor_that_is_no_rank_runs_no_engine_of_several(
    tmp_path: Path, factory: FakeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("belle_compile.runtime.distributed.ranks.place", lambda: Place(0, 2))
    monkeypatch.setattr("belle_compile.runtime.loading.join_ranks", lambda place: TwoRanks())
    message = (
        r"^engine: this executor runs engines of one rank: found an engine of fake in 2 ranks; "
        r"rebuild it for one rank\.$"
    )
    with pytest.raises(EngineError, match=message):
        Engine.load(directory_of(tmp_path, "fake", ranks=2))
    (request,) = factory.requests
    assert request.collectives is not None and request.local_rank == 0


def test_a_name_has_one_executor(factory: FakeFactory) -> None:
    register_executor("fake", factory)
    with pytest.raises(ValueError, match="backend tvm has an executor already"):
        register_executor("tvm", factory)


def test_a_process_on_its_own(tmp_path: Path) -> None:
    target = artifact.TargetInfo("cpux2", "tvm", ("avx2",), manifest().target.requires, 2)
    directory = make_directory(tmp_path / "e", {"tokenizer.json": b"{}"}, target=target)
    remedy = "use belle-run --ranks 2, or start this program with mpiexec -n 2"
    with pytest.raises(
        EngineError, match=rf"engine: ranks: found 1 process, expected 2, what the engine was built for; {remedy}"
    ):
        Engine.load(directory)
