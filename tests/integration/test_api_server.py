"""The server itself: companion calls, batches, streams, metrics, health, start and stop."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from api.app import make_runner
from api.calls import Call, Reply
from api.dispatch import answer
from api.events import MAX_CLIENTS
from api.openapi import document
from api.routes import CALLS
from api.schemas import Empty, NoArguments
from api.service import SERVICE
from engine.config import Config, NamespaceConfig, TenantConfig
from engine.service import Engine
from tests.api_site import MIB, Site, serving, serving_gated

UNKNOWN = "650ea11b-b7fb-4269-8232-aa53865aab3b"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with serving(tmp_path) as made:
        yield made


# Companion calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "members"),
    [
        ("cluster/list", ["uuid", "name", "mode"]),
        ("tenant/list", ["uuid", "name"]),
        ("namespace/list", ["uuid", "name", "tenant"]),
        ("zone/list", ["uuid", "name"]),
        ("object_group/list", ["uuid", "name"]),
        (
            "pool/list",
            [
                *("pool_uuid", "name", "path", "usd_types", "replica", "capacity", "free"),
                *("error", "pinned"),
            ],
        ),
        (
            "backup_point/list",
            [
                "backup_point_uuid",
                "name",
                "kind",
                "path",
                "state",
                "capacity",
                "free",
                "stored_bytes",
                "logical_bytes",
                "chunk_count",
                "pack_count",
                "backup_count",
                "last_error",
            ],
        ),
    ],
)
async def test_the_embedded_default_is_listed(site: Site, call: str, members: list[str]) -> None:
    data = (await site.get(call)).data
    assert list(data) == ["list", "total_count"]
    [row] = data["list"]
    assert data["total_count"] == 1
    assert list(row) == members
    assert row["name"] == "default"


async def test_pool_offers_both_types_and_has_room(site: Site) -> None:
    [pool] = (await site.get("pool/list")).data["list"]
    assert set(pool["usd_types"]) == {"HDD", "SSD"}
    assert 0 < pool["free"] <= pool["capacity"]
    assert pool["error"] == ""


async def test_a_vms_life(site: Site) -> None:
    disk = {"target_device": "sda", "pool_uuid": site.ids["pool"], "volume_name": "new"}
    body = {"compute_name": "vm", "vm_type": "GCD", "disks": [disk | {"capacity": MIB}]}
    made = (await site.post("compute/create", body)).data
    assert list(made) == ["compute_uuid"]
    row = (await site.get("compute/inspect", **made)).data
    assert row.pop("disks") == [
        {
            "target_device": "sda",
            "pool_uuid": site.ids["pool"],
            "volume_name": "new",
            "path": str(site.pool_path / "new"),
            "capacity": MIB,
            "usd_type": "HDD",
            "replica": 1,
            "share": False,
            "format": "raw",
            "pinned": 0,
        }
    ]
    assert row == {
        "compute_uuid": made["compute_uuid"],
        "compute_name": "vm",
        "cluster_uuid": site.ids["cluster"],
        "tenant": site.ids["tenant"],
        "namespace": site.ids["namespace"],
        "zone_uuid": site.ids["zone"],
        "object_group": site.ids["group"],
        "vm_type": "GCD",
        "state": "stopped",
        "action": "",
        "last_error": "",
        "host": "",
        "alerts": [],
    }
    assert (site.pool_path / "new").stat().st_size == MIB
    delete = made | {"delete_volumes": True}
    assert (await site.post("compute/delete", delete)).data == {}
    assert (await site.get("compute/list")).data == {"list": [], "total_count": 0}
    assert not (site.pool_path / "new").exists()


async def test_a_points_life(site: Site) -> None:
    path = site.root / "second"
    path.mkdir()
    body = {"name": "second", "kind": "local", "path": str(path)}
    made = (await site.post("backup_point/create", body)).data
    assert list(made) == ["backup_point_uuid"]
    row = (await site.get("backup_point/inspect", **made)).data
    assert (row["name"], row["kind"], row["path"]) == ("second", "local", str(path))
    assert (row["state"], row["backup_count"], row["last_error"]) == ("online", 0, "")
    vm = await site.make_vm()
    await site.back_up(vm, backup_point_uuid=made["backup_point_uuid"])
    assert (await site.get("backup_point/inspect", **made)).data["backup_count"] == 1
    for kind in ("verify", "gc", "rebuild"):
        started = (await site.post(f"backup_point/{kind}", made | {"deep": True})).data
        assert list(started) == ["job_uuid"]
        job = await site.ended(started["job_uuid"])
        assert (job.kind, job.state) == (kind, "succeeded"), job
    assert (await site.post("backup_point/delete", made)).data == {}
    assert (await site.get("backup_point/list")).data["total_count"] == 1
    assert (await site.post("backup_point/create", body)).data == made
    assert (await site.get("compute/backup/list")).data["total_count"] == 1


async def test_a_jobs_row(site: Site) -> None:
    vm = await site.make_vm()
    backup = await site.back_up(vm)
    [row] = (await site.get("job/list")).data["list"]
    assert row == (await site.get("job/inspect", job_uuid=row["job_uuid"])).data
    assert list(row) == [
        "job_uuid",
        "kind",
        "backup_uuid",
        "compute_uuid",
        "backup_point_uuid",
        "state",
        "error",
        "created_at",
        "started_at",
        "finished_at",
        "progress",
        "stalled_s",
        "stalled_on",
        "result",
    ]
    assert (row["kind"], row["state"], row["error"]) == ("backup", "succeeded", "")
    assert (row["backup_uuid"], row["compute_uuid"]) == (backup, vm)
    assert row["created_at"] <= row["started_at"] <= row["finished_at"]
    assert list(row["progress"]) == [
        "bytes_total",
        "bytes_scanned",
        "bytes_read",
        "bytes_changed",
        "bytes_stored",
        "bytes_restored",
        "rate",
        "eta_s",
    ]
    assert row["progress"]["bytes_total"] == row["progress"]["bytes_scanned"] == 3 * MIB


async def test_operations_are_logged_and_paged(site: Site) -> None:
    vm = await site.make_vm()
    await site.back_up(vm, vm_type="GDT")
    data = (await site.get("operation/list")).data
    assert data["total_count"] == 2
    row = data["list"][0]
    assert abs(row.pop("at") - time.time()) < 600
    assert row == {
        "seq": 2,
        "who": "127.0.0.1",
        "what": "compute/backup/create",
        "target": vm,
        "name": "test-api",
        "vm_type": "GDT",
        "scode": 0,
        "desc": "",
    }
    second = (await site.get("operation/list", page_number="2", page_size="1")).data
    assert [one["what"] for one in second["list"]] == ["compute/create"]


async def test_another_tenants_vm_is_neither_shown_nor_deleted(tmp_path: Path) -> None:
    tenants = (TenantConfig("default"), TenantConfig("other"))
    spaces = (NamespaceConfig("default"), NamespaceConfig("theirs", "other"))
    async with serving(tmp_path, Config(tenants=tenants, namespaces=spaces)) as site:
        vm = await site.make_vm()
        scope = {"compute_uuid": vm, "tenant": site.engine.tenants()[1].uuid}
        shown = await site.get("compute/inspect", **scope)
        tracked = await site.post("compute/track", scope)
        deleted = await site.post("compute/delete", {**scope, "delete_volumes": True})
        assert [one.output["scode"] for one in (shown, tracked, deleted)] == [40407] * 3
        assert os.listdir(site.pool_path) == ["vm1-sda"]
        own = {"compute_uuid": vm, "tenant": site.ids["tenant"]}
        assert (await site.get("compute/inspect", **own)).data["compute_uuid"] == vm
        assert (await site.post("compute/delete", own)).data == {}


# Batches -----------------------------------------------------------------------------------------


async def test_a_batch_does_what_it_can(site: Site) -> None:
    one, two = await site.make_vm(), await site.make_vm(seed=2)
    items = [site.create_body(one), {"backup_name": 5}, site.create_body(two)]
    data = (await site.post("compute/backup/batch/create", {"items": items})).data
    assert list(data) == ["success", "fail", "results"]
    assert (data["success"], data["fail"]) == (2, 1)
    assert [result["scode"] for result in data["results"]] == [0, 40001, 0]
    assert [result["data"] is None for result in data["results"]] == [False, True, False]
    for job in (await site.get("job/list")).data["list"]:
        await site.ended(job["job_uuid"])
    made = [result["data"]["backup_uuid"] for result in data["results"] if result["data"]]
    items = [{"backup_uuid": uuid} for uuid in (*made, UNKNOWN)]
    data = (await site.post("compute/backup/batch/delete", {"items": items})).data
    assert (data["success"], data["fail"]) == (2, 1)
    assert [result["data"] for result in data["results"]] == [{}, {}, None]
    assert (await site.get("compute/backup/list")).data["total_count"] == 0
    logged = (await site.get("operation/list", page_size="6")).data["list"]
    assert [row["what"] for row in logged] == ["compute/backup/delete"] * 3 + [
        "compute/backup/create"
    ] * 3


@pytest.mark.parametrize("items", [[], [5], "x", None, [{}] * 1001])
async def test_a_batch_that_is_none_is_refused_as_a_whole(site: Site, items: Any) -> None:
    refused = await site.post("compute/backup/batch/create", {"items": items})
    assert refused.output["scode"] == 40001
    assert refused.output["desc"].startswith("items")


# Events ------------------------------------------------------------------------------------------


async def _next_event(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Skips comments."""
    while True:
        event = (await response.content.readuntil(b"\n\n")).decode()
        if event.startswith("event: job\ndata: "):
            row = json.loads(event.removeprefix("event: job\ndata: "))
            assert isinstance(row, dict)
            return row
        assert event.startswith(":"), event


