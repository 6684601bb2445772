"""Whether a job hangs, and what on: a mount that does not answer holds its threads for good, and
no signal ends that.

A job hangs when it has not got on for a while *and* for as long a call to files that it needs (its
backup point's, its VM's pools', the state's), or to its VM's libvirt, has been under way, be it the
job's own or another's that it waits for. A wait for a disk server (qemu-nbd, QEMU) is a call to the
file that it serves. So one that computes, or waits for its turn, does not hang. Looking never waits
for a medium of these: the state is read from memory (storage/lmdb_env/lock_file.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from engine.errors import NotFound
from engine.inventory.inventory import Inventory, pool_of
from engine.model import BackupPoint, Job
from engine.state import Rows
from storage.files.in_flight import longest_in_flight_s


@dataclass(frozen=True, slots=True)
class Hang:
    """For how many seconds, and what does not answer; 0 and "" if nothing hangs."""

    seconds: float = 0.0
    on: str = ""


NO_HANG = Hang()
HangOf: TypeAlias = Callable[[Job, float], Hang]
"""For a job, and for how many seconds it has not got on."""

log = logging.getLogger(__name__)


def never(_job: Job, _still_s: float) -> Hang:
    """Where there is nothing to hang on."""
    return NO_HANG


@dataclass(frozen=True, slots=True)
class Hangs:
    """Thread-safe."""

    points: Rows[BackupPoint]
    inventory: Inventory
    state_path: str
    after_s: float

    def of(self, job: Job, still_s: float) -> Hang:
        """`still_s`: for how long the job has not got on."""
        if still_s < self.after_s:
            return NO_HANG
        found = [
            Hang(min(still_s, longest_in_flight_s(path)), name) for name, path in self._places(job)
        ]
        worst = max(found, key=lambda hang: hang.seconds, default=NO_HANG)
        return worst if worst.seconds >= self.after_s else NO_HANG

    def _places(self, job: Job) -> Iterator[tuple[str, str]]:
        """(name, path) of all directories, and the libvirt, that the job needs an answer of."""
        yield "the data directory", self.state_path
        point = self.points.get(job.backup_point_uuid)
        if point is not None:
            yield f"backup point {point.name}", point.path
        try:
            vm = self.inventory.vm(job.compute_uuid)
            pools = {pool_of(self.inventory.places, disk) for disk in vm.disks if disk.pool_uuid}
        except NotFound:
            return
        yield from ((f"pool {pool.name}", pool.path) for pool in pools)
        host = self.inventory.host_of(vm)
        if host:
            yield f"libvirt {host}", host


def log_hang(before: Job, now: Job) -> None:
    """One line when a job begins to hang, and one when it goes on."""
    fields = {"job": now.uuid, "kind": now.kind, "on": now.stalled_on or before.stalled_on}
    if now.stalled_on and not before.stalled_on:
        log.warning("job_stalled", extra=fields)
    elif before.stalled_on and not now.stalled_on:
        log.warning("job_goes_on", extra=fields)
