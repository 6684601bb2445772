"""Schemathesis against the live server: no 500, and every answer as the OpenAPI document says.

The server runs in this process, on a loopback port and a temporary data directory, so destructive
calls are welcome; invented paths of points are moved below that directory. 503 and 507 are answers
that the document foresees (a path that isn't there is an unreachable point).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from api.openapi import document
from api.routes import CALLS
from tests.api_site import Site, serving

AnyCase: TypeAlias = schemathesis.Case[Any]

EXAMPLES = 8


@pytest.fixture(scope="module")
def live_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The server in an event loop of its own, since schemathesis' client blocks."""
    root = tmp_path_factory.mktemp("site")
    started: list[Site] = []
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serving(root) as site:
            vm = await site.make_vm()
            await site.back_up(vm)
            started.append(site)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(60)
    yield started[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(60)
    loop.close()


# What the server serves at /openapi.json (test_api_server). The events never end by themselves.
SCHEMA = schemathesis.openapi.from_dict(document(CALLS)).exclude(path="/v1/job/events")


@SCHEMA.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_document_is_kept(case: AnyCase, live_site: Site) -> None:
    _keep_below(case, live_site.root)
    response = case.call(base_url=live_site.url, timeout=60)
    assert response.status_code != 500, response.text
    case.validate_response(
        response,
        checks=[
            content_type_conformance,
            negative_data_rejection,
            response_headers_conformance,
            response_schema_conformance,
            status_code_conformance,
            unsupported_method,
        ],
    )


def _keep_below(case: AnyCase, root: Path) -> None:
    """No invented path of a point is one of this machine's."""
    body = case.body
    if case.path == "/v1/backup_point/create" and isinstance(body, dict):
        path = body.get("path")
        if isinstance(path, str) and path.startswith("/"):
            body["path"] = f"{root}/points{path}"[:4096]