async def test_events_tell_a_job_to_its_end(site: Site) -> None:
    vm = await site.make_vm()
    async with site.http.get(f"{site.url}/v1/job/events") as response:
        assert response.content_type == "text/event-stream"
        created = await site.post("compute/backup/create", site.create_body(vm))
        states: list[str] = []
        while not states or states[-1] != "succeeded":
            row = await asyncio.wait_for(_next_event(response), 60)
            assert row["job_uuid"] == created.headers["X-Job-Uuid"]
            states.append(row["state"])
    assert row == (await site.get("job/inspect", job_uuid=row["job_uuid"])).data


async def test_a_new_listener_is_told_what_is_under_way(tmp_path: Path) -> None:
    async with serving_gated(tmp_path) as (site, gate):
        created = await site.post("compute/backup/create", site.create_body(await site.make_vm()))
        async with site.http.get(f"{site.url}/v1/job/events") as response:
            row = await asyncio.wait_for(_next_event(response), 60)
            assert row["job_uuid"] == created.headers["X-Job-Uuid"]
            assert row["state"] in ("queued", "running")
        gate.open()
        await site.ended(created.headers["X-Job-Uuid"])


async def test_listeners_beyond_the_limit_are_refused(site: Site) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:
        streams = [await http.get(f"{site.url}/v1/job/events") for _ in range(MAX_CLIENTS)]
        assert {stream.status for stream in streams} == {200}
        refused = await site.get("job/events")
        assert refused.output["scode"] == 50304
        for stream in streams:
            stream.close()


