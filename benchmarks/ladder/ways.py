"""The ways to answer requests that the steps of the ladder compare, each in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from belle_compile.runtime import Engine, EngineError, SamplingParams
from benchmarks.ladder.load import Answer, Sample, Served, batched, replay
from benchmarks.ladder.steps import Asked

LEAST = 2  # requests that are timed, however long they take
_clock = time.perf_counter


class Way(ABC):
    """Answers a closed loop of users for some seconds, or until there are no more requests."""

    @abstractmethod
    def sample(self, requests: Sequence[Asked], users: int, seconds: float) -> Sample: ...


class OneAtATime(Way):
    """Answers one request after the other."""

    @abstractmethod
    def answer(self, asked: Asked) -> Served: ...

    def sample(self, requests: Sequence[Asked], users: int, seconds: float) -> Sample:
        served: list[Served] = []
        started = _clock()
        for asked in requests:
            served.append(self.answer(asked))
            if len(served) >= LEAST and _clock() - started >= seconds:
                break
        return replay(served, [asked.tokens for asked in requests[: len(served)]], users)


class Transformers(OneAtATime):
    """Transformers in float32. Busy is the time in the model's forward, Python between its ops included."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from benchmarks.simulation import load_fp32

        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        self._torch, self._device, self._kv_cache = torch, settings["device"], settings["kv_cache"]
        self._model = load_fp32(Path(settings["path"])).to(self._device)
        self._forward_s, self._began = 0.0, 0.0
        self.ends: list[float] = []
        self._model.register_forward_pre_hook(self._begin)
        self._model.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self._began = _clock()

    def _end(self, *_: Any) -> None:
        if self._device != "cpu":
            self._torch.accelerator.synchronize()
        self.ends.append(_clock())
        self._forward_s += self.ends[-1] - self._began

    def answer(self, asked: Asked) -> Served:
        self._forward_s, self.ends = 0.0, []
        ids = self._torch.tensor([asked.prompt], device=self._device)
        started = _clock()
        with self._torch.inference_mode():
            self._model.generate(
                ids, attention_mask=self._torch.ones_like(ids), min_new_tokens=asked.tokens, max_new_tokens=asked.tokens,
                do_sample=False, use_cache=self._kv_cache, pad_token_id=0,
            )  # fmt: skip
        return Served([self.ends[0] - started], _clock() - started, self._forward_s)


class _Engine:
    """Our engine, and the time in which its kernels run."""

    def __init__(self, settings: dict[str, Any]) -> None:
        result_cache = "memory" if settings["result_cache"] else None
        threads = settings["threads"] and (settings["threads"] // settings["ranks"] or 1)
        self.engine = Engine.load(
            settings["path"], threads=threads, prefix_cache=settings["prefix_cache"], result_cache=result_cache
        )
        self.busy: float | None = None  # share of the time that was measured last

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Set `busy` to the share of the `with` block in which kernels ran; None for an engine that runs no program of them."""
        started = ended = 0.0
        try:
            with self.engine.profile() as profile:
                started = _clock()
                yield
                ended = _clock()
        except EngineError as error:
            if error.stage != "profile":
                raise
            self.busy = None
            yield
            return
        assert profile.result is not None
        kernels_s = sum(kernel.seconds for phase in profile.result.phases for kernel in phase.kernels)
        self.busy = kernels_s / (ended - started)


def greedy(tokens: int) -> SamplingParams:
    """Exactly so many tokens, the likeliest ones."""
    return SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=tokens, ignore_eos=True)


class EngineOneAtATime(_Engine, OneAtATime):
    """Our engine without batches."""

    def answer(self, asked: Asked) -> Served:
        started = _clock()
        (result,) = self.engine.generate([asked.prompt], greedy(asked.tokens))
        return Served([result.timings.first_token_s], _clock() - started)

    def sample(self, requests: Sequence[Asked], users: int, seconds: float) -> Sample:
        with self.timed():
            found = super().sample(requests, users, seconds)
        return replace(found, busy=self.busy)


class Padded(_Engine, Way):
    """Our engine behind a batcher as the article has it: batches sorted by length, padded to their longest prompt and answer.

    Our steps are ragged. What padding costs is computed beside the requests: for each, a sequence of as many tokens as its
    prompt lacks, and as many tokens after its answer as the longest answer has more. So the answers stay what they are.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self._largest_batch = settings["largest_batch"]

    def sample(self, requests: Sequence[Asked], users: int, seconds: float) -> Sample:
        with self.timed():
            found = batched(requests, users, seconds, self._largest_batch, self._serve)
        return replace(found, busy=self.busy)

    def _serve(self, batch: Sequence[Asked]) -> Served:
        longest, tokens = max(len(asked.prompt) for asked in batch), max(asked.tokens for asked in batch)
        chance = np.random.default_rng(longest)
        vocabulary = self.engine.executor.vocab_size
        missing = [longest - len(asked.prompt) for asked in batch if len(asked.prompt) < longest]
        filling = [chance.integers(5, min(250, vocabulary), count).tolist() for count in missing]
        prompts = [*(asked.prompt for asked in batch), *filling]
        started = _clock()
        results = self.engine.generate(prompts, [*[greedy(tokens)] * len(batch), *[greedy(1)] * len(filling)])
        return Served([result.timings.first_token_s for result in results[: len(batch)]], _clock() - started)


class Continuous(_Engine, Way):
    """Our scheduler: every request is submitted when it comes."""

    def sample(self, requests: Sequence[Asked], users: int, seconds: float) -> Sample:
        with self.timed():
            answers, took = asyncio.run(self._run(requests, users, seconds))
        return Sample(users, answers, min(seconds, took), self.busy)

    async def _run(self, requests: Sequence[Asked], users: int, seconds: float) -> tuple[list[Answer], float]:
        more, answers, started = iter(requests), [], _clock()

        async def user() -> None:
            for asked in more:
                sent = _clock() - started
                if sent >= seconds:
                    return
                first = 0.0
                async for _ in self.engine.astream(asked.prompt, greedy(asked.tokens)):
                    first = first or _clock() - started
                answers.append(Answer(sent, first, _clock() - started, asked.tokens))

        await asyncio.gather(*(user() for _ in range(users)))
        return answers, _clock() - started


WAYS: dict[str, Callable[[dict[str, Any]], Way]] = {
    "transformers": Transformers, "one": EngineOneAtATime, "padded": Padded, "continuous": Continuous,
}  # fmt: skip
