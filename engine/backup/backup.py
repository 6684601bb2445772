"""One backup of one VM, from the opened session to the acknowledged commit.

In durable order: OPEN (holds the parent) · snapshot · for each disk what is known of its changes,
and whether a sample bears that out; scan, packs and manifest · a check that nobody changed a volume
that was read directly · COMMIT. Whatever fails before the commit, leaving the session's block
aborts it, and the snapshot's block lets go of the volumes. See docs/design.md §6.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from engine.backup.likeness import find_lender
from engine.backup.pages import Ranges
from engine.backup.patching import Bases
from engine.backup.pipeline import scan_disk, store_again
from engine.backup.sampling import try_unchanged
from engine.errors import Cancelled
from engine.jobs.jobs import JobContext
from engine.snapshot.freeze import NO_HOOK, FreezeHook
from engine.snapshot.hold import Held, Hold
from engine.snapshot.snapshot import NO_LIMITS, CloneLimits, SnapshotFacts, take_snapshot
from engine.snapshot.sources import DiskFile, DiskSource, FoundBy
from engine.snapshot.tracking import Tracker
from storage.domain.domain import Domain
from storage.domain.maps import DiskMap
from storage.domain.session import NewBackup, Session
from storage.errors import (
    ChunkMissing,
    Damaged,
    NotOnPoint,
    PointFull,
    PointReadOnly,
    PointUnreachable,
    StorageError,
)
from storage.format.manifests import PAGE_ENTRIES

log = logging.getLogger(__name__)

COMMIT_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class DiskWork:
    """A disk to back up as `disk_uuid`, against `parent_disk` (`parent_capacity` bytes) or "".

    `lenders`: disk backups that it may resemble, for when it builds on no parent.
    """

    file: DiskFile
    disk_uuid: str
    parent_disk: str = ""
    parent_capacity: int = 0
    lenders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackupFacts:
    """What a label says about the backup that it is on."""

    snapshot: SnapshotFacts
    incremental: frozenset[str]  # target devices of the disks that build on the parent's
    notes: tuple[str, ...] = ()
    found_by: Mapping[str, FoundBy] = field(default_factory=dict)  # by target device

    @property
    def full(self) -> bool:
        """Whether no disk builds on the parent."""
        return not self.incremental


@dataclass(frozen=True, slots=True)
class BackupWork:
    """What run_backup needs. `parent`: the backup that disks may build on, or "".

    `make_label` is called once, when all that it could ask for is known: after the scans.
    """

    domain: Domain
    backup_uuid: str
    disks: Sequence[DiskWork]
    make_label: Callable[[BackupFacts], bytes]
    parent: str = ""
    workers: int = 3
    freeze: FreezeHook = NO_HOOK
    limits: CloneLimits = NO_LIMITS
    tracker: Tracker | None = None
    hold: Hold | None = None  # a better way to hold the disks than take_snapshot


@dataclass(frozen=True, slots=True)
class BackupResult:
    """A backup that is on the point. `parent`: what it builds on, "" for a full one."""

    parent: str
    facts: BackupFacts
    label: bytes


def run_backup(work: BackupWork, ctx: JobContext) -> BackupResult:
    """Makes the backup; durable on the point on return. Else nothing of it is there.

    A parent that is gone, or a disk whose size changed, makes a full backup, of all or that disk.
    Raises Cancelled, Conflict("volume_changed"), PoolUnreachable, PoolFull, StorageError.
    What was stored when the service is stopped saves the next backup's time
    (storage.domain.salvage).
    """
    session, parent = _begin(work)
    with session:
        try:
            return _make(work, session, parent, ctx)
        except Cancelled as reason:
            if reason.wish == "interrupted":
                session.set_aside()
            raise
        except StorageError:
            # The reason behind a file that is gone may be that the session is not ours any more.
            with contextlib.suppress(PointUnreachable, PointFull, PointReadOnly, Damaged):
                session.require_open()
            raise


def _make(work: BackupWork, session: Session, parent: str, ctx: JobContext) -> BackupResult:
    with _hold(work, parent) as snapshot:
        ctx.set_total(sum(snapshot.facts.capacities.values()))
        facts = _facts(work, parent, snapshot.facts)
        for disk in work.disks:
            facts = _scanned(work, disk, facts, snapshot, session, ctx)
        _store_doubted(work, facts, snapshot, session, ctx)
        label = work.make_label(facts)
        new = NewBackup(
            backup=work.backup_uuid,
            parent="" if facts.full else parent,
            label=label,
            disks=[disk.disk_uuid for disk in work.disks],
        )
        _commit(work, new, snapshot, session, ctx)
        snapshot.committed()
        _keep_baselines(work, snapshot)
    return BackupResult(new.parent, facts, label)


def _hold(work: BackupWork, parent: str) -> Held:
    if work.hold is not None:
        return work.hold(parent)
    return take_snapshot([disk.file for disk in work.disks], work.freeze, work.limits)


def _begin(work: BackupWork) -> tuple[Session, str]:
    """An open session, and the parent that it holds: "" if that was deleted meanwhile."""
    if work.parent:
        try:
            return work.domain.begin("backup", [work.parent]), work.parent
        except NotOnPoint:
            log.info("parent_gone", extra={"backup": work.backup_uuid, "parent": work.parent})
    return work.domain.begin("backup"), ""


def _facts(work: BackupWork, parent: str, held: SnapshotFacts) -> BackupFacts:
    """Which disks build on the parent's, and why the others do not."""
    notes = list(held.notes)
    if work.parent and not parent:
        notes.append("full: the parent backup was deleted")
    incremental = set()
    for disk in work.disks:
        target = disk.file.target_device
        if not parent or not disk.parent_disk:
            continue
        if held.capacities[target] != disk.parent_capacity:
            notes.append(f"{target} full: its size changed")
        elif damage := _damage(work.domain, disk.parent_disk):
            notes.append(f"{target} full: {damage}")
        else:
            incremental.add(target)
    return BackupFacts(held, frozenset(incremental), tuple(notes))