async def test_streams_end_when_the_server_stops(tmp_path: Path) -> None:
    engine = Engine.start(str(tmp_path / "data"), Config())
    runner = make_runner(engine)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/job/events"
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        stopping = asyncio.create_task(runner.cleanup())
        await asyncio.wait_for(response.read(), 10)
        await stopping
    engine.stop()


# What is not a call ------------------------------------------------------------------------------


async def test_health(site: Site) -> None:
    async with site.http.get(f"{site.url}/healthz") as response:
        assert response.status == 200
        assert (await response.json())["data"]["state"] == "ready"


async def test_health_while_stopping(tmp_path: Path) -> None:
    engine = Engine.start(str(tmp_path / "data"), Config())
    runner = make_runner(engine)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    runner.app[SERVICE].stopping = True
    async with aiohttp.ClientSession() as http, http.get(f"{url}/healthz") as response:
        assert response.status == 503
        assert (await response.json())["scode"] == 50303
    await runner.cleanup()
    engine.stop()


async def test_metrics(site: Site) -> None:
    await site.back_up(await site.make_vm())
    await site.get("compute/backup/inspect", backup_uuid=UNKNOWN)
    await site.get("no/such/route")
    async with site.http.get(f"{site.url}/metrics") as response:
        assert response.content_type == "text/plain"
        text = await response.text()
    assert 'vmkeep_requests_total{route="/v1/compute/backup/create",scode="0"} 1.0' in text
    assert 'vmkeep_requests_total{route="/v1/compute/backup/inspect",scode="40408"} 1.0' in text
    assert 'vmkeep_requests_total{route="unknown",scode="40400"} 1.0' in text
    assert 'vmkeep_request_seconds_count{route="/v1/compute/create"} 1.0' in text
    assert 'vmkeep_jobs{state="succeeded"} 1.0' in text
    assert "vmkeep_clone_seconds_count" in text
    assert 'vmkeep_backups{status="done"} 1.0' in text
    stored = re.search(r"vmkeep_point_stored_bytes\{[^}]*\} (\S+)", text)
    assert stored is not None


