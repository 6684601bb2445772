"""The scratch directory: where QEMU puts what the guest overwrites while a backup reads.

A slow or hung backup point makes it grow, up to the disks' size. A guest's write would *fail* when
it can't be put aside. So a watch ends the backup's job before it comes to that: when less than a
reserve is free, or the backup's own limit is reached. The backup fails, the guest goes on. While
libvirt does not answer the job can't be ended: then it is asked again.

The files are made here, not by libvirt: it has QEMU create them in a job of QEMU's, and a QEMU
that is asked for its block nodes meanwhile, as any look at a disk's size does, may abort, and its
guest with it (capacity.py).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import threading
from collections.abc import Callable, Sequence

from engine.errors import HypervisorRefused, ScratchFull

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class ScratchWatch:
    """Watches from `start` to `stop`. When there is a problem `give_up` ends the job, and says
    whether it could; the watch's own thread calls it until it can.
    """

    def __init__(
        self,
        directory: str,
        files: Sequence[str],
        reserve_bytes: int,
        limit_bytes: int,
        give_up: Callable[[], bool],
    ) -> None:
        self._directory = directory
        self._files = tuple(files)
        self._reserve_bytes = reserve_bytes
        self._limit_bytes = limit_bytes
        self._give_up = give_up
        self._problem = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scratch", daemon=True)

    @property
    def problem(self) -> str:
        """Why the job was ended; "" as long as it was not."""
        return self._problem

    def require_room(self) -> None:
        """Raises ScratchFull."""
        problem = self._problem or self._look()
        if problem:
            raise ScratchFull(problem)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            problem = self._look()
            if problem and not self._problem:
                self._problem = problem
                log.error("scratch_full", extra={"path": self._directory, "why": problem})
            if self._problem and self._give_up():
                return

    def _look(self) -> str:
        """What is wrong, or ""."""
        try:
            room = os.statvfs(self._directory)
        except OSError as error:
            return f"scratch directory {self._directory}: {error.strerror or error}"
        free_bytes = room.f_bavail * room.f_frsize
        if free_bytes < self._reserve_bytes:
            return (
                f"scratch directory {self._directory} has {free_bytes} bytes left, and "
                f"{self._reserve_bytes} are the reserve"
            )
        used_bytes = sum(_used_bytes(path) for path in self._files)
        if self._limit_bytes and used_bytes > self._limit_bytes:
            return f"the guest overwrote more than {self._limit_bytes} bytes during the backup"
        return ""


def make_anew(path: str, content: bytes) -> None:
    """A file that was not there before, with the owner of its directory: QEMU, or libvirt on its
    behalf, opens it. ScratchFull, HypervisorRefused."""
    remove_left([path])
    try:
        with open(path, "xb", opener=_private) as file:
            owner = os.stat(os.path.dirname(path))
            if owner.st_uid != os.geteuid():
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(content)
    except OSError as error:
        remove_left([path])
        refused = ScratchFull if error.errno in _NO_ROOM else HypervisorRefused
        raise refused(f"scratch file {path}: {error.strerror or error}") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def remove_left(paths: Sequence[str]) -> None:
    """Deletes what is there of these; libvirt does so by itself unless QEMU died."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def clear_left(ours: str) -> None:
    """Deletes what a former process of ours left: QEMU may have it open, in a job that is going to
    be ended; where host and QEMU stopped too, nobody else knows of it. `ours`: see LiveSetup."""
    remove_left(glob.glob(f"{glob.escape(ours)}*"))


def _used_bytes(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0
