"""Restoring a backup to a new VM: a plan, made of checks only; then the VM, the job, the volumes.

Nothing is created before every check has passed. The VM's record comes first (state `restoring`):
it reserves its name and its volumes' names. The volumes get their names when all of them are
complete. A restore that fails leaves no volume; its VM stays, without disks, and says why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from msgspec.structs import replace

from engine.core import Core
from engine.errors import Conflict, Invalid, NotFound, PoolFull
from engine.ids import new_id, normal
from engine.inventory.inventory import find, require_addable
from engine.inventory.volumes import (
    bounded_volume_size,
    offered_type,
    require_plain_name,
    volume_path,
)
from engine.jobs.jobs import JobContext, new_job
from engine.model import BACKUP_DONE, Backup, Disk, DiskBackup, Pool, Vm
from engine.points.distrust import remember_distrusted
from engine.qemu.header import VolumeFormat
from engine.restore.restore import Gaps, RestoreDisk, run_restore
from engine.verb_types import RestoreTarget, Scope
from storage.domain.domain import Domain
from storage.errors import Damaged, StorageError

log = logging.getLogger(__name__)

MOST_NAME_CHARS = 200
POOL_TIMEOUT_S = 10.0
MEASURE_TIMEOUT_S = 60.0
SHOWN_RANGES = 10_000


@dataclass(frozen=True, slots=True)
class PlannedDisk:
    """A disk of the backup and the volume to make of it."""

    source: DiskBackup
    pool: Pool
    disk: Disk


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """A restore that passed every check."""

    backup: Backup
    vm: Vm
    disks: tuple[PlannedDisk, ...]


def restore_backup(
    core: Core,
    scope: Scope,
    backup_uuid: str,
    new_vm_name: str,
    targets: Sequence[RestoreTarget],
    object_group: str,
    zone_uuid: str,
    *,
    allow_damaged: bool = False,
) -> tuple[str, str]:
    """Starts a restore; (vm, job). When it raises, nothing was created."""
    core.jobs.refuse_if_stopping()
    row = core.catalogue.whole(core.backup_in(scope, backup_uuid))
    plan = plan_restore(core, row, new_vm_name, targets, object_group, zone_uuid)
    domain = core.points.require_answering(row.point_uuid, row.cluster_uuid)
    job = new_job(
        "restore",
        backup_uuid=row.uuid,
        compute_uuid=plan.vm.uuid,
        backup_point_uuid=row.point_uuid,
    )
    _claim_room(core, domain, plan, job.uuid, allow_damaged=allow_damaged)
    try:
        core.inventory.add_vm(plan.vm)
        try:
            run = _RestoreJob(core, plan, job.uuid, allow_damaged)
            core.jobs.submit(job, run, run.settle)
        except BaseException:
            core.amends.make(partial(_take_back, core, plan.vm.uuid))
            raise
    except BaseException:
        core.reservations.release(job.uuid)
        raise
    log.info("restore_asked", extra={"backup": row.uuid, "vm": plan.vm.uuid, "job": job.uuid})
    return plan.vm.uuid, job.uuid


def _take_back(core: Core, vm_uuid: str) -> None:
    core.inventory.end_action(vm_uuid)
    core.inventory.remove_vm(vm_uuid)


def plan_restore(
    core: Core,
    row: Backup,
    new_vm_name: str,
    targets: Sequence[RestoreTarget],
    object_group: str,
    zone_uuid: str,
) -> RestorePlan:
    """All checks but the room's. Changes nothing.

    Conflict (backup_failed, disk_not_in_backup, usd_type_not_offered, name_taken, volume_in_use),
    Invalid, NotFound, PoolUnreachable.
    """
    places = core.inventory.places
    if row.status != BACKUP_DONE:
        raise Conflict("backup_failed", f"backup {row.uuid} is not a finished one")
    if not 0 < len(new_vm_name) <= MOST_NAME_CHARS:
        raise Invalid("new_vm_name", f"has to have 1 to {MOST_NAME_CHARS} characters")
    group = find("object_group", places.object_groups, normal(object_group))
    zone = find("zone", places.zones, normal(zone_uuid))
    disks = _plan_disks(row, targets, places.pools)
    vm = Vm(
        uuid=new_id(),
        name=new_vm_name,
        cluster_uuid=row.cluster_uuid,
        tenant=find("namespace", places.namespaces, row.label.namespace).tenant,
        namespace=row.label.namespace,
        zone_uuid=zone.uuid,
        object_group=group.uuid,
        disks=tuple(planned.disk for planned in disks),
        vm_type=row.label.vm_type,
        state="restoring",
        action="restoring",
    )
    require_addable(vm, core.inventory.vms())
    for planned in disks:
        _require_free_name(core, planned)
    return RestorePlan(row, vm, disks)


def _plan_disks(
    row: Backup, targets: Sequence[RestoreTarget], pools: Sequence[Pool]
) -> tuple[PlannedDisk, ...]:
    """In the backup's order of disks."""
    if not targets:
        raise Invalid("restore_disks", "has to name at least one disk")
    wanted = {target.target_device: target for target in targets}
    if len(wanted) != len(targets):
        raise Invalid("restore_disks", "names a target_device twice")
    sources = {disk.target_device: disk for disk in row.label.disks}
    for device in wanted:
        if device not in sources:
            raise Conflict("disk_not_in_backup", f"backup {row.uuid} has no disk {device!r}")
    volumes = {(normal(target.pool_uuid), target.volume_name) for target in targets}
    if len(volumes) != len(targets):
        raise Invalid("restore_disks", "names a volume twice")
    return tuple(
        _plan_disk(source, wanted[device], pools)
        for device, source in sources.items()
        if device in wanted
    )


