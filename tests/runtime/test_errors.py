"""Errors pass from one process to another as they are."""

import pickle

import pytest

from belle_compile.runtime.errors import BelleError, EngineError
from belle_compile.runtime.serving.scheduling import DeadlineExceeded, QueueFull

ERRORS = [
    EngineError("engine", "threads", found="0", expected="1 or more", remedy="give more", node="n"),
    QueueFull("the queue", found="9", expected="8", retry_after_s=2.5),
    DeadlineExceeded(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_after_pickling(error: BelleError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
