"""Checkpoints: since when QEMU knows what a guest has written, in step with the backups.

A backup makes one, named by the host of ours and the backup. It is of use as long as the backup is
its point's newest of that VM. The parent's goes when the new backup is committed, a failed backup's
at once; what a killed service left goes with the next success. A checkpoint that is lost costs a
full read and nothing else.

To libvirt a checkpoint is a name on record; what counts is the bitmap of that name in each image. A
backup of the stopped domain leaves such bitmaps (resting.py), and nothing on record. libvirt takes
a checkpoint's record from us if QEMU says that the bitmaps are there, recording and whole.
"""

from __future__ import annotations

import logging

from engine.errors import EngineError
from engine.libvirt.binding import METADATA_ONLY, Domain, LibvirtFault
from engine.libvirt.domains import read_domain
from engine.libvirt.half_begun import is_half_begun
from engine.libvirt.jobxml import record_xml, redefinition, tracked_by
from engine.libvirt.media import has_bitmaps
from engine.qemu.bitmaps import bitmaps_of
from engine.snapshot.sources import BITMAP_PREFIX

log = logging.getLogger(__name__)

_REDEFINE = 1
_VALIDATE = 1 << 2


def prefix_of(host: str) -> str:
    """What the names of all our checkpoints begin with."""
    return f"{BITMAP_PREFIX}{host}-"


def name_for(host: str, backup_uuid: str) -> str:
    """The checkpoint, and the bitmaps, that begin with that backup."""
    return f"{prefix_of(host)}{backup_uuid}"


def disks_since(domain: Domain, name: str, known_xml: str) -> tuple[frozenset[str], str]:
    """(the disks whose changes since that checkpoint are on record, why none are).

    One that the domain does not have, as it was defined anew, or as the backup was one of the
    stopped domain, is put on record from `known_xml` if the images have its bitmaps.
    """
    try:
        xml = domain.checkpointLookupByName(name).getXMLDesc()
    except LibvirtFault:
        if not known_xml:
            return frozenset(), "the parent's checkpoint is gone"
        try:
            domain.checkpointCreateXML(redefinition(known_xml), _REDEFINE | _VALIDATE)
        except (LibvirtFault, ValueError) as error:
            return frozenset(), f"the parent's checkpoint is gone ({error})"
        xml = known_xml
    try:
        return tracked_by(xml), ""
    except ValueError as error:
        return frozenset(), f"the parent's checkpoint can't be read ({error})"


def xml_of(domain: Domain, name: str) -> str:
    """What is needed to put it on record again; "" when there is none."""
    try:
        return redefinition(domain.checkpointLookupByName(name).getXMLDesc())
    except (LibvirtFault, ValueError):
        return ""


def drop(domain: Domain, name: str) -> None:
    """Deletes one, or as much of it as can be; none there is no error. Not while anybody's job is
    on, which may have QEMU create an image: libvirt asks for the nodes first (capacity.py)."""
    try:
        checkpoint = domain.checkpointLookupByName(name)
    except LibvirtFault:
        return
    if _is_busy(domain):
        log.info("checkpoint_kept", extra={"checkpoint": name, "why": "a job is on"})
        return  # the next success does it
    try:
        checkpoint.delete()
    except LibvirtFault as error:
        log.info("checkpoint_kept", extra={"checkpoint": name, "why": str(error)})
        if not _is_active(domain):
            return  # its bitmap can't be deleted now: the next success does it
        try:
            checkpoint.delete(METADATA_ONLY)
        except LibvirtFault as again:
            log.warning("checkpoint_kept", extra={"checkpoint": name, "why": str(again)})


def sweep(domain: Domain, host: str, kept: frozenset[str]) -> None:
    """Drops all of ours but those of the backups `kept`, also those that are in the images only."""
    names = {name_for(host, backup) for backup in kept}
    known = {checkpoint.getName() for checkpoint in domain.listAllCheckpoints()}
    stale = {name for name in known if name.startswith(prefix_of(host))} - names
    if _is_active(domain):  # else QEMU does not have the images, and can't remove any of it
        stale |= _put_on_record(domain, host, known | names)
    for name in sorted(stale):
        drop(domain, name)


def _put_on_record(domain: Domain, host: str, known: set[str]) -> set[str]:
    """The names, none of `known`, that bitmaps of ours in the images have; libvirt knows them now.

    What can't be looked into, and what libvirt refuses, is left for later.
    """
    disks = read_domain(domain.XMLDesc()).disks
    found: dict[str, list[str]] = {}
    for disk in filter(has_bitmaps, disks):
        try:
            names = bitmaps_of(disk.source)
        except EngineError as error:
            log.info("bitmaps_not_seen", extra={"volume": disk.source, "why": str(error)})
            continue
        for name in names:
            if name.startswith(prefix_of(host)) and name not in known:
                found.setdefault(name, []).append(disk.target)
    for name, targets in found.items():
        try:
            xml = record_xml(name, targets, [disk.target for disk in disks])
            domain.checkpointCreateXML(xml, _REDEFINE)
        except LibvirtFault as error:
            log.info("bitmap_kept", extra={"checkpoint": name, "why": str(error)})
    return set(found)


def _is_active(domain: Domain) -> bool:
    try:
        return bool(domain.isActive())
    except LibvirtFault:
        return False


def _is_busy(domain: Domain) -> bool:
    """Whether it has a job, or one is beginning; a domain that is stopped has none."""
    try:
        return domain.jobInfo()[0] != 0
    except LibvirtFault as error:
        return is_half_begun(error)
