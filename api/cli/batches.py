"""`vmkeep backup batch-create` and `batch-delete`: many at once, each by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import click
import msgspec
from rich.table import Table

from api.cli import names
from api.cli.client_command import Here, client_command
from api.cli.exits import FAILED, Failure
from api.cli.follow import follow, require_success
from api.cli.screen import table
from api.schemas import Request, RowList
from api.schemas_backup import (
    BackupCreate,
    BackupDelete,
    BatchCreateOutput,
    BatchDeleteOutput,
    BatchRequest,
)
from api.schemas_companion import JobRow


@click.command("batch-create")
@click.argument("vms", metavar="[VM]...", nargs=-1)
@click.option("--file", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--point", default="", help="Backup point; not needed when there is one only.")
@click.option("--name", default="", help="All get this name. Default: each VM's, and the time.")
@click.option("--full/--incremental", default=False, help="Default: incremental.")
@click.option("--wait", is_flag=True, help="Until all are done, showing progress.")
@client_command
def batch_create(
    here: Here,
    *,
    vms: Sequence[str],
    path: Path | None,
    point: str,
    name: str,
    full: bool,
    wait: bool,
) -> None:
    """Back up several VMs: those named, or the bodies in a JSON file ({"items": [...]})."""
    client = here.client
    if bool(vms) == (path is not None):
        raise click.UsageError("name VMs, or give a --file")
    if path is not None:
        body = _items_of(path)
    else:
        point_uuid = names.pick_or_only(client, "backup point", point, names.points)
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}"
        body = _batch(
            BackupCreate(
                compute_uuid=names.pick(client, "VM", vm, names.vms),
                backup_point_uuid=point_uuid,
                backup_name=name or f"{vm}-{stamp}",
                full_backup=full,
            )
            for vm in vms
        )
    reply = client.post("compute/backup/batch/create", BatchCreateOutput, body)
    here.screen.answer(reply, _outcomes)
    if wait:
        made = {result.data.backup_uuid for result in reply.data.results if result.data}
        require_success(follow(here, _jobs_of(here, made)))
    _require_all(reply.data.fail)


@click.command("batch-delete")
@click.argument("backups", metavar="[BACKUP]...", nargs=-1)
@click.option("--file", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@client_command
def batch_delete(here: Here, *, backups: Sequence[str], path: Path | None) -> None:
    """Delete several backups: those named, or the bodies in a JSON file ({"items": [...]})."""
    client = here.client
    if bool(backups) == (path is not None):
        raise click.UsageError("name backups, or give a --file")
    body = (
        _items_of(path)
        if path is not None
        else _batch(
            BackupDelete(backup_uuid=names.pick(client, "backup", wanted, names.backups))
            for wanted in backups
        )
    )
    reply = client.post("compute/backup/batch/delete", BatchDeleteOutput, body)
    here.screen.answer(reply, _outcomes)
    _require_all(reply.data.fail)


def _batch(bodies: Iterable[Request]) -> BatchRequest:
    return BatchRequest(items=[msgspec.to_builtins(body) for body in bodies])


def _items_of(path: Path) -> BatchRequest:
    try:
        return msgspec.json.decode(path.read_bytes(), type=BatchRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise click.UsageError(f"{path}: {error}") from error


def _outcomes(answer: BatchCreateOutput | BatchDeleteOutput) -> Table:
    return table(
        ("outcome", "particulars", "backup uuid"),
        (
            (result.message, result.desc, getattr(result.data, "backup_uuid", ""))
            for result in answer.results
        ),
    )


def _require_all(failures: int) -> None:
    if failures:
        raise Failure(FAILED, f"{failures} of the batch failed")


def _jobs_of(here: Here, backup_uuids: set[str]) -> list[str]:
    rows = here.client.get("job/list", RowList[JobRow]).data.rows
    return [
        row.job_uuid for row in rows if row.kind == "backup" and row.backup_uuid in backup_uuids
    ]
