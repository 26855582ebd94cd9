"""Side-by-side runs: rows, tables of made-up samples, and a worker with our adapter on a tiny engine; nothing is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm")  # the build extra, which the benchmarks need
pytest.importorskip("tomllib")  # Python 3.11, which the peers need

from benchmarks.engines import SHAPES, cost
from benchmarks.peers import __main__ as peers
from benchmarks.peers import agree, convert, home, models, report, rounds, rows, worker
from benchmarks.peers.convert import Ready
from benchmarks.peers.home import PeersError
from benchmarks.peers.rows import Row
from benchmarks.tasks import TASKS, Task
from tests.parity.engines import BEST_ISA, Builder

OURS, FAST, SMALL = Row("belle int8", "belle", 8, "int8"), Row("fast", "ov", 8, "int8"), Row("small", "llama", 4, "q4_0")
SPEEDS = {OURS: (20.0, 20.0, 30.0), FAST: (10.0, 16.0, 12.0), SMALL: (24.0, 25.0, 25.0)}  # three rounds each


# Rows


def write(folder: Path, text: str) -> Path:
    path = folder / "rows.toml"
    path.write_text(text)
    return path


def test_committed_rows() -> None:
    found = rows.read_rows()
    assert found[0].is_ours and found[0].bits == 8 and {row.peer for row in found} == set(rows.ADAPTERS)
    assert all(set(row.only_for + row.skip) <= set(SHAPES) for row in found)
    assert all(Path(row.adapter.rpartition(":")[0]).is_file() for row in found)
    for shape in SHAPES:
        peers = {row.peer for row in rows.choose(found, shape)}
        assert ("ort" in peers) == shape.startswith(("llama", "smollm2"))


@pytest.mark.parametrize("backend", ["torchscript", "onnxruntime"])
def test_rows_of_other_backends(backend: str) -> None:
    """Ours first, and beside it what that runtime's users would run."""
    config = home.FOLDER / f"{backend.removesuffix('script')}.toml"
    ours, *peers = rows.read_rows(config)
    assert ours.is_ours and ours.backend == backend and peers and not any(row.is_ours for row in peers)
    assert convert.engine_path(ours.peer, "llama-1b", ours.format, ours.backend).name == f"peers-llama-1b-{backend}"


