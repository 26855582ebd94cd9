"""Runs one adapter in a process of its own: reads a request from stdin, prints one line "RESULT {...}".

Runs under a peer's interpreter, so it imports nothing of this project.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Ids = list[int]
Tick = Callable[..., None]  # of a new token, or with its time
JIFFY = 1 / os.sysconf("SC_CLK_TCK")
LONG = 1000  # tokens of a prompt


def load_adapter(spec: str) -> Any:
    """The class named FILE:CLASS."""
    file, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location("adapter_under_test", file)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["adapter_under_test"] = module
    module_spec.loader.exec_module(module)
    return getattr(module, name)


def own_processes() -> list[tuple[Path, list[str]]]:
    """/proc folder and stat fields (from the state on) of every process of this session: the engine and its children."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[3]) == os.getsid(0):
                found.append((folder, fields))
    return found


def others_seconds() -> float:
    """Processor seconds that the rest of the machine has used since boot."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    own = sum(int(x) for _, fields in own_processes() for x in fields[11:15])
    return (sum(ticks[:3]) + sum(ticks[5:8]) - own) * JIFFY


def peak_mb() -> int:
    """Sum of the peak resident sizes of this session's processes, in MB; pages they share count once for each."""
    total = 0
    for folder, _ in own_processes():
        try:
            lines = (folder / "status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return total // 1_000_000


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, cores that others kept busy meanwhile, and the result."""
    others, start = others_seconds(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    used = others_seconds() - others - 3 * JIFFY  # the counters are that coarse, and short samples would look noisy
    return seconds, max(0.0, used / seconds), result


class Bench:
    """The measurements of one process. A sample is [tokens per second, cores used by others].

    Decoding speed is n / (t[n + 1 tokens] - t[1 token]) on fresh prompts of one length, where t[1 token] is the mean of
    a run before and one after. Behind a long prompt that difference drowns in how long the prompt takes, so there adapters
    say when tokens come, which costs some engines a little.
    Prompts are random and never repeated, so that prefix caches do not help.
    """

    def __init__(self, adapter: Any, request: dict[str, Any]) -> None:
        self.gen: Callable[..., list[Ids]] = adapter.gen
        self.request = request
        self.random = random.Random(request["seed"])

    def run(self, task: dict[str, Any], n_new: int, *ticks: Tick) -> tuple[float, float]:
        """(seconds, cores that others used) of `n_new` tokens after fresh prompts; a tick is handed on to the adapter."""
        vocab = self.request["vocab"]
        prompts = [[self.random.randrange(100, vocab) for _ in range(task["prompt"])] for _ in range(task["batch"])]
        seconds, others, new = timed(lambda: self.gen(prompts, n_new, True, *ticks))
        if [len(ids) for ids in new] != [n_new] * len(prompts):
            raise RuntimeError(f"gen gave {[len(ids) for ids in new]} tokens, {n_new} were asked of each of {len(prompts)}")
        return seconds, others

    def measure(self, task: dict[str, Any]) -> list[float]:
        """A prefill where the task has no steps, else decoding."""
        if task["prompt"] > LONG and task["steps"]:
            return self.measure_by_ticks(task)
        before, others_before = self.run(task, 1)
        if not task["steps"]:
            return [round(task["batch"] * task["prompt"] / before, 2), round(others_before, 2)]
        long, others_long = self.run(task, task["steps"] + 1)
        after, others_after = self.run(task, 1)
        seconds = long - (before + after) / 2
        if seconds <= 0:
            raise RuntimeError(f"{task['steps']} more tokens took no time: {before:.4f}, {long:.4f}, {after:.4f} s")
        others = max(others_before, others_long, others_after)
        return [round(task["batch"] * task["steps"] / seconds, 2), round(others, 2)]

    def measure_by_ticks(self, task: dict[str, Any]) -> list[float]:
        """Decoding from the first new token to the last."""
        times: list[float] = []
        _, others = self.run(task, task["steps"] + 1, lambda at=None: times.append(time.perf_counter() if at is None else at))
        if len(times) not in (2, task["steps"] + 1):
            raise RuntimeError(f"the adapter told of {len(times)} tokens, {task['steps'] + 1} were made")
        return [round(task["batch"] * task["steps"] / (times[-1] - times[0]), 2), round(others, 2)]

    def __call__(self) -> dict[str, Any]:
        out: dict[str, Any] = {"tasks": {}, "errors": {}, "peak_mb": {}}
        for task in self.request["tasks"]:
            try:
                self.run(task, 2)  # warm-up: the first run of a size also allocates
                out["tasks"][task["name"]] = self.measure(task)
            except Exception as error:  # one task that a peer cannot do must not lose the others
                out["errors"][task["name"]] = " ".join(repr(error).split())[:300]
            out["peak_mb"][task["name"]] = peak_mb()
        return out


def greedy(adapter: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Greedy answers, one prompt at a time, up to the end-of-text token."""
    return {"answers": [adapter.gen([ids], request["tokens"], False)[0] for ids in request["prompts"]]}


def teacher_forced(adapter: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Logits along the reference's answers: saved when save_to is given, else compared with those in compare_with."""
    import numpy as np

    if not hasattr(adapter, "logits"):
        return {"teacher": None}
    pairs = zip(request["prompts"], request["answers"], strict=True)
    rows = [adapter.logits(prompt + answer[:-1], len(prompt) - 1) for prompt, answer in pairs]
    logits = np.concatenate(rows).astype(np.float32)
    if "save_to" in request:
        np.save(request["save_to"], logits)
    reference = np.load(request.get("compare_with") or request["save_to"], mmap_mode="r")
    targets = [token for answer in request["answers"] for token in answer]
    same, divergence, loss = 0, 0.0, 0.0
    for ours, theirs, target in zip(logits, reference, targets, strict=True):
        p, q = (x.astype(np.float64) - x.max() for x in (theirs, ours))
        p, q = (x - np.log(np.exp(x).sum()) for x in (p, q))
        same += int(ours.argmax() == theirs.argmax())
        divergence += float((np.exp(p) * (p - q)).sum())
        loss += float(p[target] - q[target])
    found = {"top1": same, "kl": divergence, "loss": loss}  # loss: how much more than the reference's
    return {"teacher": {"positions": len(logits)} | {name: value / len(logits) for name, value in found.items()}}


def main() -> None:
    request = json.load(sys.stdin)
    os.sched_setaffinity(0, request["cpus"])
    sys.path.remove(str(Path(__file__).resolve().parent))  # an engine that imports `report` does not mean ours
    adapter_class = load_adapter(request["adapter"])
    start = time.perf_counter()
    adapter = adapter_class(request["engine"], request["option"])
    out: dict[str, Any] = {"load": round(time.perf_counter() - start, 3)}
    if request["work"] == "bench":
        out |= Bench(adapter, request)()
    elif request["work"] == "greedy":
        out |= greedy(adapter, request)
    else:
        out |= teacher_forced(adapter, request)
    print("RESULT " + json.dumps(out), flush=True)
    os._exit(0)  # some peers crash while they are torn down


if __name__ == "__main__":
    main()
