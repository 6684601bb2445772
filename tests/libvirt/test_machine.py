"""What a domain has beside its disks: its XML, its firmware's variables, its TPM's state.

The guest never runs: the domain is started paused, which is when libvirt makes the files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.libvirt.machine import inflated
from engine.model import Backup
from tests.engine_rig import EngineRig
from tests.libvirt.host import MIB, Host
from tests.libvirt.site import config_for, wait_for_vm

_PAUSED = 1
_WITH_NVRAM = 1 << 2


@pytest.fixture(scope="module")
def rig(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRig]:
    for tool, package in (("swtpm", "swtpm"), ("swtpm_setup", "swtpm-tools")):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian package {package})")
    data = tmp_path_factory.mktemp("site") / "data"
    config = config_for(host.uri, scratch=host.scratch, tpm_directory=tpm_directory(host))
    with EngineRig(data, config) as made:
        yield made


@pytest.fixture(scope="module")
def domain(host: Host, rig: EngineRig) -> Any:
    """Started once, so that it has all that it can have; it is paused."""
    for name in ("code.fd", "template.fd"):
        (host.root / name).write_bytes(bytes(MIB))
        host.own(host.root / name)
    plain = host.define("sealed", [host.image("vda", "sealed.raw", MIB, "raw")], agent=False)
    xml = plain.XMLDesc().replace(
        "</type>",
        f"</type><loader readonly='yes' type='pflash'>{host.root}/code.fd</loader>"
        f"<nvram template='{host.root}/template.fd'>{host.root}/sealed.vars</nvram>",
    )
    tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
    made: Any = host.connection.defineXML(xml.replace("</devices>", f"{tpm}</devices>"))
    made.createWithFlags(_PAUSED)
    with vars_of(host, "sealed").open("r+b") as file:
        file.write(b"what the firmware wrote")
    wait_for_vm(rig, "sealed", lambda vm: vm is not None and vm.state == "paused")
    return made


def tpm_directory(host: Host) -> Path:
    return host.root / "config/libvirt/qemu/swtpm"


def tpm_of(host: Host, uuid: str) -> bytes:
    return (tpm_directory(host) / uuid / "tpm2/tpm2-00.permall").read_bytes()


def vars_of(host: Host, name: str) -> Path:
    return host.root / f"{name}.vars"


def test_they_come_back_with_the_running_domain(host: Host, rig: EngineRig, domain: Any) -> None:
    come_back(host, rig, domain, "again")


def test_they_come_back_with_the_stopped_domain(host: Host, rig: EngineRig, domain: Any) -> None:
    domain.destroy()
    wait_for_vm(rig, "sealed", lambda vm: vm is not None and vm.state == "stopped")
    come_back(host, rig, domain, "revived")


def test_what_can_not_be_read_is_named_and_the_disks_are_backed_up(
    host: Host, rig: EngineRig, domain: Any
) -> None:
    variables, tpm = vars_of(host, "sealed"), tpm_directory(host) / domain.UUIDString()
    variables.rename(host.root / "away")
    tpm.rename(host.root / "tpm-away")
    backup = back_up(rig)
    assert {note for note in backup.label.notes if "not in the backup" in note} == {
        "the firmware's variables are not in the backup: No such file or directory",
        "the TPM's state is not in the backup: No such file or directory",
    }
    made = restored(host, rig, backup, "without")
    assert not (tpm_directory(host) / made.UUIDString()).exists()
    made.undefineFlags(0)


def test_a_domain_that_can_not_be_defined_leaves_none_of_them(
    host: Host, rig: EngineRig, domain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host.root / "away").rename(vars_of(host, "sealed"))
    (host.root / "tpm-away").rename(tpm_directory(host) / domain.UUIDString())
    backup = back_up(rig)
    before = {path.name for path in tpm_directory(host).iterdir()}
    monkeypatch.setattr("engine.libvirt.restored.new_domain_xml", lambda *_: "<domain/>")
    _, job = rig.ask_restore(backup, "never")
    assert "domain never" in rig.ended(job).error
    assert {path.name for path in tpm_directory(host).iterdir()} == before
    assert [path.name for path in rig.pool_path.iterdir() if path.suffix == ".nvram"] == []


def back_up(rig: EngineRig) -> Backup:
    return rig.back_up(wait_for_vm(rig, "sealed", lambda vm: vm is not None))


def come_back(host: Host, rig: EngineRig, domain: Any, name: str) -> None:
    backup = back_up(rig)
    assert not [note for note in backup.label.notes if "not in the backup" in note]
    machine = rig.core.catalogue.whole(backup).label.machine
    assert machine is not None
    assert "<name>sealed</name>" in inflated(machine.xml)
    variables, tpm = vars_of(host, "sealed").read_bytes(), tpm_of(host, domain.UUIDString())
    made = restored(host, rig, backup, name)
    place = rig.pool_path / f"{made.UUIDString()}.nvram"
    assert made.XMLDesc().count(f">{place}</nvram>") == 1
    for _ in range(2):  # as restored, and as a start finds it
        assert place.read_bytes() == variables
        assert variables.startswith(b"what the firmware wrote")
        assert tpm_of(host, made.UUIDString()) == tpm
        if not made.isActive():
            made.createWithFlags(_PAUSED)
    made.destroy()
    made.undefineFlags(_WITH_NVRAM)


def restored(host: Host, rig: EngineRig, backup: Backup, name: str) -> Any:
    vm_uuid, job = rig.ask_restore(backup, name)
    rig.succeed(job)
    return host.connection.lookupByUUIDString(vm_uuid)
