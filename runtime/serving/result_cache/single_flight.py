"""Identical requests that are under way at the same time are computed once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.generation import FinishReason, Generation
from belle_compile.runtime.serving.logprobs import TokenLogprob
from belle_compile.runtime.serving.messages import Job
from belle_compile.runtime.serving.scheduling import Withdrawn
from belle_compile.runtime.serving.step_loop import StepLoop

Scored = tuple[int, TokenLogprob | None]  # a token, with its log probability if that was asked for


class Flight:
    """One computation: the generation that leads it, which gets its tokens first, and those that follow.

    It is registered under its key until its answer is stored, so that between the end and the store nobody computes it again.
    """

    def __init__(self, flights: Flights, key: str, leader: Generation, storable: bool) -> None:
        """`storable` says whether a member allows the answer to be stored."""
        self.key, self.leader, self.storable = key, leader, storable
        self.tokens: list[Scored] = []
        self.followers: tuple[Generation, ...] = ()  # those that have all `tokens`
        self.members = 1  # generations that want the answer
        self.ended = False
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self._flights = flights

    def on_token(self, token: int, logprob: TokenLogprob | None) -> None:
        """Give a token to the followers."""
        scored = (token, logprob)
        for follower in self._flights.add(self, scored):
            _replay(follower, [scored], self.leader)

    def on_end(self, finish_reason: FinishReason | None, error: BaseException | None) -> None:
        """End the followers of an answer that failed; pass a complete one on to be stored."""
        self._flights.end(self, finish_reason, error)


class Flights:
    """The flights under way, by key.

    Its lock is held for changes of a few fields only: neither while steps run, nor during detokenizing or any call of a store.
    """

    def __init__(self, loop: StepLoop, on_complete: Callable[[Flight, FinishReason], None]) -> None:
        """`loop` computes what the leaders need. `on_complete` is called on the thread that ends an answer, with a flight that
        stays joinable until `release`."""
        self._submit, self._withdraw, self._wake = loop.submit, loop.withdraw, loop.wake
        loop.give_up = self.withdraw  # a request whose time is over leaves its flight
        self._on_complete = on_complete
        self._lock = threading.Lock()
        self._flights: dict[str, Flight] = {}
        self._of: dict[Job, Flight] = {}
        self._leaving: queue.SimpleQueue[tuple[Job, EngineError]] = queue.SimpleQueue()

    @contextmanager
    def section(self) -> Iterator[None]:
        """Hold the lock, and handle the withdrawals that came meanwhile."""
        try:
            with self._lock:
                yield
        finally:
            self._handle_leaving()

    def add(self, flight: Flight, scored: Scored) -> tuple[Generation, ...]:
        """Note a token of a flight; returns the members that are to be given it. Each token of each answer passes here, so this
        is `section` without its cost."""
        with self._lock:
            flight.tokens.append(scored)
            followers = flight.followers
        self._handle_leaving()
        return followers

    def enter(self, key: str, generation: Generation, storable: bool) -> Flight | None:
        """Join the flight of this key, or lead a new one. Returns the flight that was joined, which may have ended; None for a
        new one, whose leader the caller must replay or submit to the step loop."""
        with self.section():
            flight = self._flights.get(key)
            if flight is None:
                self._flights[key] = flight = Flight(self, key, generation, storable)
                generation.observer, self._of[generation] = flight, flight
                return None
            flight.members += 1
            flight.storable |= storable
            self._of[generation] = flight
            generation.cached = True
        generation.start()
        self._catch_up(flight, generation)
        return flight

    def lead_alone(self, key: str, generation: Generation, storable: bool) -> None:
        """Lead a flight that nobody can join."""
        flight = Flight(self, key, generation, storable)
        with self.section():
            generation.observer, self._of[generation] = flight, flight

    def withdraw(self, job: Job, error: EngineError | None = None) -> None:
        """Take a job out, which ends with `error`, by default `Withdrawn`.

        Its flight goes on for other members; without any it is dropped before the next step.

        Waits for no lock: the garbage collector may call it anywhere. A thread that holds the lock handles what it finds here.
        """
        self._leaving.put((job, error or Withdrawn()))
        self._handle_leaving()

    def end(self, flight: Flight, finish_reason: FinishReason | None, error: BaseException | None) -> None:
        """End a flight, on the thread that ends its leader."""
        with self.section():
            flight.ended, flight.finish_reason, flight.error = True, finish_reason, error
            complete = finish_reason is not None and flight.members > 0
            for generation in (flight.leader, *flight.followers):
                self._of.pop(generation, None)
            followers = flight.followers
            if not complete:
                self._forget(flight)
        for follower in followers:
            _end(follower, flight)
        if complete and finish_reason is not None:
            self._on_complete(flight, finish_reason)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Submit to the step loop what is neither answered nor given up yet. What was given up ends here.

        Under the lock, so that a withdrawal finds a generation either not submitted or in the step loop.
        """
        given_up: list[Generation] = []
        with self.section():
            computed: list[Generation] = []
            for generation in generations:
                if not generation.done.is_set() and not generation.cached:
                    flight = generation.observer
                    given_up_now = isinstance(flight, Flight) and flight.members == 0
                    (given_up if given_up_now else computed).append(generation)
            if computed:
                self._submit(computed)
        for generation in given_up:
            generation.fail(Withdrawn())

    def release(self, flight: Flight) -> None:
        """Forget a flight that has ended."""
        with self.section():
            self._forget(flight)

    def _catch_up(self, flight: Flight, generation: Generation) -> None:
        """Replay what the flight has computed, on the caller's thread, until the generation has all tokens and can follow."""
        taken = 0
        while not generation.done.is_set():
            with self.section():
                tokens = flight.tokens[taken:]
                if not tokens and not flight.ended:
                    flight.followers = (*flight.followers, generation)
                    return
            if not tokens:
                _end(generation, flight)
            _replay(generation, tokens, flight.leader)
            taken += len(tokens)
        with self.section():
            self._of.pop(generation, None)

    def _handle_leaving(self) -> None:
        while not self._leaving.empty() and self._lock.acquire(blocking=False):
            actions: list[Callable[[], None]] = []
            try:
                while not self._leaving.empty():
                    actions.append(self._leave(*self._leaving.get()))
            finally:
                self._lock.release()
            for action in actions:
                action()

    def _leave(self, job: Job, error: EngineError) -> Callable[[], None]:
        """Take a job out, under the lock; returns what is to be done without it."""
        flight = self._of.pop(job, None)
        if flight is None:
            if isinstance(job, Generation) and job.observer:
                return _nothing  # it has left before, or its flight has ended
            return lambda: self._withdraw(job, error)
        flight.members -= 1
        follows = job is not flight.leader
        if follows:
            flight.followers = tuple(other for other in flight.followers if other is not job)
        if flight.members == 0:
            self._forget(flight)
            leader = flight.leader

            def drop() -> None:
                self._withdraw(leader, error)
                if follows:
                    job.fail(error)

            return drop

        def leave() -> None:
            if follows:
                job.fail(error)
            else:
                flight.leader.detach(error)
            self._wake()

        return leave

    def _forget(self, flight: Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]


def _nothing() -> None:
    pass


def _end(generation: Generation, flight: Flight) -> None:
    """End a generation that has all tokens of a flight which has ended, unless these have ended it."""
    if generation.done.is_set():
        return
    if flight.finish_reason is None:
        generation.fail(flight.error or Withdrawn())
        return
    try:
        generation.conclude(flight.finish_reason)
    except Exception as error:
        generation.fail(error)


def _replay(generation: Generation, tokens: list[Scored], leader: Generation) -> None:
    """Add the leader's next tokens to a generation until it ends. An error while its text is made is its own."""
    try:
        if generation.sequence.length == generation.sequence.prompt_length:
            generation.replay_prompt(leader.prompt_logprobs)
        for token, logprob in tokens:
            if generation.done.is_set():
                return
            generation.replay(token, logprob)
    except Exception as error:
        generation.fail(error)
