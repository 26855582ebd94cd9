"""An engine of several ranks for use from another process, which starts the ranks and sends its calls to rank 0.

python -m belle_compile.compiler.ranked_engine ENGINE RANKS [ISA]    # started by RankedEngine, and as each rank by the launcher
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from belle_compile.runtime.distributed import ranks
from belle_compile.runtime.distributed.launcher import Launcher
from belle_compile.runtime.engine import Engine, Result
from belle_compile.runtime.errors import PROGRAM, BelleError, EngineError
from belle_compile.runtime.serving.request import SamplingParams
from belle_compile.runtime.usage import show_error

_TIMEOUT_S = 60.0  # for a rank to start, to give a sign of life and to end: a build may leave the host busy


class RankedEngine:
    """An engine with the methods of `Engine` that measurements need; its ranks run until `close`."""

    def __init__(self, directory: Path, count: int, *, isa: str | None = None) -> None:
        """Start `count` ranks with kernels for `isa` (None: the best that each host has); raises EngineError with the message
        of a rank that cannot run."""
        self._errors = tempfile.TemporaryFile()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        arguments = [str(directory), str(count), *([isa] if isa else [])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            self.max_context: int = self._ask("max_context")
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Result]:
        """Answer prompts of token ids, as `Engine.generate` does."""
        results: list[Result] = self._ask("generate", [list(ids) for ids in prompts], params)
        return results

    def logits(self, token_ids: Sequence[int], *, start: int = 0) -> npt.NDArray[np.float32]:
        """The logits [tokens - start, vocabulary] after each token from number `start` on, as `Engine.logits` gives them."""
        logits: npt.NDArray[np.float32] = self._ask("logits", list(token_ids), start=start)
        return logits

    def close(self) -> None:
        """End the ranks; a second call does nothing."""
        assert self._process.stdin is not None and self._process.stdout is not None, "pipes"
        with suppress(OSError):
            self._process.stdin.close()  # rank 0 ends when its input does, and the other ranks with it
        try:
            self._process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> RankedEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, what: str, *arguments: Any, **options: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None, "pipes"
        try:
            pickle.dump((what, arguments, options), self._process.stdin)
            self._process.stdin.flush()
            good, answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self._process.wait()
            self._errors.seek(0)
            messages = self._errors.read().decode(errors="replace").strip().splitlines()
            found = f"exit code {self._process.returncode}"
            if messages:
                found = messages[-1].removeprefix(f"{PROGRAM}: ").removesuffix(".")
            raise EngineError("ranks", "they cannot run on this host", found=found) from None
        if not good:
            raise EngineError(**answer)
        return answer


def _answer(engine: Engine) -> None:
    """Answer pickled calls (name, arguments, options) from the standard input until it ends, on the standard output."""
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            what, arguments, options = pickle.load(questions)
        except EOFError:
            return
        try:
            result = engine.max_context if what == "max_context" else getattr(engine, what)(*arguments, **options)
            answer = True, result
        except BelleError as error:
            answer = False, error.parts()
        pickle.dump(answer, answers)
        answers.flush()


def _rank(directory: Path, isa: str | None, here: ranks.Place) -> int:
    """Run one rank and return its exit code: rank 0 answers calls, and loading the engine on another rank serves its steps."""
    line, code = ranks.Line(here), 0
    try:
        with Engine.load(directory, isa=isa, prefix_cache=False) as engine:  # measurements repeat prompts
            _answer(engine)
    except BelleError as error:
        line.say("error", error.parts())
        code = 1
    except SystemExit as ended:  # raised by a rank that has served the steps of rank 0
        code = int(ended.code or 0)
    line.say("exit", code)
    return code


def main() -> int:
    """Run the launcher, or a rank that it has started; returns the exit code."""
    directory, count, isa = Path(sys.argv[1]), int(sys.argv[2]), next(iter(sys.argv[3:]), None)
    here = ranks.place()
    if here is not None and ranks.supervised():
        return _rank(directory, isa, here)
    launcher = Launcher(count, [sys.executable, *sys.orig_argv[1:]], _TIMEOUT_S)
    code = launcher.run()
    if launcher.error:
        show_error(launcher.error, as_json=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
