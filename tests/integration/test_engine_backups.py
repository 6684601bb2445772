"""The engine with real files: backups, restores and deletes."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from msgspec.structs import replace

from engine.catalogue.catalogue import Catalogue
from engine.errors import Conflict, EngineError, Invalid, NotFound, PoolFull
from engine.model import BACKUP_DONE, BACKUP_FAILED, BACKUP_RUNNING, Backup, Pool, Vm
from engine.restore.new_volume import NewVolume
from engine.snapshot.snapshot import RESTORES
from engine.verb_types import BackupQuery, NewDisk, RestoreTarget, Scope
from storage.errors import Damaged, PointFull, PointUnreachable
from storage.files.fs import OsFs
from tests.engine_rig import ANYWHERE, ONE_JOB, PATIENCE_S, EngineRig, disk_bytes, files_below
from tests.rig import random_bytes, write_at

MIB = 1 << 20


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[EngineRig]:
    with EngineRig(tmp_path / "data", ONE_JOB) as made:
        yield made


def changed(rig: EngineRig, vm: Vm, offset: int, seed: int) -> bytes:
    """Changes the VM's first volume; its content now."""
    path = rig.volume(vm.disks[0])
    write_at(path, offset, random_bytes(MIB, seed))
    return path.read_bytes()


def code_of(caught: pytest.ExceptionInfo[EngineError]) -> str:
    return caught.value.code


def test_two_disks_come_back_bit_for_bit(rig: EngineRig) -> None:
    contents = [disk_bytes(3 * MIB, 1), disk_bytes(2 * MIB + 512, 2)]
    vm = rig.make_vm("web", *contents)
    backup = rig.back_up(vm, name="nightly")
    assert backup.status == BACKUP_DONE
    assert [disk.target_device for disk in backup.label.disks] == ["sda", "sdb"]
    assert [disk.capacity for disk in backup.label.disks] == [len(c) for c in contents]
    assert rig.restore(backup, "copy") == contents
    copy = next(vm for vm in rig.engine.vms(ANYWHERE) if vm.name == "copy")
    assert (copy.state, copy.action, copy.last_error) == ("stopped", "", "")


