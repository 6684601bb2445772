"""Workers: bounded, off the event loop, and indifferent to whoever stops waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from api.errors import ApiError
from api.workers import Workers


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers("test", threads=1, max_waiting=1)
    made.start()
    yield made
    assert made.close(5)


async def test_the_result_comes_from_another_thread(workers: Workers) -> None:
    assert await workers.run(threading.get_ident) != threading.get_ident()


async def test_an_error_is_raised_where_it_is_awaited(workers: Workers) -> None:
    def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await workers.run(fails)


async def test_what_can_not_wait_is_refused(workers: Workers) -> None:
    begun, release = threading.Event(), threading.Event()

    def holds() -> bool:
        begun.set()
        return release.wait(30)

    running = asyncio.create_task(workers.run(holds))
    assert await asyncio.to_thread(begun.wait, 30)
    waiting = asyncio.create_task(workers.run(lambda: 2))
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as caught:
        await workers.run(lambda: 3)
    assert caught.value.code == "overloaded"
    release.set()
    assert (await running, await waiting) == (True, 2)


async def test_a_call_that_began_ends_though_nobody_waits(workers: Workers) -> None:
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    def holds() -> None:
        begun.set()
        release.wait(30)
        ended.set()

    running = asyncio.create_task(workers.run(holds))
    assert await asyncio.to_thread(begun.wait, 30)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    release.set()
    assert await workers.run(ended.is_set)


async def test_a_hung_thread_does_not_hold_up_close() -> None:
    hung = Workers("hung", threads=1, max_waiting=1)
    hung.start()
    begun, release = threading.Event(), threading.Event()

    def holds() -> None:
        begun.set()
        release.wait(30)

    running = asyncio.create_task(hung.run(holds))
    assert await asyncio.to_thread(begun.wait, 30)
    assert not hung.close(0.01)
    release.set()
    await running
