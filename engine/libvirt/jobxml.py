"""The XML that a backup job and its checkpoint are asked for with.

Every disk has a scratch file of its own name: libvirt 9.0 fails without. A disk that is not listed
is in neither.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine.libvirt.domains import parsed

_LONG_AGO = "1"  # libvirt wants a time, and does nothing with it


@dataclass(frozen=True, slots=True)
class JobDisk:
    """A disk of the job. `tracked`: it gets a bitmap. `base`: the checkpoint to build on, or ""."""

    target: str
    scratch: str
    tracked: bool
    base: str = ""


def export_bitmap(target: str) -> str:
    """The name that the NBD server shows a disk's dirty bitmap by."""
    return f"backup-{target}"


def backup_xml(disks: Sequence[JobDisk], socket: str) -> str:
    """For virDomainBackupBegin, in pull mode."""
    root = ET.Element("domainbackup", mode="pull")
    ET.SubElement(root, "server", transport="unix", socket=socket)
    listed = ET.SubElement(root, "disks")
    for disk in disks:
        node = ET.SubElement(listed, "disk", name=disk.target, backup="yes", type="file")
        node.set("exportname", disk.target)
        node.set("backupmode", "incremental" if disk.base else "full")
        if disk.base:
            node.set("incremental", disk.base)
            node.set("exportbitmap", export_bitmap(disk.target))
        ET.SubElement(node, "driver", type="qcow2")
        ET.SubElement(node, "scratch", file=disk.scratch)
    return ET.tostring(root, encoding="unicode")


def checkpoint_xml(name: str, disks: Sequence[JobDisk]) -> str:
    """For the checkpoint that begins with the job; "" when no disk could have a bitmap."""
    if not any(disk.tracked for disk in disks):
        return ""
    tracked = [disk.target for disk in disks if disk.tracked]
    return ET.tostring(_checkpoint(name, tracked, [d.target for d in disks]), encoding="unicode")


def record_xml(name: str, tracked: Collection[str], targets: Sequence[str]) -> str:
    """For putting a checkpoint on record whose bitmaps the images of `tracked` have, out of all
    `targets` of the domain; "" when there are none."""
    if not tracked:
        return ""
    root = _checkpoint(name, tracked, targets)
    ET.SubElement(root, "creationTime").text = _LONG_AGO
    return ET.tostring(root, encoding="unicode")


def _checkpoint(name: str, tracked: Collection[str], targets: Sequence[str]) -> ET.Element:
    root = ET.Element("domaincheckpoint")
    ET.SubElement(root, "name").text = name
    listed = ET.SubElement(root, "disks")
    for target in targets:
        kind = "bitmap" if target in tracked else "no"
        ET.SubElement(listed, "disk", name=target, checkpoint=kind)
    return root


def tracked_by(xml: str) -> frozenset[str]:
    """The disks that a checkpoint has a bitmap of. ValueError."""
    nodes = parsed(xml).iterfind("disks/disk")
    return frozenset(n.get("name", "") for n in nodes if n.get("checkpoint") == "bitmap")


def redefinition(xml: str) -> str:
    """A checkpoint's XML for putting it on record again: without its parent. ValueError."""
    root = parsed(xml)
    for name in ("parent", "domain"):
        for node in root.findall(name):
            root.remove(node)
    return ET.tostring(root, encoding="unicode")


def job_socket(xml: str) -> str:
    """Where a running backup job serves its disks. ValueError."""
    server = parsed(xml).find("server")
    return "" if server is None else server.get("socket", "")
