"""A seal: the BLAKE3 of a file that nobody writes, beside it, until somebody opens it again.

A file that is opened loses its seal first, durably. So a seal that is there speaks of the file as
it was closed, whatever happened to the machine since; a file without one was not closed.
"""

from __future__ import annotations

import contextlib
import os

from blake3 import blake3

from storage.errors import Damaged

_PIECE = 4 << 20


def put_seal(path: str) -> None:
    """Seals the file. Failing to is no error: the file then counts as one that was not closed."""
    fresh = f"{path}.seal.new"
    with contextlib.suppress(OSError):
        with open(fresh, "w", encoding="ascii") as file:
            file.write(_digest(path))
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, f"{path}.seal")


def break_seal(path: str) -> bool:
    """Takes the seal away, durably; whether there was one. Damaged, and it stays, if it does not
    fit."""
    try:
        with open(f"{path}.seal", encoding="ascii", errors="replace") as file:
            sealed = file.read(1000)
    except FileNotFoundError:
        return False
    found = _digest(path) if os.path.exists(path) else "nothing"
    if sealed != found:
        raise Damaged(f"{path} is not what it was when it was closed")
    os.unlink(f"{path}.seal")
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    return True


def _digest(path: str) -> str:
    hasher = blake3()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            hasher.update(piece)
    return hasher.hexdigest()
