"""The domain itself, as kept with a backup: its XML, the firmware's variables, its TPM's state."""

from __future__ import annotations

import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable
from functools import partial

from engine.libvirt.binding import (
    XML_INACTIVE,
    XML_MIGRATABLE,
    XML_SECURE,
    Domain,
    LibvirtFault,
)
from engine.libvirt.domains import DomainFacts, parsed, target_of
from engine.libvirt.files import read_bounded
from engine.libvirt.tpm import read_tpm
from engine.model import Machine

MOST_XML_BYTES = 1 << 20
MOST_NVRAM_BYTES = 64 << 20
MOST_DEFLATED_BYTES = 256 << 10


def machine_of(
    domain: Domain, facts: DomainFacts, tpm_directory: str, checkpoint: str = ""
) -> tuple[Machine | None, tuple[str, ...]]:
    """(what is kept, notes on what is not)."""
    try:
        kept = domain.XMLDesc(XML_INACTIVE | XML_SECURE | XML_MIGRATABLE)
        xml = with_plugged_disks(kept, domain.XMLDesc(XML_SECURE))
    except (LibvirtFault, ValueError) as error:
        return None, (f"the domain's XML is not in the backup: {error}",)
    packed = deflated(xml.encode())
    if not packed:
        return None, ("the domain's XML is not in the backup: it is too large",)
    nvram, notes = b"", tuple[str, ...]()
    if facts.nvram:
        what = "the firmware's variables are not"
        nvram, notes = _small_file(what, partial(read_bounded, facts.nvram, MOST_NVRAM_BYTES))
    tpm = b""
    if facts.tpm:
        read = partial(read_tpm, tpm_directory, facts.uuid, facts.tpm)
        tpm, more = _small_file("the TPM's state is not", read)
        notes += more
    return Machine(packed, deflated(checkpoint.encode()), nvram, tpm), notes


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


def deflated(content: bytes) -> bytes:
    """b"" for what is empty or too large."""
    packed = zlib.compress(content) if 0 < len(content) <= MOST_NVRAM_BYTES else b""
    return packed if len(packed) <= MOST_DEFLATED_BYTES else b""


def _small_file(what: str, read: Callable[[], bytes]) -> tuple[bytes, tuple[str, ...]]:
    """(the file, deflated; a note if it is not kept)."""
    try:
        packed = deflated(read())
        why = "" if packed else "it is empty or too large"
    except OSError as error:
        packed, why = b"", error.strerror or str(error)
    return packed, (f"{what} in the backup: {why}",) if why else ()
