"""Memory that large reads and direct writes go through.

In huge pages where the kernel has them: a device then gets a few long pieces, not a thousand pages
in requests of a quarter of that each. It has to be private for this. What `mmap` gives otherwise is
a file in memory, for which Linux has huge pages turned off.
"""

from __future__ import annotations

import contextlib
import mmap

_HUGE_BYTES = 2 << 20
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def large_buffer(size_bytes: int) -> memoryview:
    """New memory of so many bytes, all zeros, that begins at a page.

    It goes with the last view of it.
    """
    # In whole huge pages, since newer kernels align just such maps to them.
    memory = mmap.mmap(-1, -(-size_bytes // _HUGE_BYTES) * _HUGE_BYTES, flags=_PRIVATE)
    # A fork while the device writes into it may leave us with the old content (open(2), O_DIRECT).
    memory.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size_bytes]
