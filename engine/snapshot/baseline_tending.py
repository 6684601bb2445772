"""Seeing to it that baselines never outlive their use, nor take the room that VMs need.

A round forgets the disks that are no VM's any more (or have another volume), drops the baselines of
backups that are gone, or not their point's newest of the VM (after one by QEMU, or a direct read),
and all those in a pool with less room than the operator reserves. Rounds go every `look_every_s`,
and at once where something was deleted. The regular ones also look how much room is pinned
(engine/snapshot/pinned.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from functools import partial

from engine.core import Core
from engine.errors import EngineError, NotFound
from engine.inventory.inventory import pool_of
from engine.inventory.volumes import volume_path
from engine.model import BACKUP_RUNNING, Baseline
from engine.snapshot.snapshot import clear_leftovers

log = logging.getLogger(__name__)

POOL_TIMEOUT_S = 5.0


def tend_baselines(core: Core) -> None:
    """One round over all baselines. Raises StorageError."""
    used = _used(core)
    short: dict[str, bool] = {}
    for row in core.baselines.rows():
        disk = row.vm_uuid, row.target_device
        if (*disk, row.volume) not in used and (*disk, "") not in used:
            core.baselines.forget(row)
        elif not row.file:
            continue
        elif why := _why_useless(core, row):
            core.baselines.drop(row, why)
        else:
            place = os.path.dirname(row.volume)
            if place not in short:
                short[place] = _short_of_room(core, place)
            if short[place]:
                core.baselines.drop(row, "the baseline was dropped: the pool is short of room")


def _used(core: Core) -> frozenset[tuple[str, str, str]]:
    """(VM, target device, volume's path) of all disks that are files in pools; "" for what may be
    any path, for a hypervisor that is away says nothing of its pools, and the configuration may
    have left one out by mistake, or a hypervisor."""
    left_out = core.inventory.left_out()
    found = {(vm.uuid, disk.target_device, "") for vm in left_out for disk in vm.disks}
    for vm in core.inventory.vms():
        for disk in vm.disks:
            path = ""
            if vm.state != "unreachable":
                if not disk.pool_uuid:
                    continue
                with contextlib.suppress(EngineError):
                    pool = pool_of(core.inventory.places, disk)
                    path = volume_path(pool, disk.volume_name)
            found.add((vm.uuid, disk.target_device, path))
    return frozenset(found)


def _why_useless(core: Core, row: Baseline) -> str:
    """Why no backup is going to build on the baseline's; "" when one may."""
    try:
        backup = core.catalogue.get(row.backup_uuid)
    except NotFound:
        return "the baseline's backup was deleted"
    if backup.status == BACKUP_RUNNING:  # committed, and about to be noted
        return ""
    newest = core.catalogue.newest(backup.cluster_uuid, backup.point_uuid, row.vm_uuid)
    if newest is not None and newest.uuid == backup.uuid:
        return ""
    return "the baseline is not of the newest backup"


def _short_of_room(core: Core, place: str) -> bool:
    """A pool that does not answer is left as it is."""
    try:
        return core.probes.ask(
            f"reserve {place}", lambda: core.baselines.short_of_room(place), POOL_TIMEOUT_S
        )
    except (OSError, TimeoutError) as error:
        log.warning("pool_not_tended", extra={"pool": place, "error": str(error)})
        return False


class BaselineTending:
    """The thread that does the rounds. It also clears the pools that a hypervisor which was away at
    the start makes known: see engine/recovery.py."""

    def __init__(self, core: Core, cleared: frozenset[str]) -> None:
        """`cleared`: the paths of those that the start has cleared."""
        self._core = core
        self._cleared = set(cleared)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="baselines", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """No round begins any more; returns within `timeout_s`."""
        self._stopped.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopped.wait(self._core.config.tracking.look_every_s):
            try:
                tend_baselines(self._core)
                self.clear_late_pools()
                self._core.pinned.look(self._core.baselines.rows(), self._core.probes)
            except Exception:  # also that the system has no thread just now: the next round may
                if not self._stopped.is_set():
                    log.exception("baselines_not_tended")

    def clear_late_pools(self) -> None:
        """What the last process left there; each once, whether it answers or not."""
        core = self._core
        late = {pool.path for pool in core.inventory.places.pools} - self._cleared
        for path in late:
            self._cleared.add(path)
            clear = partial(clear_leftovers, path, core.baselines.files())
            try:
                core.probes.ask(f"clear {path}", clear, POOL_TIMEOUT_S)
            except TimeoutError as error:
                log.warning("pool_not_cleared", extra={"pool": path, "error": str(error)})
