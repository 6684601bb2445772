"""How much a domain holds: counts over its view."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from storage.view import tables
from storage.view.tables import BackupState, PackState, Tables


@dataclass(frozen=True, slots=True)
class DomainStats:
    """Sizes in bytes. `stored` is on disk, `live` the part of it that backups reference."""

    backups: int
    packs: int
    chunks: int
    stored_bytes: int
    live_bytes: int
    logical_bytes: int


@dataclass(slots=True)
class Counts:
    """Of the state after record `seq`. Sizes in bytes; `dead`: packs without a live chunk."""

    seq: int
    packs: int = 0
    chunks: int = 0
    stored_bytes: int = 0
    live_bytes: int = 0
    backups: int = 0
    logical_bytes: int = 0
    dead: set[str] = field(default_factory=set)

    def count_pack(self, pack: str, row: PackState, sign: int) -> None:
        self.packs += sign
        self.chunks += sign * row.live_chunks
        self.stored_bytes += sign * row.size_bytes
        self.live_bytes += sign * row.live_bytes
        if sign > 0 and not row.live_chunks:
            self.dead.add(pack)
        else:
            self.dead.discard(pack)

    def count_backup(self, row: BackupState, capacity: int, sign: int) -> None:
        if not row.forgotten:
            self.backups += sign
            self.logical_bytes += sign * capacity

    def copy(self) -> Counts:
        return replace(self, dead=set(self.dead))

    def stats(self) -> DomainStats:
        return DomainStats(
            backups=self.backups,
            packs=self.packs,
            chunks=self.chunks,
            stored_bytes=self.stored_bytes,
            live_bytes=self.live_bytes,
            logical_bytes=self.logical_bytes,
        )


def counted(state: Tables) -> Counts:
    """Reads all rows of packs, backups and their disks."""
    counts = Counts(tables.applied(state)[0])
    for pack, row in tables.packs.scan(state):
        counts.count_pack(pack, row, 1)
    for _, backup in tables.backups.scan(state):
        disks = (tables.disks.require(state, disk) for disk in backup.disks)
        counts.count_backup(backup, sum(disk.capacity for disk in disks), 1)
    return counts
