"""belle-run of several ranks: answers as of one rank, and an end with one sentence whatever happens to a rank."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import time
from pathlib import Path

import pytest

from belle_compile.runtime import host
from belle_compile.runtime.distributed import launcher

pytest.importorskip("tvm")
pytest.importorskip("mpi4py")

from tests.runtime import ranked
from tests.runtime.ranked import belle_run

pytestmark = [pytest.mark.alone, pytest.mark.skipif("avx2" not in host.host_isas(), reason="needs AVX2")]

LONG = ("--temperature", 0, "--ignore-eos", "--max-new-tokens", 60_000, "--raw", "hello")  # a minute's work and more
SHORT = ("--temperature", 0, "--json", "hello")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of ranks."""
    root = tmp_path_factory.mktemp("engines")
    return {ranks: ranked.build(root / f"x{ranks}", ranks) for ranks in (1, 2, 3)}


def tokens(engine: Path, *arguments: object, **more: object) -> list[int]:
    code, out, errors = belle_run(engine, *arguments, **more).end()  # type: ignore[arg-type]
    assert (code, errors) == (0, ""), errors
    ids: list[int] = json.loads(out)["token_ids"]
    return ids


SAMPLINGS = [
    ("--temperature", 0, "--repetition-penalty", 1),
    ("--temperature", 0, "--repetition-penalty", 1.3),
    ("--temperature", 0, "--repetition-penalty", 0.7),
    ("--temperature", 1, "--top-k", 5, "--top-p", 0.9, "--repetition-penalty", 1.2, "--seed", 3),
    ("--temperature", 1, "--top-k", 0, "--top-p", 0.9, "--seed", 3),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda sampling: " ".join(map(str, sampling)))
@pytest.mark.parametrize("ranks", [2, 3])
def test_tokens_are_those_of_one_rank(engines: dict[int, Path], ranks: int, sampling: tuple[object, ...]) -> None:
    arguments = ("--json", "--ignore-eos", *sampling, "hello world")
    assert tokens(engines[ranks], *arguments) == tokens(engines[1], *arguments)


def test_a_chat_reads_the_launcher_s_input(engines: dict[int, Path]) -> None:
    run = belle_run(engines[2], "--temperature", 0)
    assert run.process.stdin
    run.process.stdin.write("hello\nhello\n/exit\nnever\n")
    code, out, errors = run.end()
    assert code == 0 and out and errors.count("first after") == 2


def test_profile_shows_sums(engines: dict[int, Path]) -> None:
    code, _, errors = belle_run(engines[2], "--temperature", 0, "--profile", "hello").end()
    assert code == 0 and "  all-reduce  " in errors


def test_ranks_that_somebody_else_started(engines: dict[int, Path]) -> None:
    mine = (launcher.mpiexec(), "-n", "2")
    assert tokens(engines[2], *SHORT, before=mine) == tokens(engines[1], *SHORT)
    code, out, errors = belle_run(engines[1], *SHORT, before=mine).end()
    assert code == 1 and json.loads(out)["error"]["found"] == "2"
    assert errors.count("engine: ranks: found 2, expected 1, what the engine was built for") == 1


