"""Bad luck in the middle of a job: it fails by name, loses nothing, and the next one succeeds."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.config import (
    Config,
    DiskConfig,
    Limits,
    NamespaceConfig,
    PointConfig,
    PoolConfig,
    TenantConfig,
    Tracking,
    VmConfig,
)
from engine.errors import NotFound, PoolUnreachable
from engine.jobs.jobs import JobContext
from engine.model import BACKUP_DONE, BACKUP_FAILED, Backup, Pool, Vm
from engine.points.distrust import remember_distrusted
from engine.probes import Probes
from engine.restore.reservations import Reservations
from engine.verb_types import NewDisk, RestoreTarget, Scope
from storage.check.check import check_point
from storage.domain.session import NewBackup, Session
from storage.errors import PointUnreachable
from tests.conftest import LoopFs
from tests.engine_rig import ANYWHERE, PATIENCE_S, EngineRig, disk_bytes, files_below
from tests.rig import random_bytes, write_at
from tests.vectors import colliding_chunks

MIB = 1 << 20


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[EngineRig]:
    with EngineRig(tmp_path / "data") as made:
        yield made


def failed(rig: EngineRig, vm: Vm, job_uuid: str) -> str:
    """Asserts that the job failed and let go of the VM; its reason."""
    job = rig.ended(job_uuid)
    assert job.state == "failed"
    assert rig.engine.vm(vm.uuid).action == ""
    return job.error


def clean(path: Path) -> None:
    report = check_point(str(path), deep=True)
    assert report.findings == []


def on_first_batch(monkeypatch: pytest.MonkeyPatch, mishap: object) -> None:
    """Calls `mishap()` once, when the running job has stored its first batch; none of its threads
    goes on to another one meanwhile, or it might be done before."""
    told: list[bool] = []
    add = JobContext.add
    one_at_a_time = threading.Lock()

    def add_then(self: JobContext, **counts: int) -> None:
        add(self, **counts)
        with one_at_a_time:
            if not told:
                told.append(True)
                assert callable(mishap)
                mishap()

    monkeypatch.setattr(JobContext, "add", add_then)


def test_a_point_that_vanishes_during_a_backup(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = disk_bytes(24 * MIB, 1)
    vm = rig.make_vm("web", content)
    kept = rig.back_up(vm)
    point = Path(rig.engine.points()[0].point.path)
    away = point.with_name("unplugged")
    write_at(rig.volume(vm.disks[0]), 0, random_bytes(20 * MIB, 2))
    with monkeypatch.context() as patch:
        on_first_batch(patch, lambda: point.rename(away))
        backup, job = rig.ask_backup(vm)
        assert str(point) in failed(rig, vm, job)
    assert rig.engine.backup(ANYWHERE, backup).status == BACKUP_FAILED
    away.rename(point)
    rig.restart()
    again = rig.back_up(rig.engine.vm(vm.uuid))
    assert rig.restore(again, "copy") == [rig.volume(vm.disks[0]).read_bytes()]
    assert rig.restore(kept, "old") == [content]
    clean(point)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_point_that_fills_during_a_backup(tmp_path: Path, loop_fs: LoopFs, kind: str) -> None:
    place = loop_fs(kind, 330 * MIB if kind == "xfs" else 96 * MIB)
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    config = Config(
        limits=Limits(point_reserve_bytes=0), points=(PointConfig("small", str(place)),)
    )
    with EngineRig(tmp_path / "data", config) as rig:
        small = random_bytes(2 * MIB, 1)
        vm = rig.make_vm("small", small)
        kept = rig.back_up(vm)
        big = rig.make_vm("big", os.urandom(free + 8 * MIB))
        _, job = rig.ask_backup(big)
        assert "bytes free" in failed(rig, big, job) or "No space left" in rig.ended(job).error
        assert rig.restore(kept, "copy") == [small]
        rig.engine.delete_backup(ANYWHERE, kept.uuid)
        again = rig.back_up(vm)
        assert rig.restore(again, "another") == [small]
    clean(place)


@pytest.mark.root
def test_a_pool_that_fills_before_a_restore_has_its_room(
    tmp_path: Path, loop_fs: LoopFs, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = loop_fs("ext4", 96 * MIB)
    pools = (
        PoolConfig("big", str(tmp_path)),
        PoolConfig("small", str(place)),
    )
    with EngineRig(tmp_path / "data", Config(pools=pools)) as rig:
        backup = rig.back_up(_vm_in_big(rig, tmp_path, random_bytes(48 * MIB, 1)))
        before = files_below(place)
        hog = place / "somebody-elses"
        set_total = JobContext.set_total

        def fill(self: JobContext, size_bytes: int) -> None:
            set_total(self, size_bytes)
            with hog.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(MIB))

        with monkeypatch.context() as patch:
            patch.setattr(JobContext, "set_total", fill)
            vm_uuid, job = _restore_into(rig, backup, "small", "copy")
            assert rig.ended(job).state == "failed"
        vm = rig.engine.vm(vm_uuid)
        assert (vm.state, vm.action) == ("restore_failed", "")
        assert str(place) in vm.last_error
        hog.unlink()
        assert files_below(place) == before
        vm_uuid, job = _restore_into(rig, backup, "small", "copy2")
        rig.succeed(job)
        (disk,) = rig.engine.vm(vm_uuid).disks
        assert rig.volume(disk).read_bytes() == random_bytes(48 * MIB, 1)


def test_a_pool_that_hangs_holds_up_no_vm_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow").mkdir()
    pools = (PoolConfig("big", str(tmp_path)), PoolConfig("slow", str(tmp_path / "slow")))
    answers = threading.Event()
    with EngineRig(tmp_path / "data", Config(pools=pools)) as rig, contextlib.ExitStack() as undo:
        uuids = {state.pool.name: state.pool.uuid for state in rig.engine.pools()}
        vms: list[str] = []

        def create(pool: str, name: str) -> None:
            disk = NewDisk("sda", uuids[pool], f"{name}.raw", capacity=MIB)
            vms.append(rig.engine.create_vm(ANYWHERE, name, "", "", [disk]))

        create("slow", "there")
        monkeypatch.setattr("engine.inventory.vms.POOL_TIMEOUT_S", 0.1)
        for name in ("statvfs", "lstat"):
            patch = _hanging(getattr(os, name), str(tmp_path / "slow"), answers)
            monkeypatch.setattr(f"engine.inventory.volumes.os.{name}", patch)
        undo.callback(answers.set)
        for act in (
            lambda: create("slow", "new"),
            lambda: rig.engine.delete_vm(vms[0], delete_volumes=True),
        ):
            found = ThreadPoolExecutor(1).submit(act)
            with pytest.raises(PoolUnreachable, match="pool slow"):
                found.result(PATIENCE_S / 6)
            create("big", f"other{len(vms)}")
        assert [vm.name for vm in rig.engine.vms(ANYWHERE)] == ["other1", "other2", "there"]


def test_a_start_waits_for_a_pool_that_hangs_but_not_for_each_volume_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else with many VMs there it takes longer than any start may, again and again."""
    place, answers, asked = str(tmp_path / "slow"), threading.Event(), list[str]()
    os.mkdir(place)
    vms = tuple(VmConfig(name, (DiskConfig("sda", f"{name}.raw"),)) for name in ("a", "b", "c"))
    config = Config(pools=(PoolConfig("slow", place),), vms=vms)

    def sized(_probes: Probes, _pool: Pool, name: str, *_more: object) -> int:
        asked.append(name)
        return MIB

    hanging = _hanging(os.statvfs, place, answers)
    with EngineRig(tmp_path / "data", config) as rig, monkeypatch.context() as patch:
        patch.setattr("engine.service.POOL_LOOK_TIMEOUT_S", 0.2)
        patch.setattr("engine.service.bounded_volume_size", sized)
        patch.setattr("engine.inventory.volumes.os.statvfs", hanging)
        rig.restart()
        assert asked == []
        assert [vm.name for vm in rig.engine.vms(ANYWHERE)] == ["a", "b", "c"]
        answers.set()
        rig.restart()
        assert asked == ["a.raw", "b.raw", "c.raw"]


