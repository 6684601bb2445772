"""What a disk's medium is: which one, and whether QEMU can keep a bitmap in it.

A bitmap is found by its name, and all disks of a domain have it by the same. So a disk whose medium
is another one than at the parent's backup is not believed: its bitmap may be another disk's.
"""

from __future__ import annotations

import os

from engine.libvirt.domains import DomainDisk

_QCOW2 = b"QFI\xfb"
_HEADER_BYTES = 8
_MOST_CHARS = 4096


def medium_of(disk: DomainDisk) -> tuple[int, int] | None:
    """(device, inode) of its file; None if it is none that we can see."""
    try:
        found = os.stat(disk.source)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def identity_of(disk: DomainDisk) -> str:
    """Equal only for the same file, device or name."""
    return identity_with(disk, medium_of(disk))


def identity_with(disk: DomainDisk, medium: tuple[int, int] | None) -> str:
    """`identity_of`, for a medium that was looked at before."""
    inode = f"{medium[0]}:{medium[1]}" if medium else ""
    return f"{disk.kind}:{disk.format}:{inode}:{disk.source}"[:_MOST_CHARS]


def has_bitmaps(disk: DomainDisk) -> bool:
    """qcow2 has, from its version 3 on. A file that we can't look into is believed to be one."""
    if disk.format != "qcow2":
        return False
    try:
        with open(disk.source, "rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError:
        return True
    return header[:4] == _QCOW2 and int.from_bytes(header[4:], "big") >= 3
