"""Baselines: the clones that disks' newest backups were read from, kept to compare the next with.

A baseline is a file `<pool>/.vmkeep-snapshots/baseline-<disk backup>`, one for a disk of a VM at
most, and a row of the state that says which file it is (inode, generation, both times) and which
backup has its content. It holds its blocks, so what the VM overwrites takes up room twice: a pool
that runs short of room loses all its baselines at once, which costs the next backups a scan.

In durable order: the backup's COMMIT · the file gets its name · the row · the former file goes. A
file without a row is a leftover (engine/snapshot/snapshot.py); a row without its file, or with one
that is not the same any more, is no baseline. Nothing here is needed to restore anything.

`_lock` makes a look at a row and its change one step. It is never held while a pool is touched,
which may not answer: that holds up nobody who has no disk in it. Read engine/snapshot/tracking.py
next.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

from msgspec.structs import replace

from engine.model import Baseline
from engine.snapshot.extents import file_system_id, generation, keeps_shared_blocks
from engine.snapshot.snapshot import SNAPSHOTS
from engine.snapshot.sources import VolumeSource
from engine.state import State, baseline_key
from storage.errors import StorageError
from storage.files.in_flight import InFlight

log = logging.getLogger(__name__)

PREFIX = "baseline-"
REMOVE_TIMEOUT_S = 2.0
_MAKE_ATTEMPTS = 100


class Baselines:
    """Those of this host. All methods may be called from any thread."""

    def __init__(
        self, state: State, clock: Callable[[], float], *, reserve_share: float = 0.0
    ) -> None:
        """A file system with less than `reserve_share` of it free gets no baselines."""
        self._state = state
        self._clock = clock
        self._reserve_share = reserve_share
        self._lock = threading.Lock()
        self._removal = _Removal()

    def rows(self) -> list[Baseline]:
        """Of all disks, also those without a baseline just now."""
        return self._state.baselines.values()

    def find(self, vm_uuid: str, target_device: str) -> Baseline | None:
        return self._state.baselines.get(baseline_key(vm_uuid, target_device))

    def files(self) -> frozenset[str]:
        """The paths of all that there are."""
        return frozenset(row.file for row in self.rows() if row.file)

    def keep(self, row: Baseline, clone: VolumeSource) -> None:
        """Makes `clone` the disk's baseline; the former one goes. `row` says which backup it is of.

        If it can't be one, there is none, and the row says why. Raises StorageError.
        """
        before = self.find(row.vm_uuid, row.target_device)
        try:
            is_off = before is not None and before.off
            row = replace(row, why="tracking is off") if is_off else self._named(row, clone)
        except OSError as error:
            row = replace(row, why=f"no baseline could be kept: {error.strerror or error}")
        try:
            with self._lock:
                before = self.find(row.vm_uuid, row.target_device)
                row = replace(row, off=before.off, off_at=before.off_at) if before else row
                self._state.baselines.put(row)
        except StorageError:
            self._removal.remove(row.file)
            raise
        if before and before.file != row.file:
            self._removal.remove(before.file)

    def drop(self, row: Baseline, why: str) -> None:
        """The baseline goes; `row`, if it is still what there is, says why."""
        with self._lock:
            now = self.find(row.vm_uuid, row.target_device)
            dropped = now is not None and now.file == row.file
            if now is not None and dropped:
                self._state.baselines.put(replace(now, file="", why=why))
        if dropped:
            self._removal.remove(row.file)
        log.info("baseline_dropped", extra={"vm": row.vm_uuid, "file": row.file, "why": why})

    def drop_all(self, why: str) -> None:
        """All baselines go, and all rows say why."""
        with self._lock:
            rows = self.rows()
            self._state.baselines.put_all(replace(row, file="", why=why) for row in rows)
        self._removal.remove(*(row.file for row in rows))
        log.info("baselines_dropped", extra={"count": len(rows), "why": why})

    def forget(self, row: Baseline) -> None:
        """The baseline goes, and all that is known of the disk."""
        with self._lock:
            now = self.find(row.vm_uuid, row.target_device)
            if now is not None:
                self._state.baselines.delete(baseline_key(row.vm_uuid, row.target_device))
        if now is not None:
            self._removal.remove(now.file)

    def turn_off(self, row: Baseline, why: str) -> None:
        """The disk's changes are not tracked any more, until `turn_on`."""
        with self._lock:
            now = self.find(row.vm_uuid, row.target_device) or row
            self._state.baselines.put(replace(now, file="", off=why, off_at=self._clock()))
        self._removal.remove(now.file)

    def turn_on(self, vm_uuid: str, target_device: str) -> None:
        """Tracked again, from the next backup on. One that is not off is no error."""
        with self._lock:
            now = self.find(vm_uuid, target_device)
            if now is not None and now.off:
                self._state.baselines.put(replace(now, off="", off_at=0.0))

    def short_of_room(self, path: str) -> bool:
        """Whether what this path is on has less room than the operator reserves. OSError."""
        found = os.statvfs(path)
        return found.f_bavail < self._reserve_share * found.f_blocks

    def _named(self, row: Baseline, clone: VolumeSource) -> Baseline:
        """The row with its file; `file` is "" when there can't be one. Raises OSError."""
        if clone.origin is None or not keeps_shared_blocks(clone.fd):
            return replace(row, why="the pool's file system is neither XFS nor btrfs")
        if self.short_of_room(row.volume):
            return replace(row, why="no baseline was kept: the pool is short of room")
        root = f"{os.path.dirname(row.volume)}/{SNAPSHOTS}"
        path = f"{root}/{PREFIX}{row.disk_uuid}"
        with InFlight(path):
            _name(clone.fd, root, path)
        found = os.fstat(clone.fd)
        return replace(
            row,
            inode=clone.origin.inode,
            generation=clone.origin.generation,
            size_bytes=clone.capacity,
            file=path,
            file_system=file_system_id(clone.fd),
            file_inode=found.st_ino,
            file_generation=generation(clone.fd),
            file_mtime_ns=found.st_mtime_ns,
            file_ctime_ns=found.st_ctime_ns,
        )


