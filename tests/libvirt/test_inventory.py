"""libvirt's domains and pools as an inventory: what is listed, and how it stays true."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.config import PoolConfig
from engine.errors import ConfigInvalid, Conflict, HypervisorAway, Invalid
from engine.libvirt import inventory, watch
from engine.model import Backup, Vm
from engine.snapshot.snapshot import RESTORES
from engine.state import State
from engine.verb_types import NewDisk, RestoreTarget
from storage.errors import StorageError
from tests.engine_rig import ANYWHERE, EngineRig
from tests.libvirt.host import MIB, Host, Image
from tests.libvirt.site import config_for, contents, rig_on, vm_named, wait_for_vm, wait_until
from tests.nfs.kit import Kit, find_tool

libvirt = pytest.importorskip("libvirt")

MARKS = """<metadata><vmkeep:place xmlns:vmkeep="urn:vmkeep:place:1"
    namespace="shop" zone="cellar" object_group="nowhere"/></metadata>"""

HIDDEN = """<metadata><vmkeep:place xmlns:vmkeep="urn:vmkeep:place:1"
    leave_out="yes"/></metadata>"""


@pytest.fixture
def rig(host: Host, tmp_path: Path) -> Iterator[EngineRig]:
    with rig_on(tmp_path / "data", host) as made:
        yield made


@pytest.fixture(autouse=True)
def clean_host(host: Host) -> Iterator[None]:
    yield
    for domain in host.connection.listAllDomains():
        if domain.isActive():
            domain.destroy()
        domain.undefineFlags(0)


def test_domains_are_vms(host: Host, rig: EngineRig) -> None:
    pool = host.connection.storagePoolDefineXML(
        "<pool type='dir'><name>images</name>"
        f"<target><path>{host.root}/images</path></target></pool>"
    )
    pool.create()
    images = [
        host.image("vda", "a.qcow2", 64 * MIB),
        host.image("vdb", "b.raw", 32 * MIB, "raw"),
    ]
    domain = host.define("one", images)
    vm = wait_for_vm(rig, "one", lambda vm: vm is not None and vm.disks[0].pool_uuid != "")
    assert vm.uuid == domain.UUIDString()
    assert (vm.state, vm.host) == ("stopped", host.uri)
    assert [(d.target_device, d.volume_name, d.format, d.capacity) for d in vm.disks] == [
        ("vda", "a.qcow2", "qcow2", 64 * MIB),
        ("vdb", "b.raw", "raw", 32 * MIB),
    ]  # and not the cdrom
    wait_until(lambda: pool.UUIDString() in [state.pool.uuid for state in rig.engine.pools()])
    vm = rig.core.inventory.look_at(vm.uuid)
    assert {disk.pool_uuid for disk in vm.disks} == {pool.UUIDString()}
    assert rig.engine.volume_path(vm.disks[0]) == str(images[0].path)


def test_a_domain_says_where_it_belongs(host: Host, rig: EngineRig) -> None:
    names = {row.uuid: row.name for row in rig.engine.namespaces()}
    zones = {row.uuid: row.name for row in rig.engine.zones()}
    for name, extra in (("plain", ""), ("marked", MARKS), ("my-web", ""), ("hidden-1", "")):
        host.define(name, [], extra=extra)
    found = {
        name: wait_for_vm(rig, name, lambda vm: vm is not None)
        for name in ("plain", "marked", "my-web")
    }
    assert [names[found[name].namespace] for name in found] == ["default", "shop", "shop"]
    assert [zones[found[name].zone_uuid] for name in found] == ["default", "cellar", "default"]
    assert found["my-web"].vm_type == "linux"
    assert vm_named(rig, "hidden-1") is None


def test_events_keep_it_fresh(host: Host, rig: EngineRig) -> None:
    domain = host.define("lively", [host.image("vda", "l.qcow2", 16 * MIB)])
    wait_for_vm(rig, "lively", lambda vm: _state(vm) == "stopped")
    domain.create()
    wait_for_vm(rig, "lively", lambda vm: _state(vm) == "running")
    domain.destroy()
    wait_for_vm(rig, "lively", lambda vm: _state(vm) == "stopped")
    domain.undefineFlags(0)
    wait_until(lambda: vm_named(rig, "lively") is None)


def test_a_look_takes_out_no_domain_that_it_was_too_early_for(host: Host, rig: EngineRig) -> None:
    mirror = rig.core.inventory
    assert isinstance(mirror, inventory.LibvirtInventory)
    early = watch.look(host.connection)
    host.define("late", [])
    wait_for_vm(rig, "late", lambda vm: vm is not None)
    mirror._on_sight(mirror._watches[host.uri], early)
    assert vm_named(rig, "late") is not None


def test_a_domain_that_is_marked_to_be_left_out_goes(host: Host, rig: EngineRig) -> None:
    domain = host.define("shy", [])
    wait_for_vm(rig, "shy", lambda vm: vm is not None)
    host.define("shy", [], extra=HIDDEN, uuid=domain.UUIDString())
    wait_until(lambda: vm_named(rig, "shy") is None)


def test_a_stopped_domain_is_read_as_it_lies(host: Host, rig: EngineRig) -> None:
    image = host.image("vda", "still.qcow2", 16 * MIB)
    command = [find_tool("qemu-io"), "-c", "write -P 7 1M 64k", str(image.path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    domain = host.define("still", [image, host.image("vdb", "still.raw", MIB, "raw")])
    vm = wait_for_vm(rig, "still", lambda vm: vm is not None)
    backup = rig.back_up(vm)
    assert "snapshot: live" not in backup.label.notes
    first, second = contents(rig, backup, "moved")
    assert first == bytes(MIB) + b"\7" * 65536 + bytes(15 * MIB - 65536)
    assert second == bytes(MIB)
    assert not domain.isActive()


def test_a_directory_stays_a_pool_when_its_last_domain_is_lost(host: Host, rig: EngineRig) -> None:
    """So what was lost can be restored to where it lay, also after a restart."""
    place = host.root / "alone"
    place.mkdir()
    path = host.image("vda", "lost.raw", MIB, "raw").path.rename(place / "lost.raw")
    path.write_bytes(b"\5" * MIB)
    host.own(place)
    domain = host.define("lost", [Image("vda", path, "raw")])
    vm = wait_for_vm(rig, "lost", lambda vm: vm is not None)
    backup = rig.back_up(vm)
    domain.undefineFlags(0)
    path.unlink()
    wait_until(lambda: vm_named(rig, "lost") is None)
    rig.restart()
    assert pool_at(rig, place) == vm.disks[0].pool_uuid
    target = RestoreTarget("vda", vm.disks[0].pool_uuid, "lost.raw", "SSD")
    group, zone = rig.engine.object_groups()[0].uuid, rig.engine.zones()[0].uuid
    _, job = rig.engine.restore_backup(ANYWHERE, backup.uuid, "lost", [target], group, zone)
    rig.succeed(job)
    assert path.read_bytes() == b"\5" * MIB
    again = wait_for_vm(rig, "lost", lambda vm: vm is not None)
    path.unlink()
    place.rmdir()
    host.connection.lookupByUUIDString(again.uuid).undefineFlags(0)
    wait_until(lambda: pool_at(rig, place) == "")


def test_a_restored_domain_that_can_not_be_noted_keeps_its_volumes(
    host: Host, rig: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state's disk fills up just when libvirt has it."""
    backup, content = backed_up(host, rig, "doubtful")
    define = libvirt.virConnect.defineXML

    def full(*_: object) -> None:
        raise StorageError("no space left")

    def define_and_fill(*given: object) -> object:
        made = define(*given)
        for name in ("_put", "note"):
            monkeypatch.setattr(inventory.LibvirtInventory, name, full)
        return made

    monkeypatch.setattr(libvirt.virConnect, "defineXML", define_and_fill)
    uuid, job = rig.ask_restore(backup, "noted")
    rig.ended(job)
    monkeypatch.undo()
    rig.restart()
    whole(rig, host, uuid, content)


