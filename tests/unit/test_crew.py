"""engine.crew: its threads give way to the process's others."""

from __future__ import annotations

import os
import threading
from unittest import mock

from engine.crew import NICER_BY, Stop, run_crew


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
