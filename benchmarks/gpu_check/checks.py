"""One check of a bundle on the GPU of this host, in a process of its own: one that hangs or crashes takes no other with it.

python -m benchmarks.gpu_check.checks BUNDLE NAME FINDINGS
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors.choices import ANY, Choices, key
from belle_compile.runtime.executors.cuda import CudaExecutor
from belle_compile.runtime.executors.cuda_device import open_device
from belle_compile.runtime.executors.kv_memory import KvMemory
from belle_compile.runtime.program import Program
from belle_compile.runtime.program_json import read_program
from benchmarks.gpu_check import adapters, provider
from benchmarks.gpu_check.driving import Plan, Sequences, TimedExecutor, follow, greedy
from benchmarks.gpu_check.findings import Findings

DEVICE, LARGE = "device", "bloom-7b1"
EXPECTED = "expected.npz"
PROMPT, GREEDY = 256, 64  # tokens of a small engine's prompt and answer
# As shares of the largest logit, the largest error of a row at most, and the median. Interpreted kernels have 2e-6 without
# quantization. With it roundings to integers flip, since attention's powers are float16: 0.031 and 0.016; a CPU's engine has
# 0.020 at most. An operand that is misread gives above 0.5.
TOLERANCE = {"none": (5e-4, 5e-4), "int8": (0.1, 0.03)}
CANDIDATES = 50
CONTEXT, STEPS = 128, 64
BATCHES, PROMPTS = (1, 2, 4, 8, 32, 128), (512, 2048)
_BLOCK = 64 << 20

# Every number of rows that kernels have variants for, one sequence and several, prompts beside tokens that are generated.
PLANS: dict[str, Plan] = {
    "prompt at once, then token by token": ({0: PROMPT}, *({0: 1},) * (GREEDY - 1)),
    "pieces of 1 to 129": tuple({0: size} for size in (1, 2, 4, 8, 16, 32, 64, 129)),
    "two pieces": ({0: 100}, {0: 156}),
    "several sequences": (
        {0: 40, 1: 1}, {0: 1, 1: 70, 2: 1}, {2: 130, 0: 1, 1: 1}, *({0: 1, 1: 1, 2: 1},) * 4, {0: 17, 1: 3, 2: 1},
    ),
    "long steps": ({0: 200, 1: 150, 2: 210}, {0: 90, 1: 150, 2: 100}),
}  # fmt: skip


def check_device(findings: Findings) -> None:
    """What the GPU is, and that its memory can be copied."""
    from cuda.bindings import driver

    with closing(open_device()) as device:
        _, version = driver.cuDriverGetVersion()
        findings.note(gpu=device.name, arch=device.arch, cuda_of_driver=f"{version // 1000}.{version % 1000 // 10}")
        findings.note(free_bytes=device.memory_bytes, shared_bytes=device.shared_bytes)
        findings.note(copy_bytes_per_second=device.copy_bandwidth())


def check_small(folder: Path, arch: str, findings: Findings) -> None:
    """Logits and greedy tokens of an engine beside those expected: with the kernels that are the fastest here, then with every
    alternative."""
    with np.load(folder / EXPECTED) as expected:
        ids, tokens, wanted = expected["ids"].tolist(), expected["tokens"].tolist(), expected["logits"]
    tolerance = TOLERANCE[folder.name.rpartition("-")[2]]
    findings.note(tolerance=list(tolerance), right=False)
    right = True
    with tempfile.TemporaryDirectory(prefix="belle-gpu-check-") as work:
        rank = linked(folder / "rank0", Path(work))
        program = read_program(rank)
        for name, chosen in _selections(program):
            if chosen is not None:
                with closing(open_device()) as device:
                    Choices(rank, device).keep(chosen)
            found: dict[str, Any] = {}
            with closing(CudaExecutor(rank, [arch], kv_memory=KvMemory(3 * len(wanted) + 48))) as executor:
                for plan, steps in PLANS.items():
                    found[plan] = _compare(executor, ids + tokens[:-1], wanted, steps)
                    findings.note_under(name, found)
                    right &= found[plan]["largest_error"] < tolerance[0] and found[plan]["median_error"] < tolerance[1]
                if chosen is None:
                    found["greedy"] = _greedy(executor, ids, tokens, wanted[-1], tolerance[0])
                    findings.note_under(name, found)
                    # Where weights are quantized, an answer may leave the other at two tokens that are nearly as likely.
                    right &= found["greedy"]["right"] or not folder.name.endswith("-none")
    findings.note(right=bool(right))


def check_adapters(folder: Path, arch: str, findings: Findings, work: Path) -> None:
    """`adapters.check_small` for an engine in a directory that can be written to."""
    engine = linked(folder, work / "engine")
    (engine / "rank0").unlink()
    linked(folder / "rank0", engine / "rank0")
    adapters.check_small(engine, arch, findings, folder / EXPECTED, TOLERANCE[folder.name.rpartition("-")[2]])


def _selections(program: Program) -> Iterator[tuple[str, dict[str, str] | None]]:
    """First what is measured to be the fastest, then each of the alternatives in turn."""
    yield "fastest", None
    choices = {
        key(name, None if bound == ANY else int(bound)): (name, *others)
        for name, by_bound in program.alternatives.items()
        for bound, others in by_bound.items()
    }
    for number in range(max(map(len, choices.values()), default=0)):
        yield f"choice {number}", {name: some[min(number, len(some) - 1)] for name, some in choices.items()}


def _compare(executor: CudaExecutor, text: list[int], wanted: NDArray[np.float32], plan: Plan) -> dict[str, Any]:
    """The largest error of a row, as a share of the largest logit, where it is, and the median."""
    scale, worst, where = float(np.abs(wanted).max()), 0.0, (0, 0)
    all_errors = []
    for sequence, start, logits in follow(executor, text, plan):
        errors = np.abs(logits - wanted[start : start + len(logits)]).max(axis=1) / scale
        errors[~np.isfinite(errors)] = np.finfo(np.float32).max
        all_errors.append(errors)
        if errors.max() > worst:
            worst, where = float(errors.max()), (sequence, start + int(errors.argmax()))
    median = float(np.median(np.concatenate(all_errors)))
    return {"largest_error": worst, "median_error": median, "sequence": where[0], "position": where[1]}


def _greedy(
    executor: CudaExecutor, ids: list[int], tokens: list[int], wanted: NDArray[np.float32], tolerance: float
) -> dict[str, Any]:
    """How many tokens are the same, and whether the candidates of the last are right, with no better one missing."""
    answer, row = greedy(executor, ids, len(tokens), CANDIDATES)
    there, allowed = np.isfinite(row), 2 * tolerance * np.abs(wanted).max()
    same, number = int((np.array(answer) == tokens).cumprod().sum()), int(there.sum())
    close = number >= CANDIDATES and np.abs(row - wanted)[there].max() <= allowed
    complete = number == len(row) or wanted[~there].max() <= np.sort(wanted)[-CANDIDATES] + allowed
    right = same == len(tokens) and close and complete
    return {"same_tokens": same, "of": len(tokens), "candidates": number, "asked_for": CANDIDATES, "right": bool(right)}


def check_large(folder: Path, arch: str, findings: Findings) -> None:
    """Times of a 7B model with weights that are made up here."""
    program = read_program(folder)
    calls, weight_bytes = program.kernel_calls, sum(call.bytes for call in program.calls)
    findings.note(weight_bytes_of_a_step=weight_bytes, launches_before_fusion=calls.before_fusion, launches=calls.after_fusion)
    with tempfile.TemporaryDirectory(prefix="belle-gpu-check-") as work:
        rank = make_weights(folder, Path(work))
        started = time.perf_counter()
        CudaExecutor(rank, [arch]).close()  # measures which kernels are the fastest
        findings.note(first_load_s=time.perf_counter() - started)
        for file in rank.glob("choices-*.json"):
            kept = json.loads(file.read_text())
            findings.note(choices=kept["choices"], microseconds=_microseconds(kept["seconds"]))
        started = time.perf_counter()
        with closing(TimedExecutor(rank, [arch])) as executor:
            findings.note(load_s=time.perf_counter() - started, copy_bytes_per_second=executor.read_bandwidth())
            _times(executor, weight_bytes, findings)
        with closing(TimedExecutor(rank, [arch])) as executor:
            executor.without_overlap()
            sequences = _prompted(executor, 1)
            findings.note_under("decode, batch 1, kernels one after the other", {"seconds": _decode(sequences)})
        adapters.check_large(rank, arch, findings)


def _microseconds(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of each of the alternatives that there were for a kernel and a number of rows, by what tells them apart."""
    found = {}
    for name, times in seconds.items():
        same = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*times, strict=False)))
        found[name] = {one[same:] or one: round(1e6 * taken, 2) for one, taken in times.items()}
    return found


