"""Run readers on files in child processes, so that a crash, a hang or a lack of memory ends none but the child.

    python -m tests.compiler.readers.runs CHECKPOINT REQUESTS

reads a JSON line {"reader", "path"} for each run, and answers with a JSON line {"end", "detail"}. The `end` is "read",
"refused" (a CompileError), "raised" (anything else), "killed" (by a signal, such as that of a limit) or "grew" (the memory).
CHECKPOINT and REQUESTS are read before, so that children have all modules.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

SECONDS = 10  # of processor time
PATIENCE = 120  # seconds until a child that waits for something is killed
MOST_GROWTH = 200 << 20  # bytes of memory
ADDRESS_SPACE = 4 << 30  # bytes that a child may map, which are not all memory


class Runs:
    """A process that runs readers in children of its own."""

    def __init__(self, checkpoint: Path, requests: Path) -> None:
        command = [sys.executable, "-m", "tests.compiler.readers.runs", str(checkpoint), str(requests)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def end_of(self, reader: str, path: Path) -> tuple[str, str]:
        """How a reader ends, and what it says."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"reader": reader, "path": str(path)}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["end"], answer["detail"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def read_checkpoint(path: Path, key: Path | None = None) -> None:
    """Open a checkpoint, build its graph and read all its tensors."""
    from belle_compile.compiler.checkpoint import open_checkpoint
    from belle_compile.compiler.families import build_graph
    from belle_compile.compiler.reading import Reading

    checkpoint = open_checkpoint(path, reading=Reading(key=key))
    build_graph(checkpoint)
    for tensor in checkpoint.tensors.values():
        if tensor.shape:
            tensor.rows(0, tensor.shape[0])


def read_requests(path: Path) -> None:
    """Select requests from a file, or open a calibration set."""
    from belle_compile.compiler.requests import SelectOptions, open_set

    open_set(path, SelectOptions(size=4, holdout=2))


def read_encrypted(path: Path) -> None:
    """Do the same with an encrypted release, whose key lies beside its directory."""
    read_checkpoint(path, path.parent / "key")


READERS: Mapping[str, Callable[[Path], None]] = {
    "checkpoint": read_checkpoint,
    "encrypted": read_encrypted,
    "requests": read_requests,
}


def run(reader: str, path: Path) -> dict[str, str]:
    """Run a reader in a child; returns how that ended."""
    receive, send = os.pipe()
    before = _resident()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _child(reader, path, send)
    os.close(send)
    if not select.select([receive], [], [], PATIENCE)[0]:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(receive, "rb") as pipe:
        told = pipe.read()
    _, status, usage = os.wait4(child, 0)
    if os.WIFSIGNALED(status) or not told:
        return {"end": "killed", "detail": f"signal {os.WTERMSIG(status)}"}
    if (growth := usage.ru_maxrss * 1024 - before) > MOST_GROWTH:
        return {"end": "grew", "detail": f"by {growth >> 20} MiB; {told.decode()[:300]}"}
    answer: dict[str, str] = json.loads(told)
    return answer


def _child(reader: str, path: Path, send: int) -> None:
    answer = {"end": "read", "detail": ""}
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + ADDRESS_SPACE,) * 2)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 1)  # panics of libraries in Rust write to the standard error
        os.dup2(nowhere, 2)
        READERS[reader](path)
    except BaseException as error:
        refused = any(kind.__name__ == "CompileError" for kind in type(error).__mro__)
        detail = str(error) if refused else "".join(traceback.format_exception(error))
        answer = {"end": "refused" if refused else "raised", "detail": detail[-4000:]}
    finally:
        os.write(send, json.dumps(answer).encode())
        os._exit(0)


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    checkpoint, requests = map(Path, sys.argv[1:])
    read_checkpoint(checkpoint)
    read_requests(requests)
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(run(task["reader"], Path(task["path"]))), flush=True)


if __name__ == "__main__":
    main()
