"""One cluster's domain on a point, opened for writing by one host.

All changes go through `append`: fold the tail, fold the new ops into an uncommitted transaction of
the view, link the record, commit. So an op is checked against the very state that it follows, and
the view never holds what the log does not. Any thread may call anything; appends take turns.

Read first: docs/design.md §5 and §6. Then storage.fold, storage.session, storage.gc.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storage import gc, imports, orphans, tables
from storage.checkpoints import publish_checkpoint
from storage.chunks import ChunkHasher
from storage.errors import Damaged, FileGone, NotOnPoint, PointUnreachable, StorageError, translated
from storage.fold import Garbage, fold
from storage.fs import Fs
from storage.listing import BackupRow, backup_row, backup_rows
from storage.log import Log
from storage.maps import DiskMap
from storage.paths import DomainPaths, FileContents
from storage.reader import ChunkReader
from storage.rebuild import make_view
from storage.record import (
    Abort,
    Forget,
    Op,
    Open,
    Record,
    SessionKind,
    encode_record,
    record_digest,
)
from storage.session import Session
from storage.tables import Tables
from storage.view import View

RECORDS_PER_TRANSACTION = 64
APPEND_ATTEMPTS = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DomainStats:
    """Sizes in bytes. `stored` is on disk, `live` the part of it that backups reference."""

    backups: int
    packs: int
    chunks: int
    stored_bytes: int
    live_bytes: int
    logical_bytes: int


class _LostRace(Exception):
    """Another host's record took the number."""


