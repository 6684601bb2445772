"""Live backups of a running VM: exact, incremental, and right whatever happens to the tracking.

One VM for all tests. Each leaves it running; what it did to the checkpoints is the next one's past.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.libvirt import ending
from engine.libvirt.binding import METADATA_ONLY
from tests.engine_rig import EngineRig
from tests.libvirt.host import MIB, disk_xml
from tests.libvirt.lab import NAME, QCOW2_BYTES, RAW_BYTES, Lab, paused_reading
from tests.libvirt.site import config_for, contents, wait_for_vm, wait_until
from tests.nfs.kit import find_tool

libvirt = pytest.importorskip("libvirt")


def test_full_then_only_what_changed(lab: Lab) -> None:
    truth = lab.quiet()
    first = lab.back_up()
    assert first.label.full
    assert first.label.frozen
    assert any(re.fullmatch(r"frozen for 0\.\d+ s", note) for note in first.label.notes)
    assert lab.restored_sums(first) == truth
    lab.write("/mnt/new", 64)
    truth = lab.quiet()
    second = lab.back_up()
    assert second.parent == first.uuid
    assert "changes found by: vda bitmap, vdb scan" in second.label.notes
    assert lab.restored_sums(second) == truth
    assert lab.restored_sums(first) != truth
    assert [name[-36:] for name in lab.checkpoints()] == [second.uuid]


def test_all_disks_at_one_instant_while_the_guest_writes(lab: Lab) -> None:
    """The guest writes a number to vda, then to vdb, again and again."""
    lab.quiet()
    write = "printf '%08d' $n | dd of=/dev/{} oflag=direct conv=sync bs=512 seek=9000 2>/dev/null"
    loop = f"n=0; while [ ! -e /tmp/enough ]; do n=$((n+1)); {write}; {write}; done"
    lab.guest.run(f"rm -f /tmp/enough; ( {loop.format('vda', 'vdb')} ) >/dev/null 2>&1 & sleep 1")
    backups = [lab.back_up() for _ in range(3)]
    lab.guest.run("touch /tmp/enough; sleep 0.2")
    seen = []
    for number, backup in enumerate(backups):
        disks = contents(lab.rig, backup, f"counted{number}")
        first, second = (int(disk[9000 * 512 :][:8]) for disk in disks)
        assert first - second in (0, 1)
        seen.append(first)
    assert seen == sorted(set(seen)), "the guest did not write meanwhile"


def test_a_guest_that_is_frozen_leaves_a_clean_file_system(lab: Lab, tmp_path: Path) -> None:
    lab.write("/mnt/held", 512)
    backup = lab.back_up()
    lab.write("/mnt/later", 64)  # thawed
    assert backup.label.frozen
    image = tmp_path / "image"
    image.write_bytes(contents(lab.rig, backup, "clean")[0])
    subprocess.run([find_tool("e2fsck"), "-fn", str(image)], check=True)


def test_nothing_that_a_job_put_aside_before_it_failed_is_served(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = libvirt.virDomain.backupBegin

    def begin_and_fail(domain: Any, *asked: Any) -> None:
        begin(domain, *asked)
        lab.write("/dev/vdb", RAW_BYTES >> 10)
        domain.abortJob()
        wait_until(lambda: domain.jobInfo()[0] == 0)
        monkeypatch.setattr(libvirt.virDomain, "backupBegin", begin)
        raise libvirt.libvirtError("not today")

    lab.write("/dev/vdb", RAW_BYTES >> 10)
    monkeypatch.setattr(libvirt.virDomain, "backupBegin", begin_and_fail)
    backup = lab.back_up()
    assert any("not today" in note for note in backup.label.notes)
    assert lab.restored_sums(backup)[1] == lab.quiet()[1]


def test_without_an_answering_agent_it_is_crash_consistent(lab: Lab) -> None:
    lab.stop_agent()
    try:
        truth = lab.quiet()
        backup = lab.back_up()
    finally:
        lab.guest.run("qemu-ga -d -m virtio-serial -p /dev/vport*p1 -t /run -f /run/agent.pid")
    assert not backup.label.frozen
    assert any("crash-consistent" in note for note in backup.label.notes)
    assert lab.restored_sums(backup) == truth


_KILLED_WHILE_FROZEN = """
import os, signal, sys, msgspec
from engine.snapshot.freeze import frozen
from engine.libvirt.agent import agent_hook
from engine.libvirt.binding import connect
from engine.libvirt.domains import read_domain
from engine.libvirt.setup import LiveSetup
from engine.model import Vm
vm = msgspec.json.decode(sys.argv[1], type=Vm)
domain = connect(vm.host).lookupByUUIDString(vm.uuid)
setup = LiveSetup("host", "", 0, 0, freeze_timeout_s=10, freeze_hold_s=600)
hook, why = agent_hook(lambda: domain, read_domain(domain.XMLDesc()), vm, setup)
with frozen(hook) as freeze:
    assert freeze.held, why
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_watchdog_thaws_when_we_are_killed_in_the_freeze(lab: Lab) -> None:
    lab.write()
    killed = [sys.executable, "-c", _KILLED_WHILE_FROZEN, msgspec.json.encode(lab.vm).decode()]
    done = subprocess.run(killed, check=False, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr  # else it was not frozen
    lab.write("/mnt/stuck", 1)
    assert lab.back_up().label.frozen


def test_disks_come_grow_and_go(lab: Lab) -> None:
    domain: Any = lab.domain
    lab.back_up()
    old = lab.host.image("vdc", "old.qcow2", 4 * MIB, "qcow2", "-o", "compat=0.10")
    domain.attachDeviceFlags(disk_xml(old), 1)
    domain.blockResize("vda", QCOW2_BYTES + 4 * MIB, 1)
    try:
        lab.write("/dev/vdc", 100)
        truth = lab.quiet("vda", "vdb", "vdc")
        backup = lab.back_up()
        assert [disk.capacity for disk in backup.label.disks][::2] == [
            QCOW2_BYTES + 4 * MIB,
            4 * MIB,
        ]
        assert "vda full: its size changed" in backup.label.notes
        assert lab.restored_sums(backup) == truth
        again = lab.back_up()
        assert "changes found by: vda bitmap, vdb scan, vdc scan" in again.label.notes
        assert lab.restored_sums(again) == truth
    finally:
        domain.detachDeviceFlags(disk_xml(old), 1)
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and len(vm.disks) == 2)
    last = lab.back_up()
    assert [disk.target_device for disk in last.label.disks] == ["vda", "vdb"]
    assert lab.restored_sums(last) == truth[:2]


