"""Clones and extent maps: the ioctls of file systems with reflinks, and comparing two maps.

FICLONE makes a file share all blocks of another. FIEMAP tells where the blocks of a file are. While
two clones are both held, no block of theirs is overwritten or given to anybody else; so where both
maps name the same block for the same offset, the content is the same. Everything that does not say
plainly where its bytes are counts as different: see `_PLAIN`. What is not in a map, or
preallocated (UNWRITTEN), reads as zeros.

All calls go through ctypes, which lets go of the GIL: a clone of a large fragmented file takes
seconds. `fcntl.ioctl` keeps the GIL with a mutable buffer of more than 1,024 bytes.
Read engine/snapshot/tracking.py next.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_FICLONE = 0x40049409
_FS_IOC_FIEMAP = 0xC020660B
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IOC_GETVERSION = 0x80087601
_FS_IOC_GETFSUUID = 0x80111500
_FS_NOCOW_FL = 0x00800000

_XFS_MAGIC = 0x58465342
_BTRFS_MAGIC = 0x9123683E

_FIEMAP_SYNC = 1
_LAST, _UNWRITTEN, _MERGED, _SHARED = 0x1, 0x800, 0x1000, 0x2000
# All flags but these make an extent one whose place is not known for sure: UNKNOWN, DELALLOC,
# ENCODED (compressed: only the whole compressed extent has a place), DATA_ENCRYPTED, NOT_ALIGNED,
# DATA_INLINE, DATA_TAIL, and what the kernel may learn yet.
_PLAIN = _LAST | _UNWRITTEN | _MERGED | _SHARED

_HEADER = struct.Struct("=QQLLLL")
_EXTENT = struct.Struct("=QQQ16xL12x")
_BATCH = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a file: bytes `start` to `end`, on the medium from `physical`.

    `flags` without LAST and SHARED, which change without the content.
    """

    start: int
    end: int
    physical: int
    flags: int = 0

    @property
    def zero(self) -> bool:
        """Reads as zeros, as a hole does."""
        return bool(self.flags & _UNWRITTEN) and not self.flags & ~_PLAIN

    @property
    def sure(self) -> bool:
        """Whether the same place means the same content."""
        return not self.flags & ~_PLAIN and self.physical != 0

    def goes_on_as(self, other: Extent) -> bool:
        """Whether the two are one piece, on the medium too."""
        return (
            self.sure
            and (self.end, self.flags) == (other.start, other.flags)
            and self.physical + self.end - self.start == other.physical
        )


class MapUnclear(Exception):
    """What the file system answered can't be relied on."""


def clone_into(target_fd: int, source_fd: int) -> None:
    """Makes the empty file `target_fd` a clone of the other. Raises OSError.

    What was written to the source before is in it, dirty pages included. Writers of the source
    stand still meanwhile; it takes about 20 µs an extent on XFS, 10 on btrfs.
    """
    _ioctl(target_fd, _FICLONE, ctypes.c_void_p(source_fd))


def share_cow_flag(source_fd: int, target_fd: int) -> None:
    """btrfs clones only between files that are both copy-on-write, or both not. Raises OSError."""
    flags = ctypes.c_int(0)
    _ioctl(source_fd, _FS_IOC_GETFLAGS, ctypes.byref(flags))
    if flags.value & _FS_NOCOW_FL:
        _ioctl(target_fd, _FS_IOC_SETFLAGS, ctypes.byref(ctypes.c_int(_FS_NOCOW_FL)))


def keeps_shared_blocks(fd: int) -> bool:
    """Whether the file system is one of which this module's reasoning is known to hold."""
    answer = (ctypes.c_long * 64)()
    _check(_libc.fstatfs(fd, answer))
    return answer[0] in (_XFS_MAGIC, _BTRFS_MAGIC)


def file_system_id(fd: int) -> str:
    """The uuid of the file system; where the kernel does not tell (before 6.9), another id of it.

    Raises OSError.
    """
    answer = (ctypes.c_ubyte * 17)()
    try:
        _ioctl(fd, _FS_IOC_GETFSUUID, answer)
    except OSError:
        return f"{os.fstatvfs(fd).f_fsid:x}"
    return bytes(answer[1 : 1 + answer[0]]).hex()


def generation(fd: int) -> int:
    """What tells two files apart that had the same inode number one after the other. OSError."""
    answer = ctypes.c_long(0)
    _ioctl(fd, _FS_IOC_GETVERSION, ctypes.byref(answer))
    return answer.value & 0xFFFFFFFF


