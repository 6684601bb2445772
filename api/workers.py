"""Threads that the engine's calls run in, so that none of them ever blocks the event loop.

A `Workers` is a fixed number of threads behind a queue with a maximum: when it is full the call is
refused (`overloaded`) before anything happened. A call that has begun runs to its end even if the
client, or the service, is gone: the threads are daemons, so one that hangs in a dead mount does not
hold up the exit (concurrent.futures' threads would be joined).
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from api.errors import ApiError

ResultT = TypeVar("ResultT")


class Workers:
    """`threads` daemon threads named after `name`; at most `max_waiting` calls wait for them."""

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self.name = name
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(max_waiting)
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{n}", daemon=True)
            for n in range(threads)
        ]

    def start(self) -> None:
        """Before the first `run`."""
        for thread in self._threads:
            thread.start()

    async def run(self, call: Callable[[], ResultT]) -> ResultT:
        """What `call()` returns or raises, in a thread. ApiError `overloaded` if none can wait.

        Cancelling the awaiting task abandons the result; the call itself goes on.
        """
        future: Future[ResultT] = Future()
        try:
            self._queue.put_nowait(lambda: _settle(future, call))
        except queue.Full:
            raise ApiError("overloaded", f"all {self.name} threads are taken, try later") from None
        return await asyncio.wrap_future(future)

    def close(self, timeout_s: float) -> bool:
        """Ends the threads when they have done what waits; whether all ended in time."""
        deadline_s = time.monotonic() + timeout_s
        try:
            for _ in self._threads:
                self._queue.put(None, timeout=max(deadline_s - time.monotonic(), 0.001))
        except queue.Full:
            return False
        for thread in self._threads:
            thread.join(max(deadline_s - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (step := self._queue.get()) is not None:
            step()
            del step  # or the last call's objects would live until the next one


def _settle(future: Future[ResultT], call: Callable[[], ResultT]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - it is the awaiting task's to handle
        future.set_exception(error)
    else:
        future.set_result(result)