def test_a_disk_that_is_resized_meanwhile_is_not_backed_up_at_its_old_size(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirtd (9.0) dies when QEMU refuses the scratch file."""
    freeze = libvirt.virDomain.fsFreeze

    def resize_and_freeze(domain: Any) -> Any:
        domain.blockResize("vdb", 2 * RAW_BYTES, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        return freeze(domain)

    with monkeypatch.context() as patch:
        patch.setattr(libvirt.virDomain, "fsFreeze", resize_and_freeze)
        assert "are being resized" in lab.failed().error
    truth = lab.quiet()
    assert lab.restored_sums(lab.back_up()) == truth
    domain: Any = lab.domain
    domain.blockResize("vdb", RAW_BYTES, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)


def test_a_hung_point_fails_the_backup_and_not_the_guest(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(lab.host.uri, scratch=lab.host.scratch, limit_bytes=2 * MIB)
    lab.write("/dev/vdb", RAW_BYTES >> 10)
    before = lab.checkpoints()
    with EngineRig(tmp_path / "data", config) as rig:
        vm = wait_for_vm(rig, NAME, lambda vm: vm is not None)
        with paused_reading(monkeypatch) as reached:
            _, job = rig.ask_backup(vm)
            assert reached.wait(60)
            for seek in range(0, 8):  # far more than the limit, and every write succeeds
                lab.guest.run(
                    f"dd if=/dev/urandom of=/dev/vdb bs=1M count=1 seek={seek} oflag=direct"
                )
        ended = rig.ended(job)
    assert "overwrote more than" in ended.error
    assert list(lab.host.scratch.iterdir()) == []
    assert lab.checkpoints() == before
    lab.back_up()


def test_too_little_scratch_is_refused(lab: Lab, tmp_path: Path) -> None:
    config = config_for(lab.host.uri, scratch=lab.host.scratch, reserve_bytes=1 << 60)
    with EngineRig(tmp_path / "data", config) as rig:
        vm = wait_for_vm(rig, NAME, lambda vm: vm is not None)
        _, job = rig.ask_backup(vm)
        assert "reserve" in rig.ended(job).error


def test_a_failed_backup_leaves_the_parents_checkpoint(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = lab.back_up()
    lab.write("/mnt/after", 128)
    with paused_reading(monkeypatch) as reached:
        _, job = lab.rig.ask_backup(lab.vm)
        assert reached.wait(60)
        assert len(lab.checkpoints()) == 2
        lab.rig.engine.cancel_job(job)
    assert lab.rig.ended(job).state == "cancelled"
    assert [name[-36:] for name in lab.checkpoints()] == [parent.uuid]
    truth = lab.quiet()
    backup = lab.back_up()
    assert "changes found by: vda bitmap, vdb scan" in backup.label.notes
    assert lab.restored_sums(backup) == truth


def test_libvirtd_is_restarted_in_the_middle(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = lab.quiet()
    with paused_reading(monkeypatch) as reached:
        backup, job = lab.rig.ask_backup(lab.vm)
        assert reached.wait(60)
        lab.host.stop()
        lab.host.start()
    lab.rig.succeed(job)
    lab.domain = lab.host.connection.lookupByUUIDString(lab.vm.uuid)
    assert [name[-36:] for name in lab.checkpoints()] == [backup]
    row = lab.rig.core.catalogue.get(backup)
    assert lab.restored_sums(row) == truth


def test_libvirtd_stays_away_at_the_end(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backup is done; QEMU's job, which takes up scratch space, ends when it can be ended."""
    monkeypatch.setattr(ending, "END_TIMEOUT_S", 0.5)
    monkeypatch.setattr(ending, "LATER_PAUSE_S", 0.05)
    truth = lab.quiet()
    with paused_reading(monkeypatch) as reached:
        backup, job = lab.rig.ask_backup(lab.vm)
        assert reached.wait(60)
        lab.host.stop()
    try:
        lab.rig.succeed(job)
    finally:
        lab.host.start()
    domain = lab.domain = lab.host.connection.lookupByUUIDString(lab.vm.uuid)
    wait_until(lambda: domain.jobInfo()[0] == 0 and not list(lab.host.scratch.iterdir()))
    assert lab.restored_sums(lab.rig.core.catalogue.get(backup)) == truth
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "running")
    lab.back_up()
    assert len(lab.checkpoints()) == 1