class _Removal:
    """Removes files. Those of a directory go one after the other, in a thread of their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[str, list[str]] = {}  # by directory, of those that have a thread

    def remove(self, *paths: str) -> None:
        """They are gone on return, or will be when their medium answers; "" is none. Takes
        REMOVE_TIMEOUT_S at most, and less if a thread is at that directory already."""
        deadline_s = time.monotonic() + REMOVE_TIMEOUT_S
        begun = [(path, self._begun(path)) for path in paths if path]
        for path, thread in begun:
            if thread is not None:
                thread.join(max(deadline_s - time.monotonic(), 0))
                if thread.is_alive():
                    log.warning("baseline_left", extra={"file": path, "why": "no answer yet"})

    def _begun(self, path: str) -> threading.Thread | None:
        """The thread that removes it; None if one is at that directory, and removes it, too."""
        place = os.path.dirname(path)
        with self._lock:
            if place in self._left:
                self._left[place].append(path)
                return None
            thread = threading.Thread(
                target=self._empty, args=(place,), name="baselines-removal", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # the system has no thread for it just now
                log.warning("baseline_left", extra={"file": path, "why": str(error)})
                return None
            self._left[place] = [path]
            return thread

    def _empty(self, place: str) -> None:
        while path := self._next(place):
            _remove(path)

    def _next(self, place: str) -> str:
        """One that is left; "" for none, and then the thread ends."""
        with self._lock:
            if self._left[place]:
                return self._left[place].pop()
            del self._left[place]
            return ""


def open_baseline(row: Baseline) -> int:
    """The baseline's file. Raises OSError when it is gone, FileExistsError when it is another."""
    fd = os.open(row.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        same = (
            row.file_inode == found.st_ino
            and row.file_generation == generation(fd)
            and row.file_mtime_ns == found.st_mtime_ns
            and row.file_ctime_ns == found.st_ctime_ns
            and row.size_bytes == found.st_size
            and row.file_system == file_system_id(fd)
        )
        if not same:
            raise FileExistsError(f"{row.file} is not as it was")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _name(fd: int, root: str, path: str) -> None:
    """Gives a nameless file a name, durably. Raises OSError."""
    for attempt in range(_MAKE_ATTEMPTS):
        with contextlib.suppress(FileExistsError):
            os.mkdir(root, 0o700)
        try:
            root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                # With a directory's descriptor given, this is linkat with AT_SYMLINK_FOLLOW.
                os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=root_fd, follow_symlinks=True)
                os.fsync(fd)
                os.fsync(root_fd)
            finally:
                os.close(root_fd)
        except FileNotFoundError:  # a snapshot, just done, removed the empty directory
            if attempt == _MAKE_ATTEMPTS - 1 or os.path.isdir(root):
                raise
        else:
            return


def _remove(path: str) -> None:
    """What can't be removed is logged, and cleared as a leftover at the next start."""
    if not path:
        return
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("baseline_left", extra={"file": path, "why": str(error)})
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))
