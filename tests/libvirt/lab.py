"""A VM that runs on a libvirt host, an engine that backs it up, and what is true of its disks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pytest

from engine.libvirt.binding import Domain, LibvirtFault
from engine.libvirt.inventory import LibvirtInventory
from engine.model import Backup, Job, Vm
from engine.nbd.source import NbdSource
from tests.engine_rig import PATIENCE_S, EngineRig
from tests.libvirt.guest import Guest
from tests.libvirt.host import MIB, Host, Image
from tests.libvirt.site import contents, wait_for_vm, wait_until

NAME = "lab"
QCOW2_BYTES = 24 * MIB
RAW_BYTES = 8 * MIB
_ABORT_PIVOT = 1 << 1


@dataclass(slots=True)
class Lab:
    """/dev/vda is qcow2 and has a file system, /dev/vdb is raw."""

    host: Host
    rig: EngineRig
    domain: Domain
    guest: Guest
    images: list[Image]
    restored: int = 0

    @property
    def vm(self) -> Vm:
        return wait_for_vm(self.rig, NAME, lambda vm: vm is not None)

    @property
    def ours(self) -> str:
        """What the paths of the engine's files in the scratch directory begin with."""
        inventory = self.rig.core.inventory
        assert isinstance(inventory, LibvirtInventory)
        return inventory._live.ours

    def back_up(self, *, full: bool = False) -> Backup:
        backup = self.rig.back_up(self.vm, full=full)
        assert list(self.host.scratch.iterdir()) == []
        return backup

    def failed(self) -> Job:
        """A backup that fails."""
        return self.failed_job(self.rig.ask_backup(self.vm)[1])

    def failed_job(self, job_uuid: str) -> Job:
        job = self.rig.ended(job_uuid)
        assert job.state == "failed", job
        assert list(self.host.scratch.iterdir()) == []
        return job

    def quiet(self, *devices: str) -> list[str]:
        """The disks' checksums as the guest reads them; nobody writes any more."""
        self.guest.run("sync; umount /mnt 2>/dev/null; true")
        read = "dd if=/dev/{} iflag=direct bs=1M 2>/dev/null | sha256sum"
        names = devices or ("vda", "vdb")
        self._await_devices(*names)
        return [self.guest.run(read.format(name)).split()[0] for name in names]

    def restored_sums(self, backup: Backup) -> list[str]:
        """The checksums of the volumes of a new VM."""
        self.restored += 1
        name = f"again{self.restored}"
        return [sha256(content).hexdigest() for content in contents(self.rig, backup, name)]

    def write(self, path: str = "/mnt/file", kib: int = 256) -> None:
        self.guest.run("grep -q /mnt /proc/mounts || mount /dev/vda /mnt")
        if path.startswith("/dev/"):
            self._await_devices(path.removeprefix("/dev/"))
        self.guest.run(f"dd if=/dev/urandom of={path} bs=1k count={kib} 2>/dev/null; sync")

    def _await_devices(self, *names: str) -> None:
        """Until the kernel has found what was plugged in: before, a write would make a file."""
        for name in names:
            self.guest.run(f"until [ -b /dev/{name} ]; do usleep 9999; done")

    def stop_agent(self) -> None:
        self.guest.run("kill $(cat /run/agent.pid); while pidof qemu-ga; do usleep 9999; done")

    def reboot(self) -> None:
        self.guest.close()
        self.guest = self.host.boot(self.domain)
        wait_for_vm(self.rig, NAME, lambda vm: vm is not None and vm.state == "running")

    def checkpoints(self) -> list[str]:
        return [checkpoint.getName() for checkpoint in self.domain.listAllCheckpoints()]


@contextlib.contextmanager
def paused_reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Backups stand still at their first read, as with a backup point that hangs.

    The event is set as soon as one does; leaving the block lets it go on.
    """
    reached, go_on = threading.Event(), threading.Event()
    read_into = NbdSource.read_into

    def slow(self: NbdSource, buffer: memoryview, offset: int) -> int:
        reached.set()
        assert go_on.wait(PATIENCE_S)
        return read_into(self, buffer, offset)

    monkeypatch.setattr(NbdSource, "read_into", slow)
    try:
        yield reached
    finally:
        go_on.set()
        monkeypatch.setattr(NbdSource, "read_into", read_into)


def pivot(domain: Any, target: str) -> None:
    """Onto the copy or commit of a disk, once that is in step and QEMU says that it is ready."""

    def is_done() -> bool:
        try:
            domain.blockJobAbort(target, _ABORT_PIVOT)
        except LibvirtFault as error:
            if "not ready for pivot" not in str(error):
                raise
            return False
        return True

    wait_until(is_done)


def make_lab(host: Host, rig: EngineRig) -> Lab:
    images = [
        host.image("vda", "lab.qcow2", QCOW2_BYTES),
        host.image("vdb", "lab.raw", RAW_BYTES, "raw"),
    ]
    domain = host.define(NAME, images)
    guest = host.boot(domain)
    guest.run("mke2fs -q /dev/vda")
    lab = Lab(host, rig, domain, guest, images)
    wait_for_vm(rig, NAME, lambda vm: vm is not None and vm.state == "running")
    lab.write(kib=2048)
    lab.write("/dev/vdb", 1024)
    return lab
