"""engine.turns: a few at once, and nobody waits for those that hang."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.turns import Turns

TIMEOUT_S = 1.0


class Refused(Exception):
    """What the callers here are refused with."""


def take(turns: Turns, key: str, hold_s: float = 0.0) -> None:
    with turns.one(key, TIMEOUT_S, Refused()):
        time.sleep(hold_s)


def test_nobody_waits_for_those_that_hang() -> None:
    turns, free = Turns(2), threading.Event()
    with ThreadPoolExecutor() as threads:
        held = [threading.Event(), threading.Event()]

        def hang(began: threading.Event) -> None:
            with turns.one("a", TIMEOUT_S, Refused()):
                began.set()
                free.wait(60.0)

        hanging = [threads.submit(hang, began) for began in held]
        assert all(began.wait(60.0) for began in held)
        with pytest.raises(Refused):
            take(turns, "a")  # once they have had theirs for long
        began_s = time.monotonic()
        with pytest.raises(Refused):
            take(turns, "a")
        assert time.monotonic() - began_s < TIMEOUT_S / 2
        take(turns, "b")
        free.set()
        for one in hanging:
            one.result(60.0)
        take(turns, "a")
    assert turns._began_s == {}  # of a volume's name nothing stays


def test_who_waits_behind_many_that_get_on_is_not_refused() -> None:
    turns = Turns(1)
    with ThreadPoolExecutor(16) as threads:
        for one in [threads.submit(take, turns, "a", 0.1) for _ in range(16)]:
            one.result(60.0)


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns(1)
    for _ in range(2):
        with pytest.raises(KeyError), turns.one("a", TIMEOUT_S, Refused()):
            raise KeyError("x")