def _plan_disk(source: DiskBackup, target: RestoreTarget, pools: Sequence[Pool]) -> PlannedDisk:
    pool = find("pool", pools, normal(target.pool_uuid))
    usd_type = offered_type(pool, target.usd_type)
    require_plain_name(target.volume_name)
    disk = Disk(
        target_device=source.target_device,
        pool_uuid=pool.uuid,
        volume_name=target.volume_name,
        capacity=source.capacity,
        usd_type=usd_type,
        replica=pool.replica,
        share=False,
        format=_format_of(source, pool),
    )
    return PlannedDisk(source, pool, disk)


def _format_of(source: DiskBackup, pool: Pool) -> VolumeFormat:
    """Of the volume to make: raw for one whose format we can read only."""
    return "qcow2" if (pool.format or source.format) == "qcow2" else "raw"


def _require_free_name(core: Core, planned: PlannedDisk) -> None:
    pool, name = planned.pool, planned.disk.volume_name
    if bounded_volume_size(core.probes, pool, name, POOL_TIMEOUT_S) is not None:
        raise Conflict("volume_in_use", f"volume {name!r} is in pool {pool.name} already")


def _claim_room(
    core: Core, domain: Domain, plan: RestorePlan, job_uuid: str, *, allow_damaged: bool
) -> None:
    """Reserves what the volumes can grow to; if there is no room for that, what they will hold."""
    most: Counter[Pool] = Counter()
    for planned in plan.disks:
        most[planned.pool] += planned.source.capacity

    def claim(needs: Counter[Pool]) -> None:
        core.reservations.claim(job_uuid, needs, lambda: _share_left(core, job_uuid))

    try:
        claim(most)
    except PoolFull:
        claim(_measured(core, domain, plan, allow_damaged=allow_damaged))


def _measured(
    core: Core, domain: Domain, plan: RestorePlan, *, allow_damaged: bool
) -> Counter[Pool]:
    """What the volumes will take: chunks that are zero stay holes, and so does a disk whose map
    can't be read, if that is allowed."""

    def measure() -> Counter[Pool]:
        needs: Counter[Pool] = Counter()
        for planned in plan.disks:
            try:
                disk_map = domain.disk_map(planned.source.disk_uuid)
            except Damaged:
                if not allow_damaged:
                    raise
                continue
            chunks = sum(len(entries) for _, entries in disk_map.pages())
            needs[planned.pool] += min(chunks * disk_map.chunk_size, disk_map.capacity)
        return needs

    key = f"measure {plan.vm.uuid}"
    try:
        return core.probes.ask(key, measure, MEASURE_TIMEOUT_S)
    except TimeoutError:
        raise PoolFull("not all disks' capacity fits, and measuring them takes too long") from None


