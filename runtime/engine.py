"""The engine: answers prompts, many requests sharing each step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from belle_compile import __version__
from belle_compile.runtime.adapters.basis import check_takes_adapters
from belle_compile.runtime.artifact import Manifest, Progress
from belle_compile.runtime.capacity.slo import Slo, limited
from belle_compile.runtime.chat import ChatEncoder
from belle_compile.runtime.drafting import Draft, load_both
from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.executors import Executor, ProfilableExecutor
from belle_compile.runtime.forks import finalize
from belle_compile.runtime.loading import Options
from belle_compile.runtime.profiling import ProfileHandle, Recorder
from belle_compile.runtime.prompt import ChatTemplate
from belle_compile.runtime.selftest import SelfTest, read_golden_answers, run_self_test
from belle_compile.runtime.serving.adapters import open_adapters
from belle_compile.runtime.serving.async_streams import AsyncStreams
from belle_compile.runtime.serving.asynchronous import AsyncStream, Handover, generate_async
from belle_compile.runtime.serving.draft_model import DraftModel
from belle_compile.runtime.serving.generation import Delta, Generation, Result, Timings
from belle_compile.runtime.serving.messages import Job
from belle_compile.runtime.serving.prompts import (
    Encoding,
    Prompt,
    as_batch,
    as_flag,
    as_params,
    as_prompt,
    as_token_ids,
    as_whole,
    require,
)
from belle_compile.runtime.serving.request import EngineIdentity, Request, RequestDefaults, SamplingParams
from belle_compile.runtime.serving.result_cache.cache import ResultCache
from belle_compile.runtime.serving.result_cache.options import CachePolicy, ResultCacheOptions
from belle_compile.runtime.serving.scheduling import SchedulerOptions, Scheduling
from belle_compile.runtime.serving.scoring import Scoring
from belle_compile.runtime.serving.step_loop import StepLoop
from belle_compile.runtime.serving.streams import Stream
from belle_compile.runtime.serving.telemetry import EngineStats, RequestLog, Telemetry
from belle_compile.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of Python's own since 3.11; nothing evaluates the annotations

__all__ = ["AsyncStream", "Delta", "Engine", "Prompt", "Result", "Stream", "Timings"]


class Engine:
    """A loaded engine directory. Several threads may use it at the same time; their requests are batched together.

    Example:
        with Engine.load("artifacts/belle-7b-cpu") as engine:
            for result in engine.generate(["你好", "1+1=?"], SamplingParams(seed=7)):
                print(result.text)
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        executor: Executor,
        result_cache: ResultCacheOptions | None = None,
        scheduler: SchedulerOptions | None = None,
        telemetry: Telemetry | None = None,
        directory: Path | None = None,
        drafts: DraftModel | None = None,
    ) -> None:
        """Assemble an engine from loaded parts, those of `directory` if they come from one. `Engine.load` loads a directory."""
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.executor = executor
        self.load_s = 0.0
        self.directory = directory
        self.chat = ChatEncoder(ChatTemplate(manifest.prompt_template), tokenizer)
        self._handover = Handover()
        self._requests = RequestLog(telemetry)
        after_answers = partial(_pass_on, self._handover, self._requests)  # which does not keep the engine alive
        dynamic_rope_from = manifest.model.dimensions.get("dynamic_rope_from")
        self.identity = EngineIdentity(manifest.digest, __version__, executor.kernels, manifest.target.ranks)
        try:
            self._loop = StepLoop(executor, scheduler, self.identity, dynamic_rope_from, after_answers, telemetry, drafts)
        except EngineError:  # an option that the engine was not built for
            executor.close()
            if drafts:
                drafts.close()
            raise
        # Those that were loaded; None for an engine without room for any.
        self.adapters = open_adapters(directory, executor, self._loop) if directory else None
        self._limits = self._loop.scheduler.limits
        self.arrivals = self._loop.arrivals  # to announce requests that are about to be submitted
        self._defaults = RequestDefaults(manifest.generation, manifest.special_tokens.eos, self._limits, executor.vocab_size)
        self.result_cache: ResultCache | None = None
        if result_cache:
            try:
                self.result_cache = ResultCache(result_cache, self._loop, tokenizer, self.identity, after_answers)
            except BaseException:
                self._loop.stop()
                raise
        self._stop = finalize(self, _stop, self._loop, self.result_cache)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        threads: int | None = None,
        isa: str | None = None,
        kv_tokens: int | None = None,
        kv_cache_memory: str | float | None = None,
        verify: Literal["header", "full"] = "header",
        progress: Progress | None = None,
        result_cache: ResultCacheOptions | str | None = None,
        max_num_seqs: int | None = None,
        max_queue: int | None = None,
        prefix_cache: bool = True,
        telemetry: Telemetry | None = None,
        lora: Mapping[str, str | Path] | None = None,
        max_loras: int | None = None,
        slo: Slo | None = None,
        draft: str | Path | None = None,
        draft_tokens: int | None = None,
    ) -> Engine:
        """Check and load an engine directory; raises `EngineError` for whatever does not fit.

        Weights for a CPU are mapped into memory without being read; those for a GPU are copied to it. `threads` and `isa` are
        for CPUs: they default to the cores that this process may use, and to BELLE_ISA or else the best instruction set of the
        CPU. `verify="full"` digests every file, weights included, and calls `progress`; "header" checks large files by their
        size only. `result_cache` is how to store answers that greedy and seeded requests may be given again, or only where:
        "memory", "sqlite:FILE" or "redis://HOST".

        `kv_tokens` is the number of tokens that the KV cache holds. In its place, `kv_cache_memory` is the memory of the cache
        of each rank: bytes (an int, "4GiB", "500MB"), or a share (0.5, "50%") of what is free beside the weights. The default
        is half of that, on a GPU all of it, but no more than the most and longest sequences of a step need.

        `max_num_seqs` answers are computed at the same time, by default as many as the engine was built for. With `max_queue`,
        a request that would be one more than these to wait is refused with `QueueFull`. `prefix_cache` reuses the keys and
        values of prompts that begin alike. `telemetry` observes steps and requests. `slo` limits latencies, by what
        `belle-run benchmark` measured on this host.

        `lora` are directories of LoRA adapters as PEFT saves them, by the names that `SamplingParams.adapter` chooses them by.
        There is room for `max_loras`, by default as many as these; `Engine.adapters` loads and unloads others. The engine must
        have been built with --lora-rank.
        `draft` is a smaller engine of the same vocabulary, which guesses the next tokens of answers; this engine verifies
        several of them in a step. No answer changes. As many are guessed as pay by measured times, or always `draft_tokens`.

        An engine of several ranks is loaded by as many processes, started with mpiexec or srun. In rank 0 this returns the
        engine. In the others it does not return: they run its steps until it is closed, and end with `SystemExit`. By default
        the ranks of a host share its cores evenly.
        """
        _check_arguments(directory, verify, isa)
        threads = None if threads is None else as_whole("threads", threads, "engine")
        path, cache_options = Path(directory), ResultCacheOptions.of(result_cache)
        require("result_cache", cache_options, ResultCacheOptions, "engine")
        scheduler = limited(SchedulerOptions(max_num_seqs, max_queue, prefix_cache), slo, path, threads)
        started, lora, least = time.perf_counter(), lora or {}, as_whole("max_loras", max_loras or 0, "engine")
        options = Options(threads, isa, kv_tokens, verify == "full", progress, kv_cache_memory, max(len(lora), least))
        manifest, tokenizer, executor, drafts = load_both(path, options, Draft.of(draft, draft_tokens), prefix_cache)
        engine = cls(manifest, tokenizer, executor, cache_options, scheduler, telemetry, path, drafts)
        engine._load_adapters(lora)
        engine.load_s = time.perf_counter() - started
        return engine

    def _load_adapters(self, lora: Mapping[str, str | Path]) -> None:
        """Load the adapters of a new engine, which is closed if one of them does not fit."""
        try:
            for name, place in lora.items():
                assert self.adapters is not None, "an engine that is loaded with slots takes adapters"
                self.adapters.load(name, place)
        except BaseException:
            self.close()
            raise

    @property
    def max_context(self) -> int:
        """Largest number of tokens that prompt and answer can have together."""
        return self._limits.capacity

    @property
    def most_sequences(self) -> int:
        """Largest number of answers that are generated at the same time."""
        return self._loop.scheduler.most_sequences

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache: CachePolicy | None = None,
        scheduling: Scheduling | None = None,
        **encoding: Unpack[Encoding],
    ) -> list[Result]:
        """Answer prompts together; returns results in the order of the prompts, those of one prompt (`n`) side by side.

        `params` are one for all prompts, or one each. The engine's prompt template is applied to strings unless `raw`, and to
        chats always. Names of special tokens, such as <|im_end|>, are these tokens in `raw` strings and text in chats, so
        that no message can forge a turn; `parse_special` True or False says so for both. `chat_template_kwargs` are variables
        of the template, such as {"enable_thinking": False}. `cache` is what the prompts allow the result cache to do, by
        default all. `scheduling` says when they are served.
        """
        generations = [Generation(request, self.tokenizer) for request in self.resolve_all(prompts, params, **encoding)]
        self._run(generations, lambda: self.submit(generations, cache, scheduling))
        return [generation.result() for generation in generations]

    def resolve_all(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **encoding: Unpack[Encoding],
    ) -> list[Request]:
        """Return the requests that `generate` serves, one for each answer."""
        batch = as_batch(prompts)
        requests = []
        for prompt, p in zip(batch, as_params(params, len(batch)), strict=True):
            requests += self.resolve(prompt, p, **encoding).answers(int(p.n) if p else 1)
        return requests

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        cache: CachePolicy | None = None,
        scheduling: Scheduling | None = None,
        **encoding: Unpack[Encoding],
    ) -> Stream:
        """Answer one prompt in pieces of whole characters. Several streams may be read in turn."""
        return Stream(self, self._resolve_one(prompt, params, encoding), cache, scheduling)

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        cache: CachePolicy | None = None,
        scheduling: Scheduling | None = None,
        **encoding: Unpack[Encoding],
    ) -> AsyncStream:
        """Answer one prompt in pieces, for `async for` on a running event loop.

        The prompt is encoded right here. A long one holds up the event loop for some milliseconds, unless `resolve` was called
        on another thread and the request is passed in its place.
        """
        return AsyncStream(self, self._handover, self._resolve_one(prompt, params, encoding), cache, scheduling)

    def astream_all(
        self, requests: Sequence[Request], *, cache: CachePolicy | None = None, scheduling: Scheduling | None = None
    ) -> AsyncStreams:
        """Answer resolved requests together, in pieces that one reader gets on the running event loop."""
        return AsyncStreams(self, self._handover, requests, cache, scheduling)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache: CachePolicy | None = None,
        scheduling: Scheduling | None = None,
        **encoding: Unpack[Encoding],
    ) -> list[Result]:
        """Do what `generate` does without blocking the event loop. Cancelling the task drops the requests."""
        requests = self.resolve_all(prompts, params, **encoding)
        return await generate_async(self, self._handover, requests, cache, scheduling)

    def submit(
        self,
        generations: Sequence[Generation],
        cache: CachePolicy | None = None,
        scheduling: Scheduling | None = None,
        *,
        wait: bool = True,
    ) -> None:
        """Begin to answer resolved requests, from the result cache where there is one and `cache` allows it.

        Without `wait`, a cache in a file or on a server is read on another thread. Raises `QueueFull` where the queue has no
        room for all of them. Those that were looked up on another thread end with it instead.
        """
        self.check_process()
        require("cache", cache, CachePolicy)
        require("scheduling", scheduling, Scheduling)
        for generation in generations:
            generation.accompany(scheduling or Scheduling(), self._requests.add)
        if self.result_cache:
            self.result_cache.submit(generations, cache or CachePolicy(), wait=wait)
        else:
            self._loop.submit(generations)

    def withdraw(self, job: Job) -> None:
        """Give up a job that was submitted: it is dropped before the next step, unless identical requests wait for its answer.

        Takes no lock: the garbage collector may call it anywhere.
        """
        (self.result_cache or self._loop).withdraw(job)

    def resolve(self, prompt: Prompt, params: SamplingParams | None = None, **encoding: Unpack[Encoding]) -> Request:
        """Return the request for the first answer to a prompt: token ids, and the engine's values where `params` has None."""
        if isinstance(prompt, Request):
            if params is not None:
                raise EngineError("request", "sampling parameters", found="a request and parameters", expected="one of them")
            return prompt
        require("params", params, SamplingParams)
        params = params or SamplingParams()
        adapter = self._digest_of_adapter(params.adapter)
        request = Request.resolve(self.encode(prompt, **encoding), params, self._defaults, adapter)
        if request.grammar:
            self.check_process()
            self.tokenizer.grammars.check(request.grammar)
        return request

    def _digest_of_adapter(self, name: str | None) -> str:
        """The digest of a loaded adapter; "" for None."""
        if name is None:
            return ""
        if self.adapters is None:
            check_takes_adapters(self.manifest)
            raise EngineError("adapter", "the engine has no adapters", found=repr(name)[:100], remedy="name some with lora")
        return self.adapters.find(name).digest

    def logits(self, token_ids: Sequence[int], *, start: int = 0, adapter: str | None = None) -> NDArray[np.float32]:
        """Return the float32 logits [tokens - start, vocabulary] after each of `token_ids[start:]`; no BOS is added.

        `start` saves computing and storing logits that are not needed, and changes none of the others.
        """
        ids, start = as_token_ids(token_ids, self.executor.vocab_size, "token_ids"), as_whole("start", start)
        self._limits.check(len(ids), "the token sequence is too long")
        if not 0 <= start < len(ids):
            raise EngineError("request", "start", found=str(start), expected=f"0 to {len(ids) - 1}, a place in the sequence")
        scoring = Scoring(ids, start, self.executor.vocab_size, self._digest_of_adapter(adapter))
        self._run([scoring], lambda: self._loop.submit([scoring]))
        return scoring.result()

    def self_test(self) -> SelfTest:
        """Answer the prompts of the engine's `selftest.json` and compare; raises `EngineError` at the first token that differs.

        The result tells how much was tested: nothing, with a reason, where the engine has no golden answers.
        """
        assert self.directory is not None, "self_test() of an engine that was assembled from parts"
        return run_self_test(self.generate, read_golden_answers(self.directory, self.manifest))

    @contextlib.contextmanager
    def profile(self) -> Iterator[ProfileHandle]:
        """Time every kernel of the requests that are answered in the `with` block. The handle has its `result` afterwards.

        Timing costs a fraction of a microsecond per kernel call. Before and after the block, the speed at which memory is read
        is measured, which takes half a second each time. Outside of the block nothing is timed.

            with engine.profile() as profile:
                engine.generate("你好")
            print(profile.result.table())
        """
        handle, executor = ProfileHandle(), self.executor
        if not isinstance(executor, ProfilableExecutor):
            found = f"the executor of backend {self.manifest.target.backend}, which runs no program of kernels"
            raise EngineError("profile", "this engine cannot be profiled", found=found)
        before = self._loop.call(executor.read_bandwidth)
        recorder = Recorder(executor.program, executor.batch)
        self._loop.record(recorder)
        try:
            yield handle
        finally:
            self._loop.record(None)
        bandwidth = max(before, self._loop.call(executor.read_bandwidth))
        handle.result = recorder.profile(executor.isa, executor.threads, bandwidth)

    def encode(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        parse_special: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids that the model is given for a prompt; see `generate` for the other arguments."""
        if isinstance(prompt, Request):
            return list(prompt.prompt)
        raw, given = as_flag("raw", raw), as_prompt(prompt)
        parse = raw and isinstance(given, str) if parse_special is None else as_flag("parse_special", parse_special)
        if isinstance(given, str) and raw:
            ids = self.chat.encode_text(given, parse_special=parse)
        elif isinstance(given, str) or (given and isinstance(given[0], Mapping)):
            messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
            ids = self.chat.encode(messages, parse_special=parse, variables=chat_template_kwargs)
        else:
            ids = given
        return as_token_ids(ids, self.executor.vocab_size)

    def stats(self) -> EngineStats:
        """Return what was counted since the engine was loaded. Waits for no step; the counts may be of different moments."""
        self.check_process()
        stats = self._loop.stats(self._requests.ends(), self.result_cache.stats() if self.result_cache else None)
        return replace(stats, adapters=self.adapters.stats()) if self.adapters else stats

    def check_process(self) -> None:
        """Raise `EngineError` in a process that was forked from the one that loaded the engine: it has no step thread."""
        self._loop.owner.check()

    @property
    def draft_bytes(self) -> int:
        """The memory that the draft engine takes, its cache included; 0 without one."""
        drafts = self._loop.scheduler.drafts
        return drafts.memory_bytes if drafts else 0

    def alive(self, within_s: float) -> bool:
        """Whether the engine is open and its steps go on: one ended in the last `within_s` seconds, or the step thread answers
        a message in as many. Waits no longer than that."""
        return self._loop.alive(within_s)

    def close(self) -> None:
        """Drop the requests under way and free the memory. A second call does nothing."""
        self._stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _resolve_one(self, prompt: Prompt, params: SamplingParams | None, encoding: Encoding) -> Request:
        request = self.resolve(prompt, params, **encoding)
        if params is not None and params.n != 1:
            remedy = "stream each of Engine.resolve(prompt, params).answers(n)"
            raise EngineError("sampling", "n", found=str(params.n), expected="1, for a stream is one answer", remedy=remedy)
        return request

    def _run(self, jobs: Sequence[Job], submit: Callable[[], None]) -> None:
        """Submit jobs and wait until all are done."""
        try:
            submit()
            for job in jobs:
                job.done.wait()
        finally:  # an interrupt leaves no job behind
            for job in jobs:
                if not job.done.is_set():
                    self.withdraw(job)


def _check_arguments(directory: object, verify: object, isa: object) -> None:
    """Raise `EngineError` for arguments of `Engine.load` of another type or value."""
    if verify not in ("header", "full"):
        raise EngineError("engine", "verify", found=repr(verify), expected='"header" or "full"')
    if not isinstance(directory, (str, Path)):
        raise EngineError("engine", "directory", found=type(directory).__name__, expected="a path")
    require("isa", isa, str, "engine")


def _pass_on(handover: Handover, requests: RequestLog) -> None:
    """Pass on what was answered on this thread."""
    handover.flush()
    requests.flush()


def _stop(loop: StepLoop, cache: ResultCache | None) -> None:
    """End an engine. What it has answered by then is stored."""
    loop.stop()
    if cache:
        cache.close()
