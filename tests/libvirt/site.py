"""An engine whose VMs are libvirt's."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from engine.config import Config, Libvirt, LibvirtHost, LibvirtRule, NamespaceConfig, ZoneConfig
from engine.model import Backup, Vm
from tests.engine_rig import PATIENCE_S, EngineRig
from tests.libvirt.host import Host
from tests.nfs.kit import find_tool


def config_for(
    *uris: str,
    scratch: Path | None = None,
    reserve_bytes: int = 1 << 20,
    limit_bytes: int = 0,
    tpm_directory: Path = Path("/nowhere"),
) -> Config:
    return Config(
        inventory="libvirt",
        libvirt=Libvirt(
            hosts=tuple(LibvirtHost(uri) for uri in uris),
            rules=(
                LibvirtRule("hidden-*", leave_out=True),
                LibvirtRule("*-web", namespace="shop", vm_type="linux"),
            ),
            scratch=str(scratch or ""),
            scratch_reserve_bytes=reserve_bytes,
            scratch_limit_bytes=limit_bytes,
            tpm_directory=str(tpm_directory),
        ),
        namespaces=(NamespaceConfig("default"), NamespaceConfig("shop")),
        zones=(ZoneConfig("default"), ZoneConfig("cellar")),
    )


def rig_on(data: Path, host: Host) -> EngineRig:
    return EngineRig(data, config_for(host.uri, scratch=host.scratch))


def vm_named(rig: EngineRig, name: str) -> Vm | None:
    found = [vm for vm in rig.core.inventory.vms() if vm.name == name]
    return found[0] if found else None


def wait_for_vm(rig: EngineRig, name: str, is_so: Callable[[Vm | None], bool]) -> Vm:
    """The VM, once it is so. Events bring it soon; nothing is said of how soon."""
    end = time.monotonic() + PATIENCE_S
    while not is_so(vm := vm_named(rig, name)):
        assert time.monotonic() < end, vm
        time.sleep(0.02)
    assert vm is not None
    return vm


def contents(rig: EngineRig, backup: Backup, vm_name: str) -> list[bytes]:
    """What a guest would read from the disks of a new VM made from the backup."""
    vm_uuid, job = rig.ask_restore(backup, vm_name)
    rig.succeed(job)
    return [_content(rig.volume(disk), disk.format) for disk in rig.engine.vm(vm_uuid).disks]


def _content(volume: Path, form: str) -> bytes:
    if form == "raw":
        return volume.read_bytes()
    flat = volume.with_name(f".{volume.name}.flat")
    command = [find_tool("qemu-img"), "convert", "-f", form, "-O", "raw"]
    subprocess.run([*command, str(volume), str(flat)], check=True)
    content = flat.read_bytes()
    flat.unlink()
    return content


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end, what
        time.sleep(0.02)