def test_a_pool_that_hangs_at_last_holds_up_no_restore_into_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was looked at, and before it is asked for its room."""
    reserved, answers, asked = Reservations(), threading.Event(), threading.Event()
    slow, fast = (Pool(uuid=name, name=name, path=str(tmp_path / name)) for name in ("slow", "f"))
    for pool in (slow, fast):
        Path(pool.path).mkdir()
    statvfs = os.statvfs

    def hanging(path: str) -> object:
        if path == slow.path:
            asked.set()
            answers.wait(PATIENCE_S)
        return statvfs(path)

    monkeypatch.setattr("engine.inventory.volumes.os.statvfs", hanging)
    with ThreadPoolExecutor(2) as threads:
        claim = threads.submit(reserved.claim, "a", {slow: 1})
        assert asked.wait(PATIENCE_S)
        try:
            threads.submit(reserved.claim, "b", {fast: 1}).result(PATIENCE_S / 6)
        finally:
            answers.set()
        claim.result(PATIENCE_S)


def _hanging(
    look: Callable[[str], object], place: str, answers: threading.Event
) -> Callable[[str], object]:
    """The call, which does not return for what is in `place` until it `answers`."""

    def asked(path: str) -> object:
        if str(path).startswith(place):
            answers.wait(PATIENCE_S)
        return look(path)

    return asked


def test_a_vm_whose_pool_is_not_configured_any_more_keeps_its_volumes(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    kept = PoolConfig("kept", str(tmp_path))
    pools = (kept, PoolConfig("gone", str(tmp_path / "gone")))
    with EngineRig(tmp_path / "data", Config(pools=pools)) as rig:
        uuids = {state.pool.name: state.pool.uuid for state in rig.engine.pools()}
        disks = [
            NewDisk("sda", uuids["kept"], "one.raw", capacity=MIB),
            NewDisk("sdb", uuids["gone"], "two.raw", capacity=MIB),
        ]
        vm = rig.engine.create_vm(ANYWHERE, "vm", "", "", disks)
        rig.config = Config(pools=(kept,))
        rig.restart()
        with pytest.raises(NotFound) as caught:
            rig.engine.delete_vm(vm, delete_volumes=True)
        assert caught.value.code == "pool_not_found"
        assert rig.engine.vm(vm).name == "vm"
        assert (tmp_path / "one.raw").exists()
        rig.engine.delete_vm(vm, delete_volumes=False)


def test_a_volume_that_can_not_be_removed_is_named_and_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EngineRig(tmp_path / "data") as rig:
        vm = rig.make_vm("vm", b"one", b"two", b"three")
        unlink = os.unlink

        def failing(path: str) -> None:
            if path.endswith("vm-1.raw"):
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            unlink(path)

        monkeypatch.setattr("engine.inventory.volumes.os.unlink", failing)
        said = r"^the VM is deleted, but not its volumes vm-1\.raw \(pool default: Operation not"
        with pytest.raises(PoolUnreachable, match=said):
            rig.engine.delete_vm(vm.uuid, delete_volumes=True)
        assert rig.engine.vms(ANYWHERE) == []
        assert [path.name for path in rig.pool_path.iterdir()] == ["vm-1.raw"]


def _vm_in_big(rig: EngineRig, pool_path: Path, content: bytes) -> Vm:
    (pool_path / "source.raw").write_bytes(content)
    (pool,) = [state.pool for state in rig.engine.pools() if state.pool.name == "big"]
    disks = [NewDisk("sda", pool.uuid, "source.raw")]
    return rig.engine.vm(rig.engine.create_vm(ANYWHERE, "source", "", "", disks))


def _restore_into(rig: EngineRig, backup: Backup, pool: str, name: str) -> tuple[str, str]:
    (found,) = [state.pool for state in rig.engine.pools() if state.pool.name == pool]
    target = RestoreTarget("sda", found.uuid, f"{name}.raw", "SSD")
    group, zone = rig.engine.object_groups()[0].uuid, rig.engine.zones()[0].uuid
    return rig.engine.restore_backup(ANYWHERE, backup.uuid, name, [target], group, zone)


def test_a_backup_whose_commit_got_no_answer_is_there_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at the point meets the COMMIT before the job notes that it has failed."""
    content = disk_bytes(1 << 20, 1)
    with EngineRig(tmp_path / "data") as rig:
        commit = Session.commit

        def unanswered(self: Session, new: Sequence[NewBackup]) -> None:
            commit(self, new)
            raise PointUnreachable("no answer")

        def looking(*args: Any) -> None:
            rig.core.points.look_again(rig.point_uuid)
            remember_distrusted(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Session, "commit", unanswered)
            patch.setattr("engine.backup.backup_job.remember_distrusted", looking)
            backup, job = rig.ask_backup(rig.make_vm("web", content))
            assert rig.ended(job).state == "failed"
        row = rig.engine.backup(ANYWHERE, backup)
        assert (row.status, row.error) == (BACKUP_DONE, "")
        assert rig.restore(row, "copy") == [content]
        rig.engine.delete_backup(ANYWHERE, backup)
        assert rig.core.points.domain(rig.point_uuid, rig.cluster_uuid).backups() == []