def test_a_program_of_several_ranks(engines: dict[int, Path]) -> None:
    change = """
from belle_compile.runtime import Engine, SamplingParams
import weakref
class Other: pass
other = Other()
weakref.finalize(other, lambda: None)  # whose place in the order of what runs at the end is before all of ours
engine = Engine.load(sys.argv[1])
(result,) = engine.generate(["hello"], SamplingParams(temperature=0))
print(rank, result.token_ids, len(engine.logits([1, 2, 3])), engine.executor.threads)
try:
    Engine.load(sys.argv[1])
except Exception as error:
    print(error)
sys.exit(0)
"""
    code, out, errors = belle_run(engines[2], change=change, before=(launcher.mpiexec(), "-n", "2")).end()
    threads = max(1, len(host.usable_cores()) // 2)
    assert (code, errors) == (0, "") and out.startswith(f"0 {tokens(engines[1], *SHORT)} 3 {threads}\n")
    assert out.endswith("ranks: an engine was loaded by these processes before; start the ranks anew, or keep the engine.\n")


def test_ctrl_c_at_a_terminal_breaks_an_answer_off(engines: dict[int, Path]) -> None:
    ours, theirs = os.openpty()
    arguments = ("--temperature", 0, "--ignore-eos", "--raw", "--max-new-tokens", 60_000)
    run = belle_run(engines[2], *arguments, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    rest = until(ours, "> ")
    os.write(ours, b"hello\n")
    until(ours, "hello", rest)
    time.sleep(0.3)  # within the answer
    run.process.send_signal(signal.SIGINT)  # what the terminal's Ctrl-C does
    rest = until(ours, "(stopped; this turn is forgotten)")
    until(ours, "> ", rest)
    os.write(ours, b"/exit\n")
    assert run.end(10)[0] == 0
    os.close(ours)


def until(terminal: int, text: str, seen: str = "") -> str:
    """Read what a terminal shows, `seen` of it already, up to some text; returns what was read beyond it."""
    deadline = time.monotonic() + 20
    while text not in (seen := seen.replace("\r", "")):
        assert time.monotonic() < deadline and select.select([terminal], [], [], 20)[0], seen
        seen += os.read(terminal, 65536).decode(errors="replace")
    return seen.partition(text)[2]


def test_another_number_of_ranks(engines: dict[int, Path]) -> None:
    code, out, errors = belle_run(engines[2], "--ranks", 3, *SHORT).end()
    remedy = "run it with 2, or make an engine for 3 with belle-compile repartition"
    assert code == 1 and json.loads(out)["error"]["remedy"] == remedy
    assert errors == f"belle-run: engine: ranks: found 3, expected 2, what the engine was built for; {remedy}.\n"
    assert tokens(engines[2], "--ranks", 2, *SHORT) == tokens(engines[1], "--ranks", 1, *SHORT)


def failure(engine: Path, change: str, *arguments: object, within: float = 10) -> str:
    """What belle-run says when ranks begin with `change`; it ends within some seconds."""
    run = belle_run(engine, *(arguments or SHORT), change=change)
    code, _, errors = run.end()
    assert code == 1 and time.monotonic() - run.started < within
    assert errors.count("\n") == 1, errors
    return errors


def test_ranks_with_different_engines(engines: dict[int, Path], tmp_path: Path) -> None:
    other = ranked.build(tmp_path / "other", 2, seed=1)
    errors = failure(engines[2], f"if rank == 1: sys.argv[1] = {str(other)!r}")
    assert errors.startswith("belle-run: ranks: they have different engines: found digest ")
    assert " on rank 1, expected digest " in errors and errors.endswith("; give all ranks copies of the same engine.\n")


def test_a_rank_that_does_not_load(engines: dict[int, Path], tmp_path: Path) -> None:
    errors = failure(engines[2], f"if rank == 1: sys.argv[1] = {str(tmp_path)!r}")
    assert errors.startswith(f"belle-run: engine: {tmp_path} is not an engine: found no manifest.json; ")
    (engines[3] / "rank2" / "program.json").rename(tmp_path / "program.json")
    errors = failure(engines[3], "pass")
    (tmp_path / "program.json").rename(engines[3] / "rank2" / "program.json")
    assert errors.startswith("belle-run: engine: file rank2/program.json is missing from ")


def test_a_rank_that_ends_before_it_reports(engines: dict[int, Path]) -> None:
    remedy = "the other ranks were ended with it.\n"
    for when in ("", "time.sleep(3), "):  # before and after the others have reported
        errors = failure(engines[2], f"if rank == 1: {when}os.kill(os.getpid(), signal.SIGKILL)")
        how = "was killed by signal 9 (SIGKILL) before all had started"
        assert re.fullmatch(rf"belle-run: ranks: rank 1 \(process \d+\) {re.escape(f'{how}; {remedy}')}", errors), errors
        errors = failure(engines[3], f"if rank == 1: {when}1 // 0")
        how = "ended with exit code 1 before all had started: found ZeroDivisionError: integer division or modulo by zero"
        assert re.fullmatch(rf"belle-run: ranks: rank 1 \(process \d+\) {re.escape(f'{how}; {remedy}')}", errors), errors


@pytest.mark.parametrize(
    ("ended", "how"),
    [(-9, "was killed by signal 9 (SIGKILL)"), (-40, "was killed by signal 40"), (3, "ended with exit code 3")],
)
def test_a_rank_that_started_and_ended_between_two_looks(monkeypatch: pytest.MonkeyPatch, ended: int, how: str) -> None:
    monkeypatch.setattr(launcher, "_environment", lambda _: {"PMI_RANK": "1", "PMI_SIZE": "2"})
    run, (ours, theirs) = launcher.Launcher(2, [], 10), socket.socketpair()
    with ours, theirs:
        theirs.sendall(f'["started", [7, 8]]\n["ended", [{ended}, 1.5]]\n'.encode())
        run._receive(ours, [b""])
        assert run._ranks[1].name == "rank 1 (process 8)" and run._ranks[1].how_it_ended == how


def test_errors_of_ranks_as_json(engines: dict[int, Path]) -> None:
    code, out, errors = belle_run(engines[2], "--top-p", 3, *SHORT).end()
    error = json.loads(out)["error"]
    assert (code, errors) == (1, f"belle-run: {error['message']}\n")
    assert (error["stage"], error["what"], error["expected"]) == ("sampling", "top_p", "above 0 and at most 1")


def test_a_rank_that_hangs_before_it_reports(engines: dict[int, Path]) -> None:
    stop = "if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)"
    errors = failure(engines[2], stop, "--rank-timeout", 4, *SHORT)
    assert errors.startswith(
        "belle-run: ranks: rank 1 did not start: found nothing within 4 s; look at what holds it up, or give it more"
    )


def test_a_rank_that_hangs_while_it_loads(engines: dict[int, Path]) -> None:
    factory = "from belle_compile.runtime.executors.cpu_factory import CpuFactory"
    sleep = f"{factory}\nif rank == 1: CpuFactory.check_host = lambda *_: time.sleep(99)"
    errors = failure(engines[2], sleep, "--rank-timeout", 4, *SHORT)
    assert errors.startswith("belle-run: ranks: rank 1 did not get ready: found nothing within 4 s; look at what holds it up")
    mine = belle_run(engines[2], "--rank-timeout", 4, *SHORT, change=sleep, before=(launcher.mpiexec(), "-n", "2"))
    code, _, errors = mine.end()
    assert code != 0 and errors.count("ranks: rank 1 did not get ready: found nothing within 4 s") == 1


STEP = "from belle_compile.runtime.executors.cpu import CpuExecutor\nfrom belle_compile.runtime.errors import EngineError\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_the_middle_of_an_answer(engines: dict[int, Path], rank: int) -> None:
    change = f"""{STEP}
step, count = CpuExecutor.step, 0
def failing(self, batch):
    global count
    count += 1
    if rank == {rank} and count == 5: raise EngineError("cpu", "kernel broke", found=f"rank {{rank}}")
    return step(self, batch)
CpuExecutor.step = failing
"""
    assert failure(engines[2], change) == f"belle-run: cpu: kernel broke: found rank {rank}.\n"
    code, _, errors = belle_run(engines[2], *SHORT, change=change, before=(launcher.mpiexec(), "-n", "2")).end()
    assert code != 0 and errors.count(f"cpu: kernel broke: found rank {rank}.") == 1


def test_a_message_that_fails_while_the_other_rank_goes_on(engines: dict[int, Path]) -> None:
    change = """from belle_compile.runtime.distributed.collectives import MpiCollectives
wait, count = MpiCollectives._wait, 0
def failing(self, request, **options):
    global count
    count += 1
    if rank == 1 and count == 5: raise self._mpi.Exception(self._mpi.ERR_OTHER)
    wait(self, request, **options)
MpiCollectives._wait = failing
"""
    sentence = failure(engines[2], change)
    assert sentence.startswith("belle-run: ranks: a message between ranks failed: found Other MPI error; look at why another")


def test_a_bug_of_a_rank_is_shown(engines: dict[int, Path]) -> None:
    change = f"{STEP}if rank == 1: CpuExecutor.step = lambda self, batch: 1 // 0"
    code, _, errors = belle_run(engines[2], *SHORT, change=change).end()
    assert code == 1 and "ZeroDivisionError" in errors and errors.count("Traceback") == 1
    assert errors.splitlines()[-1].startswith("belle-run: ranks: rank 1 (process ") and "ended with exit code 1" in errors


def answering(engine: Path, *arguments: object) -> ranked.Run:
    """belle-run in the middle of a long answer."""
    run = belle_run(engine, *arguments, *LONG)
    assert run.process.stdout and run.process.stdout.read(20)
    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed(engines: dict[int, Path], rank: int) -> None:
    run = answering(engines[2])
    process = run.rank(rank)
    killed = time.monotonic()
    os.kill(process, signal.SIGKILL)
    code, _, errors = run.end()
    assert code == 1 and time.monotonic() - killed < 10
    how = "was killed by signal 9 (SIGKILL); the other ranks were ended with it.\n"
    assert errors == f"belle-run: ranks: rank {rank} (process {process}) {how}"


def test_a_rank_that_is_stopped(engines: dict[int, Path]) -> None:
    run = answering(engines[2], "--rank-timeout", 4)
    process = run.rank(1)
    os.kill(process, signal.SIGSTOP)
    code, _, errors = run.end()
    assert code == 1 and errors == f"belle-run: ranks: rank 1 (process {process}) does not answer: found it is stopped.\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_all(engines: dict[int, Path], number: int, code: int) -> None:
    run = answering(engines[2])
    run.process.send_signal(number)
    ended, _, errors = run.end(10)
    assert ended == code and errors.strip() == ""


@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "rank 1", "launcher"])
def test_nothing_is_left_in_shared_memory(engines: dict[int, Path], end: str) -> None:
    """The memory of ranks has no name once all have mapped it."""
    run = answering(engines[2])
    mapped = [Path(f"/proc/{run.rank(rank)}/maps").read_text() for rank in (0, 1)]
    names = {line.split("/dev/shm/")[1].split()[0] for line in "".join(mapped).splitlines() if "/dev/shm/" in line}
    assert names, "this MPI has its memory there"
    if end == "rank 1":
        os.kill(run.rank(1), signal.SIGKILL)
    else:
        run.process.send_signal(signal.SIGKILL if end == "launcher" else getattr(signal, end))
    code, _, errors = run.end(20)
    assert code != 0 and "Traceback" not in errors
    assert not names & set(os.listdir("/dev/shm"))


