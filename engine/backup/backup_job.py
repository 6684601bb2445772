"""A backup from the request to its end: what is checked first, and what the job does.

Everything that can be refused is refused before a record exists. Then, in this order, the VM's
action (a compare-and-set, so one of two wins), the backup with status 1, the job. The job's
`settle` undoes them in the opposite order of importance, later if it can't just now
(engine/amends.py); after a crash engine/recovery.py does. What reads the disks and writes the point
is engine.backup.backup.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

from msgspec.structs import replace

from engine.backup.backup import BackupFacts, BackupWork, DiskWork, run_backup
from engine.catalogue.labels import encode_label, settled_backup
from engine.core import Core
from engine.errors import Conflict, EngineError, Invalid
from engine.ids import new_id, normal
from engine.inventory.inventory import find, pool_of, require_idle
from engine.inventory.volumes import volume_path
from engine.jobs.jobs import JobContext, new_job
from engine.model import (
    BACKUP_DONE,
    BACKUP_FAILED,
    BACKUP_RUNNING,
    Backup,
    BackupLabel,
    Disk,
    DiskBackup,
    Vm,
)
from engine.points.distrust import remember_distrusted
from engine.qemu.bitmaps import bitmap_name
from engine.snapshot.freeze import FreezeHook
from engine.snapshot.hold import HoldWish, Resting
from engine.snapshot.snapshot import CloneLimits, SnapshotFacts
from engine.snapshot.sources import BitmapPlan, DiskFile
from engine.snapshot.tracking import Tracker
from engine.verb_types import Scope
from storage.errors import StorageError
from storage.format.record import DISKS_LIMIT

log = logging.getLogger(__name__)

MOST_NAME_CHARS = 1024
MOST_DESCRIPTION_CHARS = 64 << 10
MOST_LENDERS = 16  # maps that are looked into for a disk without a parent

NOTHING_TO_BUILD_ON = "full: nothing to build on"


def create_backup(
    core: Core,
    scope: Scope,
    vm_uuid: str,
    point_uuid: str,
    name: str,
    description: str,
    full: bool,
) -> tuple[str, str]:
    """Starts a backup; (backup, job). See the module for what holds when it returns or raises."""
    core.jobs.refuse_if_stopping()
    _require_texts(name, description)
    vm = core.vm_in(scope, vm_uuid)
    point_uuid = normal(point_uuid)
    core.points.state(point_uuid)
    require_idle(vm)
    _require_disks(vm)
    core.points.require_writable(point_uuid, vm.cluster_uuid)
    vm = core.inventory.begin_action(vm.uuid, "backing_up")
    try:
        _require_disks(vm)
        row = _new_row(core, vm, point_uuid, name, description, full)
        core.catalogue.put(row)
        try:
            job = new_job(
                "backup", backup_uuid=row.uuid, compute_uuid=vm.uuid, backup_point_uuid=point_uuid
            )
            run = _BackupJob(core, row, vm, full)
            core.jobs.submit(job, run, run.settle)
        except BaseException:
            core.amends.make(partial(core.catalogue.remove, row))
            raise
    except BaseException:
        core.amends.make(partial(core.inventory.end_action, vm.uuid))
        raise
    log.info("backup_asked", extra={"backup": row.uuid, "vm": vm.uuid, "job": job.uuid})
    return row.uuid, job.uuid


class _BackupJob:
    """The job of one backup."""

    def __init__(self, core: Core, row: Backup, vm: Vm, full_wanted: bool) -> None:
        self._core = core
        self._row = row
        self._vm = vm
        self._full_wanted = full_wanted
        self._resting = Resting()

    def __call__(self, ctx: JobContext) -> tuple[str, ...]:
        core = self._core
        self._see_vm()
        row = self._row
        parent = None if self._full_wanted else _parent(core, row)
        wish = self._wish(parent)
        hold = core.inventory.hold_for(self._vm, wish)
        if hold is None:
            self._resting = core.inventory.resting(self._vm, wish)
        result = run_backup(
            BackupWork(
                domain=core.points.domain(row.point_uuid, row.cluster_uuid),
                backup_uuid=row.uuid,
                disks=self._disk_works(parent, by_path=hold is None),
                make_label=self._label_bytes,
                parent=parent.uuid if parent else "",
                workers=core.config.worker_count,
                freeze=self._freeze_hook(),
                limits=self._clone_limits(),
                tracker=self._tracker(),
                hold=hold,
            ),
            ctx,
        )
        core.stuns.add(result.facts.snapshot.clone_s, result.facts.snapshot.freeze_s)
        self._row = replace(self._row, parent=result.parent)
        return self._row.label.notes

    def settle(self, error: Exception | None) -> None:
        row = replace(self._row, status=BACKUP_DONE)
        if error is not None:
            reason = str(error) or type(error).__name__
            row = replace(self._row, status=BACKUP_FAILED, error=reason)
        remember_distrusted(
            self._core.state, self._core.points, row.point_uuid, (row.cluster_uuid,)
        )
        try:
            self._core.amends.make(partial(self._note_end, row))
        finally:
            self._core.points.look_again(row.point_uuid)

    def _note_end(self, row: Backup) -> None:
        """Backup and action at once: who waits for the one may rely on the other. As long as it
        fails the VM is in its action, so no other has begun when it is done later."""
        core, vm_uuid = self._core, self._vm.uuid
        read = zip(self._vm.disks, row.label.disks, strict=True)
        found = partial(_as_found, dict(read) if row.status == BACKUP_DONE else {})
        try:
            core.catalogue.put(row, lambda txn: core.inventory.end_action_in(txn, vm_uuid, found))
        except StorageError:  # then as much of it as goes
            core.catalogue.put(row)
            core.inventory.end_action(vm_uuid)
        self._put_right(row)

    def _put_right(self, ended: Backup) -> None:
        """The look at the point that met the COMMIT passes over a running backup, and none comes
        back to it: so what that has seen counts now. It may be there though we got an error; and
        its place in the log tells it from the VM's next one, which is newer."""
        core, where = self._core, (ended.cluster_uuid, ended.point_uuid)

        def read() -> list[Backup]:
            rows = core.points.domain(ended.point_uuid, ended.cluster_uuid).rows_of([ended.uuid])
            return [settled_backup(row, *where, core.inventory.places) for row in rows]

        try:
            core.catalogue.sync(*where, [ended.uuid], read)
        except (EngineError, StorageError):
            log.info("backup_not_looked_up", extra={"backup": ended.uuid})  # whoever opens it does

    def _see_vm(self) -> None:
        """Its disks as they are now: it may have waited long for its turn."""
        vm = self._core.inventory.look_at(self._vm.uuid)
        if [disk.target_device for disk in vm.disks] != [
            disk.target_device for disk in self._vm.disks
        ]:
            label = replace(self._row.label, disks=_disk_backups(vm))
            self._row = replace(self._row, label=label)
        self._vm = vm

    def _wish(self, parent: Backup | None) -> HoldWish:
        """What the inventory may have to know to hold the VM's disks."""
        machine = self._core.catalogue.whole(parent).label.machine if parent else None
        return HoldWish(
            backup_uuid=self._row.uuid,
            parent=parent.uuid if parent else "",
            identities={d.target_device: d.identity for d in parent.label.disks} if parent else {},
            checkpoint=machine.checkpoint if machine else b"",
            kept=frozenset(backup.uuid for backup in self._elsewhere()),
        )

    def _disk_works(self, parent: Backup | None, *, by_path: bool) -> list[DiskWork]:
        before = {disk.target_device: disk for disk in parent.label.disks} if parent else {}
        pools = self._core.inventory.places.pools
        roots, kept = tuple(pool.path for pool in pools), self._kept_bitmaps()
        works = []
        for disk, made in zip(self._vm.disks, self._row.label.disks, strict=True):
            path = self._path(disk) if by_path else disk.volume_name
            base = before.get(disk.target_device)
            bitmaps = self._resting.bitmaps.get(disk.target_device) or BitmapPlan(
                parent=bitmap_name(base.disk_uuid) if base else "",
                new=bitmap_name(made.disk_uuid),
                keep=kept,
            )
            form = disk.format if by_path else "raw"
            file = DiskFile(disk.target_device, path, form, roots, bitmaps)
            works.append(
                DiskWork(
                    file,
                    made.disk_uuid,
                    parent_disk=base.disk_uuid if base else "",
                    parent_capacity=base.capacity if base else 0,
                    lenders=self._lenders(disk),
                )
            )
        return works

    def _lenders(self, disk: Disk) -> tuple[str, ...]:
        """What the disk may resemble: itself, as it was; then disks of its size, and others."""
        row, found = self._row, dict[str, tuple[bool, bool]]()
        before = _parent(self._core, row)
        others = self._core.catalogue.newest_of_each(row.cluster_uuid, row.point_uuid, MOST_LENDERS)
        for backup in [*([before] if before else []), *others]:
            own = backup.label.vm_uuid == row.label.vm_uuid
            for one in backup.label.disks:
                itself = own and one.target_device == disk.target_device
                found[one.disk_uuid] = (not itself, one.capacity != disk.capacity)
        return tuple(sorted(found, key=lambda uuid: found[uuid])[:MOST_LENDERS])

    def _kept_bitmaps(self) -> frozenset[str]:
        """Those that the VM's chains on other points build on."""
        disks = (disk for backup in self._elsewhere() for disk in backup.label.disks)
        return frozenset(bitmap_name(disk.disk_uuid) for disk in disks)

    def _elsewhere(self) -> list[Backup]:
        """The VM's newest backup on each other point: what its chain there builds on."""
        core, row = self._core, self._row
        newest = (
            core.catalogue.newest(row.cluster_uuid, state.point.uuid, row.label.vm_uuid)
            for state in core.points.states()
            if state.point.uuid != row.point_uuid
        )
        return [backup for backup in newest if backup is not None]

    def _path(self, disk: Disk) -> str:
        """Conflict(format_not_readable) for what is no file in a pool."""
        if not disk.pool_uuid:
            detail = f"disk {disk.target_device} ({disk.volume_name}) is no file in a pool"
            raise Conflict("format_not_readable", f"{detail}: it is read while the VM runs only")
        pool = pool_of(self._core.inventory.places, disk)
        return volume_path(pool, disk.volume_name)

    def _label_bytes(self, facts: BackupFacts) -> bytes:
        """The label as the backup turned out."""
        label = self._row.label
        resting, held = self._resting, facts.snapshot
        notes = [*_snapshot_notes(held), *_changes_notes(facts), *facts.notes, *resting.notes]
        told = any("full: " in note for note in notes)  # of all, or of a disk
        if facts.full and not self._full_wanted and not told:
            notes.insert(0, NOTHING_TO_BUILD_ON)
        recorded = {t: resting.identities[t] for t in held.recording & resting.identities.keys()}
        identities = {**recorded, **held.identities}
        disks = tuple(
            replace(
                disk,
                capacity=held.capacities[disk.target_device],
                identity=identities.get(disk.target_device, ""),
            )
            for disk in label.disks
        )
        label = replace(
            label,
            full=facts.full,
            notes=tuple(notes),
            disks=disks,
            frozen=held.frozen,
            machine=held.machine or resting.machine,
        )
        self._row = replace(self._row, label=label)
        return encode_label(label)

    def _tracker(self) -> Tracker | None:
        if not self._core.config.tracking.enabled:
            return None
        return Tracker(self._core.baselines, self._vm.uuid, self._row.uuid)

    def _clone_limits(self) -> CloneLimits:
        clone = self._core.config.clone
        return CloneLimits(frozen=clone.most_frozen_extents, cloned=clone.most_extents)

    def _freeze_hook(self) -> FreezeHook:
        freeze = self._core.config.freeze
        return FreezeHook(
            command=freeze.command,
            vm_uuid=self._vm.uuid,
            timeout_s=freeze.timeout_s,
            hold_s=freeze.hold_s,
        )


