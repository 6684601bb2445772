"""Reading files of a point whose medium has bad places.

A medium that can't read a sector says so with the same error as one that is gone. What tells them
apart is the rest of the point: when its POINT can be read, from the medium and not from memory, and
the place still can't, then the place is damaged, as if its bytes were wrong. Else the point does
not answer, and the error stays what it was.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TypeVar

from storage.errors import Damaged
from storage.files.fs import Fs

ResultT = TypeVar("ResultT")

# EIO; what block devices say of a medium or a checksum; what XFS and ext4 say of their own blocks.
MEDIUM_ERRORS = frozenset({errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EUCLEAN, errno.EBADMSG})


class BadPlace(Damaged):
    """A place in a file can't be read, though the point answers."""


def open_to_read(fs: Fs, path: str) -> int:
    """Fs.open_read of a file on a point; BadPlace."""
    return _read(fs, path, path, lambda: fs.open_read(path))


def read_at(fs: Fs, fd: int, size_bytes: int, offset: int, path: str) -> bytes:
    """Fs.pread of a file on a point; BadPlace."""
    what = f"{path} at {offset}"
    return _read(fs, path, what, lambda: fs.pread(fd, size_bytes, offset))


def read_into(fs: Fs, fd: int, buffer: memoryview, offset: int, path: str) -> int:
    """Fs.preadv of a file on a point; BadPlace."""
    what = f"{path} at {offset}"
    return _read(fs, path, what, lambda: fs.preadv(fd, buffer, offset))


def _read(fs: Fs, path: str, what: str, read: Callable[[], ResultT]) -> ResultT:
    try:
        return read()
    except OSError as error:
        if error.errno not in MEDIUM_ERRORS or not _point_answers(fs, path):
            raise
    try:
        return read()
    except OSError as error:
        if error.errno not in MEDIUM_ERRORS:
            raise
        raise BadPlace(f"{what}: can't be read: {os.strerror(error.errno)}") from error


def _point_answers(fs: Fs, path: str) -> bool:
    """Whether the POINT above `path` can be read from the medium."""
    point, below, _ = path.rpartition("/domains/")
    if not below:
        return False
    try:
        fd = fs.open_read(f"{point}/POINT")
        try:
            fs.forget_cached(fd)
            return bool(fs.pread(fd, 1, 0))
        finally:
            fs.close(fd)
    except OSError:
        return False
