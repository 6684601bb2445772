"""Defining the domain of a restored VM, when all of its volumes are complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from engine.errors import HypervisorRefused
from engine.libvirt.binding import Connection, Domain, LibvirtFault
from engine.libvirt.machine import MOST_NVRAM_BYTES, inflated, inflated_bytes
from engine.libvirt.revive import NewDomain, new_domain_xml
from engine.model import Machine, Vm


def define_restored(
    connection: Connection,
    vm: Vm,
    machine: Machine,
    paths: Mapping[str, str],
    marks: Mapping[str, str],
) -> Domain:
    """The new domain. `paths`: of its volumes by target. HypervisorRefused; then there is none."""
    formats = {disk.target_device: disk.format for disk in vm.disks}
    volumes = {target: (path, formats[target]) for target, path in paths.items()}
    for path in paths.values():
        _hand_over(path)
    nvram = _nvram(machine, vm, next(iter(paths.values())))
    new = NewDomain(vm.uuid, vm.name, volumes, marks, nvram)
    try:
        made = connection.defineXML(new_domain_xml(inflated(machine.xml), new))
    except (LibvirtFault, ValueError) as error:
        with contextlib.suppress(OSError):
            os.unlink(nvram)
        raise HypervisorRefused(f"domain {vm.name}: {error}") from error
    _refresh_pools(connection)
    return made


def _hand_over(path: str) -> None:
    """To whom the pool's directory belongs: a QEMU that is not root's has to write to it."""
    with contextlib.suppress(OSError):
        owner = os.stat(os.path.dirname(path))
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _nvram(machine: Machine, vm: Vm, beside: str) -> str:
    """The firmware's variables in a file of their own; "" when there are none."""
    content = inflated_bytes(machine.nvram, MOST_NVRAM_BYTES)
    if not content:
        return ""
    path = f"{os.path.dirname(beside)}/{vm.uuid}.nvram"
    try:
        with open(path, "xb") as file:
            file.write(content)
            os.fsync(file.fileno())
    except OSError as error:
        raise HypervisorRefused(f"{path}: {error.strerror}") from error
    _hand_over(path)
    return path


def _refresh_pools(connection: Connection) -> None:
    """So that libvirt lists the new volumes; it does without as well."""
    with contextlib.suppress(LibvirtFault):
        for pool in connection.listAllStoragePools():
            if pool.isActive():
                pool.refresh()
