"""The job feed: changes of jobs, from the engine's threads to the clients of /v1/job/events.

Nothing here grows with the speed of the jobs: between the threads and the event loop, and for
every client, at most the latest state of each of MAX_JOBS jobs waits. A client that reads slowly
misses states in between, never the last one; past MAX_JOBS the oldest waiting one is dropped.

`JobFeed.changed` may be called from any thread; all else belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Iterator

from api.errors import ApiError
from engine.model import Job

MAX_JOBS = 1024
MAX_CLIENTS = 64


class Listener:
    """One client's place in the feed."""

    def __init__(self) -> None:
        self._waiting: dict[str, Job] = {}
        self._wake = asyncio.Event()
        self._closed = False

    def seed(self, jobs: Iterable[Job]) -> None:
        """Jobs as they were when the client came. What has changed since is newer, and stays."""
        for job in jobs:
            self._waiting.setdefault(job.uuid, job)
        self._wake.set()

    def put(self, job: Job) -> None:
        _put_latest(self._waiting, job)
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    async def take(self, timeout_s: float) -> list[Job] | None:
        """What waits; [] if nothing came in time; None when the feed is closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        if self._closed:
            return None
        self._wake.clear()
        waiting, self._waiting = self._waiting, {}
        return list(waiting.values())


class JobFeed:
    """Give `changed` to Engine.subscribe_jobs; `close` before the server waits for its clients."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._listeners: set[Listener] = set()
        self._closed = False
        self._lock = threading.Lock()  # of the two below
        self._arrived: dict[str, Job] = {}
        self._scheduled = False

    def changed(self, job: Job) -> None:
        """A job's new state. Any thread; never blocks for long."""
        with self._lock:
            _put_latest(self._arrived, job)
            if self._scheduled:
                return
            self._scheduled = True
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody listens any more
            self._loop.call_soon_threadsafe(self._spread)

    @contextlib.contextmanager
    def listen(self) -> Iterator[Listener]:
        """A client's Listener. ApiError `overloaded` when there are MAX_CLIENTS."""
        if self._closed:
            raise ApiError("shutting_down", "no more events")
        if len(self._listeners) >= MAX_CLIENTS:
            raise ApiError("overloaded", f"{MAX_CLIENTS} clients listen already")
        listener = Listener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def close(self) -> None:
        """Ends every client's stream."""
        self._closed = True
        for listener in self._listeners:
            listener.close()

    def _spread(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, {}
            self._scheduled = False
        for listener in self._listeners:
            for job in arrived.values():
                listener.put(job)


def _put_latest(waiting: dict[str, Job], job: Job) -> None:
    waiting.pop(job.uuid, None)
    waiting[job.uuid] = job
    if len(waiting) > MAX_JOBS:
        del waiting[next(iter(waiting))]
