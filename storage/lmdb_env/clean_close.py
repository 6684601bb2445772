"""Whether a file was closed cleanly, and is still what it was then: its seal tells.

The seal is the BLAKE3 of a file that nobody writes, beside it, until somebody opens it again. A
file that is opened loses its seal first, durably. So a seal that is there speaks of the file as
it was closed, whatever happened to the machine since; a file without one was not closed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from blake3 import blake3

from storage.errors import Damaged
from storage.files.bad_places import MEDIUM_ERRORS
from storage.files.fs import OsFs

_PIECE = 4 << 20


def put_seal(path: str) -> None:
    """Seals the file. Failing to is no error: the file then counts as one that was not closed."""
    fresh = f"{path}.seal.new"
    with contextlib.suppress(OSError, Damaged):
        with open(fresh, "w", encoding="ascii") as file:
            file.write(_digest(path))
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, f"{path}.seal")


def break_seal(path: str) -> bool:
    """Takes the seal away, durably; whether there was one. Damaged, and it stays, if it does not
    fit, or one of the two can't be read: the medium has lost something then, too."""
    try:
        sealed = _read_whole(f"{path}.seal")
    except FileNotFoundError:
        return False
    found = _digest(path).encode() if os.path.exists(path) else b"nothing"
    if sealed != found:
        raise Damaged(f"{path} is not what it was when it was closed")
    os.unlink(f"{path}.seal")
    OsFs().fsync_dir(os.path.dirname(path))
    return True


def _read_whole(path: str) -> bytes:
    return b"".join(_pieces(path))


def _digest(path: str) -> str:
    hasher = blake3()
    for piece in _pieces(path):
        hasher.update(piece)
    return hasher.hexdigest()


def _pieces(path: str) -> Iterator[bytes]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while piece := os.read(fd, _PIECE):
            yield piece
    except OSError as error:
        if error.errno not in MEDIUM_ERRORS:
            raise
        raise Damaged(f"{path}: can't be read: {os.strerror(error.errno)}") from error
    finally:
        os.close(fd)
