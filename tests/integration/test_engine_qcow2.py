"""VMs whose volumes are qcow2 images, through the whole engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from engine.backup import sampling
from engine.catalogue.labels import encode_label
from engine.config import Config, DiskConfig, PoolConfig, VmConfig
from engine.model import BACKUP_FAILED, Backup, Vm
from engine.verb_types import BackupQuery, Scope
from storage.domain.session import NewBackup
from tests.engine_rig import EngineRig
from tests.qemu.images import MIB, bitmaps, content, create, qemu_img, qemu_io
from tests.qemu.test_stopped import running_vm
from tests.rig import random_bytes


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[EngineRig]:
    """One VM: vda is an image, vdb one that stands on a template, vdc is raw."""
    pool = tmp_path / "pool"
    pool.mkdir()
    create(pool / "a.qcow2", "20M")
    qemu_io(pool / "a.qcow2", "write -P 1 0 9M")
    create(pool / "template")
    qemu_io(pool / "template", "write -P 2 3M 2M")
    create(pool / "b.qcow2", "16M", "-b", "template", "-F", "qcow2")
    qemu_io(pool / "b.qcow2", "write -P 3 4M 3M")
    (pool / "c.raw").write_bytes(random_bytes(3 * MIB, 1) + bytes(3 * MIB))
    disks = (
        DiskConfig("vda", "a.qcow2", format="qcow2"),
        DiskConfig("vdb", "b.qcow2", format="qcow2"),
        DiskConfig("vdc", "c.raw"),
    )
    config = Config(pools=(PoolConfig("p", str(pool)),), vms=(VmConfig("vm", disks),))
    with EngineRig(tmp_path / "data", config) as made:
        yield made


def the_vm(rig: EngineRig) -> Vm:
    (vm,) = rig.engine.vms(Scope())
    return vm


def shown(rig: EngineRig) -> list[bytes]:
    """What the VM's guest sees."""
    pool = rig.pool_path
    return [content(pool / "a.qcow2"), content(pool / "b.qcow2"), (pool / "c.raw").read_bytes()]


def restored(rig: EngineRig, backup: Backup, name: str) -> list[bytes]:
    """What the guest of a VM made from the backup sees: sound images, as sparse as they were."""
    vm_uuid, job = rig.ask_restore(backup, name)
    rig.succeed(job)
    vm, found = rig.engine.vm(vm_uuid), []
    assert [disk.format for disk in vm.disks] == [disk.format for disk in backup.label.disks]
    for disk in vm.disks:
        path = rig.volume(disk)
        if disk.format == "qcow2":
            qemu_img("check", "-q", "-f", "qcow2", path)
        assert path.stat().st_blocks * 512 < disk.capacity * 3 // 4 + MIB
        found.append(content(path) if disk.format == "qcow2" else path.read_bytes())
    return found


def test_full_then_what_changed_then_restored(rig: EngineRig) -> None:
    vm = the_vm(rig)
    assert [disk.capacity for disk in vm.disks] == [20 * MIB, 16 * MIB, 6 * MIB]
    assert [disk.format for disk in vm.disks] == ["qcow2", "qcow2", "raw"]
    first, first_shown = rig.back_up(vm), shown(rig)
    qemu_io(rig.pool_path / "a.qcow2", "write -P 5 12M 1M", "write -z -u 0 1M")
    qemu_io(rig.pool_path / "b.qcow2", "write -P 5 12M 1M")
    second, second_shown = rig.back_up(vm), shown(rig)
    assert second.parent == first.uuid
    assert [disk.capacity for disk in second.label.disks] == [20 * MIB, 16 * MIB, 6 * MIB]
    assert "changes found by: vda bitmap, vdb scan, vdc scan" in second.label.notes
    assert len(bitmaps(rig.pool_path / "a.qcow2")) == 1
    assert restored(rig, first, "one") == first_shown
    assert restored(rig, second, "two") == second_shown


def test_only_what_changed_is_read(rig: EngineRig) -> None:
    vm = the_vm(rig)
    rig.back_up(vm)
    _, job = rig.ask_backup(vm)
    # A sample of vda, 4 chunks; vdb (4 MiB of data) and vdc (6 MiB) in full.
    assert rig.succeed(job).progress.bytes_read == (4 + 4 + 6) * MIB