def test_rows_of_a_shape() -> None:
    only, skip = Row("a", "hf", 8, only_for=("llama-1b",)), Row("b", "ov", 8, "int8", skip=("llama-1b",))
    found = [OURS, only, skip]
    assert rows.choose(found, "llama-1b") == [OURS, only]
    assert rows.choose(found, "bloom-1b1") == [OURS, skip]
    assert rows.choose(found, "llama-1b", only=["hf"]) == [only]
    extra = rows.choose(found, "llama-1b", only=["belle"], ours=["isa=avx2"])
    assert [(row.name, row.option) for row in extra] == [("belle int8", ""), ("belle int8, isa=avx2", "isa=avx2")]
    with pytest.raises(PeersError, match=r"unknown \['onnx'\]; peers and rows are"):
        rows.choose(found, "llama-1b", only=["onnx"])
    with pytest.raises(PeersError, match="no row is for llama-1b"):
        rows.choose([skip], "llama-1b")
    with pytest.raises(PeersError, match="two rows are called"):
        rows.choose([OURS, OURS], "llama-1b")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[[row]]\nname = 'a'\npeer = 'hf'", "row 'a' has no bits"),
        ("[[row]]\nname = 'a'\npeer = 'vllm'\nbits = 8", "unknown peer 'vllm'; known: belle, llama"),
        ("[[row]]\nname = 'a'\npeer = 'llama'\nbits = 8\nformat = 'q9'", "llama has no format 'q9'; it has 'q8_0'"),
        ("[[row]]\nname = 'a'\npeer = 'hf'\nbits = 8\nthreads = 2", "threads = 2; expected some of name, peer"),
        ("[[row]]\nname = 'a'\npeer = 'hf'\nbits = '8'", "bits = '8'; expected"),
        ("[[row]]\nname = 'a'\npeer = 'hf'\nbits = 8\nbackend = 'tvm'", "row 'a': only rows of peer 'belle' have a backend"),
        ("[[row]\n", "rows.toml: "),
    ],
)
def test_wrong_rows(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(PeersError, match=error.replace("[", r"\[")):
        rows.read_rows(write(tmp_path, text))


# Tables


def sample(row: Row, number: int, rate: float, *, others: float = 0.0, error: str = "") -> dict[str, Any]:
    """1 GB a token at a read bandwidth of 40 GB/s; every task at the same speed, but for one that fails."""
    line = rounds.describe(Ready(row, Path("python"), Path("engine"), 1e9), number)
    if error:
        return line | {"error": error}
    speeds = {task.name: [rate, others] for task in TASKS[:-1]}
    peaks = {task.name: 100 + i for i, task in enumerate(TASKS)}
    errors = {TASKS[-1].name: "RuntimeError('no | room')"}
    return line | {"bandwidth": 40.0, "load": 0.5, "tasks": speeds, "errors": errors, "peak_mb": peaks}


def run_line(**changes: Any) -> dict[str, Any]:
    machine = {
        "processor": "a processor", "cores": 2, "instruction_sets": ["avx2"], "last_level_cache_mib": 32, "memory_gib": 8,
        "system": "Linux", "versions": {"belle-compile": "0.1.0"}, "date": "2026-01-01", "command": "python -m x",
    }  # fmt: skip
    run = {
        "kind": "run",
        "shape": "llama-1b",
        "threads": 2,
        "rounds": 3,
        "time": "2026-01-01 10:00",
        "sources": "5",
        "commit": "c",
        "method": "m",
    }
    tasks = {task.name: task.describe() for task in TASKS}
    return run | {"peers": {"ov": "openvino 1"}, "machine": machine, "tasks": tasks} | changes


def lines() -> list[dict[str, Any]]:
    samples = [sample(row, number, rate) for number in range(3) for row in SPEEDS for rate in SPEEDS[row][number : number + 1]]
    failed = {"kind": "failed", "name": "broken", "peer": "hf", "bits": 8, "error": "no complete\nenvironment"}
    return [run_line(), failed, *samples]


def save(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in content))
    return path


def test_section(tmp_path: Path) -> None:
    comparison = report.read(save(tmp_path / "llama-1b.jsonl", lines()))
    text = report.section(comparison)
    assert "a processor, 2 cores (avx2), 2 threads, 8 GiB" in text and "Memory read: median 40.0 GB/s" in text
    assert "belle-compile 0.1.0 (commit c, sources 5); openvino 1." in text
    assert "2026-01-01 10:00, 3 rounds, `python -m x`." in text
    cell = "20.0 (30.0)"
    assert f"| belle int8 | 8 | 3 | {cell} | {cell} | {cell} | - | 50% | 0.50 | 100 / 103 | 0 |" in text
    assert "| broken | 8 | 0 | failed: no complete environment | - | - | - | - | - | - | - |" in text
    assert "- fast: decode after 2000: RuntimeError('no / room')" in text
    order = [
        line.split(" | ")[0] for line in text.splitlines() if line.startswith(("| belle", "| broken", "| fast", "| small"))
    ]
    assert order == ["| belle int8", "| broken", "| fast", "| small"]


def test_ratios(tmp_path: Path) -> None:
    comparison = report.read(save(tmp_path / "llama-1b.jsonl", lines()))
    found = report.ratios(comparison)
    assert found[0] == ["decode", "belle int8", "20.0", "fast, 12.0", "1.67", "small, 25.0", "0.80"]
    assert [line[0] for line in found] == [task.name for task in TASKS[:-1]]
    alone = report.read(save(tmp_path / "alone.jsonl", [run_line(), sample(OURS, 0, 5.0)]))
    assert report.ratios(alone)[0][3:] == ["-", "-", "-", "-"]


def test_noisy_samples_are_left_out_where_there_are_others(tmp_path: Path) -> None:
    content = [run_line(), sample(OURS, 0, 5.0, others=0.9), sample(OURS, 1, 20.0), sample(FAST, 0, 7.0, others=0.5)]
    ours, fast = report.read(save(tmp_path / "llama-1b.jsonl", content)).engines
    assert ours.rates("decode") == [20.0] and ours.noisy() == len(TASKS) - 1
    assert fast.rates("decode") == [7.0]