def _damage(domain: Domain, disk: str) -> str:
    """What is known to be damaged of a disk's backup, so that none may build on it; "" for nothing.

    What is unchanged would be acknowledged though it can't be had any more, and the disk has it.
    """
    try:
        disk_map = domain.disk_map(disk)
        pages = () if domain.trust.is_whole() else disk_map.pages()
        if not any(domain.trust.doubted(list(page.values())) for _, page in pages):
            return ""
    except Damaged:
        return "the parent's manifest is damaged"
    return "of the parent's chunks some are damaged"


def _scanned(
    work: BackupWork,
    disk: DiskWork,
    facts: BackupFacts,
    snapshot: Held,
    session: Session,
    ctx: JobContext,
) -> BackupFacts:
    """Scans a disk, as little of it as is safe; the facts with how that was."""
    target = disk.file.target_device
    source = snapshot.sources[target]
    base = disk.parent_disk if target in facts.incremental else None
    parent = work.domain.disk_map(base) if base else None
    changed, note, lender = None, "", None
    if parent is None:
        lender = find_lender(work.domain, source, disk.lenders, ctx)
    else:
        note = _compare(work, disk, snapshot)
        if not note:
            changed, note = _trusted_changes(work, disk, source, parent, ctx)
    with Bases(work.domain) as bases:
        scan_disk(
            work.domain,
            source,
            session,
            session.manifest(disk.disk_uuid, source.capacity, base),
            parent,
            ctx,
            work.workers,
            changed=changed,
            bases=bases,
            lender=lender,
        )
    found_by: FoundBy = "scan" if changed is None else source.found_by
    notes = [f"scanned: {note}"] if note else []
    notes += [bases.note] if bases.note else []
    notes += ["is like another disk there: stored as what differs"] if lender else []
    return replace(
        facts,
        found_by={**facts.found_by, target: found_by},
        notes=(*facts.notes, *(f"{target} {said}" for said in notes)),
    )


def _store_doubted(
    work: BackupWork, facts: BackupFacts, snapshot: Held, session: Session, ctx: JobContext
) -> None:
    """Stores anew what has been found damaged since it was taken for unchanged, or known: else it
    would be acknowledged though it can't be had any more. All scans are done."""
    domain, chunk_size = work.domain, work.domain.chunk_size
    for disk in work.disks if not domain.trust.is_whole() else ():
        target = disk.file.target_device
        below = domain.disk_map(disk.parent_disk).pages() if target in facts.incremental else ()
        places: list[tuple[int, int]] = []
        wanted: set[bytes] = set()
        for page_no, page in chain(below, session.pages(disk.disk_uuid)):
            doubted = {
                chunk
                for chunk in domain.trust.doubted(list(page.values()))
                if chunk not in session.packs
            }
            first = page_no * PAGE_ENTRIES
            places += [
                ((first + at) * chunk_size, chunk_size) for at in page if page[at] in doubted
            ]
            wanted |= doubted
        if wanted:
            source, within = snapshot.sources[target], sorted(places)
            store_again(domain, source, session, wanted, ctx, work.workers, within=within)


def _compare(work: BackupWork, disk: DiskWork, snapshot: Held) -> str:
    """Has the clone, if it is one, told what changed; why not, if that can't be."""
    clone = snapshot.clones.get(disk.file.target_device)
    if clone is None or work.tracker is None:
        return ""
    return work.tracker.compare(disk.file.target_device, disk.parent_disk, clone)


def _keep_baselines(work: BackupWork, snapshot: Held) -> None:
    """After the commit: the clones are what the next backup is compared with."""
    for disk in work.disks:
        clone = snapshot.clones.get(disk.file.target_device)
        if clone is not None and work.tracker is not None:
            work.tracker.keep(disk.file, disk.disk_uuid, clone)


def _trusted_changes(
    work: BackupWork, disk: DiskWork, source: DiskSource, parent: DiskMap, ctx: JobContext
) -> tuple[Ranges | None, str]:
    """(what changed since the parent, or None and why not)."""
    changed = source.changed_ranges()
    if changed is None:
        return None, ""
    sample = try_unchanged(work.domain, source, parent, changed, ctx, work.workers)
    if sample.sound:
        return source.changed_ranges(), ""
    log.error("tracking_wrong", extra={"backup": work.backup_uuid, "chunk": sample.wrong_chunk})
    if work.tracker is not None and source.found_by == "reflink":
        work.tracker.missed(disk.file, sample.wrong_chunk)
    return None, (
        f"{source.found_by} missed a change in chunk {sample.wrong_chunk}, as a sample showed"
    )


def _commit(
    work: BackupWork, new: NewBackup, snapshot: Held, session: Session, ctx: JobContext
) -> None:
    """Commits; chunks that were deleted under us are read from the snapshot and stored again."""
    for attempt in range(COMMIT_ROUNDS + 1):
        ctx.check()
        snapshot.verify_unchanged()
        try:
            session.commit([new])
        except ChunkMissing as missing:
            if attempt == COMMIT_ROUNDS:
                raise
            log.info("chunks_stored_again", extra={"count": len(missing.ids)})
            for source in snapshot.sources.values():
                store_again(work.domain, source, session, missing.ids, ctx, work.workers)
        else:
            return