def test_an_image_that_was_replaced_under_its_name(rig: EngineRig) -> None:
    vm = the_vm(rig)
    rig.back_up(vm)
    pool = rig.pool_path
    create(pool / "new.qcow2", "20M")
    qemu_io(pool / "new.qcow2", "write -P 8 2M 1M")
    (pool / "new.qcow2").rename(pool / "a.qcow2")
    again, again_shown = rig.back_up(vm), shown(rig)
    assert "changes found by: vda scan, vdb scan, vdc scan" in again.label.notes
    assert restored(rig, again, "again") == again_shown


def test_nothing_builds_on_a_strangers_backup_with_the_uuids_of_ours(
    rig: EngineRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours was deleted, and theirs has other bytes: here zeros, which a sample would find out."""
    monkeypatch.setattr(sampling, "SHARE", 0)
    monkeypatch.setattr(sampling, "FEWEST_CHUNKS", 0)
    ours = rig.back_up(the_vm(rig))
    rig.engine.delete_backup(Scope(), ours.uuid)
    disks = [disk.disk_uuid for disk in ours.label.disks]
    with EngineRig(tmp_path / "b") as stranger:
        point = stranger.engine.create_point("shared", "local", str(rig.data / "point"))
        with stranger.core.points.domain(point, stranger.cluster_uuid).begin("backup") as session:
            for disk in ours.label.disks:
                session.manifest(disk.disk_uuid, disk.capacity, None)
            session.commit([NewBackup(ours.uuid, encode_label(ours.label), disks)])
    rig.engine.import_backups(rig.cluster_uuid, [(ours.uuid, rig.point_uuid)])
    again = rig.back_up(the_vm(rig))
    assert (again.parent, again.label.full) == ("", True)
    assert restored(rig, again, "copy") == shown(rig)


def test_a_vm_that_runs_is_a_named_failure(rig: EngineRig) -> None:
    vm = the_vm(rig)
    with running_vm(rig.pool_path / "a.qcow2"):
        _, job = rig.ask_backup(vm)
        ended = rig.ended(job)
    assert (ended.state, "a.qcow2 is open for writing" in ended.error) == ("failed", True)
    assert bitmaps(rig.pool_path / "a.qcow2") == []
    rig.back_up(vm)


def test_a_restored_vm_goes_on(rig: EngineRig) -> None:
    """What was restored is backed up as any other."""
    first = rig.back_up(the_vm(rig))
    vm_uuid, job = rig.ask_restore(first, "copy")
    rig.succeed(job)
    copy = rig.engine.vm(vm_uuid)
    again = rig.back_up(copy)
    qemu_io(rig.volume(copy.disks[0]), "write -P 9 1M 64k")
    last = rig.back_up(copy)
    assert last.parent == again.uuid
    assert "vda bitmap" in " ".join(last.label.notes)
    assert restored(rig, last, "copy2")[0] == content(rig.volume(copy.disks[0]))


@pytest.mark.parametrize("wanted", ["raw", "qcow2"])
def test_a_pool_may_have_a_format_of_its_own(
    tmp_path: Path, wanted: Literal["raw", "qcow2"]
) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    create(pool / "a", "5M")
    qemu_io(pool / "a", "write -P 1 1M 1M")
    (pool / "b").write_bytes(content(pool / "a"))
    disks = (DiskConfig("vda", "a", format="qcow2"), DiskConfig("vdb", "b"))
    pools = (PoolConfig("p", str(pool), format=wanted),)
    with EngineRig(tmp_path / "data", Config(pools=pools, vms=(VmConfig("vm", disks),))) as rig:
        vm_uuid, job = rig.ask_restore(rig.back_up(the_vm(rig)), "new")
        rig.succeed(job)
        for disk in rig.engine.vm(vm_uuid).disks:
            assert disk.format == wanted
            qemu_img("compare", "-F", wanted, "-f", "raw", pool / "b", rig.volume(disk))


def test_an_image_that_stands_on_a_name_that_is_not_unicode(rig: EngineRig) -> None:
    """The backup fails by name; its job never ended, and its thread was gone."""
    with (rig.pool_path / "b.qcow2").open("r+b") as image:
        place = image.read(4096).index(b"template")
        image.seek(place)
        image.write(b"templat\xff")
    _, job = rig.ask_backup(the_vm(rig))
    ended = rig.ended(job)
    assert ended.state == "failed"
    assert r"templat\udcff: No such file" in ended.error
    (backup,) = rig.engine.backups(BackupQuery()).rows
    assert (backup.status, backup.error) == (BACKUP_FAILED, ended.error)
