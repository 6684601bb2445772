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