def test_a_backup_that_a_look_has_met_before_its_end_is_the_newest_until_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that follow would build on it, and what is tracked since the last is of no use."""
    with EngineRig(tmp_path / "data") as rig:
        vm = rig.make_vm("web", disk_bytes(1 << 20, 1))

        def looking(*args: Any) -> None:
            rig.core.points.look_again(rig.point_uuid)
            remember_distrusted(*args)

        with monkeypatch.context() as patch:
            patch.setattr("engine.backup.backup_job.remember_distrusted", looking)
            made = [rig.back_up(vm)]
        made += [rig.back_up(vm), rig.back_up(vm)]
        assert [backup.parent for backup in made] == ["", made[0].uuid, made[1].uuid]


def test_colliding_chunks_of_two_tenants_stay_their_own(tmp_path: Path) -> None:
    """Equal XXH3-128, different content: nobody gets the other one's data, in whatever order."""
    one, other = colliding_chunks(MIB)
    config = Config(
        tenants=(TenantConfig("mallory"), TenantConfig("alice")),
        namespaces=(NamespaceConfig("m", "mallory"), NamespaceConfig("a", "alice")),
    )
    contents = {"m": one + other + one, "a": other + bytes(MIB) + one}
    with EngineRig(tmp_path / "data", config) as rig:
        spaces = {space.name: space for space in rig.engine.namespaces()}
        backups = {}
        for name, content in contents.items():
            (rig.pool_path / f"{name}.raw").write_bytes(content)
            scope = Scope(tenant=spaces[name].tenant, namespace_uuid=spaces[name].uuid)
            disks = [NewDisk("sda", rig.pool_uuid, f"{name}.raw")]
            vm = rig.engine.vm(rig.engine.create_vm(scope, name, "", "", disks))
            backups[name] = rig.back_up(vm)
            assert backups[name].label.tenant == spaces[name].tenant
        assert rig.core.points.domain(rig.point_uuid, rig.cluster_uuid).stats().chunks == 2
        for name, content in contents.items():
            assert rig.restore(backups[name], f"{name}-copy") == [content]


def test_baselines_are_tended_again_after_a_moment_without_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else none would ever go until the next start, however short of room their pool is."""
    rounds, again = list[int](), threading.Event()

    def tend(_core: object) -> None:
        rounds.append(1)
        if len(rounds) == 1:
            raise RuntimeError("can't start new thread")
        again.set()

    monkeypatch.setattr("engine.snapshot.baseline_tending.tend_baselines", tend)
    with EngineRig(tmp_path / "data", Config(tracking=Tracking(look_every_s=0.05))):
        assert again.wait(PATIENCE_S)
