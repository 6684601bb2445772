"""What a qcow2 image says of itself, read without QEMU: size, features, what it stands on.

Only for volumes that the inventory declares to be qcow2: a raw volume's first bytes are its
guest's, who could make them look like an image with any file of ours as its backing file. For the
same reason a chain is followed only where every image names the format of what it stands on, and
only to regular files in directories that the caller allows.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias

from engine.errors import DiskServerRefused
from engine.snapshot.sources import open_volume, pool_errors

VolumeFormat: TypeAlias = Literal["raw", "qcow2"]

MOST_CHAIN = 64
_MAGIC = b"QFI\xfb"
_V2 = struct.Struct(
    ">4sIQIIQI"
)  # magic, version, backing offset and size, cluster bits, size, crypt
_V2_BYTES = 72
_FEATURES_AT = 72
_LENGTH_AT = 100
_EXTERNAL_DATA = 1 << 2
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_MOST_HEADER_BYTES = 64 << 10  # a cluster holds all of it; the smallest ones have 512 bytes
_MOST_NAME_BYTES = 1023


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """`size_bytes` is the disk's. `backing`: as written in the image, "" for none."""

    version: int
    size_bytes: int
    backing: str = ""
    backing_format: str = ""
    encrypted: bool = False
    external_data: bool = False


def read_header(fd: int, path: str) -> Qcow2Header:
    """The header of the image that `fd` is open on. DiskServerRefused if it is none."""
    with pool_errors(path):
        start = os.pread(fd, _MOST_HEADER_BYTES, 0)
    return parse_header(start, path)


def parse_header(start: bytes, path: str) -> Qcow2Header:
    """From the image's first bytes."""
    if len(start) < _V2_BYTES or not start.startswith(_MAGIC):
        raise DiskServerRefused(f"{path} is declared as qcow2, and is not")
    _, version, name_at, name_bytes, _, size_bytes, crypt = _V2.unpack_from(start)
    if version not in (2, 3) or (version == 3 and len(start) < _LENGTH_AT + 4):
        raise DiskServerRefused(f"{path}: a qcow2 image of version {version}")
    features, length = 0, _V2_BYTES
    if version == 3:
        (features,) = struct.unpack_from(">Q", start, _FEATURES_AT)
        (length,) = struct.unpack_from(">I", start, _LENGTH_AT)
    if name_at and not 0 < name_bytes <= _MOST_NAME_BYTES:
        raise DiskServerRefused(f"{path}: a backing file's name of {name_bytes} bytes")
    if name_at + name_bytes > len(start):
        raise DiskServerRefused(f"{path}: a backing file's name at {name_at}")
    return Qcow2Header(
        version=version,
        size_bytes=size_bytes,
        backing=os.fsdecode(start[name_at : name_at + name_bytes]) if name_at else "",
        backing_format=_backing_format(start, length),
        encrypted=crypt != 0,
        external_data=bool(features & _EXTERNAL_DATA),
    )


def _backing_format(start: bytes, at: int) -> str:
    while at + _EXTENSION.size <= len(start):
        kind, size_bytes = _EXTENSION.unpack_from(start, at)
        at += _EXTENSION.size
        if kind == _BACKING_FORMAT:
            return start[at : at + size_bytes].decode(errors="replace")
        if kind == 0:
            break
        at += size_bytes + -size_bytes % 8
    return ""


def chain_below(path: str, header: Qcow2Header, roots: Collection[str]) -> list[str]:
    """The files that an image stands on, nearest first: real paths of regular files in `roots`.

    DiskServerRefused for anything else: no declared format, an encrypted image, data in another
    file, a place that is not allowed. PoolUnreachable.
    """
    allowed = {os.path.realpath(root) for root in (*roots, os.path.dirname(path))}
    found: list[str] = []
    while True:
        _require_plain(path, header)
        if not header.backing:
            return found
        if len(found) == MOST_CHAIN:
            raise DiskServerRefused(f"{path}: over {MOST_CHAIN} backing files")
        below = _backing_path(path, header, allowed)
        found.append(below)
        if header.backing_format == "raw":
            return found
        with pool_errors(below):
            fd = open_volume(below)
        try:
            path, header = below, read_header(fd, below)
        finally:
            os.close(fd)


def _require_plain(path: str, header: Qcow2Header) -> None:
    if header.encrypted:
        raise DiskServerRefused(f"{path} is encrypted")
    if header.external_data:
        raise DiskServerRefused(f"{path} has its data in another file")


def _backing_path(path: str, header: Qcow2Header, allowed: Collection[str]) -> str:
    if header.backing_format not in ("raw", "qcow2"):
        raise DiskServerRefused(
            f"{path} does not declare its backing file as raw or qcow2; qemu-img rebase -u -F does"
        )
    if re.match(r"[A-Za-z][\w+.-]*:", header.backing):
        raise DiskServerRefused(f"{path} stands on {header.backing!r}, which is no file")
    real = os.path.realpath(os.path.join(os.path.dirname(path), header.backing))
    if os.path.dirname(real) not in allowed:
        raise DiskServerRefused(f"{path} stands on {real}, which is in no pool")
    return real
