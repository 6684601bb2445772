"""Calls that wait for a file system that does not answer leave threads to all others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from api.service import THREADS
from engine.config import Config, PointConfig, PoolConfig
from engine.errors import PoolUnreachable
from engine.inventory import vms
from engine.points import points
from engine.verb_types import NewDisk
from storage.errors import PointUnreachable
from storage.point import ClusterLabel, Point
from tests.api_site import MIB, serving
from tests.conftest import LoopFs
from tests.engine_rig import ANYWHERE, PATIENCE_S, EngineRig, attach, back_up_to, disk_bytes
from tests.fire.test_hang import AT_ONCE, Frozen

pytestmark = pytest.mark.root

FS_BYTES = 320 * MIB
SOON_S = 10.0
SILENT_POINTS = 4


async def test_a_call_for_a_point_that_is_well_is_answered(tmp_path: Path, loop_fs: LoopFs) -> None:
    """However many others hang, each with as many deletes as may be at it at once."""
    places = [loop_fs("ext4", FS_BYTES) for _ in range(SILENT_POINTS)]
    named = [PointConfig(f"slow{number}", str(place)) for number, place in enumerate(places)]
    (tmp_path / "home").mkdir()
    config = Config(limits=AT_ONCE, points=(PointConfig("home", str(tmp_path / "home")), *named))
    async with serving(tmp_path, config) as site:
        uuids = {one.point.name: one.point.uuid for one in site.engine.points()}
        vm = await site.make_vm({"sda": MIB})
        home = await site.back_up(vm, backup_point_uuid=uuids["home"])
        slow = [
            await site.back_up(vm, backup_point_uuid=uuids[point.name])
            for point in named
            for _ in range(points.AT_ONCE)
        ]

        def delete(backup: str) -> asyncio.Task[Any]:
            body = {"cluster_uuid": site.ids["cluster"], "tenant": "", "backup_uuid": backup}
            return asyncio.create_task(site.post("compute/backup/delete", body))

        with contextlib.ExitStack() as stack:
            for place in places:
                stack.enter_context(Frozen(place)).freeze()
            hanging = [delete(one) for one in slow]
            assert not (await asyncio.wait(hanging, timeout=1.0))[0]
            async with asyncio.timeout(SOON_S):
                assert (await delete(home)).output["scode"] == 0
        assert {(await one).output["scode"] for one in hanging} == {0}


@pytest.mark.parametrize("what", ["import", "erase", "list"])
def test_few_calls_wait_for_one_point(
    tmp_path: Path, loop_fs: LoopFs, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The others are refused, and those that come later at once."""
    monkeypatch.setattr(points, "TURN_TIMEOUT_S", 1.0)
    place = loop_fs("ext4", FS_BYTES)
    config = Config(limits=AT_ONCE)
    with (
        EngineRig(tmp_path / "data", config) as rig,
        ThreadPoolExecutor(THREADS["POST", "slow"]) as threads,
    ):
        point, answers = attach(rig, place), threading.Event()
        backup = back_up_to(rig, point, disk_bytes(MIB, 1), "web")

        def hang(_point: Point, _unread: object = None) -> list[ClusterLabel]:
            """Who looks at NFS hangs, at a frozen one not."""
            answers.wait(PATIENCE_S)
            return []

        monkeypatch.setattr(Point, "clusters", hang)

        def call() -> Future[Any]:
            if what == "list":
                return threads.submit(rig.engine.remote_backups, rig.cluster_uuid, point)
            if what == "import":
                wanted = [(backup, point)]
                return threads.submit(rig.engine.import_backups, rig.cluster_uuid, wanted)
            return threads.submit(rig.engine.delete_point, point, erase=True)

        with Frozen(place) as medium:
            medium.freeze()
            delete = threads.submit(rig.engine.delete_backup, ANYWHERE, backup)
            assert not wait([delete], 1.0).done
            asked = [call() for _ in range(8)]
            refused = wait(asked, 5.0).done
            assert len(refused) >= len(asked) - points.AT_ONCE
            assert {type(one.exception()) for one in refused} == {PointUnreachable}
            began_s = time.monotonic()
            assert type(call().exception(SOON_S)) is PointUnreachable
            assert time.monotonic() - began_s < 1.0
            answers.set()


@pytest.mark.parametrize("both", [False, True])
def test_a_pool_that_hangs_holds_up_no_vm_of_another(
    tmp_path: Path, loop_fs: LoopFs, monkeypatch: pytest.MonkeyPatch, both: bool
) -> None:
    """A volume is being made there, also for a VM that has one elsewhere; VMs with disks elsewhere
    are made and deleted."""
    monkeypatch.setattr(vms, "POOL_TIMEOUT_S", 1.0)
    place = loop_fs("xfs", FS_BYTES)
    (tmp_path / "well").mkdir()
    pools = (PoolConfig("slow", str(place)), PoolConfig("well", str(tmp_path / "well")))
    config = Config(limits=AT_ONCE, pools=pools)
    with EngineRig(tmp_path / "data", config) as rig, ThreadPoolExecutor() as threads:
        uuids = {state.pool.name: state.pool.uuid for state in rig.engine.pools()}

        def make(name: str, *pool_names: str) -> Future[str]:
            disks = [
                NewDisk(f"sd{n}", uuids[pool], name, capacity=MIB)
                for n, pool in enumerate(pool_names)
            ]
            return threads.submit(rig.engine.create_vm, ANYWHERE, name, "", "", disks)

        with Frozen(place) as medium:
            medium.freeze()
            hanging = make("a", "well", "slow") if both else make("a", "slow")
            assert not wait([hanging], 1.0).done
            made = make("b", "well").result(SOON_S)
            threads.submit(rig.engine.delete_vm, made, True).result(SOON_S)
            for names in (("slow",), ("well", "slow")):
                with pytest.raises(PoolUnreachable, match="ask again"):
                    make("c", *names).result(SOON_S)
            assert os.listdir(tmp_path / "well") == ["a"] * both
            make("d", "well").result(SOON_S)
            medium.thaw()
            hanging.result(PATIENCE_S)
            make("c", "slow").result(PATIENCE_S)
