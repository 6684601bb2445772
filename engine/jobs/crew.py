"""A crew: some threads that do the same work until it is done or one of them fails.

The one concurrency pattern of the data path. Each thread calls `work()` once; `work` pulls its
items from something shared that looks at `stop` between them. The first exception sets `stop`, the
others end at their next item, and that exception is raised in the caller when all have ended. So no
thread outlives the call, and what they share needs no clean-up of its own.

They take every core there is for as long as it takes; so the kernel prefers the process's other
threads, which answer calls in a millisecond, when both want one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable

NICER_BY = 5

log = logging.getLogger(__name__)


class Stop:
    """True once a member of the crew failed. `error` is the first failure."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        """`wake` is called at the first failure, to rouse members that wait for something."""
        self.error: BaseException | None = None
        self._wake = wake
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return self.error is not None

    def fail(self, error: BaseException) -> None:
        """Keeps the first error and tells everybody to end."""
        with self._lock:
            first = self.error is None
            if first:
                self.error = error
        if first:
            self._wake()


def run_crew(size: int, name: str, work: Callable[[], None], stop: Stop) -> None:
    """Runs `work` in `size` threads and returns when all have ended; raises the first error.

    In fewer where the system has not so many: RuntimeError when it has none.
    """

    def member() -> None:
        try:
            _give_way()
            if not stop:
                work()
        except BaseException as error:  # noqa: BLE001  (raised again in the caller)
            stop.fail(error)

    threads = [
        threading.Thread(target=member, name=f"{name}-{number}", daemon=True)
        for number in range(max(1, size))
    ]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError:  # the system has no more threads for us; fewer do it as well
        log.warning("crew_is_small", extra={"crew": name, "count": len(started)})
        if not started:
            raise
    for thread in started:
        thread.join()
    if stop.error is not None:
        raise stop.error


def _give_way() -> None:
    """Of the calling thread only: Linux keeps this for each."""
    with contextlib.suppress(OSError):  # where it may not be: then calls wait a little longer
        os.nice(NICER_BY)
