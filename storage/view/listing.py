"""What a state says about its backups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from storage.view import tables
from storage.view.tables import Tables


@dataclass(frozen=True, slots=True)
class DiskRow:
    """A disk backup: its uuid and the volume's size in bytes."""

    disk: str
    capacity: int


@dataclass(frozen=True, slots=True)
class BackupRow:
    """A live backup. `label` is what the engine gave; `seq` the record that committed it."""

    backup: str
    parent: str
    label: bytes
    seq: int
    disks: tuple[DiskRow, ...]


def backup_rows(state: Tables) -> Iterator[BackupRow]:
    """The live backups of a state."""
    for backup, row in tables.backups.scan(state):
        if not row.forgotten:
            yield backup_row(state, backup, row)


def live_rows(state: Tables, backups: Iterable[str]) -> list[BackupRow]:
    """Those of the backups that are live."""
    rows = [(backup, tables.backups.get(state, backup)) for backup in backups]
    return [
        backup_row(state, backup, row)
        for backup, row in rows
        if row is not None and not row.forgotten
    ]


def backup_row(state: Tables, backup: str, row: tables.BackupState) -> BackupRow:
    disks = tuple(DiskRow(disk, tables.disks.require(state, disk).capacity) for disk in row.disks)
    return BackupRow(backup, row.parent, row.label, row.seq, disks)
