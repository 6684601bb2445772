"""LMDB's lock file, in memory instead of beside the data.

Theory: LMDB keeps the table of its readers in `lock.mdb` and writes to it, through shared memory,
when a read begins and when it ends. Where the medium does not answer, such a write waits in a page
fault, and py-lmdb has the interpreter's lock meanwhile: every thread of the process would stand
still, for a read whose pages are all in memory. On a full file system, or over a bad sector, the
fault is a SIGBUS, which ends the process. We share no environment with another process, so the
table need not be a file that others find: LMDB is given a directory in memory, with its lock file
and a link to the data.

Whether a process has an environment open is told by a lock on the directory of its data.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator

READERS = 1024  # threads that may be inside a read at once
# LMDB 0.9: a header of two cache lines, then a cache line a reader. A little more does no harm.
_SIZE_BYTES = (READERS + 64) * 64
_MEMORY = "/dev/shm"


@contextlib.contextmanager
def lock_in_memory(directory: str) -> Iterator[str]:
    """What to give to lmdb.open for the data in `directory`; by the end LMDB has all of it open.

    Raises OSError, also when there is no memory for the lock file: later that would be a SIGBUS.
    """
    with tempfile.TemporaryDirectory(prefix="vmkeep-", dir=_MEMORY) as place:
        os.symlink(os.path.join(os.path.abspath(directory), "data.mdb"), f"{place}/data.mdb")
        with open(f"{place}/lock.mdb", "xb") as file:
            os.posix_fallocate(file.fileno(), 0, _SIZE_BYTES)
        yield place


def occupy(directory: str) -> int:
    """Tells `is_occupied` that the environment there is open, until the descriptor is closed.

    Raises OSError; BlockingIOError when it is open already.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_occupied(directory: str) -> bool:
    """Whether a process, this one included, has the environment there open. Raises OSError."""
    try:
        os.close(occupy(directory))
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
