"""What the handlers share: the engine, the threads, the job feed, the metrics, the documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec
from aiohttp import web

from api.calls import Pace
from api.events import JobFeed
from api.metrics import Metrics
from api.openapi import Object
from api.workers import Workers
from engine.service import Engine

QUICK_THREADS = 4  # they use the engine's memory and state
SLOW_THREADS = 8  # they mostly wait, for a point's files
MAX_WAITING = 256

Unsubscribe: TypeAlias = Callable[[], None]


class Service:
    """Lives as long as the application. `start`, `stop`, `close` belong to the event loop."""

    def __init__(self, engine: Engine, document: Object, page: str) -> None:
        self.engine = engine
        self.metrics = Metrics(engine)
        self.document = msgspec.json.encode(document)
        self.page = page.encode()
        self.quick = Workers("quick", QUICK_THREADS, MAX_WAITING)
        self.slow = Workers("slow", SLOW_THREADS, MAX_WAITING)
        self.stopping = False
        self._feed: JobFeed | None = None
        self._unsubscribe: Unsubscribe | None = None

    @property
    def feed(self) -> JobFeed:
        if self._feed is None:
            raise RuntimeError("the service has not been started")
        return self._feed

    def workers(self, pace: Pace) -> Workers:
        return self.slow if pace == "slow" else self.quick

    def start(self) -> None:
        self.quick.start()
        self.slow.start()
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
        self.quick.close(timeout_s)
        self.slow.close(timeout_s)


SERVICE = web.AppKey("service", Service)
