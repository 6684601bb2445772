"""`vmkeep point`: backup points and their upkeep; `point check` needs no server."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from api.cli import names, params, units
from api.cli.client_command import Here, client_command
from api.cli.follow import finish
from api.cli.screen import Screen, card, table
from api.schemas import Empty, RowList
from api.schemas_companion import (
    JobStarted,
    PointCreate,
    PointCreated,
    PointDelete,
    PointInspectQuery,
    PointMaintenance,
    PointRow,
)


@click.group()
def point() -> None:
    """Backup points: the directories that hold the backups."""


@point.command("list")
@client_command
def list_points(here: Here) -> None:
    """Attached backup points."""
    here.screen.answer(here.client.get("backup_point/list", RowList[PointRow]), _list_view)


@point.command("inspect")
@click.argument("name", metavar="POINT")
@client_command
def inspect(here: Here, *, name: str) -> None:
    """One backup point."""
    query = PointInspectQuery(backup_point_uuid=_uuid(here, name))
    here.screen.answer(here.client.get("backup_point/inspect", PointRow, query), _card)


@point.command("create")
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(["local", "nfs"]), default="local", show_default=True)
@client_command
def create(here: Here, *, name: str, path: Path, kind: str) -> None:
    """Make a point of the empty directory PATH, or attach one that is a point already.

    PATH is a directory of the server's. What other clusters keep on it stays theirs.

    \b
      vmkeep point create offsite /mnt/backup --kind nfs
    """
    body = PointCreate(name=name, kind="nfs" if kind == "nfs" else "local", path=str(path))
    reply = here.client.post("backup_point/create", PointCreated, body)
    here.screen.answer(reply, lambda made: f"backup point {made.backup_point_uuid} ({name})")


@point.command("delete")
@click.argument("name", metavar="POINT")
@click.option("--erase", is_flag=True, help="Also erase this cluster's backups on it.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@client_command
def delete(here: Here, *, name: str, erase: bool, yes: bool) -> None:
    """Detach a point. What is on it stays, unless you say --erase."""
    uuid = _uuid(here, name)
    if erase and not yes:
        click.confirm(f"Erase all backups of this cluster on {name}?", abort=True, err=True)
    body = PointDelete(backup_point_uuid=uuid, erase=erase)
    reply = here.client.post("backup_point/delete", Empty, body)
    here.screen.answer(reply, lambda _: f"detached {uuid}")


@point.command("verify")
@click.argument("name", metavar="POINT")
@click.option("--deep", is_flag=True, help="Read and check every stored byte.")
@click.option("--wait", is_flag=True, help="Until it is done, showing progress.")
@client_command
def verify(here: Here, *, name: str, deep: bool, wait: bool) -> None:
    """Check a point, in the server."""
    _maintain(here, "backup_point/verify", name, deep=deep, wait=wait)


@point.command("gc")
@click.argument("name", metavar="POINT")
@click.option("--wait", is_flag=True, help="Until it is done, showing progress.")
@client_command
def collect(here: Here, *, name: str, wait: bool) -> None:
    """Free what no backup needs. Backups and restores may go on meanwhile."""
    _maintain(here, "backup_point/gc", name, deep=False, wait=wait)


@point.command("rebuild")
@click.argument("name", metavar="POINT")
@click.option("--wait", is_flag=True, help="Until it is done, showing progress.")
@client_command
def rebuild(here: Here, *, name: str, wait: bool) -> None:
    """Make the server's view of a point anew, from the point's own files."""
    _maintain(here, "backup_point/rebuild", name, deep=False, wait=wait)


@point.command("check")
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--deep", is_flag=True, help="Read and check every stored byte.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--rate", metavar="SIZE", default="0", help="Read no more than this a second: 50M.")
@click.option(
    "--resume",
    type=params.OwnDirectory(),
    help="Remember in this directory what was read; an interrupted deep check goes on there.",
)
def check(*, path: Path, deep: bool, as_json: bool, rate: str, resume: Path | None) -> None:
    """Check the backup point at PATH on this machine, without a server. Changes nothing.

    Exit code 1 when data is lost or in doubt, 5 when the point can't be read at all.

    \b
      vmkeep point check /mnt/backup --deep
    """
    from api.cli.check import check_and_tell  # the storage layer, which no other command needs

    rate_bytes_per_s = params.size(rate)
    check_and_tell(
        Screen(json=as_json), path, deep=deep, rate_bytes_per_s=rate_bytes_per_s, resume=resume
    )


def _maintain(here: Here, call: str, name: str, *, deep: bool, wait: bool) -> None:
    body = PointMaintenance(backup_point_uuid=_uuid(here, name), deep=deep)
    reply = here.client.post(call, JobStarted, body)
    if not wait:
        here.screen.answer(reply, lambda started: f"job {started.job_uuid}")
        return
    finish(here, reply.data.job_uuid)


def _uuid(here: Here, name: str) -> str:
    return names.pick(here.client, "backup point", name, names.points)


def _list_view(answer: RowList[PointRow]) -> Table:
    columns = ("name", "kind", "state", ">backups", ">stored", ">free", "uuid", "path")
    return table(columns, (_row(row) for row in answer.rows))


def _row(row: PointRow) -> tuple[str, ...]:
    return (
        row.name,
        row.kind,
        row.state,
        str(row.backup_count),
        units.size(row.stored_bytes),
        units.size(row.free),
        row.backup_point_uuid,
        row.path,
    )


def _card(row: PointRow) -> Table:
    ratio = row.logical_bytes / row.stored_bytes if row.stored_bytes else 0.0
    return card(
        [
            ("name", row.name),
            ("uuid", row.backup_point_uuid),
            ("path", f"{row.path} ({row.kind})"),
            ("state", row.state),
            ("error", row.last_error),
            ("backups", str(row.backup_count)),
            ("holds", f"{units.size(row.logical_bytes)} of volumes in {row.chunk_count} chunks"),
            ("stored", f"{units.size(row.stored_bytes)} in {row.pack_count} packs"),
            ("ratio", f"{ratio:.1f}" if ratio else ""),
            ("free", f"{units.size(row.free)} of {units.size(row.capacity)}"),
        ]
    )
