"""What changed on a disk since its parent backup, without reading it: two held clones compared.

The clone that the parent backup was read from was kept (engine/snapshot/baselines.py). The maps of
both are read in the order baseline, new clone, baseline. If the baseline's two maps differ,
something moved its blocks meanwhile (balance, defragmentation), and nothing is known. Else, where
both name the same block at the same offset, the content is the same, whatever became of the volume
in between: written, replaced, moved, deduplicated. Everything doubtful counts as changed
(engine/snapshot/extents.py).

Whenever anything is not as it should be, the disk is scanned, and a note says why. A sample of what
is said to be unchanged is read each time (engine/backup/sampling.py); one miss ends tracking for
the disk until an operator turns it on again.
"""

from __future__ import annotations

import logging
import os

from msgspec.structs import replace

from engine.model import Baseline
from engine.snapshot.baselines import Baselines, open_baseline
from engine.snapshot.extents import Extent, MapUnclear, count_extents, differences, extent_map
from engine.snapshot.sources import DiskFile, VolumeSource
from storage.errors import StorageError

log = logging.getLogger(__name__)

MOST_EXTENTS = 1 << 20  # of both maps; about 200 bytes each in memory


class Tracker:
    """Tracks one VM's disks through one backup. Not thread-safe."""

    def __init__(self, baselines: Baselines, vm_uuid: str, backup_uuid: str) -> None:
        self._baselines = baselines
        self._vm_uuid = vm_uuid
        self._backup_uuid = backup_uuid

    def compare(self, target: str, parent_disk: str, clone: VolumeSource) -> str:
        """Tells `clone` what changed since `parent_disk`; else the reason why that isn't known."""
        row = self._baselines.find(self._vm_uuid, target)
        reason = _unfit(row, parent_disk, clone)
        if row is None or reason:
            return reason
        try:
            clone.track(_changed(row, clone))
        except FileNotFoundError:
            return "the baseline is gone"
        except FileExistsError:
            return "the baseline was changed"
        except MapUnclear as unclear:
            return f"the baseline can't be compared: {unclear}"
        except OSError as error:
            return f"the baseline can't be compared: {error.strerror or error}"
        return ""

    def missed(self, disk: DiskFile, chunk: int) -> None:
        """A sample proved the comparison wrong. Raises StorageError."""
        why = f"backup {self._backup_uuid}: a change in chunk {chunk} was not seen"
        self._baselines.turn_off(self._row(disk), why)
        log.error("tracking_off", extra={"vm": self._vm_uuid, "volume": disk.path, "why": why})

    def keep(self, disk: DiskFile, disk_uuid: str, clone: VolumeSource) -> None:
        """After the commit: `clone` has the content of disk backup `disk_uuid`. Raises nothing."""
        row = replace(self._row(disk), backup_uuid=self._backup_uuid, disk_uuid=disk_uuid)
        try:
            self._baselines.keep(row, clone)
        except StorageError:
            log.exception("baseline_not_kept", extra={"vm": self._vm_uuid, "volume": disk.path})

    def _row(self, disk: DiskFile) -> Baseline:
        return Baseline(vm_uuid=self._vm_uuid, target_device=disk.target_device, volume=disk.path)


def _unfit(row: Baseline | None, parent_disk: str, clone: VolumeSource) -> str:
    """Why this is no baseline to compare `clone` with; "" when it is one."""
    if row is None:
        return "no baseline yet"
    if row.off:
        return f"tracking is off since {row.off}"
    if not row.file:
        return row.why or "no baseline"
    if row.disk_uuid != parent_disk:
        return "the baseline is not the parent backup's"
    if clone.origin is None or (clone.origin.inode, clone.origin.generation) != (
        row.inode,
        row.generation,
    ):
        return "the volume was replaced"
    if row.size_bytes != clone.capacity:
        return "its size changed"
    return ""


def _changed(row: Baseline, clone: VolumeSource) -> list[tuple[int, int]]:
    """What the baseline and the clone differ in. Raises OSError, MapUnclear."""
    baseline_fd = open_baseline(row)
    try:
        if os.fstat(baseline_fd).st_dev != os.fstat(clone.fd).st_dev:
            raise MapUnclear("it is on another file system")
        if count_extents(baseline_fd) + count_extents(clone.fd) > MOST_EXTENTS:
            raise MapUnclear("too many extents")
        before = extent_map(baseline_fd, row.size_bytes)
        after = extent_map(clone.fd, clone.capacity)
        require_unmoved(before, extent_map(baseline_fd, row.size_bytes))
    finally:
        os.close(baseline_fd)
    return differences(before, after, clone.capacity)


def require_unmoved(before: list[Extent], after: list[Extent]) -> None:
    """Raises MapUnclear unless both maps of one file are the same."""
    if before != after:
        raise MapUnclear("its blocks moved meanwhile")