def _prompted(executor: CudaExecutor, batch: int) -> Sequences:
    """Sequences after a prompt each; raises EngineError where the GPU is too small for so many."""
    random, sequences = np.random.default_rng(0), Sequences(executor, batch, CONTEXT + 2 * STEPS)
    for sequence in range(batch):
        sequences.prefill(sequence, random.integers(5, 250, CONTEXT).tolist())
    return sequences


def _times(executor: TimedExecutor, weight_bytes: int, findings: Findings) -> None:
    random, program = np.random.default_rng(0), executor.program
    for batch in BATCHES:
        name = f"decode, batch {batch}"
        try:
            sequences = _prompted(executor, batch)
        except EngineError as error:  # a smaller GPU
            findings.note_under(name, {"unmeasured": str(error)})
            continue
        seconds = _decode(sequences)
        kv = batch * (CONTEXT + 8 + STEPS // 2) * program.kv.block_bytes // program.block_size
        share = (weight_bytes + kv) / executor.read_bandwidth() / seconds
        kinds = _seconds_of_kinds(executor, batch)
        findings.note_under(
            name, {"seconds": seconds, "tokens_per_second": batch / seconds, "share_of_copy": share, "seconds_of_kinds": kinds}
        )
    for length in PROMPTS:
        times = [_prompt(executor, random.integers(5, 250, length).tolist()) for _ in range(5)]
        findings.note_under(f"prefill {length}", {"first_token_s": float(np.median(times[1:]))})
    most = program.max_tokens
    products = {}
    for call in [call for call in program.calls if call.kind == "qlinear" and call.rows == "T"][:4]:
        seconds = executor.seconds_of([call], most)
        products[call.node] = {"seconds": seconds, "int8_ops": 2 * call.bytes * most / seconds}
    findings.note_under(f"products of {most} tokens", products)
    findings.note_under(f"seconds of kinds, {most} tokens", _seconds_of_kinds(executor, most))


def _decode(sequences: Sequences) -> float:
    sequences.decode(8)
    return sequences.decode(STEPS)


def _seconds_of_kinds(executor: TimedExecutor, rows: int) -> dict[str, float]:
    """Of a step, the calls of each kind one after the other."""
    calls = [call for call in executor.program.calls if call.when != "adapted"]
    of_kind = {kind: [call for call in calls if call.kind == kind] for kind in dict.fromkeys(call.kind for call in calls)}
    return {kind: executor.seconds_of(calls, rows) for kind, calls in of_kind.items()}


def _prompt(executor: CudaExecutor, tokens: list[int]) -> float:
    sequences, started = Sequences(executor, 1, len(tokens)), time.perf_counter()
    sequences.prefill(0, tokens)
    return time.perf_counter() - started


def linked(folder: Path, work: Path) -> Path:
    """A directory with the same files, in which others may be written; made if it is missing."""
    work.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (work / file.name).symlink_to(file.resolve())
    return work


def make_weights(folder: Path, work: Path) -> Path:
    """A rank's directory with weights of random bytes, and small numbers where they are floats."""
    linked(folder, work)
    header = (folder / "weights.header").read_bytes()
    tensors = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
    tensors.pop("__metadata__", None)
    block = np.random.default_rng(0).integers(-127, 128, _BLOCK, dtype=np.int8).tobytes()
    floats = np.full(_BLOCK // 4, 0.004, np.float32).tobytes()
    with open(work / "weights.safetensors", "wb") as weights:
        weights.write(header)
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, stop = entry["data_offsets"]
            source = {"I8": block, "F32": floats}.get(entry["dtype"])
            if source is None:
                raise EngineError("gpu check", f"tensor {name}", found=entry["dtype"], expected="I8 or F32")
            assert weights.tell() == len(header) + start, "no gaps"
            for at in range(start, stop, _BLOCK):
                weights.write(source[: min(_BLOCK, stop - at)])
    return work


@contextmanager
def reported(findings: Findings) -> Iterator[None]:
    """What ends a check is one of its findings."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        first: BaseException = error  # closing what has failed fails again
        while first.__context__ and not first.__suppress_context__:
            first = first.__context__
        findings.note(failed=f"{type(first).__name__}: {first}")
        raise SystemExit(1) from None


def main() -> None:
    bundle, name, findings = Path(sys.argv[1]), sys.argv[2], Findings(Path(sys.argv[3]))
    with reported(findings):
        arch = json.loads((bundle / "bundle.json").read_text())["arch"]
        if name == DEVICE:
            check_device(findings)
        elif name == LARGE:
            check_large(bundle / LARGE, arch, findings)
        elif name == f"{provider.FOLDER}/{LARGE}":
            with tempfile.TemporaryDirectory(prefix="belle-gpu-check-") as work:
                made = make_weights(bundle / name / "rank0", Path(work) / "rank0")
                provider.check_large(made.parent, findings)
        elif Path(name).parts[0] == provider.FOLDER:
            provider.check_small(bundle / name, findings, PROMPT)
        elif Path(name).parts[0] == adapters.FOLDER:
            with tempfile.TemporaryDirectory(prefix="belle-gpu-check-") as work:
                check_adapters(bundle / name, arch, findings, Path(work))
        else:
            check_small(bundle / name, arch, findings)


if __name__ == "__main__":
    main()
