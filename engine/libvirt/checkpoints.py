"""Checkpoints: since when QEMU knows what a guest has written, in step with the backups.

A backup makes one, named by the host of ours and the backup. It is of use as long as the backup is
its point's newest of that VM. The parent's goes when the new backup is committed, a failed backup's
at once; what a killed service left goes with the next success. A checkpoint that is lost costs a
full read and nothing else.
"""

from __future__ import annotations

import logging

from engine.libvirt.binding import METADATA_ONLY, Domain, LibvirtFault
from engine.libvirt.jobxml import redefinition, tracked_by

log = logging.getLogger(__name__)

_PREFIX = "vmkeep"
_REDEFINE = 1
_VALIDATE = 1 << 2


def name_for(host: str, backup_uuid: str) -> str:
    """The checkpoint that begins with that backup."""
    return f"{_PREFIX}-{host}-{backup_uuid}"


def disks_since(domain: Domain, name: str, known_xml: str) -> tuple[frozenset[str], str]:
    """(the disks whose changes since that checkpoint are on record, why none are).

    One that the domain has lost, for it was defined anew, is put on record again from `known_xml`
    if the images still have its bitmaps.
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
    """Deletes one, or as much of it as can be; none there is no error."""
    try:
        checkpoint = domain.checkpointLookupByName(name)
    except LibvirtFault:
        return
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
    """Drops all of ours but those of the backups `kept`."""
    names = {name_for(host, backup) for backup in kept}
    for checkpoint in domain.listAllCheckpoints():
        name = checkpoint.getName()
        if name.startswith(f"{_PREFIX}-{host}-") and name not in names:
            drop(domain, name)


def _is_active(domain: Domain) -> bool:
    try:
        return bool(domain.isActive())
    except LibvirtFault:
        return False
