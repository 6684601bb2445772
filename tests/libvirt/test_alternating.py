"""Backups of the running and of the stopped domain in turn: each builds on the one before.

What was written between two of them must be in the later one's changes, whoever took which of them.
One VM for all tests. /dev/vda and /dev/vdb are qcow2, so their bitmaps have the same names.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from engine.model import Backup
from engine.qemu.bitmaps import bitmaps_of
from tests.engine_rig import ANYWHERE, PATIENCE_S
from tests.libvirt.host import MIB, Host, Image
from tests.libvirt.lab import NAME, Lab, paused_reading, pivot
from tests.libvirt.site import rig_on, wait_for_vm
from tests.nfs.kit import find_tool

SIZE = 16 * MIB
BY_BITMAP = "changes found by: vda bitmap, vdb bitmap"
_DISK_ONLY_NO_METADATA = 1 << 4 | 1 << 2
_COMMIT_ACTIVE = 1 << 2


@pytest.fixture(scope="module")
def lab(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with rig_on(tmp_path_factory.mktemp("site") / "data", host) as rig:
        images = [host.image(name, f"{name}.qcow2", SIZE) for name in ("vda", "vdb")]
        domain = host.define(NAME, images)
        made = Lab(host, rig, domain, host.boot(domain), images)
        made.guest.run("mke2fs -q /dev/vda")
        made.write("/dev/vdb", 4096)
        wait_for_vm(rig, NAME, lambda vm: vm is not None and vm.state == "running")
        made.back_up()
        yield made
        made.guest.close()


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is another cover: these tests go without it."""
    monkeypatch.setattr("engine.backup.sampling.FEWEST_CHUNKS", 0)
    monkeypatch.setattr("engine.backup.sampling.SHARE", 0.0)


def test_in_turn_each_reads_what_changed(lab: Lab) -> None:
    for number in range(2):
        lab.write(f"/mnt/a{number}", 100)
        lab.write("/dev/vdb", 64)
        assert BY_BITMAP in right_backup(lab).label.notes
        lab.write(f"/mnt/b{number}", 100)
        stop(lab)
        assert BY_BITMAP in right_backup(lab).label.notes
        assert BY_BITMAP in right_backup(lab).label.notes  # two of the stopped one
        lab.reboot()
    lab.write("/mnt/c", 100)
    newest = right_backup(lab)
    assert BY_BITMAP in newest.label.notes
    assert [name[-36:] for name in lab.checkpoints()] == [newest.uuid]
    only_bitmap(lab, newest)


def test_two_points(lab: Lab, tmp_path: Path) -> None:
    """Each has its own chain, and neither takes the other's bitmap away."""
    (tmp_path / "p").mkdir()
    other = lab.rig.engine.create_point("other", "local", str(tmp_path / "p"))
    try:
        lab.write("/mnt/first", 100)
        right_backup(lab, other)
        right_backup(lab)
        lab.write("/mnt/second", 100)
        stop(lab)
        assert BY_BITMAP in right_backup(lab).label.notes
        assert BY_BITMAP in right_backup(lab, other).label.notes
        lab.reboot()
        lab.write("/mnt/third", 100)
        assert BY_BITMAP in right_backup(lab, other).label.notes
        assert BY_BITMAP in right_backup(lab).label.notes
    finally:
        lab.rig.engine.delete_point(other, False)
    right_backup(lab)


@pytest.mark.parametrize("stopped_first", [False, True])
def test_a_snapshot_is_taken_and_committed_in_between(lab: Lab, stopped_first: bool) -> None:
    """No backup sees the overlay; what was written to it is in the next one all the same."""
    if stopped_first:
        stop(lab)
        right_backup(lab)
        lab.reboot()
    else:
        right_backup(lab)
    domain: Any = lab.domain
    lab.write("/mnt/before", 64)
    overlay = lab.host.root / f"images/over{stopped_first}.qcow2"
    domain.snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{overlay}'/>"
        "</disk><disk name='vdb' snapshot='no'/></disks></domainsnapshot>",
        _DISK_ONLY_NO_METADATA,
    )
    lab.write("/mnt/above", 128)
    domain.blockCommit("vda", None, None, 0, _COMMIT_ACTIVE)
    pivot(domain, "vda")
    lab.write("/mnt/after", 64)
    if not stopped_first:
        stop(lab)
    right_backup(lab)
    if not stopped_first:
        lab.reboot()
    right_backup(lab)


