"""Dividing a step into runs of prompts and of answers, for executors that compute them apart (`StepBatch.answers_apart`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from belle_compile.runtime.executors.batch import StepBatch


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one sequence in a step: they begin at index `at` of the step and at position `start`. The last
    token of the sequence in the step has the position `last`."""

    row: int
    at: int
    start: int
    count: int
    last: int

    def part(self, offset: int, count: int) -> Segment:
        """`count` of its tokens after the first `offset`."""
        return Segment(self.row, self.at + offset, self.start + offset, count, self.last)


def divided(batch: StepBatch, chunk: int) -> tuple[list[Segment], list[list[Segment]]]:
    """The tokens of prompts in segments of at most `chunk` tokens; and those of answers: the first one of each answer in the
    step, then the second ones, and so on."""
    prompts: list[Segment] = []
    answers: list[list[Segment]] = []
    for segment in segments_of(batch):
        prompt = min(max(int(batch.prompt_lengths[segment.row]) - segment.start, 0), segment.count)
        prompts += (segment.part(offset, min(chunk, prompt - offset)) for offset in range(0, prompt, chunk))
        for offset in range(prompt, segment.count):
            if len(answers) == offset - prompt:
                answers.append([])
            answers[offset - prompt].append(segment.part(offset, 1))
    return prompts, answers


def segments_of(batch: StepBatch) -> Iterator[Segment]:
    """All tokens of each sequence in the step."""
    sequences = batch.sequences[: batch.tokens]
    ends = [*(np.flatnonzero(sequences[1:] != sequences[:-1]) + 1).tolist(), batch.tokens]
    at = 0
    for end in ends:
        start = int(batch.positions[at])
        yield Segment(int(sequences[at]), at, start, end - at, start + end - at - 1)
        at = end
