"""Reading what is read once: past the page cache, unless it is there already.

A pack is written past the cache, so a restore finds it on the device. To bring it in by way of the
cache means a copy, pages that others could use, and waiting for one piece while the next could be
under way. What the cache has of a file mincore() says, without bringing anything in.
"""

from __future__ import annotations

import ctypes
import mmap
import os

PAGE_BYTES = 4096
# What is smaller comes sooner with what lies around it, which the cache takes along.
LEAST_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def lead_bytes(offset: int) -> int:
    """Where in a page-aligned buffer to put what lies at `offset` of a file, so that it can be read
    past the cache."""
    return offset % PAGE_BYTES


def read_once(fd: int, view: memoryview, offset: int) -> int:
    """Reads the beginning of `view`, as much as goes well in this way; returns the byte count.

    That may be 0: what is wrong, and the rest, is for an ordinary read.
    """
    if len(view) < LEAST_BYTES or (_address(view) - offset) % PAGE_BYTES:
        return 0
    try:
        return 0 if is_cached(fd, len(view), offset) else _read_pages(fd, view, offset)
    except (OSError, ValueError):  # ValueError: the file ends before it
        return 0


def _address(view: memoryview | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def is_cached(fd: int, size_bytes: int, offset: int) -> bool:
    """Whether at least half of it is in the page cache."""
    lead = lead_bytes(offset)
    pages = -(-(lead + size_bytes) // PAGE_BYTES)
    found = (ctypes.c_ubyte * pages)()
    # Nothing is ever looked at through this, so it is no matter that a file may shrink.
    with mmap.mmap(fd, lead + size_bytes, access=mmap.ACCESS_COPY, offset=offset - lead) as mapped:
        if _libc.mincore(ctypes.c_void_p(_address(mapped)), ctypes.c_size_t(len(mapped)), found):
            return True
    return 2 * bytes(found).count(0) <= pages


def _read_pages(fd: int, view: memoryview, offset: int) -> int:
    """Takes whole pages: those of which only a part is wanted come into memory of their own."""
    lead, rest = lead_bytes(offset), lead_bytes(offset + len(view))
    first = PAGE_BYTES - lead if lead else 0
    last = len(view) - rest
    edges = memoryview(mmap.mmap(-1, 2 * PAGE_BYTES))
    before, after = edges[:PAGE_BYTES], edges[PAGE_BYTES:]
    pieces = [*([before] if lead else []), view[first:last], *([after] if rest else [])]
    direct_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        count = os.preadv(direct_fd, pieces, offset - lead)
    finally:
        os.close(direct_fd)
    view[:first] = before[lead:] if lead else b""
    view[last:] = after[:rest]
    return max(0, min(count - lead, len(view)))
