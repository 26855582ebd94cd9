"""The engine: prompts in, answers out; many requests share each step."""

from __future__ import annotations

import contextlib
import queue
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from belle_compile.runtime.artifact import Manifest, Progress
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.loading import Options, load_parts
from belle_compile.runtime.profiling import ProfileHandle, Recorder
from belle_compile.runtime.prompt import ChatTemplate, Message
from belle_compile.runtime.serving.generation import Generation, Result, Timings
from belle_compile.runtime.serving.sampling import Sampler, SamplingParams
from belle_compile.runtime.serving.scheduler import Sequence as TokenSequence
from belle_compile.runtime.serving.scheduler import fill
from belle_compile.runtime.serving.step_loop import StepLoop
from belle_compile.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from belle_compile.runtime.executors import Executor

__all__ = ["Engine", "Prompt", "Result", "Stream", "Timings"]

# A question, a chat of {"role", "content"} messages, or token ids (then neither template nor BOS is added).
Prompt = str | Sequence[Message] | Sequence[int]


class Engine:
    """An engine directory, loaded. Safe to use from several threads; their requests are batched together.

    Example:
        with Engine.load("artifacts/belle-7b-cpu") as engine:
            for result in engine.generate(["你好", "1+1=?"], SamplingParams(seed=7)):
                print(result.text)
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, executor: Executor) -> None:
        """Put loaded parts together; use `Engine.load` for a directory."""
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.executor = executor
        self.load_s = 0.0
        self._template = ChatTemplate(manifest.prompt_template)
        self._loop = StepLoop(executor)
        self._scheduler = self._loop.scheduler
        # Beyond this length dynamic RoPE scaling rotates a token by how many come with it, wrong guesses included.
        self._scheduler.draft_until = manifest.model.dimensions.get("dynamic_rope_from", self._scheduler.draft_until)
        self._stop = weakref.finalize(self, self._loop.stop)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        threads: int | None = None,
        isa: str | None = None,
        kv_tokens: int | None = None,
        verify: Literal["header", "full"] = "header",
        progress: Progress | None = None,
    ) -> Engine:
        """Check and load an engine directory. Weights for a CPU are mapped, not read; those for a GPU are copied there.

        `threads` defaults to the cores this process may use, `isa` to the best the CPU has (or env BELLE_ISA); both are of
        engines for CPUs. `kv_tokens` defaults to what half of a host's memory beside the weights holds, or what is left of a
        GPU's. `verify="full"` digests the weights too, which reads them
        all and reports to `progress`. Raises `EngineError` for whatever does not fit, in one sentence.

        An engine of several ranks is loaded in as many processes, started with mpiexec or srun. Rank 0 gets the engine; for the
        others this does not return: they serve it until it is closed, and end with `SystemExit`. By default they share the
        cores of a host evenly.
        """
        if verify not in ("header", "full"):
            raise EngineError("engine", "verify", found=repr(verify), expected='"header" or "full"')
        started = time.perf_counter()
        engine = cls(*load_parts(Path(directory), Options(threads, isa, kv_tokens, verify == "full", progress)))
        engine.load_s = time.perf_counter() - started
        return engine

    @property
    def max_context(self) -> int:
        """Tokens that prompt and answer can have together."""
        return self._scheduler.capacity

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        raw: bool = False,
    ) -> list[Result]:
        """Answer prompts together; results in their order. One `params` serves all, or give one for each.

        The engine's template is applied to strings unless `raw`, and to chats always.
        """
        batch: list[Any] = [prompts] if _is_one_prompt(prompts) else list(prompts)
        each = [params] * len(batch) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(batch):
            raise EngineError("request", "sampling parameters", found=str(len(each)), expected=f"{len(batch)}, one a prompt")
        generations = [self._prepare(prompt, p, raw) for prompt, p in zip(batch, each, strict=True)]
        try:
            self._loop.submit(generations)
            for generation in generations:
                generation.done.wait()
        finally:  # an interrupt leaves no request behind
            for generation in generations:
                if not generation.done.is_set():
                    self._loop.withdraw(generation)
        return [generation.result() for generation in generations]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False) -> Stream:
        """Answer one prompt piece by piece; complete characters only. Several streams may be read in turn."""
        return Stream(self, self._loop, lambda on_piece: self._prepare(prompt, params, raw, on_piece))

    def logits(self, token_ids: Sequence[int], *, start: int = 0) -> NDArray[np.float32]:
        """Float32 logits [tokens - start, vocabulary] after each of `token_ids[start:]`, taken as they are.

        A `start` saves the head's work and the memory of logits that nobody looks at; those that remain are the same.
        """
        ids = self._check_ids(token_ids)
        self._scheduler.check_length(len(ids), "the token sequence is too long")
        if not 0 <= start < len(ids):
            raise EngineError("request", "start", found=str(start), expected=f"0 to {len(ids) - 1}, a place in the sequence")
        return self._loop.call(lambda: self._score(ids, start))

    @contextlib.contextmanager
    def profile(self) -> Iterator[ProfileHandle]:
        """Time every kernel of the requests answered in the `with` block; its `result` is there at the end.

        Costs a fraction of a microsecond a kernel, and before and after the block half a second to measure how fast memory is
        read. Outside of the block nothing is timed.

            with engine.profile() as profile:
                engine.generate("你好")
            print(profile.result.table())
        """
        handle, threads = ProfileHandle(), self.executor.threads
        before = self._loop.call(self.executor.read_bandwidth)
        recorder = Recorder(self.executor.program, self.executor.batch)
        self._loop.record(recorder)
        try:
            yield handle
        finally:
            self._loop.record(None)
        handle.result = recorder.profile(self.executor.isa, threads, max(before, self._loop.call(self.executor.read_bandwidth)))

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids the model would see for a prompt."""
        if isinstance(prompt, str):
            return self._encode_text(prompt if raw else self._template.render([{"role": "user", "content": prompt}]))
        items: list[Any] = list(prompt)
        if items and isinstance(items[0], Mapping):
            return self._encode_text(self._template.render(items))
        return self._check_ids(items)

    def close(self) -> None:
        """Free the memory; requests under way are dropped. A second time does nothing."""
        self._stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _score(self, ids: list[int], start: int) -> NDArray[np.float32]:
        sequence = TokenSequence(ids, 0)
        batch = self._scheduler.batch
        out = np.empty((len(ids) - start, self.executor.vocab_size), np.float32)
        self._scheduler.admit(sequence)
        try:
            assert sequence.blocks is not None, "admitted"
            sequence.blocks.grow(len(ids))
            first = 0
            while first < len(ids):
                wanted = max(first, start)  # the step's tokens before this one need no logits
                end = min(len(ids), first + batch.max_tokens, wanted + batch.max_rows)
                fill(batch, sequence, 0, first, end - first)
                rows = max(0, end - wanted)
                batch.logit_rows[:rows] = np.arange(wanted - first, wanted - first + rows, dtype=np.int32)
                batch.tokens, batch.rows = end - first, rows
                if batch.candidates is not None:
                    batch.candidates[:rows] = 0
                logits = self.executor.step()
                if rows:
                    out[wanted - start : wanted - start + rows] = logits
                first = end
        finally:
            self._scheduler.release(sequence)
        return out

    def _encode_text(self, text: str) -> list[int]:
        return self._check_ids(self.tokenizer.encode(text))

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        array = np.asarray(ids)
        vocabulary = self.executor.vocab_size
        if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
            found = "no tokens" if array.size == 0 else f"{type(ids[0]).__name__}"
            raise EngineError("request", "the prompt", found=found, expected="text, chat messages or token ids")
        if array.min() < 0 or array.max() >= vocabulary:
            found = str(int(array.max() if array.max() >= vocabulary else array.min()))
            raise EngineError("request", "a token id", found=found, expected=f"0 to {vocabulary - 1}")
        return [int(token) for token in array]

    def _prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        raw: bool,
        on_piece: Callable[[str | None], None] | None = None,
    ) -> Generation:
        params = params or SamplingParams()
        ids = self.encode(prompt, raw=raw)
        self._scheduler.check_length(len(ids) + 1, "the prompt and one token are too long")
        defaults = self.manifest.generation
        # A length that was asked for is kept or refused; the default yields to the context's end.
        room = self._scheduler.capacity - len(ids)
        max_new_tokens = min(defaults.max_new_tokens, room) if params.max_new_tokens is None else params.max_new_tokens
        self._scheduler.check_length(len(ids) + max_new_tokens, "prompt and max_new_tokens are too long")
        end_ids = () if params.ignore_eos else self.manifest.special_tokens.eos
        sampler = Sampler(params, defaults, ids)
        return Generation(
            ids, max_new_tokens, sampler, params.stop, end_ids, self.tokenizer, on_piece, params.prompt_lookup,
        )  # fmt: skip


def _is_one_prompt(prompts: Any) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer, Mapping)))


class Stream(Iterator[str]):
    """The pieces of an answer as they come; `result` once they are through. Closing it early drops the request."""

    def __init__(self, engine: Engine, loop: StepLoop, prepare: Callable[[Callable[[str | None], None]], Generation]) -> None:
        self._engine = engine  # kept alive while it is read
        self._loop = loop
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ended = False
        self._generation = prepare(self._pieces.put)
        loop.submit([self._generation])

    @property
    def result(self) -> Result:
        """The finished answer; raises `EngineError` before the last piece was read."""
        if not self._ended:
            raise EngineError("request", "the answer is not finished", remedy="read the stream to its end first")
        return self._generation.result()

    def __next__(self) -> str:
        piece = None if self._ended else self._pieces.get()
        if piece is None:
            self._ended = True
            self._generation.result()  # raises the error the request ended with, if any
            raise StopIteration
        return piece

    def close(self) -> None:
        """Drop the request if it is still under way."""
        if not self._generation.done.is_set():
            self._loop.withdraw(self._generation)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_generation"):
            self.close()