def count_extents(fd: int) -> int:
    """How many extents a file has; quick. Raises OSError."""
    header = ctypes.create_string_buffer(_HEADER.pack(0, (1 << 64) - 1, 0, 0, 0, 0), _HEADER.size)
    _ioctl(fd, _FS_IOC_FIEMAP, header)
    mapped = _HEADER.unpack(header.raw)[3]
    assert isinstance(mapped, int)
    return mapped


def extent_map(fd: int, size_bytes: int) -> list[Extent]:
    """The extents below `size_bytes`, ascending, apart, cut at it. Raises OSError, MapUnclear.

    What is one piece is one extent, though the file system cuts it where sharing begins or ends.
    """
    found: list[Extent] = []
    for start, physical, length, flags in _raw_extents(fd, size_bytes):
        end = min(start + length, size_bytes)
        one = Extent(start, end, physical, flags & ~(_LAST | _SHARED))
        if found and found[-1].goes_on_as(one):
            before = found.pop()
            one = Extent(before.start, one.end, before.physical, one.flags)
        found.append(one)
    return found


def unshared_bytes(fd: int) -> int:
    """How much room only this file takes up: what deleting it would free. OSError, MapUnclear."""
    size_bytes = os.fstat(fd).st_size
    return sum(
        length for _, _, length, flags in _raw_extents(fd, size_bytes) if not flags & _SHARED
    )


def _raw_extents(fd: int, size_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, physical, length, flags) of what begins below `size_bytes`, ascending, apart."""
    position = 0
    while position < size_bytes:
        batch = _batch(fd, position, size_bytes - position)
        before = position
        for start, physical, length, flags in batch:
            if start >= size_bytes:
                return
            known = max(position - start, 0)  # a piece of what the last batch ended with
            if length > known:
                yield start + known, physical + known, length - known, flags
                position = start + length
        if not batch or batch[-1][3] & _LAST:
            return
        if position == before:
            raise MapUnclear(f"the extent map stands still at {position}")


def _batch(fd: int, start: int, length: int) -> list[tuple[int, int, int, int]]:
    """(start, physical, length, flags) of the next extents."""
    size = _HEADER.size + _BATCH * _EXTENT.size
    head = _HEADER.pack(start, length, _FIEMAP_SYNC, 0, _BATCH, 0)
    buffer = ctypes.create_string_buffer(head, size)
    _ioctl(fd, _FS_IOC_FIEMAP, buffer)
    view = memoryview(buffer)
    mapped = _HEADER.unpack(view[: _HEADER.size])[3]
    end = _HEADER.size + min(mapped, _BATCH) * _EXTENT.size
    return list(_EXTENT.iter_unpack(view[_HEADER.size : end]))


def differences(
    before: Iterable[Extent], after: Iterable[Extent], size_bytes: int
) -> list[tuple[int, int]]:
    """(offset, length), ascending and apart, of what may differ between two files of that size.

    Sound only for maps of two clones of one file system that were held while both were read.
    """
    found: list[tuple[int, int]] = []
    for start, end, old, new in _side_by_side(before, after, size_bytes):
        if _same(old, new, start):
            continue
        if found and found[-1][0] + found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end - start))
    return found


def _same(old: Extent | None, new: Extent | None, at: int) -> bool:
    if old is None or new is None:
        return old is new
    places = old.physical + at - old.start, new.physical + at - new.start
    return old.sure and new.sure and places[0] == places[1]


def _side_by_side(
    before: Iterable[Extent], after: Iterable[Extent], size_bytes: int
) -> Iterator[tuple[int, int, Extent | None, Extent | None]]:
    """(from, to, the extent there before, and after): pieces in which neither begins or ends."""
    olds = iter([one for one in before if not one.zero])
    news = iter([one for one in after if not one.zero])
    old, new = next(olds, None), next(news, None)
    at = 0
    while at < size_bytes:
        while old is not None and old.end <= at:
            old = next(olds, None)
        while new is not None and new.end <= at:
            new = next(news, None)
        bounds = [size_bytes]
        bounds += [one.start if one.start > at else one.end for one in (old, new) if one]
        end = min(bounds)
        yield (
            at,
            end,
            old if old is not None and old.start <= at else None,
            new if new is not None and new.start <= at else None,
        )
        at = end


def _ioctl(fd: int, request: int, argument: object) -> None:
    _check(_libc.ioctl(fd, request, argument))


def _check(status: int) -> None:
    if status < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