def _share_left(core: Core, job_uuid: str) -> float:
    try:
        progress = core.jobs.job(job_uuid).progress
    except NotFound:  # not submitted yet
        return 1.0
    if not progress.bytes_total:
        return 1.0
    return max(1.0 - progress.bytes_restored / progress.bytes_total, 0.0)


class _RestoreJob:
    """The job of one restore."""

    def __init__(self, core: Core, plan: RestorePlan, job_uuid: str, allow_damaged: bool) -> None:
        self._allow_damaged = allow_damaged
        self._core = core
        self._plan = plan
        self._job_uuid = job_uuid
        self._working = False

    def __call__(self, ctx: JobContext) -> tuple[str, ...]:
        self._working = True
        try:
            return self._restore(ctx)
        finally:
            self._working = False

    def _restore(self, ctx: JobContext) -> tuple[str, ...]:
        core, row = self._core, self._plan.backup
        disks = [
            RestoreDisk(
                planned.source.disk_uuid,
                volume_path(planned.pool, planned.disk.volume_name),
                planned.disk.format,
            )
            for planned in self._plan.disks
        ]
        domain = core.points.domain(row.point_uuid, row.cluster_uuid)
        report = run_restore(
            domain,
            disks,
            ctx,
            core.config.worker_count,
            backup=row.uuid,
            allow_damaged=self._allow_damaged,
            # What was claimed is no longer free, and would be counted twice.
            has_room=partial(core.reservations.release, self._job_uuid),
            complete=self._complete,
        )
        devices = {disk.source.disk_uuid: disk.source.target_device for disk in self._plan.disks}
        return tuple(
            line for gaps in report.gaps for line in _gap_lines(devices[gaps.disk_uuid], gaps)
        )

    def _complete(self) -> None:
        """The volumes become the VM's. Without a machine they go again, and without a note if no
        hypervisor has them."""
        inventory, plan = self._core.inventory, self._plan
        defined = inventory.realize(plan.vm, plan.backup.label)
        try:
            inventory.note(plan.vm.uuid, lambda now: after_restore(now, ""))
        except StorageError:
            if not defined:
                raise
            log.exception("restore_not_noted", extra={"vm": plan.vm.uuid})

    def settle(self, error: Exception | None) -> None:
        """A restore that a stop did not wait for may have given its volumes their names, or do so
        yet. Its VM stays as it is: the next start takes back what was not complete by then."""
        core, vm = self._core, self._plan.vm
        if self._working:
            return
        row = self._plan.backup
        remember_distrusted(core.state, core.points, row.point_uuid, (row.cluster_uuid,))
        core.reservations.release(self._job_uuid)
        reason = "" if error is None else str(error) or type(error).__name__
        noted = partial(after_restore, reason=reason)
        core.amends.make(partial(core.inventory.end_action, vm.uuid, noted))
        # The backup may have been deleted meanwhile: what only we still held is dead now.
        core.points.reclaim(self._plan.backup.point_uuid, 0)


def _gap_lines(device: str, gaps: Gaps) -> list[str]:
    """What a job's result says about a disk that is not complete; one range a line."""
    ranges = gaps.ranges()
    shown = ranges[:SHOWN_RANGES]
    lines = [
        f"{device}: {gaps.size_bytes} bytes in {len(ranges)} ranges are damaged and read as zeros"
    ]
    lines += [f"{device}: missing offset={at} length={length}" for at, length in shown]
    if len(ranges) > len(shown):
        lines.append(f"{device}: and {len(ranges) - len(shown)} more ranges")
    return lines


def after_restore(vm: Vm, reason: str) -> Vm:
    """The VM once its restore has ended; `reason` is "" for success.

    One that a hypervisor has is complete: it was defined last of all. What is noted stays.
    """
    if vm.host or vm.state != "restoring":
        return vm
    if not reason:
        return replace(vm, state="stopped", last_error="")
    return replace(vm, state="restore_failed", disks=(), last_error=reason)
