"""How much a domain holds: counts over its view."""

from __future__ import annotations

from dataclasses import dataclass

from storage import tables
from storage.tables import Tables


@dataclass(frozen=True, slots=True)
class DomainStats:
    """Sizes in bytes. `stored` is on disk, `live` the part of it that backups reference."""

    backups: int
    packs: int
    chunks: int
    stored_bytes: int
    live_bytes: int
    logical_bytes: int


def stats_of(state: Tables) -> DomainStats:
    """Reads all rows of packs, backups and their disks."""
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
