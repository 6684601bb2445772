"""The service below its calls: what is no HTTP, who does not read, who asks for another host."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from yarl import URL

from api.app import MAX_LINE_BYTES
from api.errors import BY_NAME
from engine.model import Job
from tests.api_site import MEMBERS, MIB, Site, read_answer, serving

PATIENCE_S = 30.0


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serving(tmp_path) as made:
        yield made


@pytest.fixture
async def hasty_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    """Of little patience."""
    monkeypatch.setattr("api.app.IDLE_TIMEOUT_S", 0.2)
    monkeypatch.setattr("api.app.BODY_TIMEOUT_S", 0.2)
    async with serving(tmp_path) as made:
        yield made


@contextlib.asynccontextmanager
async def connected(
    site: Site,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    url = URL(site.url)
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(url.host, url.port)
        try:
            yield reader, writer
        finally:
            writer.close()


POST = b"POST /v1/job/cancel HTTP/1.1\r\nHost: x\r\n"


NO_REQUESTS = [
    (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", "Received HTTPS traffic"),
    (b"G@T /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "Invalid method"),
    (b"GET /healthz HTTP/1.1\r\n\r\n", "Missing 'Host' header"),
    (b"GET /healthz HTTP/1.1\r\nHost x\r\n\r\n", "Invalid header token"),
    (b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * MAX_LINE_BYTES), "Got more than 65536"),
    (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", "http://["),
    (POST + b"Content-Length: -2\r\n\r\n{}", "Invalid character in Content-Length"),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "Invalid character in chunk size"),
    (POST + b"Expect: more\r\nContent-Length: 2\r\n\r\n{}", "Unknown Expect: more"),
    (b"GET /nowhere HTTP/1.1\r\nHost: x\r\nExpect: more\r\n\r\n", "Unknown Expect: more"),
]


async def test_what_is_not_even_a_request_is_answered_in_the_envelope(site: Site) -> None:
    for sent, said in NO_REQUESTS:
        async with connected(site) as (reader, writer):
            writer.write(sent)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(line for line in head.splitlines() if line.startswith("Content-Length: "))
            output = json.loads(await reader.readexactly(int(length.split()[1])))
        assert head.split()[1] == "400"
        assert "Content-Type: application/json\r\n" in head
        assert "Cache-Control: no-store\r\n" in head
        assert list(output) == MEMBERS
        assert output["scode"] == BY_NAME["malformed"].scode
        assert output["desc"].startswith(said)
        assert output["desc"].isprintable()


async def has_place(site: Site) -> bool:
    """Whether one more may listen to the events."""
    async with site.http.get(f"{site.url}/v1/job/events") as response:
        if response.status == 200:
            return True
        answer = await read_answer(response)
    return bool(answer.output["scode"] != BY_NAME["overloaded"].scode)


async def test_a_client_that_does_not_read_its_events_loses_its_place(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And others get theirs meanwhile."""
    monkeypatch.setattr("api.events.MAX_CLIENTS", 2)
    monkeypatch.setattr("api.routes.system.SEND_TIMEOUT_S", 0.2)
    large = Job(uuid="large", kind="gc", error="x" * (MIB // 4))
    url = f"{site.url}/v1/job/events"
    async with connected(site) as (reader, deaf), site.http.get(url) as heard:
        deaf.write(b"GET /v1/job/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"text/event-stream" in await reader.readuntil(b"\r\n\r\n")
        assert not await has_place(site)
        while not await has_place(site):
            site.engine._core.jobs._tell(large)
            while b"large" not in await heard.content.readuntil(b"\n\n"):
                pass


async def test_who_says_nothing_is_let_go(hasty_site: Site) -> None:
    """Before it has sent a request's whole head, and after an answer."""
    for sent in (b"", b"GET /hea", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
        async with connected(hasty_site) as (reader, writer):
            writer.write(sent)
            assert (b"200 OK" in await reader.read()) == sent.endswith(b"\n")


async def test_a_body_that_does_not_come_is_not_waited_for(hasty_site: Site) -> None:
    async with connected(hasty_site) as (reader, writer):
        writer.write(POST + b"Content-Length: 2\r\n\r\n{")
        answer = await reader.readuntil(b"}")
    assert b"HTTP/1.1 400" in answer
    assert b"the body did not come within 0.2 s" in answer


async def test_only_so_many_may_be_connected(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The others keep their connections, and whoever comes when one has gone gets one."""
    monkeypatch.setattr("api.connections.MAX_CONNECTIONS", 2)
    asked = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"

    async def is_answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            writer.write(asked)
            return await reader.readexactly(15) == b"HTTP/1.1 200 OK"
        except (asyncio.IncompleteReadError, ConnectionError):
            return False

    async with connected(site) as first:
        async with connected(site) as second:
            for _ in range(3):
                async with connected(site) as late:
                    assert not await is_answered(*late)
            assert await is_answered(*second)
            assert await is_answered(*first)
        assert [record.message for record in caplog.records] == ["connections_refused"]
        while True:
            async with connected(site) as late:
                if await is_answered(*late):
                    return
