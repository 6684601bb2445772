"""/v1/job/events, /healthz, /metrics, /openapi.json, /docs: what isn't a Call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from api import VERSION
from api.docs import CONTENT_SECURITY_POLICY
from api.envelope import succeeded
from api.errors import ApiError
from api.routes.jobs import job_row
from api.schemas_companion import Health
from api.service import SERVICE
from engine.jobs.jobs import ACTIVE_STATES
from engine.model import Job

log = logging.getLogger(__name__)

HEARTBEAT_S = 15.0  # also how soon a client that went away is noticed
SEND_TIMEOUT_S = 30.0
_HEARTBEAT = b": still here\n\n"


async def _health(request: web.Request) -> web.StreamResponse:
    if request.app[SERVICE].stopping:
        raise ApiError("shutting_down", "no more calls are taken")
    request.app[SERVICE].require_state("nothing can be changed, all else is answered")
    health = succeeded(Health(state="ready", version=VERSION))
    return web.Response(body=msgspec.json.encode(health), content_type="application/json")


async def _metrics(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    text = await service.looking.run(service.metrics.render)
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _openapi(request: web.Request) -> web.StreamResponse:
    return web.Response(body=request.app[SERVICE].document, content_type="application/json")


async def _docs(request: web.Request) -> web.StreamResponse:
    return web.Response(
        body=request.app[SERVICE].page,
        content_type="text/html",
        charset="utf-8",
        headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY},
    )


async def _job_events(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    with service.feed.listen() as listener:
        jobs = await service.looking.run(service.engine.jobs)
        listener.seed(job for job in reversed(jobs) if job.state in ACTIVE_STATES)
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        )
        try:
            await response.prepare(request)
            await _send(response, _HEARTBEAT)
            while (changed := await listener.take(HEARTBEAT_S)) is not None:
                await _send(response, _events(changed) or _HEARTBEAT)
            await response.write_eof()
        except ConnectionError:
            log.debug("listener_gone", extra={"who": request.remote})
        except TimeoutError:
            log.info("listener_does_not_read", extra={"who": request.remote})
            if request.transport is not None:
                request.transport.abort()
        return response


async def _send(response: web.StreamResponse, events: bytes) -> None:
    """TimeoutError when the client takes nothing any more, so that it does not keep its place."""
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await response.write(events)


def _events(jobs: Iterable[Job]) -> bytes:
    """JSON has no bare line ends, so a row is one `data` line."""
    return b"".join(
        b"event: job\ndata: " + msgspec.json.encode(job_row(job)) + b"\n\n" for job in jobs
    )


HANDLERS: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
    "/v1/job/events": _job_events,
    "/healthz": _health,
    "/metrics": _metrics,
    "/openapi.json": _openapi,
    "/docs": _docs,
}
