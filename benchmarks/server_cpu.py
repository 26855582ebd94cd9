"""What HTTP costs in CPU time: microseconds a token of streamed answers, beside those of `Engine.generate`.

    python -m benchmarks.server_cpu ENGINE [--connections 64] [--step-ms 10] [--out benchmarks/results/server-cpu.json]

No kernels run: a step sleeps, and the rest is what is measured. CPU time, unlike wall time, says much the same on a machine
that has other things to do, which can only add to it: the least of all rounds counts. `belle-run serve` runs in a process of
its own; this one is the client, and answers the same prompts with `generate` and with `astream` in turn, one task for each
answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from belle_compile.runtime import Engine
from belle_compile.runtime.cli import main as belle_run
from benchmarks import machine
from benchmarks.idle_executor import replace_executors
from benchmarks.server_overhead import ANSWER, PARAMS, new_prompts, stream
from benchmarks.servers import Server

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
ROUNDS = 8


def _cpu_s(process: int) -> float:
    """Return the CPU time of all threads of a process."""
    return time.clock_gettime((~process << 3) | 2)  # how Linux numbers the CPU clocks of processes


def _main_thread_s(process: int) -> float:
    """Return the CPU time of a process's first thread, on which the server's event loop runs."""
    fields = Path(f"/proc/{process}/task/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


async def _astream(engine: Engine, prompts: list[list[int]]) -> None:
    async def read(prompt: list[int]) -> None:
        async for _ in engine.astream(prompt, PARAMS):
            pass

    await asyncio.gather(*map(read, prompts))


def measure(engine: Engine, server: Server, connections: int) -> dict[str, Any]:
    """Return the least microseconds of CPU time a token of each way, and of the server's event loop."""
    ways: dict[str, tuple[int, Callable[[list[list[int]]], object]]] = {
        "generate": (os.getpid(), lambda prompts: engine.generate(prompts, PARAMS)),
        "astream": (os.getpid(), lambda prompts: asyncio.run(_astream(engine, prompts))),
        "http": (server.process, lambda prompts: stream(server, prompts)),
    }
    taken: dict[str, list[float]] = {way: [] for way in [*ways, "http_event_loop"]}
    prompts = new_prompts(engine)
    for turn in range(ROUNDS + 1):
        for way, (process, answer) in ways.items():
            before, loop_before = _cpu_s(process), _main_thread_s(process)
            answer(prompts(connections))
            seconds, loop_seconds = _cpu_s(process) - before, _main_thread_s(process) - loop_before
            if turn:  # the first one warms up
                taken[way].append(1e6 * seconds / (connections * ANSWER))
                if way == "http":
                    taken["http_event_loop"].append(1e6 * loop_seconds / (connections * ANSWER))
    return {"connections": connections} | {way: round(min(values), 1) for way, values in taken.items()}


def main() -> None:
    """Measure, print and write the row; or be the server, where the arguments begin with "serve"."""
    if sys.argv[1:2] == ["serve"]:
        replace_executors(float(os.environ["STEP_S"]))
        belle_run()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    replace_executors(options.step_ms / 1000)
    os.environ["STEP_S"] = str(options.step_ms / 1000)  # for the server
    # Such an engine fails its self-test, and is never "ready".
    server = Server(options.engine, program="benchmarks.server_cpu", ready="/health")
    with server, Engine.load(options.engine) as engine:
        row = measure(engine, server, options.connections)
    print(json.dumps(row))
    if options.out:
        facts = {"unit": "microseconds of CPU time a token", "step_ms": options.step_ms, "answer_tokens": ANSWER}
        result = {"machine": machine.describe(), **facts, "rows": [row]}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
