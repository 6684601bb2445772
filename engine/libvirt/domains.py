"""What libvirt's XML says of a domain or a storage pool, as far as a backup is concerned.

Pure functions on text. libvirt wrote the XML, on behalf of whoever may define domains; what is
missing or odd in it leaves a disk or a mark out, and never raises for a domain that libvirt took.

Marks are how a domain says where it belongs, in its <metadata>:

    <vmkeep:place xmlns:vmkeep="urn:vmkeep:place:1" namespace="shop" zone="cellar"
                  object_group="web" vm_type="linux" leave_out="no"/>
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass, field

MARKS_URI = "urn:vmkeep:place:1"
MARKS = ("namespace", "zone", "object_group", "vm_type", "leave_out")
AGENT_CHANNEL = "org.qemu.guest_agent.0"

_DISK_DEVICES = ("disk", "lun")
_FRAMES = ("encryption", "source/encryption", "source/slices")
_DIRECTORY_POOLS = ("dir", "fs", "netfs")
_MOST_MARK_CHARS = 200


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """A disk that has a medium. `source`: a file's or block device's path, else its name.

    `framed`: the disk is a part of its raw medium, inside an encryption's header or a slice.
    """

    target: str
    kind: str  # file, block, network, volume, …
    source: str
    format: str = "raw"
    share: bool = False
    framed: bool = False


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """A domain's XML, read. Disks in the XML's order, without cdroms, floppies and empty ones."""

    uuid: str
    name: str
    disks: tuple[DomainDisk, ...]
    marks: dict[str, str] = field(default_factory=dict)
    agent: str = ""  # the guest agent's channel: "" = none, connected, disconnected, unknown
    nvram: str = ""  # the file of the firmware's variables; what is none counts as unreadable
    tpm: str = ""  # the version of an emulated TPM


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """A storage pool that is a directory."""

    uuid: str
    name: str
    path: str


def read_domain(xml: str) -> DomainFacts:
    """The facts. ValueError for what is no domain's XML."""
    root = parsed(xml)
    disks = [_disk(node) for node in root.iterfind("devices/disk")]
    return DomainFacts(
        uuid=root.findtext("uuid", ""),
        name=root.findtext("name", ""),
        disks=tuple(disk for disk in disks if disk is not None),
        marks=_marks(root),
        agent=_agent(root),
        nvram=_nvram(root),
        tpm=_tpm(root),
    )


def read_pool(xml: str) -> PoolFacts | None:
    """The facts; None for a pool that is no directory. ValueError for what is no pool's XML."""
    root = parsed(xml)
    path = root.findtext("target/path", "")
    if root.get("type") not in _DIRECTORY_POOLS or not path.startswith("/"):
        return None
    return PoolFacts(root.findtext("uuid", ""), root.findtext("name", ""), path.rstrip("/") or "/")


def target_of(disk: ET.Element) -> str:
    """The name of a <disk> in its domain."""
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")


def parsed(xml: str) -> ET.Element:
    """The root element. ValueError."""
    try:
        return ET.fromstring(xml)
    except ET.ParseError as error:
        raise ValueError(f"not XML: {error}") from error


def _disk(node: ET.Element) -> DomainDisk | None:
    source, target = node.find("source"), node.find("target")
    if node.get("device", "disk") not in _DISK_DEVICES or source is None or target is None:
        return None
    kind, name, place = node.get("type", "file"), target.get("dev", ""), _place(source)
    if not place and kind not in ("file", "block"):
        place = f"{kind}:{_address(source)}"  # some disks have no name
    if not place or not name or node.find("readonly") is not None:
        return None
    driver = node.find("driver")
    return DomainDisk(
        target=name,
        kind=kind,
        source=place,
        format="raw" if driver is None else driver.get("type", "raw"),
        share=node.find("shareable") is not None,
        framed=any(node.find(path) is not None for path in _FRAMES),
    )


def _place(source: ET.Element) -> str:
    if source.get("volume"):
        return f"{source.get('pool', '')}/{source.get('volume')}"
    return next((source.get(key, "") for key in ("file", "dev", "name") if source.get(key)), "")


def _address(source: ET.Element) -> str:
    """What tells a source that has no name from others: all that it says of itself."""
    nodes = [source, *source.iterfind("host"), *source.iterfind("address")]
    return " ".join(value for node in nodes for value in node.attrib.values())


def _marks(root: ET.Element) -> dict[str, str]:
    node = root.find(f"metadata/{{{MARKS_URI}}}place")
    if node is None:
        return {}
    return {key: node.get(key, "")[:_MOST_MARK_CHARS] for key in MARKS if node.get(key)}


def _agent(root: ET.Element) -> str:
    for target in root.iterfind("devices/channel/target"):
        if target.get("name") == AGENT_CHANNEL:
            return target.get("state", "unknown")
    return ""


def _nvram(root: ET.Element) -> str:
    node = root.find("os/nvram")
    if node is None:
        return ""
    source = node.find("source")
    if source is None:
        return (node.text or "").strip()
    return source.get("file", "") or node.get("type", "unknown")


def _tpm(root: ET.Element) -> str:
    backend = root.find("devices/tpm/backend")
    if backend is None or backend.get("type") != "emulator":
        return ""
    return backend.get("version", "2.0")