def test_a_restored_domain_keeps_its_volumes_when_libvirt_is_away_after_a_kill(
    host: Host, tmp_path: Path
) -> None:
    """We were killed when libvirt had it, and had not noted that: the volume has both names."""
    pool = tmp_path / "pool"
    hidden = pool / RESTORES / "hidden"
    pool.mkdir()
    config = replace(config_for(host.uri), pools=(PoolConfig("ours", str(pool)),))
    with EngineRig(tmp_path / "data", config) as rig:
        backup, content = backed_up(host, rig, "killed")
        uuid, job = rig.ask_restore(backup, "unnoted")
        rig.succeed(job)
        vm, pool_uuid = rig.engine.vm(uuid), rig.pool_uuid
    hidden.parent.mkdir()
    hidden.hardlink_to(pool / "unnoted-vda")
    disk = replace(vm.disks[0], pool_uuid=pool_uuid, volume_name="unnoted-vda")
    state = State(str(tmp_path / "data" / "state"))
    row = replace(vm, host="", state="restoring", action="restoring", disks=(disk,))
    state.vms.put(row)
    state.close()
    host.stop()
    try:
        with EngineRig(tmp_path / "data", config):
            assert not hidden.exists()
    finally:
        host.start()
    with EngineRig(tmp_path / "data", config) as rig:
        whole(rig, host, uuid, content)


def backed_up(host: Host, rig: EngineRig, name: str) -> tuple[Backup, bytes]:
    """A stopped domain's backup, and what its disk holds."""
    image, content = host.image("vda", f"{name}.raw", MIB, "raw"), name.encode().ljust(MIB, b"\6")
    image.path.write_bytes(content)
    host.define(name, [image])
    return rig.back_up(wait_for_vm(rig, name, lambda vm: vm is not None)), content


