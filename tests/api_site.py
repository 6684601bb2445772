"""A real server on the loopback, over a real Engine: what the tests of the HTTP API talk to."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import aiohttp
from aiohttp import web

from api.app import make_runner
from engine.config import Config, Limits
from engine.model import Job
from engine.service import Engine
from engine.snapshot.freeze import FreezeHook
from engine.snapshot.snapshot import CloneLimits, Snapshot, take_snapshot
from engine.snapshot.sources import DiskFile

MIB = 1 << 20
JOB_TIMEOUT_S = 60.0
SNAPSHOTS = ".vmkeep-snapshots"  # a backup under way makes it
MEMBERS = ["scode", "desc", "message", "message_cn", "stack", "data"]

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """An answer; every one is checked to be an envelope, in the contract's order of members."""

    status: int
    output: dict[str, Any]
    headers: Mapping[str, str]

    @property
    def data(self) -> Any:
        """A success's data."""
        assert self.output["scode"] == 0, self.output
        return self.output["data"]


async def read_answer(response: aiohttp.ClientResponse) -> Answer:
    output = await response.json()
    assert list(output) == MEMBERS
    assert response.content_type == "application/json"
    if output["scode"]:
        assert response.status == output["scode"] // 100
        assert output["data"] is None
        assert output["message"] != "success"
        assert output["message_cn"] != "成功"
        assert isinstance(output["stack"], list)
        for step in output["stack"]:
            module, _function, line = step.split(":")
            assert module.split(".")[0] in {"api", "engine", "storage"}
            assert "/" not in step
            assert int(line) > 0
    else:
        assert response.status == 200
        success = {"desc": "", "message": "success", "message_cn": "成功", "stack": None}
        assert {name: output[name] for name in success} == success
    return Answer(response.status, output, response.headers)


