"""Who is next: jobs begin in order, and only so many run at once, not counting those that hang.

A job that hangs may do so for days, as long as its point does not answer, and those behind it need
other points. So its place is given to another; when it goes on again, one more runs than should
until the next one ends. Each that hangs keeps its thread and its buffers, hence MOST_HANGING.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

MOST_HANGING = 8

JobT = TypeVar("JobT", bound=Hashable)


class Line(Generic[JobT]):
    """Shares the lock of its owner, who holds it for what says so here."""

    def __init__(self, lock: threading.Lock, places: int) -> None:
        self.most_at_once = places + MOST_HANGING  # threads that are to `take`, hence jobs that run
        self._changed = threading.Condition(lock)
        self._places = places
        self._closed = False
        self._waiting: deque[JobT] = deque()
        self._running: set[JobT] = set()
        self._hanging: frozenset[JobT] = frozenset()

    def add(self, job: JobT) -> None:
        """At the end. The lock is held."""
        self._waiting.append(job)
        self._changed.notify()

    def remove(self, job: JobT) -> bool:
        """Whether it was waiting; it does not any more. The lock is held."""
        if job not in self._waiting:
            return False
        self._waiting.remove(job)
        return True

    def close(self) -> list[JobT]:
        """Those that wait, who will not run; `take` ends. The lock is held."""
        self._closed = True
        left = list(self._waiting)
        self._waiting.clear()
        self._changed.notify_all()
        return left

    def take(self) -> JobT | None:
        """The next job, as soon as there is a place for it; None when the line is closed."""
        with self._changed:
            while not self._closed and not (self._waiting and self._has_place()):
                self._changed.wait()
            if self._closed:
                return None
            job = self._waiting.popleft()
            self._running.add(job)
            return job

    def _has_place(self) -> bool:
        return len(self._running - self._hanging) < self._places

    def give_back(self, job: JobT) -> None:
        """It does not run any more."""
        with self._changed:
            self._running.discard(job)
            self._changed.notify()

    def note_hanging(self, jobs: Collection[JobT]) -> None:
        """These hang now, and no others."""
        with self._changed:
            self._hanging = frozenset(jobs)
            self._changed.notify_all()
