"""The steps of the ladder, the engines that they need, and the files of requests that all of them answer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from belle_compile.compiler.driver import BuildRequest, build
from belle_compile.compiler.requests import SelectOptions, write_set
from belle_compile.compiler.targets import choose
from belle_compile.runtime import Engine, host
from benchmarks.serving.workloads import Chat


@dataclass(frozen=True)
class Built:
    """How an engine is built: a preset, with or without fused kernels, for so many ranks, calibrated by requests or not."""

    quantization: str
    fuse: bool = True
    ranks: int = 1
    calibrated: bool = False


CALIBRATION = SelectOptions(size=64, holdout=64)
ENGINES = {
    "float32-unfused": Built("none", fuse=False),
    "float32": Built("none"),
    "int8-unfused": Built("int8", fuse=False),
    "int8": Built("int8", calibrated=True),
    "int8-ranks": Built("int8", ranks=2),
}


@dataclass(frozen=True)
class Step:
    """A way to answer requests, which differs from the step before in what `title` says.

    `way` is a class of benchmarks/ladder/ways.py, `engine` one of `ENGINES`; Transformers has the checkpoint itself. Padded
    batches have up to `largest_batch` requests.
    """

    name: str
    title: str
    way: str
    engine: str = ""
    kv_cache: bool = True
    largest_batch: int = 8
    prefix_cache: bool = False
    result_cache: bool = False

    @property
    def ranks(self) -> int:
        return ENGINES[self.engine].ranks if self.engine else 1

    def settings(self, path: Path, threads: int | None = None, device: str = "cpu") -> dict[str, Any]:
        """What the process of the step is told; `path` is its engine or checkpoint, `device` where Transformers' model runs."""
        return asdict(self) | {"path": str(path.absolute()), "ranks": self.ranks, "threads": threads, "device": device}


STEPS = (
    Step("recompute", "Transformers, float32, one at a time, no KV cache", "transformers", kv_cache=False),
    Step("kv-cache", "KV cache", "transformers"),
    Step("compiled", "compiled, without fusion", "one", "float32-unfused"),
    Step("fusion", "fused kernels", "one", "float32"),
    Step("int8", "INT8", "one", "int8"),
    Step("padded", "dynamic batches, sorted by length and padded", "padded", "int8"),
    Step("continuous", "continuous batches", "continuous", "int8"),
    Step("prefix-cache", "prefix cache", "continuous", "int8", prefix_cache=True),
    Step("result-cache", "result cache", "continuous", "int8", prefix_cache=True, result_cache=True),
    Step("ranks", "two ranks", "continuous", "int8-ranks", prefix_cache=True, result_cache=True),
)


def make_engine(checkpoint: Path, name: str, target: str, out: Path, reuse: bool, requests: Path) -> Path:
    """Build an engine for a target of one rank, or for several of them; `reuse` keeps one that exists.

    A CPU's engine has kernels for the best instruction set of this host only. If the engine is to be calibrated, the file
    `requests` (JSON lines with `question` and `std_answer`) has those to calibrate with and to hold out for the accuracy gate.
    """
    built = ENGINES[name]
    if reuse and (out / "manifest.json").is_file():
        return out
    whole = target if built.ranks == 1 else f"{target}x{built.ranks}"
    possible = choose(target)[0].isas or ()
    isas = tuple(isa for isa in host.host_isas() if isa in possible)[:1]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        calibration = Path(folder) / "requests.set" if built.calibrated else None
        if calibration:
            write_set(requests, calibration, CALIBRATION, field="question", answer="std_answer")
        request = BuildRequest(
            checkpoint, out, target=whole, quantization=built.quantization, isas=isas, fuse=built.fuse,
            calibration=calibration, force=True,
        )  # fmt: skip
        return build(request)


# Ways to batch requests whose answers differ as much as real ones do: most of the ladder's answers are equally long.
BATCHING = (
    Step("padded-8", "padded, batches of up to 8", "padded", "int8"),
    Step("padded-16", "padded, batches of up to 16", "padded", "int8", largest_batch=16),
    Step("continuous", "continuous", "continuous", "int8"),
)
LONGEST_ANSWER = 32  # tokens: the first step computes all tokens again for each
LONGEST_BATCHED_ANSWER = 256  # tokens, of `BATCHING`


class Asked(NamedTuple):
    """A request: the tokens of its prompt, and how many it is answered with."""

    prompt: list[int]
    tokens: int


def write_requests(engine: Engine, chats: Sequence[Chat], longest: int, longest_answer: int, path: Path) -> None:
    """Write the first question of each chat in the tokens of an engine, for all steps; those with more than `longest` tokens
    are left out, answers included, which get at most `longest_answer`. Raises SystemExit where none is left."""
    lines = []
    for system, (question, *_) in chats:
        messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question.text}]
        prompt, tokens = engine.encode(messages), min(question.answer_tokens, longest_answer)
        if len(prompt) + tokens <= longest:
            lines.append(json.dumps([prompt, tokens]) + "\n")
    if not lines:
        raise SystemExit(f"ladder: no request has at most {longest} tokens with its answer.")
    path.write_text("".join(lines), encoding="utf-8")


def read_requests(path: Path) -> list[Asked]:
    return [Asked(*json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
