"""A file system that does not answer for a while: it is shown, and all goes on when it does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from api.metrics import Metrics
from engine.config import Config, DiskConfig, Limits, PointConfig, PoolConfig, Tracking, VmConfig
from engine.jobs.jobs import JobContext
from engine.model import Job
from engine.nbd.source import NbdSource
from engine.snapshot import baselines
from engine.snapshot.snapshot import SNAPSHOTS
from engine.verb_types import BackupQuery, NewDisk, RestoreTarget
from storage.files.growing import GrowingFile
from storage.files.in_flight import InFlight, in_flight, longest_in_flight_s
from storage.format.record import Commit, Record
from storage.log.log import Log
from tests.conftest import LoopFs
from tests.engine_rig import ANYWHERE, PATIENCE_S, EngineRig, back_up_to
from tests.fire.test_point_lost import on_first_batch
from tests.qemu.images import create, qemu_io
from tests.rig import random_bytes

MIB = 1 << 20
SOON_S = 15.0
# One thread: py-lmdb holds the GIL while it begins to read, and for that writes to the view's lock
# file, so another one that asks the view while its file system is frozen stops the whole process.
AT_ONCE = Limits(stalled_after_s=0.001, point_reserve_bytes=0, workers=1)
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # ioctls: who writes to the file system stands still


class Frozen:
    """A file system that can be frozen; whose end thaws it."""

    def __init__(self, place: Path) -> None:
        self._fd = os.open(place, os.O_RDONLY)
        self._held = False

    def freeze(self) -> None:
        fcntl.ioctl(self._fd, _FREEZE, 0)
        self._held = True

    def thaw(self) -> None:
        if self._held:
            self._held = False
            fcntl.ioctl(self._fd, _THAW, 0)

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        os.close(self._fd)


def until(rig: EngineRig, job: str, wanted: Callable[[Job], bool]) -> Job:
    """The job as soon as it is so."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not wanted(seen := rig.engine.job(job)):
        assert time.monotonic() < deadline_s, seen
        time.sleep(0.01)
    return seen


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_a_backup_stalls_on_its_point(
    tmp_path: Path, loop_fs: LoopFs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = loop_fs(kind, 320 * MIB)
    config = Config(limits=AT_ONCE, points=(PointConfig("nas", str(place)),))
    content = random_bytes(24 * MIB, 1)
    with EngineRig(tmp_path / "data", config) as rig, Frozen(place) as medium:
        vm = rig.make_vm("web", content)
        told: list[Job] = []
        rig.engine.subscribe_jobs(told.append)
        before_first_write(monkeypatch, medium.freeze)
        backup, job = rig.ask_backup(vm)
        seen = until(rig, job, lambda row: row.stalled_s >= 1)
        assert (seen.state, seen.stalled_on) == ("running", "backup point nas")
        # Everybody is answered meanwhile.
        assert rig.engine.backup(ANYWHERE, backup).uuid == backup
        assert [row.stalled_on for row in rig.engine.jobs()] == ["backup point nas"]
        assert 'vmkeep_jobs_stalled_seconds{on="backup point nas"}' in shown(rig)
        medium.thaw()
        rig.succeed(job)
        ended = rig.engine.job(job)
        assert (ended.stalled_s, ended.stalled_on) == (0, "")
        assert "on=" not in shown(rig)
        assert rig.restore(rig.engine.backup(ANYWHERE, backup), "copy") == [content]
    assert "backup point nas" in {row.stalled_on for row in told}
    assert told[-1].stalled_on == ""


@pytest.mark.root
def test_a_job_that_hangs_holds_up_no_job_on_another_point(
    tmp_path: Path, loop_fs: LoopFs, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, well = loop_fs("ext4", 320 * MIB), tmp_path / "well"
    well.mkdir()
    limits = msgspec.structs.replace(AT_ONCE, stalled_after_s=0.5, max_jobs=1)
    config = Config(limits=limits, points=(PointConfig("nas", str(place)),))
    content = random_bytes(24 * MIB, 1)
    with EngineRig(tmp_path / "data", config) as rig, Frozen(place) as medium:
        nas, vm = rig.point_uuid, rig.make_vm("web", content)
        other = rig.engine.create_point("well", "local", str(well))
        before_first_write(monkeypatch, medium.freeze)
        backup, job = rig.engine.create_backup(ANYWHERE, vm.uuid, nas, "b", "", False)
        until(rig, job, lambda row: row.stalled_on == "backup point nas")
        back_up_to(rig, other, content, "db")
        assert rig.engine.job(job).state == "running"
        medium.thaw()
        rig.succeed(job)
        assert rig.restore(rig.engine.backup(ANYWHERE, backup), "copy") == [content]


def before_first_write(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Calls `act` once, when a pack is written to for the first time."""
    left = [act]
    write = GrowingFile._write_stage

    def act_then_write(self: GrowingFile, stage: memoryview) -> None:
        while left:
            left.pop()()
        write(self, stage)

    monkeypatch.setattr(GrowingFile, "_write_stage", act_then_write)


def shown(rig: EngineRig) -> str:
    """What Prometheus is told."""
    return Metrics(rig.engine).render().decode()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_a_backup_stalls_in_its_view(
    tmp_path: Path, loop_fs: LoopFs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The file system stands still after a record was linked, when LMDB writes next."""
    place = loop_fs(kind, 320 * MIB)
    config = Config(limits=AT_ONCE, points=(PointConfig("nas", str(place)),))
    content = random_bytes(3 * MIB, 1)
    with EngineRig(tmp_path / "data", config) as rig, Frozen(place) as medium:
        vm = rig.make_vm("web", content)
        publish = Log.publish

        def publish_then_freeze(log: Log, record: Record) -> bool:
            published = publish(log, record)
            if any(isinstance(op, Commit) and op.backups for op in record.ops):
                medium.freeze()
            return published

        monkeypatch.setattr(Log, "publish", publish_then_freeze)
        backup, job = rig.ask_backup(vm)
        seen = until(rig, job, lambda row: row.stalled_s >= 1)
        assert (seen.state, seen.stalled_on) == ("running", "backup point nas")
        medium.thaw()
        rig.succeed(job)
        assert rig.restore(rig.engine.backup(ANYWHERE, backup), "copy") == [content]


def test_a_backup_stalls_on_a_server_of_its_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A qemu-nbd that does not answer: what it stands before is the image's pool."""
    pool = tmp_path / "pool"
    pool.mkdir()
    create(pool / "a.qcow2", "20M")
    qemu_io(pool / "a.qcow2", "write -P 1 0 9M")
    disks = (DiskConfig("vda", "a.qcow2", format="qcow2"),)
    pools = (PoolConfig("big", str(pool)),)
    config = Config(limits=AT_ONCE, pools=pools, vms=(VmConfig("vm", disks),))
    with EngineRig(tmp_path / "data", config) as rig:
        servers: list[int] = []

        def stop_server() -> None:
            for child in Path("/proc/self/task").glob("*/children"):
                servers.extend(int(pid) for pid in child.read_text().split() if _is_nbd(pid))
            for pid in servers:
                os.kill(pid, signal.SIGSTOP)

        on_first_read(monkeypatch, stop_server)
        (vm,) = rig.engine.vms(ANYWHERE)
        _, job = rig.ask_backup(vm)
        try:
            seen = until(rig, job, lambda row: row.stalled_s >= 1)
            assert (seen.state, seen.stalled_on) == ("running", "pool big")
        finally:
            for pid in servers:
                os.kill(pid, signal.SIGCONT)
        rig.succeed(job)


def _is_nbd(pid: str) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "qemu-nbd"


def on_first_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Calls `act` once, before the first read of a disk server."""
    left, read_into = [act], NbdSource.read_into

    def act_then_read(source: NbdSource, buffer: memoryview, offset: int) -> int:
        while left:
            left.pop()()
        return read_into(source, buffer, offset)

    monkeypatch.setattr(NbdSource, "read_into", act_then_read)


@pytest.mark.root
def test_a_restore_stalls_on_its_pool(
    tmp_path: Path, loop_fs: LoopFs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = loop_fs("xfs", 320 * MIB)
    pools = (PoolConfig("big", str(tmp_path)), PoolConfig("slow", str(pool)))
    content = random_bytes(24 * MIB, 1)
    (tmp_path / "source.raw").write_bytes(content)
    config = Config(limits=AT_ONCE, pools=pools)
    with EngineRig(tmp_path / "data", config) as rig, Frozen(pool) as medium:
        uuids = {state.pool.name: state.pool.uuid for state in rig.engine.pools()}
        disks = [NewDisk("sda", uuids["big"], "source.raw")]
        vm = rig.engine.vm(rig.engine.create_vm(ANYWHERE, "source", "", "", disks))
        backup = rig.back_up(vm)
        on_first_batch(monkeypatch, medium.freeze)
        target = RestoreTarget("sda", uuids["slow"], "copy", "SSD")
        group, zone = rig.engine.object_groups()[0].uuid, rig.engine.zones()[0].uuid
        _, job = rig.engine.restore_backup(ANYWHERE, backup.uuid, "copy", [target], group, zone)
        seen = until(rig, job, lambda row: row.stalled_s >= 1)
        assert (seen.state, seen.stalled_on) == ("running", "pool slow")
        medium.thaw()
        rig.succeed(job)
        assert (pool / "copy").read_bytes() == content


@pytest.fixture
def two_pools(tmp_path: Path, loop_fs: LoopFs) -> Iterator[EngineRig]:
    """With a VM in each that has a baseline: "slow" and "well", as their pools are called."""
    places = {name: loop_fs("xfs", 320 * MIB) for name in ("slow", "well")}
    pools = tuple(PoolConfig(name, str(place)) for name, place in places.items())
    for number, place in enumerate(places.values()):
        (place / "v").write_bytes(random_bytes(MIB, number))
    vms = tuple(VmConfig(name, (DiskConfig("sda", "v", pool=name),)) for name in places)
    config = Config(limits=AT_ONCE, pools=pools, vms=vms, tracking=Tracking(pool_reserve_share=0.0))
    with EngineRig(tmp_path / "data", config) as rig:
        for vm in rig.engine.vms(ANYWHERE):
            rig.back_up(vm)
        assert all(row.file for row in rig.core.baselines.rows())
        yield rig


def slow_pool(rig: EngineRig) -> Path:
    return Path(next(one.pool.path for one in rig.engine.pools() if one.pool.name == "slow"))


def eventually(seen: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not seen():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.root
def test_a_start_without_tracking_does_not_wait_for_baselines(
    two_pools: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go as soon as their pool answers."""
    rig, pool = two_pools, slow_pool(two_pools)
    monkeypatch.setattr("engine.recovery.POOL_TIMEOUT_S", 1.0)
    with ThreadPoolExecutor() as threads, Frozen(pool) as medium:
        rig.engine.stop(PATIENCE_S)
        rig.config = msgspec.structs.replace(rig.config, tracking=Tracking(enabled=False))
        medium.freeze()
        threads.submit(rig.restart).result(SOON_S)
        assert (pool / SNAPSHOTS).exists()
        assert not any(row.file for row in rig.core.baselines.rows())
        medium.thaw()
        eventually(lambda: not (pool / SNAPSHOTS).exists())


@pytest.mark.root
def test_baselines_in_a_pool_that_hangs_hold_up_no_other(
    two_pools: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is to be deleted, or made, there; backups of other pools are made and deleted."""
    rig, pool = two_pools, slow_pool(two_pools)
    slow, well = rig.engine.vms(ANYWHERE)
    with ThreadPoolExecutor() as threads, Frozen(pool) as medium:
        medium.freeze()
        backups = {row.label.vm_name: row.uuid for row in rig.engine.backups(BackupQuery()).rows}
        threads.submit(rig.engine.delete_backup, ANYWHERE, backups["slow"]).result(SOON_S)
        assert len(list((pool / SNAPSHOTS).iterdir())) == 1
        threads.submit(rig.back_up, well).result(SOON_S)
        threads.submit(rig.engine.delete_backup, ANYWHERE, backups["well"]).result(SOON_S)
        medium.thaw()
        eventually(lambda: not (pool / SNAPSHOTS).exists())

        name = baselines._name

        def freeze_then_name(fd: int, root: str, path: str) -> None:
            if path.startswith(str(pool)):
                medium.freeze()
            name(fd, root, path)

        monkeypatch.setattr(baselines, "_name", freeze_then_name)
        _, job = rig.ask_backup(slow)
        seen = until(rig, job, lambda row: row.stalled_s >= 1)
        assert seen.stalled_on == "pool slow"
        threads.submit(rig.back_up, well).result(SOON_S)
        medium.thaw()
        rig.succeed(job)


def test_a_job_that_computes_is_not_stalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it has counted nothing; nor is it by a call on files that it doesn't need."""
    gate, runs = threading.Event(), threading.Event()
    with EngineRig(tmp_path / "data", Config(limits=AT_ONCE)) as rig:
        vm = rig.make_vm("web", random_bytes(MIB, 1))

        def compute() -> None:
            runs.set()
            assert gate.wait(PATIENCE_S)

        on_first_batch(monkeypatch, compute)
        _, job = rig.ask_backup(vm)
        assert runs.wait(PATIENCE_S)
        with InFlight(str(tmp_path / "elsewhere" / "file")):
            assert rig.engine.job(job).stalled_on == ""
        point = rig.engine.points()[0].point
        with InFlight(f"{point.path}/domains"):
            until(rig, job, lambda row: row.stalled_on == f"backup point {point.name}")
        until(rig, job, lambda row: row.stalled_on == "")
        gate.set()
        rig.succeed(job)


def test_a_job_that_moves_is_not_stalled(tmp_path: Path) -> None:
    """Though a call is under way all the time."""
    with EngineRig(tmp_path / "data", Config(limits=Limits(stalled_after_s=3600))) as rig:
        vm = rig.make_vm("web", random_bytes(MIB, 1))
        hangs = rig.core.jobs._hang_of
        _, job = rig.ask_backup(vm)
        rig.succeed(job)
        point = rig.engine.points()[0].point.path
        with InFlight(point):
            assert hangs(rig.engine.job(job), 3599).on == ""


def test_still_is_since_the_last_count() -> None:
    now = [0.0]
    context = JobContext(clock=lambda: now[0])
    now[0] = 5.0
    assert context.still_s == 5.0
    context.add(scanned=1)
    assert context.still_s == 0.0


def test_calls_under_way(tmp_path: Path) -> None:
    """By path and by descriptor, below a directory, while they last and no longer."""

    class Files:
        @in_flight
        def read(self, _place: int, then: Callable[[], float]) -> float:
            return then()

    def seen(directory: Path = tmp_path) -> bool:
        return longest_in_flight_s(str(directory)) > 0

    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    try:
        assert Files().read(fd, lambda: float(seen())) == 1.0
        assert not seen()
        with InFlight(str(tmp_path) + "-other/file"):
            assert not seen()
        with contextlib.suppress(ZeroDivisionError):
            Files().read(fd, lambda: 1 / 0)
        assert not seen()
    finally:
        os.close(fd)
    with InFlight(fd), InFlight(str(tmp_path)):
        assert seen()
        assert not seen(tmp_path / "below")
