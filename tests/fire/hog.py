"""Somebody else's file, which leaves as little room on a file system as is wanted."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE_S = 30.0
_STEPS = [1 << shift for shift in range(26, 11, -1)]


def take_all(path: Path) -> None:
    """Makes a file that takes everything, also what is kept for root."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        size = 0
        for step in _STEPS:
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(fd, size, step)
                    size += step
        os.ftruncate(fd, size)
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def filled(place: Path, leave_bytes: int = 0) -> Iterator[Path]:
    """All but `leave_bytes` of the file system at `place` is taken inside the block."""
    hog = place / "somebody-elses"
    take_all(hog)
    try:
        if leave_bytes:
            os.truncate(hog, max(hog.stat().st_size - leave_bytes, 0))
        _sync(place)
        yield hog
    finally:
        wanted_bytes = free_bytes(place) + hog.stat().st_blocks * 512 * 3 // 4
        hog.unlink()
        _sync(place)
        _await_room(place, wanted_bytes)


def free_bytes(place: Path) -> int:
    """Also what is kept for root."""
    found = os.statvfs(place)
    return found.f_bfree * found.f_frsize


def _sync(place: Path) -> None:
    """So that what was freed is free: ext4 frees with its journal."""
    fd = os.open(place, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _await_room(place: Path, wanted_bytes: int) -> None:
    """XFS frees in the background. Others may be quicker to take what is free."""
    deadline_s = time.monotonic() + PATIENCE_S
    while free_bytes(place) < wanted_bytes and time.monotonic() < deadline_s:
        time.sleep(0.01)
