"""The aiohttp application: routes of the Calls, and an envelope around whatever goes wrong.

The event loop only moves bytes. Requests are parsed, checked, done and encoded in worker threads
(dispatch.answer), "slow" calls in threads of their own, so that a point that hangs holds up no
other call, and those that change something in others than those that look (api/service.py). A
client that goes away changes nothing: its call runs to its end (aiohttp doesn't cancel handlers,
and a worker can't be cancelled).

Read next: dispatch, workers, routes/system, connections.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from functools import partial

from aiohttp import web

from api import docs, openapi
from api.calls import AnyCall, Batch
from api.connections import HEADERS, Enveloped, Runner
from api.decode import MAX_BODY_BYTES
from api.dispatch import Answered, Received, answer, answer_error
from api.errors import ApiError
from api.origins import refuse_foreign_host, refuse_foreign_origin
from api.routes import CALLS, system
from api.service import SERVICE, Service
from engine.service import Engine

HOST_NAMES = web.AppKey[frozenset[str] | None]("host_names")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LOOK_EVERY_S = 0.5  # whether a call that takes long waits for a silent disk
SHUTDOWN_TIMEOUT_S = 1.0  # for requests under way; their calls go on in the workers
WORKERS_TIMEOUT_S = 0.5
IDLE_TIMEOUT_S = 75.0  # of a connection that has not sent a whole head since the last answer
BODY_TIMEOUT_S = 60.0
# A query may be long: 4096 characters are up to 48 KiB when they are percent-encoded.
MAX_LINE_BYTES = 64 << 10

_CODE_BY_STATUS = {404: "route_not_found", 405: "method_not_allowed", 413: "body_too_large"}


def make_runner(engine: Engine, host_names: Collection[str] | None = None) -> web.AppRunner:
    """The application as `vmkeep serve` runs it. Its `cleanup` takes at most about 2 s."""
    return Runner(
        make_app(engine, host_names),
        shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        access_log=None,
        keepalive_timeout=IDLE_TIMEOUT_S,
        max_line_size=MAX_LINE_BYTES,
        max_field_size=MAX_LINE_BYTES,
    )


def make_app(engine: Engine, host_names: Collection[str] | None = None) -> web.Application:
    """Serves a started Engine, which is the caller's to stop, after the application.

    host_names: what requests may call this machine, beside what is nobody else's; None: anything.
    """
    document = openapi.document(CALLS)
    app = web.Application(middlewares=[_envelope_errors], client_max_size=MAX_BODY_BYTES)
    app[HOST_NAMES] = None if host_names is None else frozenset(map(str.lower, host_names))
    app[SERVICE] = Service(engine, document, docs.page(document))
    for call in CALLS:
        app.router.add_route(call.method, call.path, partial(_handle, call))
    for path, handler in system.HANDLERS.items():
        app.router.add_route("GET", path, handler)
    app.cleanup_ctx.append(_run_service)
    app.on_shutdown.append(_stop_service)
    return app


async def _run_service(app: web.Application) -> AsyncIterator[None]:
    service = app[SERVICE]
    service.start()
    yield
    service.close(WORKERS_TIMEOUT_S)


async def _stop_service(app: web.Application) -> None:
    """Before the server waits for its handlers: the streams would never end by themselves."""
    app[SERVICE].stop()


async def _handle(call: AnyCall | Batch, request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    received = await _receive(call, request)
    work = partial(answer, service.engine, call, received, request.remote or "")
    run = partial(service.workers(call).run, work)
    return Enveloped(await (run() if call.method == "GET" else _unless_silent(service, run)))


async def _unless_silent(
    service: Service, run: Callable[[], Coroutine[None, None, Answered]]
) -> Answered:
    """What a call that changes something answers; ApiError `state_unreachable` when that takes long
    because the data directory's disk is silent. One that has begun by then goes on when it does."""
    service.require_state("nothing was changed")
    task = asyncio.ensure_future(run())
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_EVERY_S))[0]:
            service.require_state("what was asked for may be done when it answers")
        return task.result()
    finally:
        task.cancel()


async def _receive(call: AnyCall | Batch, request: web.Request) -> Received:
    if call.method == "GET":
        return list(request.query.items())
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        return ApiError("malformed", f"the body did not come within {BODY_TIMEOUT_S:g} s")
    except web.HTTPRequestEntityTooLarge:
        return ApiError("body_too_large", f"the body may have {MAX_BODY_BYTES} bytes")
    except (web.RequestPayloadError, ConnectionError) as error:
        return ApiError("malformed", f"the body could not be read: {error}")


@web.middleware
async def _envelope_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Counts every request, and answers those that reach no worker."""
    began_s = time.monotonic()
    try:
        _refuse_foreign(request)
        response = await handler(request)
    except web.HTTPException as error:
        response = Enveloped(answer_error(_as_api_error(request, error)))
        if isinstance(error, web.HTTPMethodNotAllowed):
            response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    except Exception as error:  # noqa: BLE001 - every error becomes an envelope
        response = Enveloped(answer_error(error))
    if not response.prepared:
        response.headers.update(HEADERS)
    scode = response.scode if isinstance(response, Enveloped) else 0
    seconds = time.monotonic() - began_s
    request.app[SERVICE].metrics.observe(_route(request), scode, seconds)
    return response


def _as_api_error(request: web.Request, error: web.HTTPException) -> ApiError:
    code = _CODE_BY_STATUS.get(error.status, "malformed")
    ours = ApiError(code, f"{request.method} {request.path}"[:200] + f": {error.reason}")
    return ours.with_traceback(error.__traceback__)


def _refuse_foreign(request: web.Request) -> None:
    names = request.app[HOST_NAMES]
    if names is not None:
        refuse_foreign_host(request, names)
    refuse_foreign_origin(request)


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return "unknown" if resource is None else resource.canonical
