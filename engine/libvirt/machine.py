"""The domain itself, as it is kept with a backup: its XML, and the firmware's variables."""

from __future__ import annotations

import xml.etree.ElementTree as ET
import zlib

from engine.libvirt.binding import (
    XML_INACTIVE,
    XML_MIGRATABLE,
    XML_SECURE,
    Domain,
    LibvirtFault,
)
from engine.libvirt.domains import DomainFacts, parsed, target_of
from engine.model import Machine

MOST_XML_BYTES = 1 << 20
MOST_NVRAM_BYTES = 64 << 20
MOST_DEFLATED_BYTES = 256 << 10


def machine_of(
    domain: Domain, facts: DomainFacts, checkpoint: str
) -> tuple[Machine | None, tuple[str, ...]]:
    """(what is kept, notes on what is not)."""
    try:
        kept = domain.XMLDesc(XML_INACTIVE | XML_SECURE | XML_MIGRATABLE)
        xml = with_plugged_disks(kept, domain.XMLDesc(XML_SECURE))
    except (LibvirtFault, ValueError) as error:
        return None, (f"the domain's XML is not in the backup: {error}",)
    packed = _deflated(xml.encode())
    if not packed:
        return None, ("the domain's XML is not in the backup: it is too large",)
    nvram, note = _nvram(facts)
    return Machine(xml=packed, checkpoint=_deflated(checkpoint.encode()), nvram=nvram), note


def with_plugged_disks(kept: str, live: str) -> str:
    """`kept`, the XML of the domain's next start, with those of the disks that it has now, by
    `live`, which were plugged in until it stops. ValueError for what is no XML."""
    root, running = parsed(kept), parsed(live)
    devices = root.find("devices")
    there = {target_of(disk) for disk in root.iterfind("devices/disk")}
    for disk in running.iterfind("devices/disk"):
        if devices is not None and target_of(disk) not in there:
            for address in disk.findall("address"):
                disk.remove(address)
            devices.append(disk)
    return ET.tostring(root, encoding="unicode")


def inflated(packed: bytes) -> str:
    """The text; "" for what is none. Bounded, for labels may be anybody's."""
    return inflated_bytes(packed, MOST_XML_BYTES).decode(errors="replace")


def inflated_bytes(packed: bytes, most_bytes: int) -> bytes:
    """At most `most_bytes`; b"" for what is longer or damaged."""
    if not packed:
        return b""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(packed, most_bytes)
    except zlib.error:
        return b""
    return found if stream.eof else b""


def _deflated(content: bytes) -> bytes:
    """b"" for what is too large."""
    packed = zlib.compress(content) if 0 < len(content) <= MOST_NVRAM_BYTES else b""
    return packed if len(packed) <= MOST_DEFLATED_BYTES else b""


def _nvram(facts: DomainFacts) -> tuple[bytes, tuple[str, ...]]:
    if not facts.nvram:
        return b"", ()
    try:
        with open(facts.nvram, "rb") as file:
            packed = _deflated(file.read(MOST_NVRAM_BYTES + 1))
    except OSError as error:
        return b"", (f"the firmware's variables are not in the backup: {error.strerror}",)
    return packed, () if packed else ("the firmware's variables are not in the backup",)