def test_row_that_fails_in_a_round_keeps_its_samples(tmp_path: Path) -> None:
    content = [run_line(), sample(OURS, 0, 5.0), sample(OURS, 1, 0, error="killed")]
    text = report.section(report.read(save(tmp_path / "llama-1b.jsonl", content)))
    assert "| belle int8 | 8 | 1 |" in text and "- belle int8: failed in a round: killed" in text


def test_page_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(PeersError, match="run make bench-peers"):
        report.write(tmp_path)
    save(tmp_path / "llama-1b.jsonl", lines())
    save(tmp_path / "smollm2-135m.jsonl", lines())
    greedy = {"name": "fast", "greedy": 0.5, "same_answers": 7, "before_difference": 9.0, "teacher": None}
    measured = {"positions": 9, "top1": 0.9, "kl": 0.01, "loss": 0.002}
    forced = greedy | {"name": "read", "teacher": measured, "text": measured}
    agreement = {"shape": "smollm2-135m", "prompts": 20, "longest": 32, "date": "2026-01-01", "rows": [greedy, forced]}
    (tmp_path / "agreement.json").write_text(json.dumps(agreement))
    page = report.write(tmp_path).read_text()
    assert page.index("## smollm2-135m") < page.index("## llama-1b") < page.index("## Agreement")
    assert "| fast | 0.500 | 7/20 | 9.0 | - | - | - | - | - |" in page
    assert "| read | 0.500 | 7/20 | 9.0 | 0.900 | 0.0100 | 0.900 | 0.0100 | 1.0020 |" in page
    first = (tmp_path / "speed.svg").read_bytes()
    report.write(tmp_path)
    assert (tmp_path / "speed.svg").read_bytes() == first and b"belle int8" in first


def test_rounds_are_appended_to_the_same_day_machine_and_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "llama-1b.jsonl", lines())
    assert peers.kept_lines(path, run_line(rounds=1, time="2026-01-01 12:00", peers={"hf": "torch 1"})) == lines()
    tomorrow = run_line()["machine"] | {"date": "2026-01-02"}
    for other in ({"machine": tomorrow}, {"threads": 1}, {"sources": "6"}, {"method": "n"}, {"peers": {"ov": "openvino 2"}}):
        assert peers.kept_lines(path, run_line(**other)) == []
        assert "it is replaced" in capsys.readouterr().err
    assert peers.kept_lines(tmp_path / "none.jsonl", run_line()) == []


def test_agreement() -> None:
    reference = [[1, 2, 3, 9], [4, 5, 6, 7]]
    assert agree.agreement(reference, [[1, 2, 3], [4, 0, 6, 7]], limit=4, eos=9) == (7 / 8, 1, 2.5)


# Runs


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Builder(tmp_path_factory.mktemp("peers")).engine("llama_gqa", "int8", (BEST_ISA,))


class Ticking:
    """An adapter that makes tokens at once and tells of `told` of them."""

    def __init__(self, told: int) -> None:
        self.told = told

    def gen(self, batch: list[list[int]], n_new: int, ignore_eos: bool, tick: Any = None) -> list[list[int]]:
        for number in range(self.told if tick else 0):
            tick(number / 10)
        return [[1] * n_new for _ in batch]


def test_long_prompts_are_timed_by_tokens() -> None:
    task = {"name": "long", "prompt": 2000, "batch": 1, "steps": 4}
    request = {"tasks": [task], "vocab": 300, "seed": 0}
    assert worker.Bench(Ticking(5), request)()["tasks"]["long"][0] == 10.0
    errors = worker.Bench(Ticking(4), request)()["errors"]
    assert "told of 4 tokens, 5 were made" in errors["long"]


SHORT = (Task("decode", 1, 6, 8), Task("batch", 3, 5, 4), Task("prefill", 1, 16), Task("too long", 1, 500, 4))


