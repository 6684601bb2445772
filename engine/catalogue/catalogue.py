"""The backups of the managed clusters: all in memory, all in the state, so lists need no point.

A finished backup (status 0) is a copy of what its domain says, and `sync` makes it so again; one in
progress or failed (1, 2) exists here only. A backup that a domain has is never shown as failed: if
we died between its COMMIT and our note of it, the next `sync` puts that right.

Between reading a domain and applying what was read, a backup may finish or be deleted; `sync`
notices by a count of changes and reads again.

Locks: `_writing` orders changes (state first, then memory), `_lock` guards memory only, so readers
never wait for a disk, nor for long: what changes many rows lets go of it again and again. Memory
changes under both, so who holds either may look.

In memory a row is without its machine, which is large and seldom asked for (`whole`), and shares
what others say alike (engine.catalogue.sharing): 0.9 KB each with one disk, and 1 KB in the state.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeAlias

from msgspec.structs import replace

from engine.catalogue.sharing import Sharing, without_machine
from engine.catalogue.shelves import Shelves, length, page_of, place_of
from engine.errors import NotFound
from engine.inventory.scopes import Range
from engine.model import (
    BACKUP_DONE,
    BACKUP_FAILED,
    BACKUP_RUNNING,
    FOREIGN_IDENTITY,
    Backup,
)
from engine.state import State, backup_key
from engine.verb_types import BackupPage, BackupQuery, RangeState
from storage.lmdb_env.kv import WriteTxn

SYNC_ATTEMPTS = 5
DEFAULT_PAGE_SIZE = 20
MOST_PAGE_SIZE = 1000
LOOKED_AT = 1000
KEPT_FAILED = 100  # backups of a VM on a point: one that fails each night does so for years
ROWS_PER_HOLD = 100  # what is changed before others may look
SHARED_AT_START = 10_000_000
SHARED_WHILE_RUNNING = 10_000


Beside: TypeAlias = Callable[[WriteTxn], None]


def _nothing(_txn: WriteTxn) -> None:
    return None


@dataclass(frozen=True, slots=True)
class _Change:
    put: Sequence[Backup] = ()
    remove: Sequence[Backup] = ()


class Catalogue:
    """Loaded from the state at once. All methods may be called from any thread."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._writing = threading.Lock()
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, Backup]] = {}  # by cluster, by uuid
        self._arrival: dict[str, int] = {}  # of those whose record was not read yet
        self._arrivals = 0
        self._changes: Counter[tuple[str, str]] = Counter()
        self._done: Counter[str] = Counter()  # by point
        self._sharing = Sharing(most=SHARED_WHILE_RUNNING)
        sharing = Sharing(most=SHARED_AT_START)
        with state.store.read() as txn:
            rows = [sharing.of(row) for row in state.backups.each_in(txn)]
        state.store.release_memory()
        rows.sort(key=place_of)
        self._shelves = Shelves(rows)
        for row in reversed(rows):
            self._note(row)

    # Looking --------------------------------------------------------------------------------

    def get(self, uuid: str, cluster_uuid: str = "") -> Backup:
        """The backup of that uuid, in that cluster if it is given. NotFound."""
        with self._lock:
            clusters = [cluster_uuid] if cluster_uuid else sorted(self._rows)
            found = [self._rows.get(cluster, {}).get(uuid) for cluster in clusters]
        for row in found:
            if row is not None:
                return row
        raise NotFound("backup", uuid)

    def whole(self, row: Backup) -> Backup:
        """The row with its machine, if it has one; as it is when it has gone."""
        return self._state.backups.get(backup_key(row.cluster_uuid, row.uuid)) or row

    def uuids(self, cluster_uuid: str, point_uuid: str) -> set[str]:
        """Of all backups there."""
        with self._lock:
            rows = [*self._rows.get(cluster_uuid, {}).values()]
        return {row.uuid for row in rows if row.point_uuid == point_uuid}

    def newest(self, cluster_uuid: str, point_uuid: str, vm_uuid: str) -> Backup | None:
        """What an incremental of that VM builds on: the finished one that came there last. By the
        log, which no clock can put out of order: one that was ahead would make the parent of all
        that followed, and what is tracked since the last backup would be of no use to them.

        None that was imported. Its maker says which VM it is of, and may have given it the uuids of
        one of ours, by which bitmaps are found, and chunk ids that begin as ours and name nothing.
        """
        with self._lock:
            rows = self._shelves.of_vm(cluster_uuid, point_uuid, vm_uuid)
            done = (row for row in rows if row.status == BACKUP_DONE and not _is_foreign(row))
            return max(done, key=self._age, default=None)

    def newest_of_each(self, cluster_uuid: str, point_uuid: str, most: int) -> list[Backup]:
        """A finished backup of each of the `most` VMs that were backed up there last. Those beyond
        the newest LOOKED_AT backups are not looked for."""
        found: dict[str, Backup] = {}
        with self._lock:
            rows = self._shelves.of_point(cluster_uuid, point_uuid)
            for row in islice(rows, LOOKED_AT):
                if row.status == BACKUP_DONE:
                    found.setdefault(row.label.vm_uuid, row)
                if len(found) == most:
                    break
        return list(found.values())

    def query(self, ranges: Sequence[Range], query: BackupQuery) -> BackupPage:
        """The page that `query` asks for, of the backups in `ranges`."""
        size = min(query.page_size or DEFAULT_PAGE_SIZE, MOST_PAGE_SIZE)
        skipped = (max(query.page, 1) - 1) * size
        places = [(cluster.uuid, namespace.uuid) for cluster, namespace in ranges]
        with self._lock:
            found = self._shelves.find(places, query)
            rows = page_of([*chain(*found.values())], skipped, size)
            totals = {where: length(runs) for where, runs in found.items()}
        states = [
            RangeState(cluster, namespace.uuid, totals[cluster.uuid, namespace.uuid])
            for cluster, namespace in ranges
        ]
        return BackupPage(rows, sum(totals.values()), states)

    def with_status(self, status: int) -> list[Backup]:
        """All backups of that status."""
        with self._lock:
            return [row for row in self._each() if row.status == status]

    def count(self, point_uuid: str) -> int:
        """How many finished backups are on that point."""
        with self._lock:
            return self._done[point_uuid]

    # Changing -------------------------------------------------------------------------------

    def put(self, row: Backup, beside: Beside = _nothing) -> None:
        """Adds or replaces; durable on return, together with what `beside` puts into the state. The
        newest KEPT_FAILED of a VM's that failed on a point stay there."""
        with self._writing:
            self._apply(_Change([row], self._too_many(row)), beside)

    def put_all(self, rows: Sequence[Backup]) -> None:
        """Adds or replaces all of them, or none; durable on return."""
        with self._writing:
            self._apply(_Change(put=rows))

    def remove(self, row: Backup) -> None:
        """Durable on return. One that is gone is no error."""
        with self._writing:
            self._apply(_Change(remove=[row]))

    def remove_point(self, point_uuid: str) -> None:
        """Forgets all backups of a point that was detached."""
        with self._writing:
            gone = [row for row in self._each() if row.point_uuid == point_uuid]
            self._apply(_Change(remove=gone))

    def keep_only(self, cluster_uuids: Iterable[str], point_uuids: Iterable[str]) -> None:
        """Forgets the backups of clusters and points that are not ours any more."""
        clusters, points = frozenset(cluster_uuids), frozenset(point_uuids)
        with self._writing:
            gone = [
                row
                for row in self._each()
                if row.cluster_uuid not in clusters or row.point_uuid not in points
            ]
            self._apply(_Change(remove=gone))

    def fail_running(self, reason: str) -> list[Backup]:
        """After a restart: fails what was in progress; returns it."""
        left = [
            replace(row, status=BACKUP_FAILED, error=reason)
            for row in self.with_status(BACKUP_RUNNING)
        ]
        self.put_all(left)
        return left

    def sync(
        self,
        cluster_uuid: str,
        point_uuid: str,
        only: Collection[str],
        read: Callable[[], Sequence[Backup]],
    ) -> bool:
        """Makes the finished ones of the backups `only` what the domain says: `read()` finds those
        of them that it has. No others are touched. False: too much was changed meanwhile, again and
        again; nothing was done.
        """
        where = (cluster_uuid, point_uuid)
        for _ in range(SYNC_ATTEMPTS):
            with self._lock:
                before = self._changes[where]
            rows = read()
            with self._writing:
                if self._changes[where] == before:
                    self._apply(self._difference(where, only, rows))
                    return True
        return False

    def _too_many(self, row: Backup) -> list[Backup]:
        """What goes when `row` is a backup that failed. `_writing` is held."""
        if row.status != BACKUP_FAILED:
            return []
        of_vm = self._shelves.of_vm(row.cluster_uuid, row.point_uuid, row.label.vm_uuid)
        failed = [one for one in of_vm if one.status == BACKUP_FAILED and one.uuid != row.uuid]
        failed.sort(key=self._age, reverse=True)
        return failed[KEPT_FAILED - 1 :]

    def _difference(
        self, where: tuple[str, str], only: Collection[str], rows: Sequence[Backup]
    ) -> _Change:
        """`_writing` is held."""
        known = self._rows.get(where[0], {})
        here = {uuid: known[uuid] for uuid in only if uuid in known}
        here = {uuid: row for uuid, row in here.items() if row.point_uuid == where[1]}
        put = [row for row in rows if _overrules(row, here.get(row.uuid))]
        there = {row.uuid for row in rows}
        gone = [row for row in here.values() if row.status == BACKUP_DONE and row.uuid not in there]
        return _Change(put, gone)

    def _apply(self, change: _Change, beside: Beside = _nothing) -> None:
        """`_writing` is held."""
        if not change.put and not change.remove:
            return
        with self._state.store.write() as txn:
            for row in change.put:
                self._state.backups.put_in(txn, row)
            for row in change.remove:
                self._state.backups.delete_in(txn, backup_key(row.cluster_uuid, row.uuid))
            beside(txn)
        for act, rows in ((self._forget, change.remove), (self._remember, change.put)):
            for first in range(0, len(rows), ROWS_PER_HOLD):
                with self._lock:
                    for row in rows[first : first + ROWS_PER_HOLD]:
                        act(row)
                        self._changes[row.cluster_uuid, row.point_uuid] += 1

    # Memory; `_writing` and `_lock` are held ------------------------------------------------

    def _remember(self, row: Backup) -> None:
        row = self._sharing.of(row)
        self._forget(row)
        self._shelves.add(row)
        self._note(row)

    def _note(self, row: Backup) -> None:
        """All but the shelves."""
        self._rows.setdefault(row.cluster_uuid, {})[row.uuid] = row
        self._done[row.point_uuid] += row.status == BACKUP_DONE
        if not row.seq:
            self._arrivals += 1
            self._arrival[backup_key(row.cluster_uuid, row.uuid)] = self._arrivals

    def _forget(self, row: Backup) -> None:
        known = self._rows.get(row.cluster_uuid, {}).pop(row.uuid, None)
        if known is not None:
            self._arrival.pop(backup_key(row.cluster_uuid, row.uuid), None)
            self._shelves.remove(known)
            self._done[known.point_uuid] -= known.status == BACKUP_DONE

    def _each(self) -> Iterator[Backup]:
        return chain.from_iterable(rows.values() for rows in self._rows.values())

    def _age(self, row: Backup) -> tuple[float, int, int, str]:
        """What was not read yet is later than all that was read. Of what one record brought, an
        import's, the clock tells."""
        arrival = self._arrival.get(backup_key(row.cluster_uuid, row.uuid), 0)
        return row.seq or math.inf, arrival, row.label.create_time, row.uuid


def _is_foreign(row: Backup) -> bool:
    return any(disk.identity == FOREIGN_IDENTITY for disk in row.label.disks)


def _overrules(row: Backup, known: Backup | None) -> bool:
    """Whether what the domain says is news. The end of a running backup is its job's to tell."""
    if known is None:
        return True
    return known.status != BACKUP_RUNNING and known != without_machine(row)
