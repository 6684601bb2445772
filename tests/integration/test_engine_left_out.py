"""A libvirt host that is away at a start, or left out by the configuration. Needs no libvirt."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from engine.config import Config, DiskConfig, Libvirt, LibvirtHost, PoolConfig, VmConfig
from engine.errors import NotFound
from engine.libvirt import binding, inventory, watch
from engine.libvirt.binding import LibvirtFault
from engine.model import Baseline, Directory, Disk, Vm
from engine.snapshot.baseline_tending import tend_baselines
from tests.engine_rig import ANYWHERE, EngineRig

RIGHT, WRONG = "qemu:///system", "qemu:///sytsem"


@pytest.fixture(autouse=True)
def _away(monkeypatch: pytest.MonkeyPatch) -> None:
    """All hosts are: what is known of them was seen before."""

    def connect(uri: str) -> binding.Connection:
        raise LibvirtFault(f"{uri} does not answer")

    monkeypatch.setattr(watch, "connect", connect)
    monkeypatch.setattr(inventory, "require_libvirt", lambda: None)


def config_for(uri: str) -> Config:
    return Config(inventory="libvirt", libvirt=Libvirt(hosts=(LibvirtHost(uri),)))


def domain(rig: EngineRig, name: str, host: str) -> Vm:
    (namespace,), (zone,) = rig.engine.namespaces(), rig.engine.zones()
    return Vm(
        uuid=f"{name} at {host}",
        name=name,
        cluster_uuid=rig.cluster_uuid,
        tenant=namespace.tenant,
        namespace=namespace.uuid,
        zone_uuid=zone.uuid,
        object_group=rig.engine.object_groups()[0].uuid,
        disks=(Disk("vda", "pool", "volume", 1 << 20, "HDD"),),
        state="stopped",
        host=host,
        last_error="what was last",
    )


def test_what_is_known_of_it_is_kept_until_it_is_back(tmp_path: Path) -> None:
    """A slip in the URI would cost its VMs a scan each, and the alert that one is not tracked."""
    with EngineRig(tmp_path / "data", config_for(RIGHT)) as rig:
        vm = domain(rig, "db", RIGHT)
        tracked = Baseline(vm.uuid, "vda", "/pool/volume", off="a sample has proved it wrong")
        directory = Directory("uuid", RIGHT, "/pool")
        rig.core.state.vms.put(vm)
        rig.core.state.baselines.put(tracked)
        rig.core.state.directories.put(directory)
        rig.config = config_for(WRONG)
        rig.restart()
        assert rig.engine.vms(ANYWHERE) == []
        with pytest.raises(NotFound):
            rig.engine.vm(vm.uuid)
        tend_baselines(rig.core)
        rig.config = config_for(RIGHT)
        rig.restart()
        tend_baselines(rig.core)
        assert [one.uuid for one in rig.engine.vms(ANYWHERE)] == [vm.uuid]
        assert rig.core.state.vms.get(vm.uuid) == vm
        assert rig.core.state.baselines.values() == [tracked]
        assert rig.core.state.directories.values() == [directory]


def test_a_vm_may_be_restored_under_the_name_that_it_had_there(tmp_path: Path) -> None:
    """The host may be gone for good."""
    with EngineRig(tmp_path / "data", config_for(RIGHT)) as rig:
        rig.core.state.vms.put(domain(rig, "db", WRONG))
        restored = domain(rig, "db", "")
        rig.core.inventory.add_vm(restored)
        assert [one.uuid for one in rig.engine.vms(ANYWHERE)] == [restored.uuid]


def test_a_vm_may_be_configured_under_the_name_that_one_has_there(tmp_path: Path) -> None:
    """And does not take its place: it is another one."""
    with EngineRig(tmp_path / "data", config_for(RIGHT)) as rig:
        there = domain(rig, "db", WRONG)
        rig.core.state.vms.put(there)
        pools = (PoolConfig("fast", str(tmp_path)),)
        vms = (VmConfig("db", (DiskConfig("vda", "volume"),)),)
        rig.config = structs.replace(config_for(RIGHT), pools=pools, vms=vms)
        rig.restart()
        assert [(one.name, one.host) for one in rig.engine.vms(ANYWHERE)] == [("db", "")]
        assert rig.core.inventory.left_out() == [there]


def test_what_a_restore_may_have_left_is_named_when_its_host_is_away(tmp_path: Path) -> None:
    """Nobody can tell then whether libvirt has the VM, and later its volumes' names are lost."""
    pools = (PoolConfig("fast", str(tmp_path)),)
    config = structs.replace(config_for(RIGHT), pools=pools)
    with EngineRig(tmp_path / "data", config) as rig:
        disks = (
            Disk("vda", rig.pool_uuid, "one.raw", 1 << 20, "HDD"),
            Disk("vdb", "a pool of the host", "two.raw", 1 << 20, "HDD"),
        )
        vm = domain(rig, "db", "")
        rig.core.state.vms.put(
            structs.replace(vm, disks=disks, state="restoring", action="restoring")
        )
        rig.restart()
        (ended,) = rig.engine.vms(ANYWHERE)
        assert (ended.state, ended.action) == ("restore_failed", "")
        assert ended.last_error.endswith(f"may be left: {tmp_path}/one.raw, two.raw")