def test_ranks_end_with_a_launcher_that_is_killed(engines: dict[int, Path]) -> None:
    run = answering(engines[2])
    run.process.kill()
    assert run.end(10)[0] == -signal.SIGKILL


def test_without_mpiexec(engines: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from belle_compile.runtime.cli import main

    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    result = CliRunner().invoke(main, [str(engines[2]), "x"])
    assert result.exit_code == 1 and result.stderr.startswith("belle-run: ranks: mpiexec is missing; pip install -c")


def test_a_server_of_several_ranks_drains(engines: dict[int, Path], tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx")
    run = belle_run(Path("serve"), engines[2], "--uds", tmp_path / "belle.sock")
    url, transport = "http://test/v1/completions", httpx.HTTPTransport(uds=str(tmp_path / "belle.sock"), retries=0)
    with httpx.Client(transport=transport, timeout=20) as client:
        assert run.process.stderr is not None
        assert any("listening" in line for line in iter(run.process.stderr.readline, ""))
        with client.stream(
            "POST", url, json={"prompt": "hello", "stream": True, "max_tokens": 60, "ignore_eos": True}
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            run.process.send_signal(signal.SIGTERM)  # to the launcher, which leaves it to rank 0
            assert [line for line in lines if line][-1] == "data: [DONE]"
    code, _, errors = run.end()
    assert code == 0 and '"draining"' in errors and "Traceback" not in errors


def test_ranks_meet_where_the_folder_of_temporary_files_has_a_long_path(
    engines: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)  # addresses of sockets have at most 107 bytes
    deep.mkdir()
    expected = tokens(engines[2], *SHORT)
    monkeypatch.setenv("TMPDIR", str(deep))
    assert tokens(engines[2], *SHORT) == expected