def _snapshot_notes(held: SnapshotFacts) -> list[str]:
    """How the disks were held still, and how long that kept the VM from writing."""
    notes = [f"snapshot: {held.method}"]
    if held.clone_s:
        notes.append(f"cloned in {held.clone_s:.3f} s")
    if held.freeze_s:
        notes.append(f"frozen for {held.freeze_s:.3f} s")
    return notes


def _changes_notes(facts: BackupFacts) -> list[str]:
    """How the changes of the disks that build on the parent were found."""
    found = [f"{target} {facts.found_by[target]}" for target in sorted(facts.incremental)]
    return [f"changes found by: {', '.join(found)}"] if found else []


def _require_texts(name: str, description: str) -> None:
    if not 0 < len(name) <= MOST_NAME_CHARS:
        raise Invalid("backup_name", f"has to have 1 to {MOST_NAME_CHARS} characters")
    if len(description) > MOST_DESCRIPTION_CHARS:
        raise Invalid("description", f"is over {MOST_DESCRIPTION_CHARS} characters")


def _require_disks(vm: Vm) -> None:
    if not 0 < len(vm.disks) <= DISKS_LIMIT:
        detail = f"VM {vm.name} has {len(vm.disks)} disks; a backup takes 1 to {DISKS_LIMIT}"
        raise Conflict("vm_no_disks", detail)


