"""The job feed: latest state wins, nothing grows, and it closes."""

from __future__ import annotations

import asyncio
import threading

import pytest

from api.errors import ApiError
from api.events import MAX_CLIENTS, MAX_JOBS, JobFeed, Listener
from engine.model import Job, JobState


def _job(uuid: str, state: JobState = "running") -> Job:
    return Job(uuid=uuid, kind="backup", state=state)


async def _taken(listener: Listener) -> list[tuple[str, str]]:
    return [(job.uuid, job.state) for job in await listener.take(5) or []]


async def test_a_slow_reader_gets_each_jobs_latest_state() -> None:
    feed = JobFeed()
    with feed.listen() as listener:
        for state in ("queued", "running", "succeeded"):
            feed.changed(_job("a", state))
        feed.changed(_job("b"))
        await asyncio.sleep(0)
        assert await _taken(listener) == [("a", "succeeded"), ("b", "running")]


async def test_changes_from_a_thread_wake_the_reader() -> None:
    feed = JobFeed()
    with feed.listen() as listener:
        thread = threading.Thread(target=feed.changed, args=(_job("a"),))
        thread.start()
        assert await _taken(listener) == [("a", "running")]
        thread.join()


async def test_what_waits_is_bounded() -> None:
    feed = JobFeed()
    with feed.listen() as listener:
        for number in range(MAX_JOBS + 5):
            feed.changed(_job(str(number)))
            await asyncio.sleep(0)
        waiting = await _taken(listener)
    assert len(waiting) == MAX_JOBS
    assert waiting[-1][0] == str(MAX_JOBS + 4)


async def test_the_seed_does_not_overwrite_what_is_newer() -> None:
    listener = Listener()
    listener.put(_job("a", "succeeded"))
    listener.seed([_job("a", "running"), _job("b")])
    assert await _taken(listener) == [("a", "succeeded"), ("b", "running")]


async def test_no_change_in_time_is_an_empty_list() -> None:
    assert await Listener().take(0) == []


async def test_close_ends_every_stream_and_takes_no_more() -> None:
    feed = JobFeed()
    with feed.listen() as listener:
        waiting = asyncio.create_task(listener.take(60))
        await asyncio.sleep(0)
        feed.close()
        assert await waiting is None
    with pytest.raises(ApiError, match="no more"), feed.listen():
        pass


async def test_listeners_are_bounded() -> None:
    feed = JobFeed()
    places = [feed.listen() for _ in range(MAX_CLIENTS)]
    for place in places:
        place.__enter__()
    with pytest.raises(ApiError) as caught, feed.listen():
        pass
    assert caught.value.code == "overloaded"
    places[0].__exit__(None, None, None)
    with feed.listen():
        pass


def test_a_change_after_the_loop_has_ended_is_dropped() -> None:
    async def make() -> JobFeed:
        return JobFeed()

    feed = asyncio.run(make())
    feed.changed(_job("a"))
