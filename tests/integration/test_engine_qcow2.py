"""VMs whose volumes are qcow2 images, through the whole engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import Config, DiskConfig, PoolConfig, VmConfig
from engine.model import Vm
from engine.views import Scope
from tests.engine_rig import EngineRig
from tests.qemu.images import MIB, bitmaps, content, create, qemu_io
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
    (pool / "c.raw").write_bytes(random_bytes(3 * MIB, 1))
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


def test_full_then_what_changed_then_restored(rig: EngineRig) -> None:
    vm = the_vm(rig)
    assert [disk.capacity for disk in vm.disks] == [20 * MIB, 16 * MIB, 3 * MIB]
    assert [disk.format for disk in vm.disks] == ["qcow2", "qcow2", "raw"]
    first, first_shown = rig.back_up(vm), shown(rig)
    qemu_io(rig.pool_path / "a.qcow2", "write -P 5 12M 1M", "write -z -u 0 1M")
    qemu_io(rig.pool_path / "b.qcow2", "write -P 5 12M 1M")
    second, second_shown = rig.back_up(vm), shown(rig)
    assert second.parent == first.uuid
    assert [disk.capacity for disk in second.label.disks] == [20 * MIB, 16 * MIB, 3 * MIB]
    assert "changes found by: vda bitmap, vdb scan, vdc scan" in second.label.notes
    assert len(bitmaps(rig.pool_path / "a.qcow2")) == 1
    assert rig.restore(first, "one") == first_shown
    assert rig.restore(second, "two") == second_shown


def test_only_what_changed_is_read(rig: EngineRig) -> None:
    vm = the_vm(rig)
    rig.back_up(vm)
    _, job = rig.ask_backup(vm)
    # A sample of vda, 4 chunks; vdb (4 MiB of data) and vdc (3 MiB) in full.
    assert rig.succeed(job).progress.bytes_read == (4 + 4 + 3) * MIB


def test_an_image_that_was_replaced_under_its_name(rig: EngineRig) -> None:
    vm = the_vm(rig)
    rig.back_up(vm)
    pool = rig.pool_path
    create(pool / "new.qcow2", "20M")
    qemu_io(pool / "new.qcow2", "write -P 8 2M 1M")
    (pool / "new.qcow2").rename(pool / "a.qcow2")
    again, again_shown = rig.back_up(vm), shown(rig)
    assert "changes found by: vda scan, vdb scan, vdc scan" in again.label.notes
    assert rig.restore(again, "again") == again_shown


def test_a_vm_that_runs_is_a_named_failure(rig: EngineRig) -> None:
    vm = the_vm(rig)
    with running_vm(rig.pool_path / "a.qcow2"):
        _, job = rig.ask_backup(vm)
        ended = rig.ended(job)
    assert (ended.state, "a.qcow2 is open for writing" in ended.error) == ("failed", True)
    assert bitmaps(rig.pool_path / "a.qcow2") == []
    rig.back_up(vm)
