"""What aiohttp answers before a request gets to the application, in the envelope as all else is.

That is what is no HTTP, and an `Expect` that nobody knows. aiohttp's way to have that said in other
words is a connection's `handle_error`, so the server has to make connections of ours.

And it makes no more than MAX_CONNECTIONS at a time: each is an open file, and those that jobs need
must not be taken by who connects and says nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiohttp import web

from api.dispatch import Answered, answer_error
from api.errors import ApiError
from api.printable import one_line

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 512  # half of the files that a process may open where nobody can raise that
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

_MAX_SHOWN_CHARS = 200


class Enveloped(web.Response):
    """An answer in the envelope; `scode` is for the metrics."""

    def __init__(self, answered: Answered) -> None:
        super().__init__(
            body=answered.body,
            status=answered.status,
            headers={**HEADERS, **answered.headers},
            content_type="application/json",
        )
        self.scode = answered.scode


class Runner(web.AppRunner):
    """An AppRunner; `options` are those of its connections."""

    def __init__(self, app: web.Application, *, shutdown_timeout_s: float, **options: Any) -> None:
        super().__init__(app, handle_signals=False, shutdown_timeout=shutdown_timeout_s)
        self._options = options

    async def _make_server(self) -> web.Server:
        return _Server(await super()._make_server(), self._options)


class _Server(web.Server):
    """One that does as `server` does, with connections of ours."""

    def __init__(self, server: web.Server, options: dict[str, Any]) -> None:
        handle = partial(_handle, server.request_handler)
        super().__init__(handle, request_factory=server.request_factory)
        self._options = options
        self._full = False

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        was_full, self._full = self._full, len(self.connections) > MAX_CONNECTIONS
        if self._full:
            self._loop.call_soon(handler.force_close)  # it is not quite made yet
            if not was_full:
                log.warning("connections_refused", extra={"open": MAX_CONNECTIONS})

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._options)


async def _handle(
    handle: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], request: web.BaseRequest
) -> web.StreamResponse:
    try:
        return await handle(request)
    except web.HTTPExpectationFailed as error:
        return _malformed(error.text)


class _Connection(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP, or a defect in how we send an answer. Nothing can follow it."""
        super().handle_error(request, status, exc, message)  # raises if an answer has begun
        if status == 400:
            response = _malformed(message)
        else:
            response = Enveloped(answer_error(exc or TimeoutError()))
        response.force_close()
        return response


def _malformed(why: str | None) -> Enveloped:
    """By aiohttp's first line; the others point at the place in the request."""
    line = one_line((why or "no HTTP").partition("\n")[0].removesuffix(":"))
    return Enveloped(answer_error(ApiError("malformed", line[:_MAX_SHOWN_CHARS])))