def _as_found(read: Mapping[Disk, DiskBackup], vm: Vm) -> Vm:
    """The VM with the sizes that its disks were found to have: a volume may have grown."""
    disks = [
        replace(disk, capacity=read[disk].capacity) if disk in read else disk for disk in vm.disks
    ]
    return replace(vm, disks=tuple(disks))


def _parent(core: Core, row: Backup) -> Backup | None:
    return core.catalogue.newest(row.cluster_uuid, row.point_uuid, row.label.vm_uuid)


def _new_row(
    core: Core, vm: Vm, point_uuid: str, name: str, description: str, full: bool
) -> Backup:
    """The backup as it is asked for, status 1."""
    places = core.inventory.places
    row = Backup(
        uuid=new_id(),
        cluster_uuid=vm.cluster_uuid,
        point_uuid=point_uuid,
        status=BACKUP_RUNNING,
        label=BackupLabel(
            vm_uuid=vm.uuid,
            vm_name=vm.name,
            tenant=vm.tenant,
            tenant_name=find("tenant", places.tenants, vm.tenant).name,
            namespace=vm.namespace,
            namespace_name=find("namespace", places.namespaces, vm.namespace).name,
            name=name,
            description=description,
            create_time=int(core.clock()),
            full=full,
            disks=_disk_backups(vm),
            vm_type=vm.vm_type,
        ),
    )
    parent = None if full else _parent(core, row)
    if full or parent is not None:
        return replace(row, parent=parent.uuid if parent else "")
    return replace(row, label=replace(row.label, full=True, notes=(NOTHING_TO_BUILD_ON,)))


def _disk_backups(vm: Vm) -> tuple[DiskBackup, ...]:
    return tuple(
        DiskBackup(
            target_device=disk.target_device,
            disk_uuid=new_id(),
            capacity=disk.capacity,
            replica=disk.replica,
            share=disk.share,
            usd_type=disk.usd_type,
            format=disk.format,
        )
        for disk in vm.disks
    )
