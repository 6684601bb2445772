"""A guest that never stops writing, and how far it has come, seen without asking it.

It writes n into block n of /dev/vdb, past its page cache, for n = 1, 2, 3, … (the blocks' count
goes round). So an instant of the disk has consecutive numbers, one in each block, once all were
written; and who reads the raw image on the host sees how many there have been.
"""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

from tests.engine_rig import EngineRig
from tests.libvirt.guest import Guest
from tests.libvirt.site import wait_until

BLOCK_BYTES = 128 << 10
WINDOW_S = 1.0
_PAUSE_US = 20_000
_DIGITS = 8
_WRITE = f"dd of=/dev/vdb oflag=direct conv=sync,notrunc bs={BLOCK_BYTES}"


class Writer:
    """Writes from `start` to `stop`; the numbers go on at the next start. `image`: /dev/vdb's."""

    def __init__(self, guest: Guest, image: Path) -> None:
        self._guest = guest
        self._image = image
        self._blocks = image.stat().st_size // BLOCK_BYTES
        self._writes = False

    def start(self) -> None:
        """It has written something since."""
        number = f"printf '%0{_DIGITS}d' $n"
        one = f"n=$((n+1)); {number} | {_WRITE} seek=$((n % {self._blocks})) 2>/tmp/said"
        one += " || mv /tmp/said /tmp/failed"
        loop = f"while [ ! -e /tmp/enough ]; do {one}; usleep {_PAUSE_US}; done; rm /tmp/enough"
        self._guest.run(f"( n={self.count()}; {loop} ) >/dev/null 2>&1 &")
        self._writes = True
        self.wait_for(1)

    def stop(self) -> None:
        """Nothing is under way any more, and no write ever failed."""
        if self._writes:
            self._guest.run("touch /tmp/enough; while [ -e /tmp/enough ]; do usleep 9999; done")
            self._writes = False
            self._guest.run("if [ -e /tmp/failed ]; then cat /tmp/failed; false; fi")

    def count(self) -> int:
        """How many writes are done."""
        with self._image.open("rb") as image:
            at = range(0, self._blocks * BLOCK_BYTES, BLOCK_BYTES)
            heads = [os.pread(image.fileno(), _DIGITS, place) for place in at]
        return max(_number(head) for head in heads)

    def wait_for(self, more: int) -> None:
        """Until it has written so much more."""
        goal = self.count() + more
        wait_until(lambda: self.count() >= goal)

    def windows(self, count: int) -> list[int]:
        """The writes done in each of `count` windows of time."""
        seen = [self.count()]
        for _ in range(count):
            time.sleep(WINDOW_S)
            seen.append(self.count())
        return [after - before for before, after in pairwise(seen)]

    def windows_until(self, rig: EngineRig, job_uuid: str) -> list[int]:
        """The same, until the job has ended."""
        found = []
        while not rig.engine.job(job_uuid).finished_at:
            before = self.count()
            if not rig.engine.wait_for_job(job_uuid, WINDOW_S).finished_at:
                found.append(self.count() - before)
        return found


def numbers_in(disk: bytes) -> list[int]:
    """Of all blocks of an instant of /dev/vdb, ascending; 0 for one that was never written."""
    places = range(0, len(disk), BLOCK_BYTES)
    return sorted(_number(disk[at : at + _DIGITS]) for at in places)


def _number(head: bytes) -> int:
    return int(head) if head.strip(b"\0") else 0
