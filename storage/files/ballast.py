"""Ballast: room on a full point for what makes room.

Theory: deleting writes before it frees: a record, and the pages of the view that change. On a file
system that somebody else has filled to the last byte neither fits. So each domain keeps a file of
allocated, unused room. What may not fail for want of room (all but backups, imports and
checkpoints) unlinks it when it meets "no space", and goes on in the room that this gives.

It is made again at once, out of half of what is free then, so that it serves more than once; and in
full when there is room. It says nothing, so it may be lost, or deleted by anybody, at any time.

Before that there is a reserve: room that backups, imports and checkpoints leave free.

Size: as large as the view, since a delete may write all of it anew; no less than BALLAST_BYTES, and
no more than BALLAST_SHARE of the file system.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from storage.errors import PointFull, StorageError
from storage.files.fs import Fs, Room
from storage.files.publish import close_discarded, discard

BALLAST_BYTES = 8 << 20
BALLAST_SHARE = 50
SMALLEST_BYTES = 64 << 10
RESERVE_BYTES = 64 << 20
RESERVE_SHARE = 50  # of a small file system not more

ResultT = TypeVar("ResultT")

log = logging.getLogger(__name__)


def reserve_bytes(room: Room) -> int:
    """What is kept free on a file system of that size, for the small writes that deleting takes."""
    return min(RESERVE_BYTES, room.capacity_bytes // RESERVE_SHARE)


def ballast_size(capacity_bytes: int, free_bytes: int, view_bytes: int) -> int:
    """How large it is to be, given the file system's size, what is free without it, and how large
    the view is. 0: there is no room for any."""
    wanted = min(max(BALLAST_BYTES, view_bytes), capacity_bytes // BALLAST_SHARE)
    size = min(wanted, free_bytes // 2)
    return size if size >= SMALLEST_BYTES else 0


class Ballast:
    """One domain's. Hosts that share the domain share the file. Thread-safe; nothing but `spend`
    raises."""

    def __init__(self, fs: Fs, path: str, directory: str, view_bytes: Callable[[], int]) -> None:
        """`path` is the file, `directory` one that is there, on the same file system. `view_bytes`
        may raise StorageErrors: then it stays as it is."""
        self._fs = fs
        self._path = path
        self._directory = directory
        self._view_bytes = view_bytes
        self._lock = threading.RLock()

    def keep(self) -> None:
        """It is there afterwards, as large as it is to be, as far as there is room."""
        with self._lock:
            try:
                self._keep()
            except (OSError, StorageError) as error:
                log.info("ballast_not_made", extra={"path": self._path, "error": str(error)})

    def spend(self, act: Callable[[], ResultT]) -> ResultT:
        """act(), and, when that raises PointFull, once more in the room that the ballast took."""
        try:
            return act()
        except PointFull:
            if not self._give_up():
                raise
        try:
            return act()
        finally:
            self.keep()

    def _keep(self) -> None:
        have = self._size()
        room = self._fs.room(self._directory)
        wanted = ballast_size(room.capacity_bytes, room.free_bytes + have, self._view_bytes())
        if have >= wanted // 2:
            return
        if have:
            self._fs.unlink(self._path)
        try:
            self._make(wanted)
        except FileExistsError:
            return  # another host of the domain made it just now

    def _make(self, size_bytes: int) -> None:
        fd = self._fs.open_new(self._path)
        try:
            self._fs.allocate(fd, size_bytes)
        except BaseException:
            close_discarded(self._fs, fd)
            discard(self._fs, self._path)
            raise
        self._fs.close(fd)

    def _size(self) -> int:
        try:
            return self._fs.stat(self._path).size_bytes
        except FileNotFoundError:
            return 0

    def _give_up(self) -> bool:
        """Whether there was one."""
        with self._lock:
            try:
                self._fs.unlink(self._path)
            except OSError:
                return False
            log.warning("ballast_given_up", extra={"path": self._path})
            return True
