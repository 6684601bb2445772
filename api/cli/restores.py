"""`vmkeep backup restore`."""

from __future__ import annotations

from collections.abc import Sequence

import click
import msgspec

from api.cli import names, params
from api.cli.backups import inspect_backup
from api.cli.client_command import Here, client_command
from api.cli.follow import finish
from api.cli.params import DISK_METAVAR, DiskSpec
from api.client import Client
from api.schemas import Empty, RowList
from api.schemas_backup import BackupRestore, ComputeBackupRestoreDisk
from api.schemas_companion import PoolRow


@click.command("restore")
@click.argument("backup_name", metavar="BACKUP")
@click.option("--as", "vm_name", required=True, metavar="NAME", help="The new VM's name.")
@click.option(
    "--disk",
    "disks",
    multiple=True,
    type=params.disk,
    metavar="DEVICE=POOL:VOLUME[:USD_TYPE]",
    help="Where a disk goes. Default: all disks, as NAME-DEVICE in the default pool.",
)
@click.option("--group", default="", help="Object group; not needed when there is one only.")
@click.option("--zone", default="", help="Not needed when there is one only.")
@click.option(
    "--allow-damaged",
    is_flag=True,
    help="Restore what is left of a damaged backup; the job lists what reads as zeros.",
)
@click.option("--wait", is_flag=True, help="Until it is done, showing progress.")
@client_command
def restore(
    here: Here,
    *,
    backup_name: str,
    vm_name: str,
    disks: Sequence[DiskSpec],
    group: str,
    zone: str,
    allow_damaged: bool,
    wait: bool,
) -> None:
    """Make a brand-new VM from BACKUP. The VM that was backed up is never touched.

    \b
      vmkeep backup restore web01-20261123-183000 --as web01-old --wait
      vmkeep backup restore 3f2a --as web02 --disk sda=fast:web02-root:SSD
    """
    client = here.client
    source = inspect_backup(client, backup_name).data
    chosen = disks or [DiskSpec(disk.target_device, "", "") for disk in source.disks]
    body = BackupRestore(
        backup_uuid=source.uuid,
        backup_name=source.name,
        new_vm_name=vm_name,
        restore_disks=[_restore_disk(client, disk, vm_name) for disk in chosen],
        object_group=names.pick_or_only(client, "object group", group, names.groups),
        zone_uuid=names.pick_or_only(client, "zone", zone, names.zones),
        allow_damaged=allow_damaged,
    )
    reply = client.post("compute/backup/restore", Empty, body)
    vm, job = reply.headers["X-Compute-Uuid"], reply.headers["X-Job-Uuid"]
    here.screen.line(f"VM {vm} ({vm_name})")
    if wait:
        finish(here, job, compute_uuid=vm)
    elif here.screen.json:
        here.screen.document(msgspec.json.encode({"compute_uuid": vm, "job_uuid": job}))


def _restore_disk(client: Client, disk: DiskSpec, vm_name: str) -> ComputeBackupRestoreDisk:
    if disk.capacity:
        raise click.UsageError("a restored disk has the size that it had: no :SIZE here")
    pool = names.pick_or_only(client, "pool", disk.pool, names.pools)
    return ComputeBackupRestoreDisk(
        target_device=disk.target_device,
        pool_uuid=pool,
        volume_name=disk.volume or f"{vm_name}-{disk.target_device}",
        usd_type=disk.usd_type or _first_type(client, pool),
    )


def _first_type(client: Client, pool_uuid: str) -> str:
    for row in client.get("pool/list", RowList[PoolRow]).data.rows:
        if row.pool_uuid == pool_uuid and row.usd_types:
            return row.usd_types[0]
    raise click.UsageError(f"say which usd_type: {DISK_METAVAR}")