def test_first_incremental_is_full_and_says_so(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    backup = rig.back_up(vm, full=False)
    assert backup.label.full
    assert backup.parent == ""
    assert "full: nothing to build on" in backup.label.notes


def test_an_incremental_builds_on_the_newest(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(4 * MIB, 1))
    first = rig.back_up(vm)
    changed(rig, vm, MIB, 2)
    second = rig.back_up(vm)
    content = changed(rig, vm, 2 * MIB, 3)
    third = rig.back_up(vm)
    assert [second.parent, third.parent] == [first.uuid, second.uuid]
    assert not third.label.full
    assert rig.restore(third, "copy") == [content]
    full = rig.back_up(vm, full=True)
    assert full.label.full
    assert full.parent == ""


def test_after_a_clock_that_was_ahead_backups_build_on_each_other(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    with mock.patch.object(rig.engine, "_core", dataclasses.replace(rig.core, clock=lambda: 4e9)):
        ahead = rig.back_up(vm)
    assert ahead.label.create_time == 4_000_000_000
    chain = [ahead, *(rig.back_up(vm) for _ in range(3))]
    assert [one.parent for one in chain] == ["", *(one.uuid for one in chain[:-1])]
    assert rig.listed()[0] == ahead.uuid


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_a_chain_goes_in_any_order(rig: EngineRig, order: tuple[int, ...]) -> None:
    vm = rig.make_vm("web", disk_bytes(4 * MIB, 1))
    contents, chain = [], []
    for step in range(3):
        contents.append(changed(rig, vm, step * MIB, 10 + step))
        chain.append(rig.back_up(vm))
    left = set(range(3))
    for gone in order:
        rig.engine.delete_backup(ANYWHERE, chain[gone].uuid)
        left.discard(gone)
        for kept in left:
            assert rig.restore(chain[kept], f"copy-{gone}-{kept}") == [contents[kept]]
    assert rig.listed() == []


def test_deleting_all_frees_the_packs_before_it_answers(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(4 * MIB, 1))
    first = rig.back_up(vm)
    changed(rig, vm, 0, 2)
    second = rig.back_up(vm)
    packs = Path(rig.engine.points()[0].point.path, "domains", rig.cluster_uuid, "packs")
    assert len(files_below(packs)) == 2
    rig.engine.delete_backup(ANYWHERE, first.uuid)
    rig.engine.delete_backup(ANYWHERE, second.uuid)
    assert files_below(packs) == []
    assert rig.engine.points()[0].stored_bytes == 0
    assert rig.engine.points()[0].backup_count == 0


def test_a_vm_in_an_action_is_busy(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    free = rig.occupy()
    backup, job = rig.ask_backup(vm)
    assert rig.engine.vm(vm.uuid).action == "backing_up"
    assert rig.engine.backup(ANYWHERE, backup).status == BACKUP_RUNNING
    for act in (lambda: rig.ask_backup(vm), lambda: rig.engine.delete_vm(vm.uuid, True)):
        with pytest.raises(Conflict) as caught:
            act()
        assert code_of(caught) == "vm_busy"
    with pytest.raises(Conflict) as caught:
        rig.engine.delete_backup(ANYWHERE, backup)
    assert code_of(caught) == "backup_running"
    free()
    rig.succeed(job)
    assert rig.engine.vm(vm.uuid).action == ""
    assert rig.listed() == [backup]


def test_a_backup_that_is_seen_to_have_ended_leaves_its_vm_idle(rig: EngineRig) -> None:
    """At that very moment: who waits for the one asks for the next."""
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    seen = []
    show = Catalogue._remember

    def look(catalogue: Catalogue, row: Backup) -> None:
        seen.append((row.status, rig.engine.vm(vm.uuid).action))
        show(catalogue, row)

    with mock.patch.object(Catalogue, "_remember", look):
        rig.back_up(vm)
        rig.volume(vm.disks[0]).unlink()
        assert rig.ended(rig.ask_backup(vm)[1]).state == "failed"
    ended = [one for one in seen if one[0] != BACKUP_RUNNING]
    assert set(ended) == {(BACKUP_DONE, ""), (BACKUP_FAILED, "")}


def test_a_disk_that_has_grown_is_a_reason_of_its_own_for_a_full_backup(rig: EngineRig) -> None:
    vm = rig.make_vm("web", random_bytes(MIB, 1))
    rig.back_up(vm)
    rig.volume(vm.disks[0]).write_bytes(random_bytes(2 * MIB, 2))
    grown = rig.back_up(vm).label
    assert grown.full
    assert [note for note in grown.notes if "full: " in note] == ["sda full: its size changed"]


def test_a_vm_is_shown_with_the_size_that_its_backup_found(rig: EngineRig) -> None:
    vm = rig.make_vm("web", random_bytes(MIB, 1), random_bytes(MIB, 2))
    rig.volume(vm.disks[0]).write_bytes(random_bytes(2 * MIB, 3))
    made = rig.back_up(vm)
    now = rig.engine.vm(vm.uuid)
    for disks in (made.label.disks, now.disks):
        assert [disk.capacity for disk in disks] == [2 * MIB, MIB]
    assert now == replace(vm, disks=now.disks)


def test_a_vm_that_can_not_be_noted_does_not_keep_its_backup_running(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    failing = mock.Mock(side_effect=Damaged("the VM's row"))
    with mock.patch.object(rig.core.inventory, "end_action_in", failing):
        assert rig.back_up(vm).status == BACKUP_DONE
    assert failing.called
    assert rig.engine.vm(vm.uuid).action == ""


def test_a_backup_in_the_queue_can_be_cancelled(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    free = rig.occupy()
    backup, job = rig.ask_backup(vm)
    rig.engine.cancel_job(job)
    row = rig.engine.backup(ANYWHERE, backup)
    assert (row.status, row.error) == (BACKUP_FAILED, "cancelled")
    assert rig.engine.job(job).state == "cancelled"
    assert rig.engine.vm(vm.uuid).action == ""
    with pytest.raises(Conflict) as caught:
        rig.engine.cancel_job(job)
    assert code_of(caught) == "job_finished"
    free()
    rig.engine.delete_backup(ANYWHERE, backup)
    assert rig.listed() == []


def test_a_running_backup_can_be_cancelled(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    rig.engine.subscribe_jobs(
        lambda job: rig.engine.cancel_job(job.uuid) if job.state == "running" else None
    )
    backup, job = rig.ask_backup(vm)
    assert rig.ended(job).state == "cancelled"
    row = rig.engine.backup(ANYWHERE, backup)
    assert (row.status, row.error) == (BACKUP_FAILED, "cancelled")
    assert rig.engine.vm(vm.uuid).action == ""


def test_a_failed_backup_keeps_its_reason_and_is_no_parent(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    path = rig.volume(vm.disks[0])
    path.rename(f"{path}.away")
    backup, job = rig.ask_backup(vm)
    assert rig.ended(job).state == "failed"
    row = rig.engine.backup(ANYWHERE, backup)
    assert row.status == BACKUP_FAILED
    assert "web-0.raw" in row.error
    assert rig.engine.vm(vm.uuid).action == ""
    with pytest.raises(Conflict) as caught:
        rig.ask_restore(row, "copy")
    assert code_of(caught) == "backup_failed"
    Path(f"{path}.away").rename(path)
    assert rig.back_up(vm).label.full


def test_what_is_refused_leaves_no_record(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    bare = rig.engine.vm(rig.engine.create_vm(ANYWHERE, "bare", "", "", []))
    with pytest.raises(Conflict) as conflict:
        rig.ask_backup(bare)
    assert code_of(conflict) == "vm_no_disks"
    with pytest.raises(NotFound) as missing:
        rig.engine.create_backup(ANYWHERE, vm.uuid, "nowhere", "b", "", False)
    assert missing.value.code == "backup_point_not_found"
    with pytest.raises(NotFound):
        rig.engine.create_backup(ANYWHERE, "no-vm", rig.point_uuid, "b", "", False)
    with pytest.raises(Invalid):
        rig.ask_backup(vm, name="")
    assert rig.listed() == []
    assert rig.engine.jobs() == []
    assert rig.engine.vm(vm.uuid).action == ""


def test_a_point_that_is_gone_is_refused_and_the_list_still_comes(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    kept = rig.back_up(vm)
    path = Path(rig.engine.points()[0].point.path)
    away = path.with_name("away")
    path.rename(away)
    with pytest.raises(PointUnreachable):
        rig.ask_backup(vm)
    with pytest.raises(PointUnreachable):
        rig.engine.delete_backup(ANYWHERE, kept.uuid)
    assert rig.listed() == [kept.uuid]
    assert rig.engine.vm(vm.uuid).action == ""
    away.rename(path)
    rig.core.points.look_again(rig.point_uuid, 10.0)
    rig.engine.delete_backup(ANYWHERE, kept.uuid)
    assert rig.listed() == []


def test_a_full_point_is_refused(tmp_path: Path) -> None:
    limits = replace(ONE_JOB.limits, point_reserve_bytes=1 << 60)
    with EngineRig(tmp_path / "data", replace(ONE_JOB, limits=limits)) as rig:
        assert rig.engine.points()[0].state == "full"
        with pytest.raises(PointFull):
            rig.ask_backup(rig.make_vm("web", b"x" * MIB))
        assert rig.listed() == []


def test_restore_checks_everything_before_it_creates(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1), disk_bytes(MIB, 2))
    backup = rig.back_up(vm)
    before = sorted(rig.pool_path.iterdir())
    pool, group = rig.pool_uuid, rig.engine.object_groups()[0].uuid
    zone = rig.engine.zones()[0].uuid
    good = RestoreTarget("sda", pool, "new.raw", "SSD")

    def refused(
        *targets: RestoreTarget, name: str = "copy", group: str = group, zone: str = zone
    ) -> str:
        with pytest.raises(EngineError) as caught:
            rig.engine.restore_backup(ANYWHERE, backup.uuid, name, targets, group, zone)
        assert sorted(rig.pool_path.iterdir()) == before
        assert len(rig.engine.vms(ANYWHERE)) == 1
        return caught.value.code

    assert refused() == "invalid_member"
    assert refused(good, RestoreTarget("sda", pool, "two.raw", "SSD")) == "invalid_member"
    assert refused(good, RestoreTarget("sdb", pool, "new.raw", "SSD")) == "invalid_member"
    assert refused(RestoreTarget("sdz", pool, "new.raw", "SSD")) == "disk_not_in_backup"
    assert refused(RestoreTarget("sda", "no-pool", "new.raw", "SSD")) == "pool_not_found"
    assert refused(RestoreTarget("sda", pool, "new.raw", "NVME")) == "usd_type_not_offered"
    assert refused(RestoreTarget("sda", pool, "web-0.raw", "SSD")) == "volume_in_use"
    assert refused(good, name="web") == "name_taken"
    assert refused(good, name="") == "invalid_member"
    assert refused(good, group="no-group") == "object_group_not_found"
    assert refused(good, zone="no-zone") == "zone_not_found"
    bad = ("../x", "a/b", ".hidden", "", "..", "a\0b", "a\nb", "é" * 101, "a\\b")
    for volume in bad:
        assert refused(RestoreTarget("sda", pool, volume, "SSD")) == "invalid_member", volume
    stray = rig.pool_path / "stray.raw"
    stray.write_bytes(b"mine")
    before = sorted(rig.pool_path.iterdir())
    assert refused(RestoreTarget("sda", pool, "stray.raw", "SSD")) == "volume_in_use"
    assert stray.read_bytes() == b"mine"


def test_a_restore_reserves_its_names(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    backup = rig.back_up(vm)
    free = rig.occupy()
    copy, job = rig.ask_restore(backup, "copy", volumes=["new.raw"])
    assert (rig.engine.vm(copy).state, rig.engine.vm(copy).action) == ("restoring", "restoring")
    with pytest.raises(Conflict) as caught:
        rig.ask_restore(backup, "copy", volumes=["other.raw"])
    assert code_of(caught) == "name_taken"
    with pytest.raises(Conflict) as caught:
        rig.ask_restore(backup, "third", volumes=["new.raw"])
    assert code_of(caught) == "volume_in_use"
    free()
    rig.succeed(job)
    assert (rig.pool_path / "new.raw").exists()


def test_a_restore_without_room_is_refused_but_holes_need_none(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rig.pool_path / "huge.raw"
    path.write_bytes(disk_bytes(MIB, 1))
    with path.open("r+b") as file:
        file.truncate(8 << 40)
    huge = rig.engine.vm(
        rig.engine.create_vm(ANYWHERE, "huge", "", "", [NewDisk("sda", rig.pool_uuid, "huge.raw")])
    )
    backup = rig.back_up(huge)
    # 8 TiB do not fit, the one MiB that is not a hole does.
    copy, job = rig.ask_restore(backup, "copy")
    rig.succeed(job)
    assert rig.volume(rig.engine.vm(copy).disks[0]).stat().st_size == 8 << 40
    pool = rig.core.inventory.places.pools[0]
    # The real figure changes with all that others do on the file system.
    monkeypatch.setattr("engine.restore.reservations.pool_room", lambda _: (8 << 40, 10 * MIB))
    rig.core.reservations.claim("somebody else", {pool: 10 * MIB - 100_000})
    with pytest.raises(PoolFull):
        rig.ask_restore(backup, "third")
    assert [vm.name for vm in rig.engine.vms(ANYWHERE)] == ["copy", "huge"]


def test_room_that_a_restore_has_set_aside_is_not_counted_twice(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = rig.back_up(rig.make_vm("web", random_bytes(6 * MIB)))
    begun, go_on = threading.Event(), threading.Event()
    whole = NewVolume.write

    def write(self: NewVolume, content: memoryview, offset: int) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        whole(self, content, offset)

    def room(_: Pool) -> tuple[int, int]:
        hidden = rig.pool_path.glob(f"{RESTORES}/*")
        return 8 << 40, 15 * MIB - sum(path.stat().st_blocks * 512 for path in hidden)

    monkeypatch.setattr(OsFs, "open_direct", lambda *called: os.open(called[2], os.O_WRONLY))
    monkeypatch.setattr(NewVolume, "write", write)
    monkeypatch.setattr("engine.restore.reservations.pool_room", room)
    _, first = rig.ask_restore(backup, "first")
    assert begun.wait(PATIENCE_S)
    _, second = rig.ask_restore(backup, "second")  # 6 of the 9 MiB that are left
    go_on.set()
    rig.succeed(first)
    rig.succeed(second)


def test_a_failed_restore_leaves_no_volume_and_says_why(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(2 * MIB, 1), disk_bytes(MIB, 2))
    backup = rig.back_up(vm)
    packs = Path(rig.engine.points()[0].point.path, "domains", rig.cluster_uuid, "packs")
    pack = Path(files_below(packs)[0])
    pack.chmod(0o600)
    write_at(pack, MIB // 2, b"damage!")
    before = sorted(rig.pool_path.iterdir())
    copy, job = rig.ask_restore(backup, "copy")
    assert rig.ended(job).state == "failed"
    after = rig.engine.vm(copy)
    assert (after.state, after.action, after.disks) == ("restore_failed", "", ())
    assert pack.name in after.last_error
    assert [path for path in sorted(rig.pool_path.iterdir()) if path.is_file()] == before
    job = rig.engine.start_maintenance("verify", rig.point_uuid, True)
    verified = rig.ended(job)
    assert verified.state == "failed"
    assert any(backup.uuid in line for line in verified.result)


def test_a_backup_may_be_deleted_while_it_waits_to_be_restored(rig: EngineRig) -> None:
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    backup = rig.back_up(vm)
    free = rig.occupy()
    copy, job = rig.ask_restore(backup, "copy")
    rig.engine.delete_backup(ANYWHERE, backup.uuid)
    free()
    assert rig.ended(job).state == "failed"
    assert rig.engine.vm(copy).state == "restore_failed"


def test_listing_filters_pages_and_scopes(rig: EngineRig) -> None:
    web, db = rig.make_vm("web", b"w" * MIB), rig.make_vm("db", b"d" * MIB)
    made = [rig.back_up(vm, name=f"{vm.name}-{n}") for n in range(3) for vm in (web, db)]
    page = rig.engine.backups(BackupQuery(page_size=4))
    rest = rig.engine.backups(BackupQuery(page_size=4, page=2))
    assert (len(page.rows), len(rest.rows), page.total) == (4, 2, 6)
    assert {row.uuid for row in page.rows + rest.rows} == {row.uuid for row in made}
    times = [(-row.label.create_time, row.uuid) for row in page.rows + rest.rows]
    assert times == sorted(times)
    of_db = rig.engine.backups(BackupQuery(vm_uuid=db.uuid.upper(), name_part="-1"))
    assert [row.label.name for row in of_db.rows] == ["db-1"]
    assert [state.total for state in of_db.ranges] == [1]
    with pytest.raises(NotFound):
        rig.engine.backups(BackupQuery(scope=Scope(cluster_uuid="nowhere")))
    scope = Scope(cluster_uuid=rig.cluster_uuid.upper(), tenant="default", multiple=True)
    assert rig.engine.backup(scope, made[0].uuid.upper()) == made[0]
    with pytest.raises(NotFound):
        rig.engine.backup(ANYWHERE, "not a uuid")
