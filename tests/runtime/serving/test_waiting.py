"""The order of those that wait: priority, then clients by what they were served, then arrival."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from belle_compile.runtime.serving.scheduling import Scheduling
from belle_compile.runtime.serving.sequence import Sequence
from belle_compile.runtime.serving.waiting import WaitingQueue


class Arrivals:
    """A queue with numbered arrivals."""

    def __init__(self) -> None:
        self.queue = WaitingQueue()
        self._count = 0

    def add(self, client: str = "", tokens: int = 10, priority: int = 0) -> Sequence:
        self._count += 1
        sequence = Sequence([1] * tokens, 100, scheduling=Scheduling(priority, client=client))
        sequence.rank = priority, self._count
        self.queue.add(sequence)
        return sequence

    def take(self) -> Sequence:
        sequence = self.queue.first()
        assert sequence is not None
        self.queue.take(sequence)
        return sequence

    def take_all(self) -> list[Sequence]:
        return [self.take() for _ in range(len(self.queue))]


def test_one_client_is_served_in_order_of_arrival() -> None:
    arrivals = Arrivals()
    added = [arrivals.add() for _ in range(4)]
    assert arrivals.take_all() == added and arrivals.queue.first() is None and len(arrivals.queue) == 0


def test_a_lower_priority_number_comes_first() -> None:
    arrivals = Arrivals()
    later, usual, urgent = (arrivals.add(priority=n) for n in (5, 0, -3))
    assert arrivals.take_all() == [urgent, usual, later]


def test_a_client_with_many_requests_does_not_hold_up_another() -> None:
    arrivals = Arrivals()
    greedy = [arrivals.add("greedy") for _ in range(5)]
    modest = [arrivals.add("modest") for _ in range(2)]
    assert arrivals.take_all() == [greedy[0], modest[0], greedy[1], modest[1], *greedy[2:]]


def test_long_prompts_and_long_answers_count() -> None:
    arrivals = Arrivals()
    for _ in range(4):
        arrivals.add("long", 100)
        arrivals.add("short", 20)
    order = [sequence.scheduling.client for sequence in (arrivals.take() for _ in range(6))]
    assert order == ["long", "short", "short", "short", "short", "long"]


def test_what_is_generated_counts() -> None:
    arrivals = Arrivals()
    for _ in range(3):
        arrivals.add("a")
        arrivals.add("b")
    answering = arrivals.take()
    assert answering.scheduling.client == "a"
    answering.length += 15
    arrivals.queue.charge([answering])
    arrivals.queue.charge([answering])  # nothing is charged twice
    assert [sequence.scheduling.client for sequence in arrivals.take_all()] == ["b", "b", "b", "a", "a"]


def test_an_idle_client_gathers_no_credit() -> None:
    arrivals = Arrivals()
    for _ in range(30):
        arrivals.add("busy", 100)
    arrivals.add("idle", 1)
    for _ in range(20):
        arrivals.take()
    late = [arrivals.add("idle", 100) for _ in range(5)]
    order = [arrivals.take() for _ in range(8)]
    assert [sequence in late for sequence in order].count(True) in (4, 5), "they take turns from now on"
    assert order[0].scheduling.client != order[1].scheduling.client


def test_those_that_were_taken_out_before_come_first_in_their_priority() -> None:
    arrivals = Arrivals()
    first, second, third = (arrivals.add() for _ in range(3))
    urgent = arrivals.add(priority=-1)
    for sequence in (urgent, first, second):
        assert arrivals.take() is sequence
    arrivals.queue.add(second)
    arrivals.queue.add(first)
    assert arrivals.take_all() == [first, second, third]


def test_removed_sequences_are_gone() -> None:
    arrivals = Arrivals()
    first, second = arrivals.add("a"), arrivals.add("b")
    stranger = Sequence([1], 1)
    assert arrivals.queue.remove(first) and not arrivals.queue.remove(first) and not arrivals.queue.remove(stranger)
    arrivals.queue.take(second)
    assert not arrivals.queue.remove(second)
    arrivals.queue.add(second)
    assert len(arrivals.queue) == 1 and arrivals.queue.remove(second) and len(arrivals.queue) == 0


@settings(max_examples=50)
@given(sizes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=3, max_size=60))
def test_clients_that_wait_are_served_alike(sizes: list[tuple[str, int]]) -> None:
    """While two clients wait, what they were served differs by the two largest requests at most (theorem 4.4 of the paper)."""
    arrivals, served = Arrivals(), Counter[str]()
    for client, tokens in sizes:
        arrivals.add(client, tokens)
    waiting = Counter(client for client, _ in sizes)
    largest = max(tokens for _, tokens in sizes)
    while len(arrivals.queue):
        sequence = arrivals.take()
        client = sequence.scheduling.client
        served[client] += sequence.length
        waiting[client] -= 1
        still = [served[name] for name in waiting if waiting[name] > 0]
        assert not still or max(still) - min(still) <= 2 * largest


def test_counters_of_clients_that_come_no_more_are_forgotten() -> None:
    arrivals = Arrivals()
    for number in range(5000):
        arrivals.add(f"client {number}")
        arrivals.take()
    assert len(vars(arrivals.queue)["_served"]) < 2000