class Domain:
    """See the module. Made by storage.point.Point.domain."""

    def __init__(
        self,
        fs: Fs,
        paths: DomainPaths,
        view: View,
        *,
        host: str,
        hasher: ChunkHasher,
        chunk_size: int,
        pack_size_bytes: int,
    ) -> None:
        self.fs = fs
        self.paths = paths
        self.view = view
        self.host = host
        self.incarnation = secrets.token_hex(16)
        self.hasher = hasher
        self.chunk_size = chunk_size
        self.pack_size_bytes = pack_size_bytes
        self.contents = FileContents(fs, paths)
        self._log = Log(fs, paths.log, paths.host_tmp(host))
        self._lock = threading.RLock()

    # The log.

    def refresh(self) -> int:
        """Folds the records that came since; returns the number of the last one.

        A record whose files later records have made garbage can't be folded with its contents any
        more: then the view is made anew. Raises PointUnreachable, Damaged, PointNewerFormat.
        """
        with self._lock:
            try:
                while self.view.update(self._fold_some):
                    pass
            except FileGone as error:
                log.info("view_made_anew domain=%s reason=%s", self.paths.root, error)
                self.rebuild()
            with self.view.read() as state:
                return tables.applied(state)[0]

    def require_own_past(self) -> None:
        """The log must still hold the record that the view ends with.

        Damaged when it does not: the point was put back to an older state of itself. Nothing is
        written to such a point, since names would recur.
        """
        with self.view.read() as state:
            seq, digest = tables.applied(state)
        found = self._log.read(seq) if seq else None
        if seq and (found is None or found[1] != digest):
            raise Damaged(
                f"{self.paths.log}: record {seq}, which this host has seen, is not there any more: "
                "the point was put back to an older state"
            )

    def _fold_some(self, state: Tables) -> bool:
        """Folds up to a transaction's worth of records; False when the tail was reached."""
        for _ in range(RECORDS_PER_TRANSACTION):
            found = self._log.read(tables.applied(state)[0] + 1)
            if found is None:
                return False
            fold(state, *found, self.contents)
        return True

    def append(self, build: Callable[[Tables], Sequence[Op]]) -> Garbage:
        """Appends one record with the ops that `build` derives from the state that they follow.

        Durable on return. `build` may run several times. Raises Refused and leaves, ChunkMissing,
        PointFull, PointReadOnly, PointUnreachable; after these nothing was appended, but for
        PointUnreachable, where the next refresh tells.
        """
        with self._lock:
            for _ in range(APPEND_ATTEMPTS):
                self.refresh()
                garbage = self._append_next(build)
                if garbage is not None:
                    return garbage
        raise PointUnreachable(f"{self.paths.log}: {APPEND_ATTEMPTS} times another host was first")

    def _append_next(self, build: Callable[[Tables], Sequence[Op]]) -> Garbage | None:
        """One attempt at the next number; None when another record took it."""
        published: Record | None = None
        garbage = Garbage()

        def change(state: Tables) -> None:
            nonlocal published, garbage
            record = published or self._next_record(state, build(state))
            garbage = fold(state, record, record_digest(encode_record(record)), self.contents)
            if published is None:
                if not self._log.publish(record):
                    raise _LostRace
                published = record

        try:
            with translated(f"view {self.view.path}"):
                self.view.update(change)
        except _LostRace:
            return None
        except StorageError:
            if published is None:
                raise
            # The record is in the log; only our view is behind, and the next refresh mends that.
            log.warning("view_behind seq=%d path=%s", published.seq, self.view.path)
        return garbage

    def _next_record(self, state: Tables, ops: Sequence[Op]) -> Record:
        seq, previous = tables.applied(state)
        return Record(
            seq=seq + 1,
            previous=previous,
            nonce=secrets.token_bytes(16),
            host=self.host,
            ops=tuple(ops),
        )

    # Backups.

    def backups(self) -> list[BackupRow]:
        """All live backups, in no particular order."""
        with self.view.read() as state:
            return list(backup_rows(state))

    def backup(self, backup: str) -> BackupRow:
        """One live backup; NotOnPoint when there is none of that uuid."""
        with self.view.read() as state:
            row = tables.backups.get(state, backup)
            if row is None or row.forgotten:
                raise NotOnPoint(f"backup {backup} is not on the point")
            return backup_row(state, backup, row)

    def forget(self, backups: Sequence[str]) -> None:
        """Takes backups away, durably; others of their chains stay whole. NotOnPoint: none went.

        Files that became unreferencable are unlinked; packs go with the next `reclaim`.
        """
        garbage = self.append(lambda _: [Forget(backups=tuple(backups))])
        orphans.unlink_garbage(self, garbage)

    def disk_map(self, disk: str) -> DiskMap:
        """The complete chunk map of a disk backup that is live, or held by a session."""
        return DiskMap.of(self.view, disk, self.chunk_size)

    def reader(self) -> ChunkReader:
        """For reading what storage.reader.plan_reads plans. Hold the backup by a session."""
        return ChunkReader(self, self.hasher)

    # Sessions.

    def begin(self, kind: SessionKind, holds: Sequence[str] = ()) -> Session:
        """Opens a session that keeps `holds` from being released. NotOnPoint if one is not live."""
        session = secrets.token_hex(16)
        op = Open(
            session=session,
            kind=kind,
            host=self.host,
            incarnation=self.incarnation,
            holds=tuple(holds),
        )
        self.append(lambda _: [op])
        return Session(self, session)

    def abort(self, session: str) -> None:
        """Ends a session without outcome and deletes its files. SessionEnded if it has one."""
        orphans.unlink_garbage(self, self.append(lambda _: [Abort(session=session)]))

    def clear_dead_sessions(self) -> int:
        """Aborts sessions that this host left open before it last stopped; returns how many.

        Safe because one process at a time has the host's id (its data directory is locked).
        """
        with self.view.read() as state:
            dead = [
                session
                for session, row in tables.sessions.scan(state)
                if row.host == self.host and row.incarnation != self.incarnation
            ]
        orphans.remove_directory(self, self.paths.host_tmp(self.host))
        for session in dead:
            self.abort(session)
        orphans.sweep(self)
        return len(dead)

    # Room.

    def reclaim(
        self,
        *,
        sparse_below: float = 0.6,
        copy_budget_bytes: int = 1 << 30,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> gc.GcReport:
        """Unlinks dead packs and empties sparse ones within the budget. See storage.gc."""
        return gc.reclaim(self, sparse_below, copy_budget_bytes, cancelled)

    def rebuild(self) -> None:
        """Makes the view anew from log, footers and manifests. Others may go on reading.

        Raises Damaged when a live file is not what the log says; the old view stays then.
        """
        with self._lock:
            path, identity = self.view.path, self.view.identity
            self.view.replace(make_view(self.fs, self.paths, path, identity))

    def checkpoint(self) -> None:
        """Puts a compact copy of the view on the point, announces it, and keeps the newest two.

        Durable on return. PointFull and the like change nothing.
        """
        with self._lock:
            if self.refresh():
                publish_checkpoint(self)

    def checkpoint_if_due(self, every_records: int) -> bool:
        """checkpoint(), when that many records came since the last one."""
        with self.view.read() as state:
            since = tables.applied(state)[0] - tables.checkpoint_seq(state)
        if since >= every_records:
            self.checkpoint()
        return since >= every_records

    def import_backups(
        self,
        source_cluster_uuid: str,
        backups: Sequence[str],
        relabel: Callable[[BackupRow], bytes],
    ) -> list[BackupRow]:
        """Takes backups over from another cluster's domain of the point. See storage.imports."""
        source = self.paths.sibling(source_cluster_uuid)
        return imports.import_backups(self, source, backups, relabel)

    def stats(self) -> DomainStats:
        """Counts of the view, without a look at the point."""
        with self.view.read() as state:
            packs = [row for _, row in tables.packs.scan(state)]
            backups = [row for _, row in tables.backups.scan(state) if not row.forgotten]
            disks = [tables.disks.require(state, disk) for row in backups for disk in row.disks]
        return DomainStats(
            backups=len(backups),
            packs=len(packs),
            chunks=sum(row.live_chunks for row in packs),
            stored_bytes=sum(row.size_bytes for row in packs),
            live_bytes=sum(row.live_bytes for row in packs),
            logical_bytes=sum(disk.capacity for disk in disks),
        )

    def close(self) -> None:
        """Lets go of the view. Open sessions stay open in the log until the host's next start."""
        self.view.close()
