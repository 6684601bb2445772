"""How large a domain's disk is, without putting its guest at risk.

libvirt asks a running QEMU for all its block nodes to answer that, and a QEMU that is creating a
qcow2 image then may find that node half open and abort (seen with 7.2.22:
`qcow2_get_specific_info: Assertion 'false' failed`), and the guest with it. QEMU creates images in
snapshots and in others' backups (ours: scratch.py). So a look asks the medium where it can. A
backup has to know QEMU's own number, and asks for it while the domain has no job.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.libvirt.binding import Domain, LibvirtFault
from engine.qemu.header import read_header

if TYPE_CHECKING:
    from engine.libvirt.domains import DomainDisk

_SECTOR_BYTES = 512


def capacity_of(domain: Domain, disk: DomainDisk, *, active: bool) -> int:
    """In bytes; 0 when nobody can be asked. `active`: whether a QEMU has the disk, which takes it
    to be as large as its medium was when QEMU looked last: see size_by_libvirt."""
    found = size_by_medium(disk) if active else 0
    return found or size_by_libvirt(domain, disk, active=active)


def size_by_libvirt(domain: Domain, disk: DomainDisk, *, active: bool) -> int:
    """In bytes, as QEMU has it if it is active; 0 if libvirt can't say, or the domain has a job."""
    try:
        if active and domain.jobInfo()[0] != 0:
            return 0
        return int(domain.blockInfo(disk.target)[0])
    except LibvirtFault:
        return 0


def size_by_medium(disk: DomainDisk) -> int:
    """In whole sectors, as QEMU counts them; 0 where that takes more than we know."""
    if disk.kind not in ("file", "block") or disk.format not in ("raw", "qcow2") or disk.framed:
        return 0
    try:
        fd = os.open(disk.source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        if disk.format == "qcow2":
            return read_header(fd, disk.source).size_bytes // _SECTOR_BYTES * _SECTOR_BYTES
        return -(-os.lseek(fd, 0, os.SEEK_END) // _SECTOR_BYTES) * _SECTOR_BYTES
    except (OSError, EngineError):
        return 0
    finally:
        os.close(fd)
