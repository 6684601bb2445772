"""The disk of the data directory stops answering: what there is can be asked for all the same."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import api.service
from engine.config import Config
from tests.api_site import MIB, Answer, Site, read_answer, serving
from tests.conftest import LoopFs
from tests.engine_rig import EngineRig
from tests.fire.test_hang import AT_ONCE, Frozen
from tests.fire.test_point_lost import on_first_batch

POSTS = 70  # more than there are threads for
SOON_S = 3.0


async def looked(site: Site, **uuids: str) -> list[Answer]:
    """The answers of all calls that only look, but for those that touch a point's files."""
    calls = [
        *("cluster/list", "tenant/list", "namespace/list", "zone/list", "object_group/list"),
        *("compute/list", "backup_point/list", "job/list", "operation/list", "pool/list"),
        "compute/backup/list",
    ]
    answers = [await site.get(call) for call in calls]
    for call, member in (
        ("compute/inspect", "compute_uuid"),
        ("compute/backup/inspect", "backup_uuid"),
        ("compute/backup/record", "backup_uuid"),
        ("backup_point/inspect", "backup_point_uuid"),
        ("job/inspect", "job_uuid"),
    ):
        answers.append(await site.get(call, **{member: uuids[member]}))
    return answers


async def plain(site: Site, path: str) -> str:
    async with site.http.get(site.url + path) as response:
        return await response.text()


async def health(site: Site) -> Answer:
    async with site.http.get(f"{site.url}/healthz") as response:
        return await read_answer(response)


async def until_stalled(site: Site, job: str) -> str:
    deadline_s = time.monotonic() + 60
    while (row := (await site.get("job/inspect", job_uuid=job)).data)["stalled_s"] < 1:
        assert time.monotonic() < deadline_s, row
        await asyncio.sleep(0.05)
    return str(row["stalled_on"])


async def made(site: Site, number: int) -> tuple[Answer, float]:
    """A VM that is to be made, and how long the answer took."""
    body: dict[str, Any] = {"compute_name": f"late-{number}", "disks": []}
    began_s = time.monotonic()
    return await site.post("compute/create", body), time.monotonic() - began_s


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "ext4"])
async def test_all_that_looks_is_answered(
    loop_fs: LoopFs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The default pool and point are in the data directory, too."""
    monkeypatch.setattr(api.service, "SILENT_AFTER_S", 1.0)
    root = loop_fs(kind, 400 * MIB)
    async with serving(root, Config(limits=AT_ONCE)) as site:
        vm = await site.make_vm({"sda": 24 * MIB})
        first = await site.back_up(vm)
        before = (await health(site)).status
        with Frozen(root) as medium:
            on_first_batch(monkeypatch, medium.freeze)
            answer = await site.post("compute/backup/create", site.create_body(vm))
            job = answer.headers["X-Job-Uuid"]
            assert await until_stalled(site, job) in ("the data directory", "backup point default")
            refused = await asyncio.gather(*(made(site, number) for number in range(POSTS)))
            assert {answer.output["scode"] for answer, _ in refused} == {50307}
            assert max(seconds for _, seconds in refused) < 1.0 + SOON_S
            silent = await made(site, POSTS)
            assert "nothing was changed" in silent[0].output["desc"]
            assert silent[1] < SOON_S
            for _ in range(3):
                began_s = time.monotonic()
                point = site.ids["point"]
                uuids = {"compute_uuid": vm, "backup_uuid": first, "job_uuid": job}
                answers = await looked(site, backup_point_uuid=point, **uuids)
                assert {answer.status for answer in answers} == {200}
                assert "vmkeep_state_silent_seconds" in await plain(site, "/metrics")
                assert time.monotonic() - began_s < SOON_S
                await asyncio.sleep(0.5)
            sick = await health(site)
            assert (before, sick.status) == (200, 503)
            assert "the data directory's disk has not answered for" in sick.output["desc"]
        assert (await site.ended(job)).state == "succeeded"
        assert (await health(site)).status == 200
        restored = await site.post(
            "compute/backup/restore", site.restore_body(answer.data["backup_uuid"])
        )
        assert (await site.ended(restored.headers["X-Job-Uuid"])).state == "succeeded"
        volumes = [site.pool_path / name for name in ("vm1-sda", "restore-1")]
        assert volumes[0].read_bytes() == volumes[1].read_bytes()
        names = [row["compute_name"] for row in (await site.get("compute/list")).data["list"]]
        assert f"late-{POSTS}" not in names


def test_who_looks_does_not_wait_for_who_writes(tmp_path: Path) -> None:
    """Whatever is being recorded: a line of the operation log, a point."""
    with EngineRig(tmp_path / "data") as rig, ThreadPoolExecutor() as threads:
        rig.engine.log_operation("me", "first", "", "", "", 0, "")
        with rig.core.state.store._writer:
            (tmp_path / "far").mkdir()
            line = threads.submit(rig.engine.log_operation, "me", "second", "", "", "", 0, "")
            point = threads.submit(rig.engine.create_point, "far", "local", str(tmp_path / "far"))
            time.sleep(0.5)
            assert [line.done(), point.done()] == [False, False]
            looks = [
                threads.submit(lambda: len(rig.engine.operations(1, 10)[0])),
                threads.submit(lambda: len(rig.engine.points())),
            ]
            assert [look.result(SOON_S) for look in looks] == [1, 1]
        line.result()
        point.result()
        assert (rig.engine.operations(1, 10)[1], len(rig.engine.points())) == (2, 2)
