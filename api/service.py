"""What the handlers share: the engine, the threads, the job feed, the metrics, the documents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

import msgspec
from aiohttp import web

from api.calls import AnyCall, Batch, Method, Pace
from api.errors import ApiError
from api.events import JobFeed
from api.metrics import Metrics
from api.openapi import Object
from api.workers import Workers
from engine.service import Engine

# Slow ones mostly wait for files. Of each point, or pool, that hangs a few are held for good
# (engine/turns.py), so there are enough for a dozen of those; one costs some 25 KB of memory.
#
# Calls that only look have threads of their own: those that change something write to the state,
# and wait for it when the data directory's disk does not answer.
THREADS: Mapping[tuple[Method, Pace], int] = {
    ("GET", "quick"): 4,  # they use the engine's memory and state
    ("GET", "slow"): 32,
    ("POST", "quick"): 4,
    ("POST", "slow"): 64,
}
MAX_WAITING = 256
SILENT_AFTER_S = 10.0  # that disk; who waits for it is told then

Unsubscribe: TypeAlias = Callable[[], None]


class Service:
    """Lives as long as the application. `start`, `stop`, `close` belong to the event loop."""

    def __init__(self, engine: Engine, document: Object, page: str) -> None:
        self.engine = engine
        self.metrics = Metrics(engine)
        self.document = msgspec.json.encode(document)
        self.page = page.encode()
        self._workers = {
            (method, pace): Workers(f"{pace} {method}", threads, MAX_WAITING)
            for (method, pace), threads in THREADS.items()
        }
        self.stopping = False
        self._feed: JobFeed | None = None
        self._unsubscribe: Unsubscribe | None = None

    @property
    def feed(self) -> JobFeed:
        if self._feed is None:
            raise RuntimeError("the service has not been started")
        return self._feed

    @property
    def looking(self) -> Workers:
        """The threads of calls that only look into memory."""
        return self._workers["GET", "quick"]

    def workers(self, call: AnyCall | Batch) -> Workers:
        return self._workers[call.method, call.pace]

    def require_state(self, so_what: str) -> None:
        """ApiError `state_unreachable` when the data directory's disk is silent."""
        silent_s = self.engine.state_silent_s()
        if silent_s >= SILENT_AFTER_S:
            silence = f"the data directory's disk has not answered for {silent_s:.0f} s"
            raise ApiError("state_unreachable", f"{silence}; {so_what}")

    def start(self) -> None:
        for workers in self._workers.values():
            workers.start()
        self._feed = JobFeed()
        self._unsubscribe = self.engine.subscribe_jobs(self._feed.changed)

    def stop(self) -> None:
        """No longer healthy; the streams end."""
        self.stopping = True
        if self._unsubscribe is not None:
            self._unsubscribe()
        self.feed.close()

    def close(self, timeout_s: float) -> None:
        """Ends the threads; those that hang are left behind."""
        deadline_s = time.monotonic() + timeout_s
        for workers in self._workers.values():
            workers.close(max(deadline_s - time.monotonic(), 0.001))


SERVICE = web.AppKey("service", Service)
