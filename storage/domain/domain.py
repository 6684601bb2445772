"""One cluster's domain on a point, opened for writing by one host.

All changes go through `append` (storage.domain.appender): fold the tail, fold the new ops into an
uncommitted transaction of the view, link the record, commit. So an op is checked against the very
state that it follows, and the view never holds what the log does not. Any thread may call anything;
appends take turns.

Read first: docs/design.md §5 and §6. Then storage.log.fold, storage.domain.session,
storage.domain.gc.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from storage.domain import gc, imports, orphans
from storage.domain.adopted import AdoptedPacks
from storage.domain.appender import Appender
from storage.domain.checkpoints import publish_checkpoint
from storage.domain.maps import DiskMap
from storage.domain.reader import ChunkReader
from storage.domain.salvage import Salvage
from storage.domain.session import Session
from storage.errors import NotOnPoint, PointUnreachable, SessionEnded
from storage.files.ballast import Ballast
from storage.files.fs import Fs
from storage.format.chunks import ChunkHasher
from storage.format.paths import DomainPaths, FileContents
from storage.format.record import Abort, Forget, Op, Open, SessionKind
from storage.log.fold import Garbage
from storage.log.log import Log
from storage.log.seen import Seen
from storage.view import tables
from storage.view.listing import BackupRow, backup_row, backup_rows, live_rows
from storage.view.proof import Proof
from storage.view.stats import DomainStats
from storage.view.tables import Tables
from storage.view.tally import Tally
from storage.view.trust import Trust
from storage.view.view import View


@dataclass(frozen=True, slots=True)
class DomainLosses:
    """What a view could not take in: lost packs, chunks without a place, disks without a map."""

    packs: tuple[str, ...] = ()
    chunks: int = 0
    disks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.packs or self.chunks or self.disks)


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
        seen: Seen,
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
        self.ballast = Ballast(fs, paths.ballast, paths.root, self._view_bytes_on_point)
        self.salvage = Salvage(self)
        self._seen = seen
        self.records = Log(fs, paths.log, paths.host_tmp(host))  # to read; appending is append()
        self.trust = Trust(view)
        self.adopted = AdoptedPacks(self)
        self.proof = Proof(view)
        self._tally = Tally()
        self._appender = Appender(self, self.records, seen, self._tally)
        self._lock = self._appender.lock
        self._left_open: set[str] = set()

    # The log (storage.domain.appender).

    def refresh(self) -> int:
        """Folds the records that came since; returns the number of the last one.

        A record whose files later records have made garbage can't be folded with its contents any
        more: then the view is made anew. Raises PointUnreachable, Damaged, PointNewerFormat.
        """
        return self._appender.refresh()

    def refresh_to_end(self) -> None:
        """refresh(), to the log's end as the server has it: what an NFS client remembers as absent
        does not count. Raises PointFull and PointReadOnly, too, when the server can't be asked; and
        as `require_own_past`: by what this host has seen nobody's files are judged but its own."""
        self._appender.refresh_to_end()

    def require_own_past(self) -> None:
        """The log must still hold what the view ends with, and what this host has last seen.

        Damaged when it does not: the point was put back to an older state of itself. Nothing is
        written to such a point, since numbers would recur.
        """
        self._appender.require_own_past()

    def require_no_gap(self) -> None:
        """Folds the log to its end, behind which no record may be. Damaged: one is missing, and
        nothing is written, since its number would recur."""
        self._appender.require_no_gap()

    def append(
        self, build: Callable[[Tables], Sequence[Op]], *, spend_ballast: bool = True
    ) -> Garbage:
        """Appends one record with the ops that `build` derives from the state that they follow.

        Durable on return. `build` may run several times. Raises Refused and leaves, ChunkMissing,
        PointFull, PointReadOnly, PointUnreachable, Damaged; after these nothing was appended, but
        for PointUnreachable, where the next refresh tells. With `spend_ballast` PointFull is raised
        only when the room of storage.files.ballast was not enough either.
        """
        return self._appender.append(build, spend_ballast=spend_ballast)

    # Backups.

    def backups(self) -> list[BackupRow]:
        """All live backups, in no particular order."""
        return self.view.ask(lambda state: list(backup_rows(state)))

    def backup(self, backup: str) -> BackupRow:
        """One live backup; NotOnPoint when there is none of that uuid."""

        def found(state: Tables) -> BackupRow:
            row = tables.backups.get(state, backup)
            if row is None or row.forgotten:
                raise NotOnPoint(f"backup {backup} is not on the point")
            return backup_row(state, backup, row)

        return self.view.ask(found)

    def backup_uuids(self) -> set[str]:
        """Of all live backups, and of those that are still held."""
        rows = self.view.ask(lambda state: [key for key, _ in state.table("backups").scan()])
        return {key.decode() for key in rows}

    def changed_backups(self, seq: int) -> frozenset[str] | None:
        """Those that came, went or changed after record `seq`; None: all may have."""
        return self._tally.changed_after(seq)

    def release_memory(self) -> None:
        """See View.release_memory: after much of it was read at once."""
        with self._lock:
            self.view.release_memory()

    def rows_of(self, backups: Collection[str]) -> list[BackupRow]:
        """Those of them that are live."""
        return self.view.ask(lambda state: live_rows(state, backups))

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
        """For reading what storage.domain.reader.plan_reads plans. Hold the backup by a session."""
        return ChunkReader(self)

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
        frees = kind in ("gc", "read")
        try:
            self.append(lambda _: [op], spend_ballast=frees)
        except PointUnreachable:
            self.leave_open(session)  # the record may be there all the same
            raise
        return Session(self, session, may_use_reserve=frees)

    def abort(self, session: str) -> None:
        """Ends a session without outcome and deletes its files. SessionEnded if it has one."""
        orphans.unlink_garbage(self, self.append(lambda _: [Abort(session=session)]))

    def leave_open(self, session: str) -> None:
        """Notes a session of ours that may be open, though nobody works in it: `end_left_open`."""
        self._left_open.add(session)

    def end_left_open(self) -> int:
        """Ends the sessions whose own end did not get to the point, which did not answer; returns
        how many. Else they would keep their files, and what they hold, while this process lives.
        Raises StorageErrors."""
        ended = 0
        for session in tuple(self._left_open):
            with contextlib.suppress(SessionEnded):  # it never began, or did end
                self.abort(session)
                ended += 1
            self._left_open.discard(session)
        return ended

    def clear_dead_sessions(self) -> int:
        """Aborts sessions that this host left open before it last stopped; returns how many.

        What dead backups had sealed is kept for the next ones (storage.domain.salvage). Safe
        because one process at a time has the host's id: its data directory is locked.
        """
        with self.view.read() as state:
            dead = [
                session
                for session, row in tables.sessions.scan(state)
                if row.host == self.host and row.incarnation != self.incarnation
            ]
        orphans.remove_directory(self.fs, self.paths.host_tmp(self.host))
        self.salvage.rescue(dead)
        for session in dead:
            with contextlib.suppress(SessionEnded):  # a host that took us for gone was first
                self.abort(session)
        orphans.sweep(self, thorough=False)
        return len(dead)

    # Room.

    def reclaim(
        self,
        *,
        sparse_below: float = 0.6,
        copy_budget_bytes: int = 1 << 30,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> gc.GcReport:
        """Unlinks dead packs and empties sparse ones within the budget. See storage.domain.gc.

        With a budget it also ends what is kept for resuming backups (storage.domain.salvage).
        """
        if copy_budget_bytes:
            self.salvage.drop()
        try:
            return gc.reclaim(self, sparse_below, copy_budget_bytes, cancelled)
        finally:
            self.ballast.keep()

    def prove_view(self) -> None:
        """Reads the whole view, and makes it anew when any row is missing or not what was written:
        before what can't be undone by making a view anew. Raises StorageErrors."""
        self.view.ask(lambda state: state.prove())

    def rebuild(self) -> None:
        """Makes the view anew from log, footers and manifests. Others may go on reading.

        Raises Damaged when the log is, or is not the one that this host has seen; the old view
        stays then. What damaged files held is lost in the new one (docs/design.md §5.3): see
        `losses`.
        """
        self._appender.rebuild()

    # Damage.

    def losses(self) -> DomainLosses:
        """What the view lacks because of damaged files; empty when it lacks nothing."""

        def found(state: Tables) -> DomainLosses:
            lost = tables.losses(state)
            return DomainLosses(lost.packs, lost.chunks, tuple(tables.lost_disks(state)))

        return self.view.ask(found)

    def rewrite_manifests(self, manifests: Collection[str]) -> int:
        """Writes new manifests for the disks whose own part of the chain has one of these, from the
        view, which still knows what they said; returns how many. Durable on return."""
        self.refresh()
        return gc.rewrite_manifests(self, manifests)

    # Checkpoints.

    def checkpoint(self) -> None:
        """Puts a compact copy of the view on the point, announces it, and keeps the newest two.

        Durable on return. PointFull and the like change nothing.
        """
        with self._lock:
            if not self.refresh():
                return
            self.prove_view()
            if not self.losses():  # which it may have by that proof only, if it was made anew
                publish_checkpoint(self)

    def checkpoint_if_due(self, every_records: int) -> bool:
        """checkpoint(), when that many records came since the last one."""
        with self.view.read() as state:
            since = tables.applied(state)[0] - tables.checkpoint_seq(state)
        if since >= every_records:
            self.checkpoint()
        return since >= every_records

    # Other clusters.

    def import_backups(
        self,
        source_cluster_uuid: str,
        backups: Sequence[str],
        relabel: Callable[[BackupRow], bytes],
        taken: Callable[[Sequence[str]], None] = lambda _: None,
    ) -> list[BackupRow]:
        """Takes backups over from another cluster's domain of the point: see imports."""
        source = self.paths.sibling(source_cluster_uuid)
        return imports.import_backups(self, source, backups, relabel, taken)

    # Counts, and the end.

    def stats(self) -> DomainStats:
        """Counts of the view, without a look at the point."""
        return self._tally.counts(self.view).stats()

    def dead_packs(self, *, at_once: bool) -> tuple[str, ...]:
        """The packs without a live chunk that may be retired by now. See storage.view.proof."""
        return self.proof.dead(sorted(self._tally.counts(self.view).dead), at_once=at_once)

    def has_dead_packs(self) -> bool:
        """Whether a reclaim would find some."""
        return bool(self._tally.counts(self.view).dead)

    @property
    def view_on_point(self) -> bool:
        """Whether the view takes room of the point."""
        return self.view.path.startswith(self.paths.root + "/")

    def _view_bytes_on_point(self) -> int:
        return self.view.size_bytes() if self.view_on_point else 0

    def close(self) -> None:
        """Lets go of the view once nobody is in it; sessions stay open until the next start."""
        with self._lock:
            self._seen.make_durable()
            self.view.close(seal=True)
