"""LMDB's lock file with all of its room on the medium.

Theory: LMDB makes the file sparse and writes to it through shared memory, a page when it is first
needed. On a full file system there is no page to be had, and the process gets SIGBUS, which ends
it. So its room is set aside before LMDB opens it; then a lack of room is an ordinary error.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct

READERS = 1024  # threads that may be inside a read at once
# LMDB 0.9: a header of two cache lines, then a cache line a reader. A little more does no harm.
_SIZE_BYTES = (READERS + 64) * 64
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's is
_SET_FLAGS = 0x40086602  # FS_IOC_SETFLAGS
_NO_COW = 0x00800000  # FS_NOCOW_FL: btrfs would need new room whenever the file changes


def allocate_lock_file(directory: str) -> None:
    """Before lmdb.open of the environment in `directory`, which this process does not have open:
    closing a file drops the process's locks on it. Raises OSError when there is no room."""
    fd = _opened(os.path.join(directory, "lock.mdb"))
    try:
        found = os.fstat(fd)
        if not found.st_size:
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, _SET_FLAGS, struct.pack("l", _NO_COW))
        # XFS wants free blocks even for setting aside what is set aside already.
        if found.st_blocks * _BLOCK_BYTES < _SIZE_BYTES:
            os.posix_fallocate(fd, 0, _SIZE_BYTES)
    finally:
        os.close(fd)


def _opened(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)
    try:
        while os.read(fd, _SIZE_BYTES):
            pass
    except OSError:
        os.close(fd)
        os.unlink(path)
        return os.open(path, flags, 0o600)
    return fd