def test_rounds_of_our_engine_and_of_one_that_fails(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300}))
    good = Ready(OURS, Path(sys.executable), engine, cost(engine).weight_bytes)
    bad = Ready(FAST, Path(sys.executable), tmp_path / "missing", 1.0)
    found: list[dict[str, Any]] = []
    settings = rounds.Settings(threads=1, tasks=SHORT, quiet_limit_s=0)
    rounds.run_rounds([good, bad], tmp_path, range(3), settings, lambda: 10.0, found.append)
    ours, broken = ([line for line in found if line["name"] == row.name] for row in (OURS, FAST))
    assert [line["round"] for line in ours] == [0, 1, 2]
    assert len(broken) == rounds.GIVE_UP and all("Error" in line["error"] and "\n" not in line["error"] for line in broken)
    for line in ours:
        assert set(line["tasks"]) | set(line["errors"]) == {task.name for task in SHORT} and "too long" in line["errors"]
        assert all(rate > 0 and others >= 0 for rate, others in line["tasks"].values()) and "prefill" in line["tasks"]
        assert line["load"] > 0 and line["peak_mb"]["prefill"] > 10 and line["bytes_per_token"] > 0


def test_answers_and_logits_of_our_adapter(engine: Path, tmp_path: Path) -> None:
    one = Ready(OURS, Path(sys.executable), engine, 1.0)
    prompts = [[5, 6, 7], [9, 8, 7, 6]]
    greedy = rounds.run_worker(one, {"work": "greedy", "prompts": prompts, "tokens": 5}, 1, 60)
    answers = greedy["answers"]
    assert len(answers) == 2 and all(0 < len(answer) <= 5 for answer in answers)
    work = {"work": "teacher", "prompts": prompts, "answers": answers, "save_to": str(tmp_path / "logits.npy")}
    teacher = rounds.run_worker(one, work, 1, 60)["teacher"]
    assert teacher == {"positions": sum(map(len, answers)), "top1": 1.0, "kl": 0.0, "loss": 0.0}
    wrong = Ready(Row("a", "belle", 8, "int8", "threads=3"), Path(sys.executable), engine, 1.0)
    assert "unknown option 'threads=3'" in rounds.run_worker(wrong, {"work": "greedy"}, 1, 60)["error"]


def test_worker_that_takes_too_long(engine: Path) -> None:
    one = Ready(OURS, Path(sys.executable), engine, 1.0)
    assert rounds.run_worker(one, {"work": "greedy"}, 1, 0.01) == {"error": "no result after 0 s"}


# Preparation


def test_rows_that_cannot_be_made_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "VENVS", tmp_path / "venvs")
    monkeypatch.setattr(convert, "ENGINES", tmp_path / "engines")
    ready, failed = convert.prepare_all([FAST, SMALL], tmp_path / "llama-1b", {"llama": "no compiler"})
    assert ready == [] and [row.name for row, _ in failed] == ["fast", "small"]
    assert "setup.sh ov" in failed[0][1] and failed[1][1] == "no compiler"


def test_commands_fail_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "LOGS", tmp_path)
    assert home.run_logged([sys.executable, "-c", "print('hello')"], "fine") == "hello\n"
    with pytest.raises(PeersError, match=r"^ValueError: no \(see .*broken\.log\)$"):
        home.run_logged([sys.executable, "-c", "raise ValueError('no')"], "broken")
    assert home.last_line("", 3) == "exit status 3" and "memory" in home.last_line("working", -9)
    with pytest.raises(PeersError, match=r"the engine needs 1000000000\.0 GB on the disk of "):
        home.check_space(tmp_path / "not" / "there", 1e18, "the engine")


def test_tokenizer_is_cut_or_filled(tmp_path: Path) -> None:
    merges = ["a b", "ab c"]
    tokenizer = {"model": {"vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "c": 4, "abc": 5}, "merges": merges}}
    (tmp_path / "source.json").write_text(json.dumps(tokenizer | {"added_tokens": [{"id": 0}, {"id": 5}]}))
    for size, vocabulary, kept in ((4, 4, ["a b"]), (8, 8, merges)):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
        models.write_tokenizer(tmp_path / "source.json", tmp_path)
        written = json.loads((tmp_path / "tokenizer.json").read_text())
        assert sorted(written["model"]["vocab"].values()) == list(range(vocabulary)) and written["model"]["merges"] == kept
        assert written["added_tokens"] == [{"id": i} for i in (0, 5) if i < size]
