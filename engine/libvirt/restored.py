"""Defining the domain of a restored VM, when all of its volumes are complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from engine.errors import HypervisorAway, HypervisorRefused
from engine.libvirt.binding import Connection, Domain, LibvirtFault
from engine.libvirt.domains import read_domain
from engine.libvirt.files import hand_over, write_new
from engine.libvirt.machine import MOST_NVRAM_BYTES, inflated, inflated_bytes
from engine.libvirt.revive import NewDomain, new_domain_xml
from engine.libvirt.scratch import remove_left
from engine.libvirt.tpm import MOST_TPM_BYTES, remove_tpm, write_tpm
from engine.model import Machine, Vm


def define_restored(
    connection: Connection,
    vm: Vm,
    machine: Machine,
    paths: Mapping[str, str],
    marks: Mapping[str, str],
    tpm_directory: str,
) -> Domain:
    """The new domain. `paths`: of its volumes by target. HypervisorRefused; then there is none.

    HypervisorAway if libvirt was lost meanwhile: then it may have one, which a repetition replaces.
    """
    formats = {disk.target_device: disk.format for disk in vm.disks}
    volumes = {target: (path, formats[target]) for target, path in paths.items()}
    for path in paths.values():
        hand_over(path)
    xml = inflated(machine.xml)
    with contextlib.ExitStack() as undo:
        try:
            nvram = _nvram(machine, vm, next(iter(paths.values())), undo)
            _tpm(machine, vm, xml, tpm_directory, undo)
            new = NewDomain(vm.uuid, vm.name, volumes, marks, nvram)
            made = connection.defineXML(new_domain_xml(xml, new))
        except (LibvirtFault, ValueError, OSError) as error:
            if not connection.isAlive():
                raise HypervisorAway(f"domain {vm.name}: {error}") from error
            raise HypervisorRefused(f"domain {vm.name}: {error}") from error
        undo.pop_all()
    _refresh_pools(connection)
    return made


def _nvram(machine: Machine, vm: Vm, beside: str, undo: contextlib.ExitStack) -> str:
    """The firmware's variables in a file of their own; "" when there are none. Raises OSError."""
    content = inflated_bytes(machine.nvram, MOST_NVRAM_BYTES)
    if not content:
        return ""
    path = f"{os.path.dirname(beside)}/{vm.uuid}.nvram"
    write_new(path, content)
    undo.callback(remove_left, [path])
    hand_over(path)
    return path


def _tpm(machine: Machine, vm: Vm, xml: str, directory: str, undo: contextlib.ExitStack) -> None:
    """The TPM's state where libvirt will look for it. Raises OSError, ValueError."""
    content = inflated_bytes(machine.tpm, MOST_TPM_BYTES)
    version = read_domain(xml).tpm
    if content and version:
        write_tpm(directory, vm.uuid, version, content)
        undo.callback(remove_tpm, directory, vm.uuid)


def _refresh_pools(connection: Connection) -> None:
    """So that libvirt lists the new volumes; it does without as well."""
    with contextlib.suppress(LibvirtFault):
        for pool in connection.listAllStoragePools():
            if pool.isActive():
                pool.refresh()
