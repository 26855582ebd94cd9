"""The bounded queue, predicted waits, and deadlines; on a clock of the tests' own."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest

from belle_compile.runtime.errors import EngineError
from belle_compile.runtime.serving.admission import Deadlines, Gate
from belle_compile.runtime.serving.scheduling import FirstTokenLimit, Pace, QueueFull, SchedulerOptions, Scheduling
from belle_compile.runtime.serving.sequence import Sequence


def sequence(priority: int = 0, deadline: float = math.inf) -> Sequence:
    made = Sequence([1], 1, scheduling=Scheduling(priority))
    made.deadline = deadline
    return made


def test_no_more_enter_than_are_admitted_and_may_wait() -> None:
    gate, entered = Gate(2, free=3), [sequence() for _ in range(5)]
    gate.enter(entered[:1], 0)
    gate.enter(entered[1:], 0)
    message = "the queue is full: found 2 waiting requests and 1 more, expected at most 2; try again in 1 s"
    with pytest.raises(QueueFull, match=message) as refused:
        gate.enter([sequence()], 0)
    assert refused.value.retry_after_s == 1.0 and gate.refusals == 1
    gate.left(entered[:3], 0)
    gate.set_free(0)
    with pytest.raises(QueueFull):
        gate.enter([sequence()], 0)
    gate.gave_up(entered[3], 0)
    gate.gave_up(entered[0], 0)  # was admitted before
    gate.enter([sequence()], 0)


def test_several_enter_together_or_not_at_all() -> None:
    gate = Gate(1, free=2)
    gate.enter([sequence()], 0)
    with pytest.raises(QueueFull, match="found 0 waiting requests and 3 more"):
        gate.enter([sequence() for _ in range(3)], 0)
    gate.enter([sequence() for _ in range(2)], 0)
    assert gate.refusals == 3


LIMIT = FirstTokenLimit(0.8, prompt_tokens_per_s=1000, gap_s=0.5)


def prompt(tokens: int, priority: int = 0) -> Sequence:
    return Sequence([1] * tokens, 1, scheduling=Scheduling(priority))


def test_a_first_token_that_would_come_too_late_is_refused() -> None:
    gate = Gate(None, free=2, first_token=LIMIT)
    gate.enter([prompt(500)], 0)
    message = "the first token would come too late: found after 0.90 s, expected at most 0.8 s; try again in 1 s"
    with pytest.raises(QueueFull, match=message) as refused:
        gate.enter([prompt(400)], 0)  # has a row at once, and waits for the prompt before it
    assert refused.value.retry_after_s == pytest.approx(0.1) and gate.refusals == 1
    gate.enter([prompt(300)], 0)
    with pytest.raises(QueueFull, match=r"found after 0.90 s"):
        gate.enter([prompt(400)], 0)  # waits for a row too, for as long as was measured
    gate.enter([prompt(300)], 0)
    with pytest.raises(QueueFull, match=r"found after 1.10 s"):
        gate.enter([prompt(100)], 0)
    gate.enter([prompt(100, priority=-1)], 0)  # goes before the others


def test_a_long_prompt_is_let_in_where_nothing_waits() -> None:
    gate = Gate(None, free=1, first_token=LIMIT)
    entered = prompt(5000)
    gate.enter([entered], 0)
    with pytest.raises(QueueFull, match=r"found after 5.50 s"):
        gate.enter([prompt(5000)], 0)
    gate.left([entered], 1)
    gate.enter([prompt(5000)], 1)


def test_the_queues_own_pace_counts_once_it_is_known() -> None:
    gate, entered = Gate(None, free=4, first_token=LIMIT), [prompt(1) for _ in range(4)]
    for each in entered:
        gate.enter([each], 0)
    gate.set_free(0)
    gate.left(entered[:1], 1.0)
    gate.left(entered[1:2], 1.1)  # a row is free every 0.1 s
    for _ in range(5):
        gate.enter([prompt(1)], 1.1)
    with pytest.raises(QueueFull, match=r"found after 0.80 s, expected at most 0.8 s"):
        gate.enter([prompt(1)], 1.1)


def test_more_than_an_empty_queue_takes_are_not_asked_to_try_again() -> None:
    gate = Gate(1, free=2)
    message = "no room for so many: found 4 at once, expected at most 3, those that run included; submit fewer at once"
    with pytest.raises(QueueFull, match=message) as refused:
        gate.enter([sequence() for _ in range(4)], 0)
    assert refused.value.retry_after_s is None and gate.refusals == 4
    gate.enter([sequence() for _ in range(3)], 0)


def test_without_a_bound_any_number_waits() -> None:
    Gate(None, free=1).enter([sequence() for _ in range(1000)], 0)


def busy_gate(most: int | None = None) -> Gate:
    """One request is admitted every 2 s, and 4 wait at the time 6."""
    gate, entered = Gate(most, free=8), [sequence() for _ in range(8)]
    gate.enter(entered, 0)
    gate.set_free(0)
    for number in range(4):
        gate.left([entered[number]], 2.0 * number)
    return gate


def test_the_wait_is_predicted_from_the_last_admissions() -> None:
    gate = busy_gate(most=4)
    with pytest.raises(QueueFull) as refused:
        gate.enter([sequence(), sequence()], 6)
    assert refused.value.retry_after_s == 4.0, "two must have left the queue"


def test_whose_time_is_over_before_its_first_step_is_refused() -> None:
    gate = busy_gate()
    message = r"would wait longer than its time: found 10\.0 s until its first step, expected at most 9\.0 s; try again in 1 s"
    with pytest.raises(QueueFull, match=message):
        gate.enter([sequence(deadline=15)], 6)
    gate.enter([sequence(deadline=17)], 6)
    gate.enter([sequence(priority=-1, deadline=9)], 6)  # nobody of its priority is before it
    gate.set_free(9)
    gate.enter([sequence(deadline=6.1)], 6)


def test_a_pace_counts_only_while_others_wait() -> None:
    pace = Pace()
    assert pace.wait_s(0) is None
    pace.left(1, 10, waiting=3)
    pace.left(2, 14, waiting=0)  # nobody waits: the next gap says nothing
    pace.left(1, 1000, waiting=1)
    assert pace.wait_s(0) == 2.0 and pace.wait_s(4) == 10.0
    pace.left(1, 1006, waiting=1)
    assert pace.wait_s(0) == 4.0


class Timer:
    def __init__(self, deadline: float) -> None:
        self.sequence, self.done = sequence(deadline=deadline), threading.Event()


def test_deadlines_come_in_order_and_without_what_has_ended() -> None:
    deadlines: Deadlines[Timer] = Deadlines()
    assert deadlines.wait_s(0) is None and deadlines.over(1e9) == []
    late, early, ended = Timer(30), Timer(10), Timer(20)
    for timer in (late, early, ended):
        deadlines.add(timer)
    ended.done.set()
    assert deadlines.over(9.9) == [] and deadlines.wait_s(9) == 1 and deadlines.wait_s(11) == 0
    assert deadlines.over(10) == [early] and deadlines.over(50) == [late] and deadlines.wait_s(0) is None


def test_jobs_that_have_ended_are_not_kept_until_their_deadline() -> None:
    deadlines: Deadlines[Timer] = Deadlines()
    for _ in range(1000):
        timer = Timer(1e9)
        timer.done.set()
        deadlines.add(timer)
    assert len(vars(deadlines)["_heap"]) < 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"priority": 1.5}, r"scheduling: priority: found '1\.5' \(float\), expected a whole number"),
        ({"priority": True}, "priority"),
        ({"priority": 2**31}, "priority: found '2147483648'"),
        ({"timeout_s": 0}, r"timeout_s: found '0' \(int\), expected seconds, more than 0"),
        ({"timeout_s": math.nan}, "timeout_s: found 'nan'"),
        ({"timeout_s": math.inf}, "timeout_s: found 'inf'"),
        ({"timeout_s": "1"}, r"timeout_s: found '1' \(str\)"),
        ({"client": None}, r"client: found 'None' \(NoneType\), expected a name of at most 256 characters"),
        ({"client": "a" * 257}, "client: found 'a{80}' "),
    ],
)
def test_impossible_scheduling(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Scheduling(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_num_seqs": 0}, r"engine: max_num_seqs: found '0' \(int\), expected a whole number, 1 or more"),
        ({"max_num_seqs": 2.0}, "max_num_seqs"),
        ({"max_queue": -1}, "max_queue: found '-1'"),
        ({"prefix_cache": 1}, r"prefix_cache: found '1' \(int\), expected True or False"),
    ],
)
def test_impossible_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        SchedulerOptions(**fields)
