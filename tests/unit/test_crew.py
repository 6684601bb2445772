"""engine.jobs.crew: its threads give way to the process's others, and none outlives the call."""

from __future__ import annotations

import os
import threading
import time
from unittest import mock

import pytest

from engine.jobs.crew import NICER_BY, Stop, run_crew


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_members_give_way_and_nobody_else_does() -> None:
    before = _niceness()
    found: list[int] = []
    run_crew(2, "t", lambda: found.append(_niceness()), Stop())
    assert found == [min(before + NICER_BY, 19)] * 2
    assert _niceness() == before


def test_where_they_may_not_they_work_as_ever() -> None:
    ran: list[bool] = []
    with mock.patch("os.nice", side_effect=PermissionError):
        run_crew(2, "t", lambda: ran.append(True), Stop())
    assert ran == [True, True]


@pytest.mark.parametrize("most", [0, 1, 2])
def test_where_the_system_has_no_more_threads_those_that_there_are_do_it(most: int) -> None:
    """Were the caller told while some are at work, it would close the files that they write to."""
    starts, left = threading.Thread.start, list(range(most))
    ended: list[str] = []

    def start(self: threading.Thread) -> None:
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        starts(self)

    def work() -> None:
        time.sleep(0.1)
        ended.append(threading.current_thread().name)

    with mock.patch.object(threading.Thread, "start", start):
        if most:
            run_crew(3, "t", work, Stop())
        else:
            with pytest.raises(RuntimeError):
                run_crew(3, "t", work, Stop())
    assert sorted(ended) == [f"t-{number}" for number in range(most)]
