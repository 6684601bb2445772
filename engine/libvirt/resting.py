"""A domain that does not run: its disks are read as they lie (engine/snapshot/snapshot.py).

Its qcow2 images record changes for the next backup in bitmaps that have the names that a live
backup's checkpoint would have given them. libvirt has a checkpoint's name for the bitmaps of all
disks, and QEMU stores them in the images when the domain stops. So a backup of the stopped domain
builds on one of the running domain, and the next one of the running domain on it: engine/libvirt/
checkpoints.py puts a checkpoint on record that has these bitmaps.

As all disks share a name, a bitmap counts only in the file that the parent backup's label names for
that disk (`identity_of`). A label names it only if the image recorded from that backup on.
"""

from __future__ import annotations

from engine.libvirt.binding import Domain
from engine.libvirt.checkpoints import name_for, prefix_of
from engine.libvirt.domains import DomainFacts
from engine.libvirt.machine import machine_of
from engine.libvirt.media import identity_with, medium_of
from engine.libvirt.setup import LiveSetup
from engine.snapshot.hold import HoldWish, Resting
from engine.snapshot.sources import BitmapPlan


def resting_domain(domain: Domain, facts: DomainFacts, setup: LiveSetup, wish: HoldWish) -> Resting:
    """What libvirt knows of it, and what its images' bitmaps are called."""
    machine, notes = machine_of(domain, facts, setup.tpm_directory)
    plans, identities = dict[str, BitmapPlan](), dict[str, str]()
    for disk in facts.disks:
        medium = medium_of(disk)
        if disk.format == "qcow2" and medium is not None:
            identities[disk.target] = identity = identity_with(disk, medium)
            before = wish.identities.get(disk.target, "")
            plans[disk.target] = _plan(setup.host, wish, medium, before, identity)
    return Resting(machine, notes, plans, identities)


def _plan(
    host: str, wish: HoldWish, medium: tuple[int, int], before: str, identity: str
) -> BitmapPlan:
    parent, why = "", ""
    if wish.parent and before == identity:
        parent = name_for(host, wish.parent)
    elif wish.parent:
        why = "its medium is another one" if before else "no bitmap since the parent backup"
    return BitmapPlan(
        parent=parent,
        new=name_for(host, wish.backup_uuid),
        keep=frozenset(name_for(host, backup) for backup in wish.kept),
        ours=prefix_of(host),
        why=why,
        medium=medium,
    )
