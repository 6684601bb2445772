"""Names where the API wants uuids: a name, or the first digits of a uuid, when only one thing fits.

A whole uuid is passed on unseen, so scripts cost no extra call and may name what is gone already.
"""

from __future__ import annotations

import uuid as uuids
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import click
from msgspec.structs import replace

from api.cli.exits import REFUSED, Failure
from api.client import Client
from api.printable import one_line
from api.schemas import MAX_PAGE_SIZE, RowList
from api.schemas_backup import BackupList, BackupListQuery, ComputeBackupBaseInfo
from api.schemas_companion import ClusterRow, ComputeRow, JobRow, NamedRow, PointRow, PoolRow

PREFIX_MIN = 4  # digits of a uuid that may stand for the whole


@dataclass(frozen=True, slots=True)
class Named:
    """Something that has a name and a uuid."""

    uuid: str
    name: str


Listing = Callable[[Client], Sequence[Named]]


def pick(client: Client, what: str, wanted: str, listing: Listing) -> str:
    """The uuid that `wanted` stands for. A usage error when several fit, REFUSED when none does."""
    if _is_uuid(wanted):
        return wanted
    rows = listing(client)
    fits = [row for row in rows if wanted and row.name == wanted]  # jobs have no names
    if not fits and len(wanted) >= PREFIX_MIN:
        fits = [row for row in rows if row.uuid.startswith(wanted.lower())]
    if not fits:
        raise Failure(REFUSED, f"no {what} {wanted!r}")
    return _single(what, f"{what} {wanted!r}", fits)


def pick_or_only(client: Client, what: str, wanted: str, listing: Listing) -> str:
    """As `pick`; with nothing wanted, the only one there is, or the one named `default`."""
    if wanted:
        return pick(client, what, wanted, listing)
    rows = listing(client)
    if len(rows) > 1:
        rows = [row for row in rows if row.name == "default"] or rows
    if not rows:
        raise Failure(REFUSED, f"there is no {what} yet")
    return _single(what, f"{what} not named, and", rows)


def vms(client: Client) -> list[Named]:
    rows = client.get("compute/list", RowList[ComputeRow]).data.rows
    return [Named(row.compute_uuid, row.compute_name) for row in rows]


def pools(client: Client) -> list[Named]:
    rows = client.get("pool/list", RowList[PoolRow]).data.rows
    return [Named(row.pool_uuid, row.name) for row in rows]


def points(client: Client) -> list[Named]:
    rows = client.get("backup_point/list", RowList[PointRow]).data.rows
    return [Named(row.backup_point_uuid, row.name) for row in rows]


def clusters(client: Client) -> list[Named]:
    rows = client.get("cluster/list", RowList[ClusterRow]).data.rows
    return [Named(row.uuid, row.name) for row in rows]


def zones(client: Client) -> list[Named]:
    rows = client.get("zone/list", RowList[NamedRow]).data.rows
    return [Named(row.uuid, row.name) for row in rows]


def groups(client: Client) -> list[Named]:
    rows = client.get("object_group/list", RowList[NamedRow]).data.rows
    return [Named(row.uuid, row.name) for row in rows]


def jobs(client: Client) -> list[Named]:
    """Which have no names."""
    rows = client.get("job/list", RowList[JobRow]).data.rows
    return [Named(row.job_uuid, "") for row in rows]


def backups(client: Client) -> list[Named]:
    return [Named(row.uuid, row.name) for row in every_backup(client, BackupListQuery())]


def every_backup(client: Client, query: BackupListQuery) -> Iterator[ComputeBackupBaseInfo]:
    """All pages of a list."""
    page = 1
    while True:
        asked = replace(query, page_number=page, page_size=MAX_PAGE_SIZE)
        answer = client.get("compute/backup/list", BackupList, asked).data
        yield from answer.rows
        if page * MAX_PAGE_SIZE >= answer.total_count:
            return
        page += 1


def _single(what: str, asked: str, fits: Sequence[Named]) -> str:
    if len(fits) == 1:
        return fits[0].uuid
    shown = ", ".join(f"{row.uuid} ({row.name})" for row in fits[:5])
    more = f" and {len(fits) - 5} more" if len(fits) > 5 else ""
    said = f"{asked} could be each of {len(fits)}: {shown}{more}. Give a {what} uuid."
    raise click.UsageError(one_line(said))


def _is_uuid(text: str) -> bool:
    try:
        return str(uuids.UUID(text)) == text.lower()
    except ValueError:
        return False
