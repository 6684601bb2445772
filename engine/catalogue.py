"""The backups of the managed clusters: all in memory, all in the state, so lists need no point.

A finished backup (status 0) is a copy of what its domain says, and `sync` makes it so again; one in
progress or failed (1, 2) exists here only. A backup that a domain has is never shown as failed: if
we died between its COMMIT and our note of it, the next `sync` puts that right.

Between reading a domain and applying what was read, a backup may finish or be deleted; `sync`
notices by a count of changes and reads again.

Locks: `_writing` orders changes (state first, then memory), `_lock` guards memory only, so readers
never wait for a disk.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from msgspec.structs import replace

from engine.errors import NotFound
from engine.model import BACKUP_DONE, BACKUP_FAILED, BACKUP_RUNNING, Backup
from engine.scopes import Range
from engine.state import State, backup_key
from engine.views import BackupPage, BackupQuery, RangeState

SYNC_ATTEMPTS = 5
DEFAULT_PAGE_SIZE = 20
MOST_PAGE_SIZE = 1000

_Place: TypeAlias = tuple[int, str, str]  # newest first, then uuid, then cluster


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
        self._rows: dict[str, Backup] = {}
        self._arrival: dict[str, int] = {}
        self._arrivals = 0
        self._clusters: set[str] = set()  # that any row ever was of
        self._newest_first: list[_Place] = []
        self._changes: Counter[tuple[str, str]] = Counter()
        for row in sorted(state.backups.values(), key=_place, reverse=True):
            self._remember(row)

    # Looking --------------------------------------------------------------------------------

    def get(self, uuid: str, cluster_uuid: str = "") -> Backup:
        """The backup of that uuid, in that cluster if it is given. NotFound."""
        with self._lock:
            if cluster_uuid:
                found = self._rows.get(backup_key(cluster_uuid, uuid))
            else:
                keys = (backup_key(cluster, uuid) for cluster in sorted(self._clusters))
                found = next((self._rows[key] for key in keys if key in self._rows), None)
        if found is None:
            raise NotFound("backup", uuid)
        return found

    def newest(self, cluster_uuid: str, point_uuid: str, vm_uuid: str) -> Backup | None:
        """What an incremental of that VM builds on: its newest finished backup there."""
        with self._lock:
            found = [
                row
                for row in self._rows.values()
                if row.label.vm_uuid == vm_uuid
                and row.status == BACKUP_DONE
                and (row.cluster_uuid, row.point_uuid) == (cluster_uuid, point_uuid)
            ]
            return max(found, key=self._age, default=None)

    def query(self, ranges: Sequence[Range], query: BackupQuery) -> BackupPage:
        """The page that `query` asks for, of the backups in `ranges`."""
        totals = {(cluster.uuid, namespace.uuid): 0 for cluster, namespace in ranges}
        found: list[Backup] = []
        with self._lock:
            for place in self._newest_first:
                row = self._rows[backup_key(place[2], place[1])]
                where = (row.cluster_uuid, row.label.namespace)
                if where in totals and _matches(row, query):
                    totals[where] += 1
                    found.append(row)
        size = min(query.page_size or DEFAULT_PAGE_SIZE, MOST_PAGE_SIZE)
        first = (max(query.page, 1) - 1) * size
        states = [
            RangeState(cluster, namespace.uuid, totals[cluster.uuid, namespace.uuid])
            for cluster, namespace in ranges
        ]
        return BackupPage(found[first : first + size], len(found), states)

    def with_status(self, status: int) -> list[Backup]:
        """All backups of that status."""
        with self._lock:
            return [row for row in self._rows.values() if row.status == status]

    def count(self, point_uuid: str) -> int:
        """How many finished backups are on that point."""
        with self._lock:
            return sum(
                row.point_uuid == point_uuid and row.status == BACKUP_DONE
                for row in self._rows.values()
            )

    # Changing -------------------------------------------------------------------------------

    def put(self, row: Backup) -> None:
        """Adds or replaces; durable on return."""
        with self._writing:
            self._apply(_Change(put=[row]))

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
        with self._lock:
            gone = [row for row in self._rows.values() if row.point_uuid == point_uuid]
        with self._writing:
            self._apply(_Change(remove=gone))

    def keep_only(self, cluster_uuids: Iterable[str], point_uuids: Iterable[str]) -> None:
        """Forgets the backups of clusters and points that are not ours any more."""
        clusters, points = frozenset(cluster_uuids), frozenset(point_uuids)
        with self._lock:
            gone = [
                row
                for row in self._rows.values()
                if row.cluster_uuid not in clusters or row.point_uuid not in points
            ]
        with self._writing:
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
        self, cluster_uuid: str, point_uuid: str, read: Callable[[], Sequence[Backup]]
    ) -> None:
        """Makes the finished backups of that domain those that `read()` finds, oldest first."""
        where = (cluster_uuid, point_uuid)
        for _ in range(SYNC_ATTEMPTS):
            with self._lock:
                before = self._changes[where]
            rows = read()
            with self._writing:
                with self._lock:
                    unchanged = self._changes[where] == before
                    change = self._difference(where, rows)
                if unchanged:
                    self._apply(change)
                    return
        # Ever busy: the next refresh syncs again.

    def _difference(self, where: tuple[str, str], rows: Sequence[Backup]) -> _Change:
        here = {
            row.uuid: row
            for row in self._rows.values()
            if (row.cluster_uuid, row.point_uuid) == where
        }
        put = [row for row in rows if _overrules(row, here.get(row.uuid))]
        there = {row.uuid for row in rows}
        gone = [row for row in here.values() if row.status == BACKUP_DONE and row.uuid not in there]
        return _Change(put, gone)

    def _apply(self, change: _Change) -> None:
        if not change.put and not change.remove:
            return
        with self._state.store.write() as txn:
            for row in change.put:
                self._state.backups.put_in(txn, row)
            for row in change.remove:
                self._state.backups.delete_in(txn, backup_key(row.cluster_uuid, row.uuid))
        with self._lock:
            for row in change.remove:
                self._forget(row)
            for row in change.put:
                self._remember(row)
            for row in (*change.put, *change.remove):
                self._changes[row.cluster_uuid, row.point_uuid] += 1

    # Memory; `_lock` is held ----------------------------------------------------------------

    def _remember(self, row: Backup) -> None:
        self._forget(row)
        key = backup_key(row.cluster_uuid, row.uuid)
        self._arrivals += 1
        self._rows[key] = row
        self._clusters.add(row.cluster_uuid)
        self._arrival[key] = self._arrivals
        insort(self._newest_first, _place(row))

    def _forget(self, row: Backup) -> None:
        key = backup_key(row.cluster_uuid, row.uuid)
        known = self._rows.pop(key, None)
        self._arrival.pop(key, None)
        if known is not None:
            del self._newest_first[bisect_left(self._newest_first, _place(known))]

    def _age(self, row: Backup) -> tuple[int, int]:
        key = backup_key(row.cluster_uuid, row.uuid)
        return row.label.create_time, self._arrival[key]


def _place(row: Backup) -> _Place:
    return (-row.label.create_time, row.uuid, row.cluster_uuid)


def _overrules(row: Backup, known: Backup | None) -> bool:
    """Whether what the domain says is news. The end of a running backup is its job's to tell."""
    return known is None or (known.status != BACKUP_RUNNING and known != row)


def _matches(row: Backup, query: BackupQuery) -> bool:
    label = row.label
    return (
        (not query.vm_uuid or label.vm_uuid == query.vm_uuid)
        and (not query.point_uuid or row.point_uuid == query.point_uuid)
        and (not query.start_time or label.create_time >= query.start_time)
        and (not query.end_time or label.create_time <= query.end_time)
        and query.name_part in label.name
        and query.description_part in label.description
    )