class Site:
    """The embedded default, as a client sees it. `ids` are its uuids by kind."""

    def __init__(self, root: Path, engine: Engine, url: str, http: aiohttp.ClientSession) -> None:
        self.root = root
        self.engine = engine
        self.url = url
        self.http = http
        self.pool_path = Path(engine.pools()[0].pool.path)
        self.ids = {
            "cluster": engine.clusters()[0].uuid,
            "tenant": engine.tenants()[0].uuid,
            "namespace": engine.namespaces()[0].uuid,
            "zone": engine.zones()[0].uuid,
            "group": engine.object_groups()[0].uuid,
            "pool": engine.pools()[0].pool.uuid,
            "point": engine.points()[0].point.uuid,
        }
        self._made = 0

    async def get(self, call: str, **query: str) -> Answer:
        async with self.http.get(f"{self.url}/v1/{call}", params=query) as response:
            return await read_answer(response)

    async def post(self, call: str, body: Body | bytes, **headers: str) -> Answer:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(
            f"{self.url}/v1/{call}", data=io.BytesIO(sent), headers=headers
        ) as response:
            return await read_answer(response)

    async def make_vm(self, sizes: Mapping[str, int] | None = None, seed: int = 0) -> str:
        """A VM whose volumes hold noise; by default one `sda` of 3 MiB."""
        self._made += 1
        disks = []
        for device, size_bytes in (sizes or {"sda": 3 * MIB}).items():
            name = f"vm{self._made}-{device}"
            noise = random.Random(f"{seed} {device}").randbytes(size_bytes)
            (self.pool_path / name).write_bytes(noise)
            disks.append(
                {"target_device": device, "pool_uuid": self.ids["pool"], "volume_name": name}
            )
        body = {"compute_name": f"vm{self._made}", "disks": disks}
        uuid = (await self.post("compute/create", body)).data["compute_uuid"]
        assert isinstance(uuid, str)
        return uuid

    def create_body(self, vm: str, **members: Any) -> dict[str, Any]:
        body = {
            "cluster_uuid": self.ids["cluster"],
            "tenant": self.ids["tenant"],
            "compute_uuid": vm,
            "backup_point_uuid": self.ids["point"],
            "backup_name": "test-api",
            "description": "",
            "full_backup": True,
        }
        return body | members

    def restore_body(self, backup: str, **members: Any) -> dict[str, Any]:
        body = {
            "cluster_uuid": self.ids["cluster"],
            "tenant": "",
            "backup_uuid": backup,
            "compute_uuid": "e3174e1d-bc9b-4fe5-8d4c-8d4245ff9a1a",
            "compute_name": "",
            "object_group": self.ids["group"],
            "new_vm_name": "test-restore",
            "zone_uuid": self.ids["zone"],
            "restore_disks": [self.restore_disk()],
        }
        return body | members

    def restore_disk(self, **members: Any) -> dict[str, Any]:
        disk = {
            "target_device": "sda",
            "pool_uuid": self.ids["pool"],
            "volume_name": "restore-1",
            "usd_type": "HDD",
        }
        return disk | members

    async def ended(self, job: str) -> Job:
        """The job, once it has ended."""
        row = await asyncio.to_thread(self.engine.wait_for_job, job, JOB_TIMEOUT_S)
        assert row.state not in ("queued", "running"), row
        return row

    async def back_up(self, vm: str, **members: Any) -> str:
        """A finished backup's uuid."""
        answer = await self.post("compute/backup/create", self.create_body(vm, **members))
        job = await self.ended(answer.headers["X-Job-Uuid"])
        assert job.state == "succeeded", job
        uuid = answer.data["backup_uuid"]
        assert isinstance(uuid, str)
        return uuid

    async def shown(self) -> dict[str, Any]:
        """All that a client can see, but for sizes, times and the operation log."""
        return {
            "backups": (await self.get("compute/backup/list", page_size="1000")).data,
            "vms": (await self.get("compute/list")).data,
            "jobs": [
                (row["job_uuid"], row["state"].replace("queued", "running"))
                for row in (await self.get("job/list")).data["list"]
            ],
            "points": [
                row["backup_point_uuid"]
                for row in (await self.get("backup_point/list")).data["list"]
            ],
            "volumes": sorted(set(os.listdir(self.pool_path)) - {SNAPSHOTS}),
        }


class Gate:
    """Inside the block each backup of this process waits, its session open, before its snapshot;
    each `open` lets one go on, and the block's end all of them."""

    def __init__(self) -> None:
        self._places = threading.Semaphore(0)
        self._patch = mock.patch("engine.backup.backup.take_snapshot", self._take_snapshot)

    def open(self) -> None:
        self._places.release()

    def open_for_all(self) -> None:
        self._places.release(1000)

    def _take_snapshot(
        self, disks: Sequence[DiskFile], freeze: FreezeHook, limits: CloneLimits
    ) -> Snapshot:
        assert self._places.acquire(timeout=JOB_TIMEOUT_S)
        return take_snapshot(disks, freeze, limits)

    def __enter__(self) -> Gate:
        self._patch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._patch.stop()
        self.open_for_all()


@contextlib.asynccontextmanager
async def serving(root: Path, config: Config | None = None) -> AsyncIterator[Site]:
    """A started server on `root`/data. Everything is stopped in the end."""
    engine = Engine.start(str(root / "data"), config or Config())
    try:
        runner = make_runner(engine)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            async with aiohttp.ClientSession() as http:
                yield Site(root, engine, url, http)
        finally:
            await runner.cleanup()
    finally:
        engine.stop()


@contextlib.asynccontextmanager
async def serving_gated(root: Path) -> AsyncIterator[tuple[Site, Gate]]:
    """One job at a time, and each backup waits at the gate. What waits in the end is let go."""
    with Gate() as gate:
        async with serving(root, Config(limits=Limits(max_jobs=1))) as site:
            try:
                yield site, gate
            finally:
                gate.open_for_all()
