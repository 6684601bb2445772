"""What befalls a running VM's tracking: the next backup is the disk all the same, and says why.

One VM for all tests. Each leaves it running with a backup that the next one's may build on.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from engine.model import Backup
from tests.libvirt.host import MIB, Image, disk_xml
from tests.libvirt.lab import NAME, QCOW2_BYTES, Lab, pivot
from tests.libvirt.site import wait_for_vm
from tests.nfs.kit import find_tool

_DISK_ONLY_NO_METADATA = 1 << 4 | 1 << 2
_COMMIT_ACTIVE = 1 << 2
_COPY_TRANSIENT_REUSED = 1 << 2 | 1 << 1
_UNDEFINE_WITH_CHECKPOINTS = 1 << 4
_LIVE = 1
_INACTIVE = 1 << 1


def test_a_snapshot_is_taken_and_committed(lab: Lab) -> None:
    """On the overlay, the backup is the flattened disk."""
    domain: Any = lab.domain
    lab.back_up()
    overlay = lab.host.image("vda", "overlay.qcow2", QCOW2_BYTES)
    domain.snapshotCreateXML(
        "<domainsnapshot><disks><disk name='vda' snapshot='external'>"
        f"<source file='{overlay.path}.new'/></disk><disk name='vdb' snapshot='no'/>"
        "</disks></domainsnapshot>",
        _DISK_ONLY_NO_METADATA,
    )
    on_overlay = _right_backup(lab)
    assert "vda full read: its medium is another one" in on_overlay.label.notes
    lab.write("/mnt/above", 128)
    domain.blockCommit("vda", None, None, 0, _COMMIT_ACTIVE)
    pivot(domain, "vda")
    committed = _right_backup(lab)
    assert "vda full read: its medium is another one" in committed.label.notes
    _is_tracked_again(lab)


def test_a_disk_is_swapped_for_one_with_a_bitmap_of_that_name(lab: Lab) -> None:
    """Its bitmap tells of other changes than those since the backup."""
    domain: Any = lab.domain
    first = lab.host.image("vdc", "first.qcow2", 4 * MIB)
    domain.attachDeviceFlags(disk_xml(first), _LIVE)
    _wait_for_disks(lab, 3)
    lab.write("/dev/vdc", 128)
    backup = lab.back_up()
    (bitmap,) = [name for name in lab.checkpoints() if name.endswith(backup.uuid)]
    domain.detachDeviceFlags(disk_xml(first), _LIVE)
    _wait_for_disks(lab, 2)
    second = lab.host.image("vdc", "second.qcow2", 4 * MIB)
    _run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 2M", str(second.path))
    _run("qemu-img", "bitmap", "--add", str(second.path), bitmap)
    domain.attachDeviceFlags(disk_xml(second), _LIVE)
    _wait_for_disks(lab, 3)
    try:
        swapped = _right_backup(lab, "vda", "vdb", "vdc")
        assert "vdc full read: its medium is another one" in swapped.label.notes
    finally:
        domain.detachDeviceFlags(disk_xml(second), _LIVE)
        _wait_for_disks(lab, 2)
    lab.back_up()


def test_the_domain_is_defined_anew(lab: Lab) -> None:
    """libvirt forgets the checkpoint, the image does not: it is put on record again."""
    domain: Any = lab.domain
    lab.back_up()
    xml = domain.XMLDesc(_INACTIVE)
    domain.undefineFlags(_UNDEFINE_WITH_CHECKPOINTS)
    lab.domain = lab.host.connection.defineXML(xml)
    lab.write("/mnt/anew", 128)
    _right_backup(lab)
    _is_tracked_again(lab)


def test_the_disk_moves_to_another_pool_while_the_vm_runs(lab: Lab) -> None:
    domain: Any = lab.domain
    lab.back_up()
    moved = Image("vda", lab.host.root / "pool" / "moved.qcow2")
    _run("qemu-img", "create", "-q", "-f", "qcow2", str(moved.path), str(QCOW2_BYTES))
    lab.host.own(moved.path)
    domain.blockCopy("vda", disk_xml(moved), {}, _COPY_TRANSIENT_REUSED)
    lab.write("/mnt/meanwhile", 128)
    pivot(domain, "vda")
    backup = _right_backup(lab)
    assert "vda full read: its medium is another one" in backup.label.notes
    _is_tracked_again(lab)


def test_it_stops_moves_to_another_pool_and_is_backed_up_there(lab: Lab) -> None:
    """A backup of the stopped domain comes between two of the running one."""
    domain: Any = lab.domain
    lab.back_up()
    lab.write("/mnt/last", 128)
    truth = lab.quiet()
    lab.guest.close()
    domain.destroy()
    (vda, _) = lab.vm.disks
    old = lab.rig.volume(vda)
    (other,) = {"images", "pool"} - {old.parent.name}
    new = lab.host.root / other / "moved-again.qcow2"
    xml = domain.XMLDesc(_INACTIVE).replace(str(old), str(new))
    shutil.move(old, new)
    lab.domain = lab.host.connection.defineXML(xml)
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.disks[0].volume_name == new.name)
    stopped = lab.back_up()
    assert "changes found by: vda scan, vdb scan" in stopped.label.notes
    assert lab.restored_sums(stopped) == truth
    lab.guest = lab.host.boot(lab.domain)
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "running")
    lab.write("/mnt/elsewhere", 128)
    _right_backup(lab)
    _is_tracked_again(lab)


def _right_backup(lab: Lab, *devices: str) -> Backup:
    """A backup that is what the guest reads from its disks."""
    truth = lab.quiet(*devices)
    backup = lab.back_up()
    assert lab.restored_sums(backup) == truth
    return backup


def _is_tracked_again(lab: Lab) -> None:
    lab.write("/mnt/after", 64)
    backup = _right_backup(lab)
    assert "changes found by: vda bitmap, vdb scan" in backup.label.notes


def _wait_for_disks(lab: Lab, count: int) -> None:
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and len(vm.disks) == count)


def _run(tool: str, *arguments: str) -> None:
    subprocess.run([find_tool(tool), *arguments], check=True, capture_output=True)
