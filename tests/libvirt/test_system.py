"""libvirt in system mode: root's libvirtd, QEMU as a user of its own, files change hands."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine_rig import EngineRig
from tests.libvirt.host import MIB
from tests.libvirt.lab import NAME, Lab
from tests.libvirt.site import config_for, wait_for_vm
from tests.libvirt.system import QEMU_UID, SystemHost
from tests.nfs.kit import Kit

SIZE = 16 * MIB


@pytest.fixture(scope="module")
def host(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemHost]:
    cache = tmp_path_factory.mktemp("cache")
    with contextlib.closing(SystemHost(kit, cache)) as made:
        yield made


@pytest.fixture
def rig(host: SystemHost, tmp_path: Path) -> Iterator[EngineRig]:
    config = config_for(host.uri, scratch=host.scratch, tpm_directory=host.tpm_directory)
    before = os.umask(0o077)  # as the service's unit has it
    try:
        with EngineRig(tmp_path / "data", config) as made:
            yield made
    finally:
        os.umask(before)


def test_a_round_trip(host: SystemHost, rig: EngineRig) -> None:
    """Live, live again, stopped, restored, booted."""
    images = [host.image("vda", "a.qcow2", SIZE), host.image("vdb", "b.raw", SIZE, "raw")]
    domain = host.define(NAME, images)
    lab = Lab(host, rig, domain, host.boot(domain), images)
    assert images[0].path.stat().st_uid == QEMU_UID
    lab.guest.run("mke2fs -q /dev/vda")
    lab.write("/dev/vdb", 512)
    wait_for_vm(rig, NAME, lambda vm: vm is not None and vm.state == "running")
    truth = lab.quiet()
    first = lab.back_up()
    assert first.label.frozen
    assert lab.restored_sums(first) == truth
    lab.write("/mnt/kept", 100)
    kept = lab.guest.run("sha256sum /mnt/kept")
    truth = lab.quiet()
    second = lab.back_up()
    assert "changes found by: vda bitmap, vdb scan" in second.label.notes
    lab.guest.close()
    domain.destroy()
    wait_for_vm(rig, NAME, lambda vm: vm is not None and vm.state == "stopped")
    third = lab.back_up()
    assert "changes found by: vda bitmap, vdb scan" in third.label.notes
    assert lab.restored_sums(third) == truth
    vm_uuid, job = rig.ask_restore(second, "revived")
    rig.succeed(job)
    revived = host.connection.lookupByUUIDString(vm_uuid)
    guest = host.boot(revived)
    assert guest.run("mount /dev/vda /mnt; sha256sum /mnt/kept") == kept
    wait_for_vm(rig, "revived", lambda vm: vm is not None and vm.state == "running")
    fourth = rig.back_up(rig.engine.vm(vm_uuid))
    assert fourth.label.full
    guest.close()