async def test_documents(site: Site) -> None:
    async with site.http.get(f"{site.url}/openapi.json") as response:
        assert await response.json() == document(CALLS)
    async with site.http.get(f"{site.url}/docs") as response:
        assert response.content_type == "text/html"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert "/v1/compute/backup/create" in await response.text()


async def test_every_answer_says_what_it_is(site: Site) -> None:
    for path in ("/healthz", "/docs", "/v1/nowhere"):
        async with site.http.get(site.url + path) as response:
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Cache-Control"] == "no-store"


async def test_wrong_method_says_which_are_allowed(site: Site) -> None:
    async with site.http.put(f"{site.url}/v1/compute/backup/create") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"


async def test_a_page_of_our_own_may_post(site: Site) -> None:
    answer = await site.post("compute/create", {"compute_name": "x", "disks": []}, Origin=site.url)
    assert answer.status == 200


async def test_a_long_filter_is_read(site: Site) -> None:
    answer = await site.get("compute/backup/list", filter_backup_description="\U0001f600" * 4096)
    assert answer.data["total_count"] == 0


async def test_a_body_of_exactly_the_limit_is_read(site: Site) -> None:
    body = json.dumps({"compute_name": "x", "disks": []}).encode()
    answer = await site.post("compute/create", body + b" " * ((1 << 20) - len(body)))
    assert answer.status == 200


async def test_a_client_that_goes_away_changes_nothing(site: Site) -> None:
    body = json.dumps({"compute_name": "x", "disks": []}).encode()
    head = f"POST /v1/compute/create HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    port = int(site.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(head.encode() + body)
    deadline = time.monotonic() + 30
    while (await site.get("compute/list")).data["total_count"] == 0:
        assert time.monotonic() < deadline


async def test_a_client_that_goes_away_within_its_body_is_no_defect(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(site.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(
            b"POST /v1/compute/create HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{}"
        )
    deadline = time.monotonic() + 30
    while (await site.get("operation/list")).data["total_count"] == 0:
        assert time.monotonic() < deadline
    [row] = (await site.get("operation/list")).data["list"]
    assert row["scode"] == 40000
    assert "internal_error" not in caplog.text
    assert (await site.get("compute/list")).data["total_count"] == 0


async def test_a_defect_of_ours_tells_nothing_but_its_type(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_engine: Engine, _query: NoArguments) -> Reply[Empty]:
        raise KeyError("/etc/secret")

    call = Call(
        method="GET",
        path="/v1/broken",
        summary="",
        tag="",
        request=NoArguments,
        answer=Empty,
        run=broken,
    )
    answered = await asyncio.to_thread(partial(answer, site.engine, call, [], "me"))
    output = json.loads(answered.body)
    assert (answered.status, output["scode"], output["desc"]) == (500, 50000, "KeyError")
    assert "secret" not in answered.body.decode()
    assert "secret" in caplog.text