def test_a_checkpoint_that_is_gone_costs_a_full_read(lab: Lab) -> None:
    lab.back_up()
    for checkpoint in lab.domain.listAllCheckpoints():
        checkpoint.delete()
    lab.write("/mnt/untracked", 128)
    truth = lab.quiet()
    backup = lab.back_up()
    assert any("checkpoint is gone" in note for note in backup.label.notes)
    assert lab.restored_sums(backup) == truth


def test_a_checkpoint_that_is_off_the_record_is_put_back(lab: Lab) -> None:
    """As after the domain was defined anew: the image has the bitmap, libvirt does not know it."""
    lab.back_up()
    for checkpoint in lab.domain.listAllCheckpoints():
        checkpoint.delete(METADATA_ONLY)
    lab.write("/mnt/tracked", 128)
    truth = lab.quiet()
    backup = lab.back_up()
    assert "changes found by: vda bitmap, vdb scan" in backup.label.notes
    assert lab.restored_sums(backup) == truth


def test_the_guest_powers_off_in_the_middle(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """And somebody deletes the bitmap of the backup before."""
    bitmap = _checkpoint_of(lab, lab.back_up().uuid)
    lab.stop_agent()  # libvirt is blind for 30 s when an agent goes during a job
    with paused_reading(monkeypatch) as reached:
        _, job = lab.rig.ask_backup(lab.vm)
        assert reached.wait(60)
        lab.guest.begin("poweroff -f")
        wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "stopped")
    assert "stopped during its backup" in lab.failed_job(job).error
    image = str(lab.images[0].path)
    subprocess.run([find_tool("qemu-img"), "bitmap", "--remove", image, bitmap], check=True)
    lab.reboot()
    truth = lab.quiet()
    backup = lab.back_up()
    assert any("changed blocks are lost" in note for note in backup.label.notes)
    assert lab.restored_sums(backup) == truth
    assert [name[-36:] for name in lab.checkpoints()] == [backup.uuid]


def test_qemu_is_killed(lab: Lab) -> None:
    lab.back_up()
    lab.write("/mnt/before", 128)
    lab.host.kill_qemu(NAME)
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "stopped")
    lab.reboot()
    truth = lab.quiet()
    backup = lab.back_up()
    assert any(note.startswith("full read: ") for note in backup.label.notes)
    assert lab.restored_sums(backup) == truth
    lab.write("/mnt/chain", 64)
    truth = lab.quiet()
    backup = lab.back_up()
    assert "changes found by: vda bitmap, vdb scan" in backup.label.notes
    assert lab.restored_sums(backup) == truth


def _checkpoint_of(lab: Lab, backup_uuid: str) -> str:
    (name,) = [name for name in lab.checkpoints() if name.endswith(backup_uuid)]
    return name


def test_a_restored_domain_boots_with_the_same_contents(lab: Lab) -> None:
    """The last test: the VM is destroyed, and comes back as another one."""
    lab.write("/mnt/kept", 256)
    truth = lab.guest.sha256("/mnt/kept")
    backup = lab.back_up()
    lab.guest.close()
    lab.domain.destroy()
    vm_uuid, job = lab.rig.ask_restore(backup, "revived")
    lab.rig.succeed(job)
    vm = lab.rig.engine.vm(vm_uuid)
    assert (vm.host, vm.state, len(vm.disks)) == (lab.host.uri, "stopped", 2)
    domain = lab.host.connection.lookupByUUIDString(vm_uuid)
    assert domain.name() == "revived"
    lab.guest = lab.host.boot(domain)
    lab.guest.run("mount /dev/vda /mnt")
    assert lab.guest.sha256("/mnt/kept") == truth
    wait_for_vm(lab.rig, "revived", lambda vm: vm is not None and vm.state == "running")