def test_the_disks_change_places(lab: Lab) -> None:
    """Both files have a bitmap of the name that is looked for, each with the other's changes."""
    right_backup(lab)
    lab.write("/mnt/mine", 200)
    stop(lab)
    one, two = (image.path for image in lab.images)
    swap(one, two)
    swapped = right_backup(lab)
    assert "vda full read: its medium is another one" in swapped.label.notes
    assert "vdb full read: its medium is another one" in swapped.label.notes
    assert BY_BITMAP in right_backup(lab).label.notes
    swap(one, two)
    lab.reboot()
    back = right_backup(lab)
    assert "vda full read: its medium is another one" in back.label.notes
    lab.write("/mnt/mine", 100)
    assert BY_BITMAP in right_backup(lab).label.notes


def swap(one: Path, two: Path) -> None:
    one.rename(one.with_suffix(".away"))
    two.rename(one)
    one.with_suffix(".away").rename(two)


def test_qemu_is_killed_after_a_backup_of_the_stopped_domain(lab: Lab) -> None:
    stop(lab)
    right_backup(lab)
    lab.reboot()
    lab.write("/mnt/unrecorded", 100)
    kill(lab)
    lab.reboot()
    lab.write("/mnt/more", 100)
    newest = right_backup(lab)
    assert any(note.startswith("full read: ") for note in newest.label.notes)
    only_bitmap(lab, newest)


def test_qemu_is_killed_after_a_backup_of_the_running_domain(lab: Lab) -> None:
    right_backup(lab)
    lab.write("/mnt/unrecorded", 100)
    kill(lab)
    newest = right_backup(lab)
    assert "vda full read: the parent's bitmap is gone" in newest.label.notes
    lab.reboot()
    lab.write("/mnt/more", 100)
    kill(lab)
    newest = right_backup(lab)
    said = "vda full read: the parent's bitmap is incomplete: was QEMU killed?"
    assert said in newest.label.notes
    lab.reboot()
    right_backup(lab)


def test_a_bitmap_of_one_disk_is_deleted(lab: Lab) -> None:
    right_backup(lab)
    stop(lab)
    remove_bitmaps(lab.images[0])
    newest = right_backup(lab)
    assert "vda full read: the parent's bitmap is gone" in newest.label.notes
    assert "changes found by: vda scan, vdb bitmap" in newest.label.notes
    remove_bitmaps(lab.images[1])
    lab.reboot()
    newest = right_backup(lab)
    assert any("the parent's checkpoint is gone" in note for note in newest.label.notes)
    only_bitmap(lab, newest)


def test_a_start_wins_and_what_the_failed_backup_left_goes(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bitmaps can't be removed while QEMU has the images; the next success does it."""
    stop(lab)
    before = right_backup(lab)
    with paused_reading(monkeypatch) as reached:
        _, job = lab.rig.ask_backup(lab.vm, full=True)
        assert reached.wait(PATIENCE_S)
        lab.guest = lab.host.boot(lab.domain)
        lab.write("/mnt/started", 100)
    assert "somebody wrote to it" in lab.failed_job(job).error
    assert len(bitmaps_of(str(lab.images[0].path))) == 2
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "running")
    newest = right_backup(lab)
    assert newest.parent == before.uuid
    assert BY_BITMAP in newest.label.notes
    only_bitmap(lab, newest)


def stop(lab: Lab) -> None:
    lab.guest.run("sync; umount /mnt 2>/dev/null; true")
    lab.guest.close()
    lab.domain.destroy()
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "stopped")


def kill(lab: Lab) -> None:
    lab.host.kill_qemu(NAME)
    lab.guest.close()
    wait_for_vm(lab.rig, NAME, lambda vm: vm is not None and vm.state == "stopped")


def right_backup(lab: Lab, point: str = "") -> Backup:
    """A backup that is what the disks hold."""
    truth = lab.quiet() if lab.domain.isActive() else [_content_sum(i) for i in lab.images]
    engine = lab.rig.engine
    made, job = engine.create_backup(
        ANYWHERE, lab.vm.uuid, point or lab.rig.point_uuid, "b", "", False
    )
    lab.rig.succeed(job)
    backup = engine.backup(ANYWHERE, made)
    assert lab.restored_sums(backup) == truth, backup.label.notes
    return backup


def only_bitmap(lab: Lab, newest: Backup) -> None:
    """Nothing is left in the images but what the next backup will build on."""
    stop(lab)
    for image in lab.images:
        assert [name[-36:] for name in bitmaps_of(str(image.path))] == [newest.uuid]
    lab.reboot()


def remove_bitmaps(image: Image) -> None:
    for name in bitmaps_of(str(image.path)):
        command = [find_tool("qemu-img"), "bitmap", "--remove", str(image.path), name]
        subprocess.run(command, check=True)


def _content_sum(image: Image) -> str:
    flat = image.path.with_suffix(".flat")
    command = [find_tool("qemu-img"), "convert", "-f", "qcow2", "-O", "raw"]
    subprocess.run([*command, str(image.path), str(flat)], check=True)
    found = sha256(flat.read_bytes()).hexdigest()
    flat.unlink()
    return found