def whole(rig: EngineRig, host: Host, uuid: str, content: bytes) -> None:
    """The VM is a domain, and has its volume."""
    name = host.connection.lookupByUUIDString(uuid).name()
    vm = wait_for_vm(rig, name, lambda vm: vm is not None and vm.host == host.uri)
    vm = wait_for_vm(rig, name, lambda vm: vm is not None and vm.disks[0].pool_uuid != "")
    assert (vm.uuid, vm.state, vm.action) == (uuid, "stopped", "")
    assert rig.volume(vm.disks[0]).read_bytes() == content


def test_a_name_that_the_restored_domain_can_not_have_is_refused_at_once(
    host: Host, rig: EngineRig
) -> None:
    """Not at the end, when libvirt is asked to define it. The name is one of a domain left out."""
    backup, _ = backed_up(host, rig, "named")
    host.define("hidden-twin", [])
    before = rig.engine.vms(ANYWHERE)
    with pytest.raises(Conflict, match="a domain named 'hidden-twin'"):
        rig.ask_restore(backup, "hidden-twin", volumes=["twin"])
    with pytest.raises(Invalid, match="new_vm_name"):
        rig.ask_restore(backup, "a/b", volumes=["slash"])
    assert rig.engine.vms(ANYWHERE) == before


def pool_at(rig: EngineRig, place: Path) -> str:
    """The uuid of the pool that is this directory; "" if none is."""
    found = [state.pool.uuid for state in rig.engine.pools() if state.pool.path == str(place)]
    return "".join(found)


def test_vms_are_not_made_or_deleted_here(host: Host, rig: EngineRig) -> None:
    host.define("theirs", [])
    vm = wait_for_vm(rig, "theirs", lambda vm: vm is not None)
    with pytest.raises(Conflict, match="domain of"):
        rig.engine.delete_vm(vm.uuid, True)
    with pytest.raises(Conflict, match="made with libvirt"):
        rig.engine.create_vm(ANYWHERE, "mine", "", "", [NewDisk("vda", "x", "y")])


def test_a_host_that_is_away_comes_back_by_itself(host: Host, rig: EngineRig) -> None:
    host.define("patient", [host.image("vda", "p.qcow2", 16 * MIB)])
    vm = wait_for_vm(rig, "patient", lambda vm: vm is not None)
    host.stop()
    try:
        away = wait_for_vm(rig, "patient", lambda vm: _state(vm) == "unreachable")
        assert host.uri in away.last_error
        assert len(away.disks) == 1
        with pytest.raises(HypervisorAway):
            rig.ask_backup(vm)
    finally:
        host.start()
    wait_for_vm(rig, "patient", lambda vm: _state(vm) == "stopped")


def test_several_hosts_and_one_that_never_answers(
    host: Host, kit: Kit, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "FIRST_LOOK_S", 0.5)
    monkeypatch.setattr(watch, "STOP_S", 0.5)
    with contextlib.ExitStack() as undo:
        other = undo.enter_context(contextlib.closing(Host(kit, cache)))
        silent = undo.enter_context(socket.socket(socket.AF_UNIX))
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        hung = f"qemu+unix:///session?socket={tmp_path}/silent"
        nobody = f"qemu+unix:///session?socket={tmp_path}/nobody"
        host.define("here", [])
        other.define("there", [])
        config = config_for(host.uri, hung, other.uri, nobody)
        rig = undo.enter_context(EngineRig(tmp_path / "data", config))
        assert wait_for_vm(rig, "here", lambda vm: vm is not None).host == host.uri
        assert wait_for_vm(rig, "there", lambda vm: vm is not None).host == other.uri


def test_a_domain_on_two_hosts_is_where_it_runs(
    host: Host, kit: Kit, cache: Path, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as undo:
        other = undo.enter_context(contextlib.closing(Host(kit, cache)))
        domain = host.define("mover", [host.image("vda", "m.qcow2", 16 * MIB)])
        rig = undo.enter_context(EngineRig(tmp_path / "data", config_for(host.uri, other.uri)))
        wait_for_vm(rig, "mover", lambda vm: vm is not None and vm.host == host.uri)
        image = other.image("vda", "m.qcow2", 16 * MIB)
        there = other.define("mover", [image], uuid=domain.UUIDString())
        there.create()
        wait_for_vm(rig, "mover", lambda vm: (_state(vm), vm and vm.host) == ("running", other.uri))


@pytest.mark.usefixtures("kit")
def test_without_hosts_it_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="hosts"):
        EngineRig(tmp_path / "data", config_for())


def _state(vm: Vm | None) -> str:
    return vm.state if vm else ""
