"""`vmkeep backup`: make, list, delete and restore backups."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import click
import msgspec
from rich.table import Table

from api.cli import names, params, units
from api.cli.client_command import Here, client_command, scoped, within
from api.cli.follow import finish
from api.cli.screen import card, table
from api.client import Client, Reply
from api.schemas import Empty, ScopeMembers
from api.schemas_backup import (
    BackupCreate,
    BackupCreated,
    BackupDelete,
    BackupInspectQuery,
    BackupList,
    BackupListQuery,
    BackupRecord,
    ComputeBackupBaseInfo,
)

STATUS = {0: "done", 1: "running", 2: "failed"}


@click.group()
def backup() -> None:
    """Make, list, delete and restore backups."""


@backup.command("list")
@click.option("--vm", default="", help="Of this VM only (name or uuid).")
@click.option("--point", default="", help="On this backup point only (name or uuid).")
@click.option("--name", default="", help="Whose name contains this.")
@click.option("--description", default="", help="Whose description contains this.")
@click.option("--since", type=params.time, default=0, metavar="TIME", help="Such as 2026-11-23.")
@click.option("--until", type=params.time, default=0, metavar="TIME")
@click.option("--page", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--page-size", type=click.IntRange(1, 1000), default=50, show_default=True)
@scoped
@client_command
def list_backups(
    here: Here,
    *,
    vm: str,
    point: str,
    name: str,
    description: str,
    since: int,
    until: int,
    page: int,
    page_size: int,
    scope: ScopeMembers,
) -> None:
    """Backups, newest first.

    \b
      vmkeep backup list --vm web01 --since 2026-11-01
    """
    query = BackupListQuery(
        filter_vm_uuid=vm and names.pick(here.client, "VM", vm, names.vms),
        filter_backup_point_uuid=point and names.pick(here.client, "point", point, names.points),
        filter_backup_name=name,
        filter_backup_description=description,
        start_time=since,
        end_time=until,
        page_number=page,
        page_size=page_size,
    )
    reply = here.client.get("compute/backup/list", BackupList, within(scope, query))
    here.screen.answer(reply, _list_view)
    if len(reply.data.rows) < reply.data.total_count:
        shown = f"page {page}: {len(reply.data.rows)} of {reply.data.total_count}"
        more = f"; more with --page {page + 1}" if page * page_size < reply.data.total_count else ""
        here.screen.line(shown + more)
    for place in reply.data.each_range_list_state:
        if place.result.scode:
            here.screen.line(f"{place.cluster_name}: {place.result.message}: {place.result.desc}")


@backup.command("inspect")
@click.argument("backup_name", metavar="BACKUP")
@client_command
def inspect(here: Here, *, backup_name: str) -> None:
    """One backup. BACKUP is a name, a uuid, or a uuid's first digits."""
    here.screen.answer(inspect_backup(here.client, backup_name), _card)


@backup.command("record")
@click.argument("backup_name", metavar="BACKUP")
@client_command
def record(here: Here, *, backup_name: str) -> None:
    """What a backup was built on, what it has to note, and why it failed."""
    uuid = names.pick(here.client, "backup", backup_name, names.backups)
    query = BackupInspectQuery(backup_uuid=uuid)
    here.screen.answer(
        here.client.get("compute/backup/record", BackupRecord, query),
        lambda row: card(
            [
                ("uuid", row.uuid),
                ("status", STATUS.get(row.status, str(row.status))),
                ("kind", "full" if row.full_backup else "incremental"),
                ("built on", row.parent_uuid),
                ("error", row.error),
                ("namespace", row.namespace_name),
                ("expires", units.time(row.expired_time)),
                *(("note", note) for note in row.notes),
            ]
        ),
    )


@backup.command("create")
@click.argument("vm", metavar="VM")
@click.option("--point", default="", help="Backup point; not needed when there is one only.")
@click.option("--name", default="", help="Default: the VM's name and the time.")
@click.option("--description", default="")
@click.option("--full/--incremental", default=False, help="Default: incremental.")
@click.option("--wait", is_flag=True, help="Until it is done, showing progress.")
@client_command
def create(
    here: Here, *, vm: str, point: str, name: str, description: str, full: bool, wait: bool
) -> None:
    """Back up VM (a name or uuid).

    Returns as soon as the backup is on record; the data follows. An incremental one with nothing
    to build on becomes a full one.

    \b
      vmkeep backup create web01 --wait
      vmkeep backup create web01 --full --name before-upgrade --point offsite
    """
    client = here.client
    body = BackupCreate(
        compute_uuid=names.pick(client, "VM", vm, names.vms),
        backup_point_uuid=names.pick_or_only(client, "backup point", point, names.points),
        backup_name=name or f"{vm}-{datetime.now():%Y%m%d-%H%M%S}",
        description=description,
        full_backup=full,
    )
    reply = client.post("compute/backup/create", BackupCreated, body)
    uuid = reply.data.backup_uuid
    here.screen.line(f"backup {uuid} ({body.backup_name})")
    if wait:
        finish(here, reply.headers["X-Job-Uuid"], backup_uuid=uuid)
    elif here.screen.json:
        here.screen.document(reply.raw)


@backup.command("delete")
@click.argument("backup_names", metavar="BACKUP...", nargs=-1, required=True)
@client_command
def delete(here: Here, *, backup_names: Sequence[str]) -> None:
    """Delete backups and their data. Others, also those built on them, stay restorable."""
    deleted: list[str] = []
    for wanted in backup_names:
        uuid = names.pick(here.client, "backup", wanted, names.backups)
        body = BackupDelete(backup_uuid=uuid, backup_name=wanted)
        here.client.post("compute/backup/delete", Empty, body)
        deleted.append(uuid)
        here.screen.line(f"deleted {uuid}")
    if here.screen.json:
        here.screen.document(msgspec.json.encode({"deleted": deleted}))


def inspect_backup(client: Client, wanted: str) -> Reply[ComputeBackupBaseInfo]:
    """The backup that a name or the like stands for."""
    uuid = names.pick(client, "backup", wanted, names.backups)
    query = BackupInspectQuery(backup_uuid=uuid)
    return client.get("compute/backup/inspect", ComputeBackupBaseInfo, query)


def _list_view(answer: BackupList) -> Table:
    columns = ("name", "VM", "created", ">size", "point", "status", "uuid")
    return table(columns, (_row(row) for row in answer.rows))


def _row(row: ComputeBackupBaseInfo) -> tuple[str, ...]:
    return (
        row.name,
        row.compute_name,
        units.time(row.create_time),
        units.size(sum(disk.capacity for disk in row.disks)),
        row.backup_point_name,
        STATUS.get(row.status, str(row.status)),
        row.uuid,
    )


def _card(row: ComputeBackupBaseInfo) -> Table:
    pairs = [
        ("name", row.name),
        ("uuid", row.uuid),
        ("description", row.description),
        ("VM", f"{row.compute_name} ({row.compute_uuid})"),
        ("created", units.time(row.create_time)),
        ("status", STATUS.get(row.status, str(row.status))),
        ("point", f"{row.backup_point_name} ({row.backup_point_uuid})"),
        ("tenant", row.tenant_name),
        ("cluster", row.cluster_name),
    ]
    return card([*pairs, *((disk.target_device, units.size(disk.capacity)) for disk in row.disks)])
