"""What a domain keeps in memory of its view, so that no answer takes a look at all of its rows.

Everything here can be had from the view by a scan, which takes 3 µs for each pack, backup and disk.
It is scanned once; from then on the rows that a transaction changes are noticed (`Noticing`), and
when it has been committed the counts follow. Whatever does not fit together is scanned anew.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage.view import tables
from storage.view.stats import Counts, counted
from storage.view.tables import BackupState, PackState, Table, Tables
from storage.view.view import View

MOST_CHANGES = 10_000
_WATCHED = frozenset({"packs", "backups", "disks"})


@dataclass(frozen=True, slots=True)
class Delta:
    """What the records after `before`, up to `last`, did: (key, row before, row after)."""

    before: int
    last: int
    packs: Sequence[tuple[str, PackState | None, PackState | None]]
    backups: Sequence[tuple[str, BackupState | None, BackupState | None]]
    capacities: dict[str, int]  # of all disks that the backups have, or had


class Noticing:
    """Tables that remember what the watched ones had before they were changed."""

    def __init__(self, state: Tables) -> None:
        self._state = state
        self._before = tables.applied(state)[0]
        self._tables = {name: _Noticed(state.table(name)) for name in _WATCHED}

    def table(self, name: str) -> Table:
        return self._tables[name] if name in _WATCHED else self._state.table(name)

    def delta(self) -> Delta:
        """What has changed since it was made."""
        backups = self._changes("backups", tables.backups)
        rows = [row for _, *both in backups for row in both if row is not None]
        return Delta(
            before=self._before,
            last=tables.applied(self._state)[0],
            packs=self._changes("packs", tables.packs),
            backups=backups,
            capacities={disk: self._capacity(disk) for row in rows for disk in row.disks},
        )

    def _changes(
        self, name: str, rows: tables.Rows[tables.RowT]
    ) -> list[tuple[str, tables.RowT | None, tables.RowT | None]]:
        return [
            (key.decode(), None if old is None else rows.decode(old), rows.get(self, key.decode()))
            for key, old in self._tables[name].before.items()
        ]

    def _capacity(self, disk: str) -> int:
        """A disk's capacity never changes, but the disk may be gone."""
        old = self._tables["disks"].before.get(disk.encode())
        if old is not None:
            return tables.disks.decode(old).capacity
        row = tables.disks.get(self._state, disk)
        return 0 if row is None else row.capacity


class _Noticed:
    """A Table; `before` has the value, or None, that each changed key had."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.before: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes | None:
        return self._table.get(key)

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return self._table.get_many(keys)

    def put(self, key: bytes, value: bytes) -> None:
        self._notice(key)
        self._table.put(key, value)

    def add_many(self, rows: Sequence[tuple[bytes, bytes]], *, at_end: bool = False) -> None:
        for key, _ in rows:
            self._notice(key)
        self._table.add_many(rows, at_end=at_end)

    def delete(self, key: bytes) -> None:
        self._notice(key)
        self._table.delete(key)

    def scan(self, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        return self._table.scan(prefix)

    def keys_from(self, start: bytes, prefix: bytes) -> Iterator[bytes]:
        return self._table.keys_from(start, prefix)

    def _notice(self, key: bytes) -> None:
        if key not in self.before:
            self.before[key] = self._table.get(key)


class Tally:
    """The counts of one view, and which backups changed of late. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counts | None = None
        self._views = 0  # how many there were before
        self._last: int | None = None
        self._since = 0
        self._changed: dict[str, int] = {}  # backup → the last record that changed it

    def follow(self, delta: Delta) -> None:
        """Call it when the transaction has been committed, in the order of the records."""
        with self._lock:
            self._follow_changes(delta)
            counts = self._counts
            if counts is None or counts.seq >= delta.last:
                return  # scanned after the commit
            if counts.seq != delta.before:
                self._counts = None
                return
            for pack, *both in delta.packs:
                for row, sign in zip(both, (-1, 1), strict=True):
                    if row is not None:
                        counts.count_pack(pack, row, sign)
            for _, *states in delta.backups:
                for state, sign in zip(states, (-1, 1), strict=True):
                    if state is not None:
                        capacity = sum(delta.capacities[disk] for disk in state.disks)
                        counts.count_backup(state, capacity, sign)
            counts.seq = delta.last

    def _follow_changes(self, delta: Delta) -> None:
        if delta.before != self._last or len(self._changed) > MOST_CHANGES:
            self._changed.clear()
            self._since = delta.before
        self._changed.update({backup: delta.last for backup, *_ in delta.backups})
        self._last = delta.last

    def forget(self) -> None:
        """The view is another one now."""
        with self._lock:
            self._counts = self._last = None
            self._views += 1

    def changed_after(self, seq: int) -> frozenset[str] | None:
        """The backups that records after `seq` changed; None when that is not known."""
        with self._lock:
            if self._last is None or not self._since <= seq <= self._last:
                return None
            return frozenset(backup for backup, at in self._changed.items() if at > seq)

    def counts(self, view: View) -> Counts:
        """A copy of the counts."""
        with self._lock:
            known, views = self._counts, self._views
        if known is None:
            # Not under the lock: a damaged view is made anew by this, which comes back to forget().
            known = view.ask(counted)
        with self._lock:
            if self._counts is None and self._views == views:
                self._counts = known
            return known.copy()
