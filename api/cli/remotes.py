"""`vmkeep backup remote-list` and `import`: what is on a point, whoever put it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click
import msgspec
from rich.table import Table

from api.cli import names, units
from api.cli.backups import STATUS
from api.cli.client_command import Here, client_command
from api.cli.screen import table
from api.schemas import MAX_ITEMS, MAX_PAGE_SIZE
from api.schemas_backup import (
    ComputeRemoteBackup,
    ImportedBackups,
    RemoteBackupList,
    RemoteBackupRef,
    RemoteImport,
    RemoteListQuery,
)


@click.command("remote-list")
@click.option("--point", default="", help="Backup point; not needed when there is one only.")
@click.option("--cluster", default="", help="Our cluster; not needed when there is one only.")
@click.option("--page", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--page-size", type=click.IntRange(1, 1000), default=50, show_default=True)
@client_command
def remote_list(here: Here, *, point: str, cluster: str, page: int, page_size: int) -> None:
    """Everything on a backup point, other clusters' backups included. Reads the point."""
    query = RemoteListQuery(
        cluster_uuid=names.pick_or_only(here.client, "cluster", cluster, names.clusters),
        backup_point_uuid=names.pick_or_only(here.client, "backup point", point, names.points),
        page_number=page,
        page_size=page_size,
    )
    reply = here.client.get("compute/backup/remote/list", RemoteBackupList, query)
    here.screen.answer(reply, lambda found: _table(found.backups, found))
    _warn(here, reply.headers)


@click.command("import")
@click.argument("backups", metavar="[BACKUP_UUID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that are on the point.")
@click.option("--point", default="", help="Backup point; not needed when there is one only.")
@click.option("--cluster", default="", help="Into this cluster; not needed when there is one.")
@client_command
def import_backups(
    here: Here, *, backups: Sequence[str], everything: bool, point: str, cluster: str
) -> None:
    """Take backups found on a point into this cluster: all of those named, or none.

    With --all a thousand at a time. What is here already is no error: run it again after one.

    \b
      vmkeep backup import --point offsite --all
    """
    if bool(backups) == everything:
        raise click.UsageError("name backups, or say --all")
    cluster_uuid = names.pick_or_only(here.client, "cluster", cluster, names.clusters)
    point_uuid = names.pick_or_only(here.client, "backup point", point, names.points)
    portions = [backups]
    if everything:
        found = _all_on_point(here, cluster_uuid, point_uuid)
        portions = [found[at : at + MAX_ITEMS] for at in range(0, len(found), MAX_ITEMS)]
    done = ImportedBackups(backups=[], vm_infos={})
    for wanted in portions:
        body = RemoteImport(
            cluster_uuid=cluster_uuid,
            backup=[RemoteBackupRef(uuid=uuid, point_uuid=point_uuid) for uuid in wanted],
        )
        some = here.client.post("compute/backup/remote/import", ImportedBackups, body).data
        done.backups.extend(some.backups)
        done.vm_infos.update(some.vm_infos)
    if here.screen.json:
        here.screen.document(msgspec.json.encode(done))
    else:
        here.screen.table(_table(done.backups, done))


def _all_on_point(here: Here, cluster_uuid: str, point_uuid: str) -> list[str]:
    found: list[str] = []
    while True:
        query = RemoteListQuery(
            cluster_uuid=cluster_uuid,
            backup_point_uuid=point_uuid,
            page_number=len(found) // MAX_PAGE_SIZE + 1,
            page_size=MAX_PAGE_SIZE,
        )
        reply = here.client.get("compute/backup/remote/list", RemoteBackupList, query)
        answer = reply.data
        found += [row.uuid for row in answer.backups]
        if not answer.backups or len(found) >= answer.total_count:
            _warn(here, reply.headers)
            return found


def _warn(here: Here, headers: Mapping[str, str]) -> None:
    unread = headers.get("X-Unread-Clusters")
    if unread:
        here.screen.warning(f"not listed, since it could not be read: {unread}")


def _table(
    rows: Sequence[ComputeRemoteBackup], names_of: RemoteBackupList | ImportedBackups
) -> Table:
    vms = names_of.vm_infos
    return table(
        ("name", "VM", "created", ">size", "cluster", "status", "uuid"),
        (
            (
                row.name,
                vms[row.vm_uuid].name if row.vm_uuid in vms else row.vm_uuid,
                units.time(row.create_time),
                units.size(sum(disk.capacity for disk in row.disks.values())),
                row.cluster_name,
                STATUS.get(row.status, str(row.status)),
                row.uuid,
            )
            for row in rows
        ),
    )
