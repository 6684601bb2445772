"""`vmkeep vm`: the VMs that backups are made of, and the new ones that restores make."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.table import Table

from api.cli import names, params, units
from api.cli.client_command import Here, client_command, scoped, within
from api.cli.params import DISK_METAVAR, DiskSpec
from api.cli.screen import card, table
from api.schemas import Empty, RowList, ScopeMembers
from api.schemas_companion import (
    ComputeCreate,
    ComputeCreated,
    ComputeDelete,
    ComputeDiskRow,
    ComputeInspectQuery,
    ComputeListQuery,
    ComputeRow,
    ComputeTrack,
    NewDiskMembers,
)


@click.group()
def vm() -> None:
    """VMs and their disks."""


@vm.command("list")
@scoped
@client_command
def list_vms(here: Here, *, scope: ScopeMembers) -> None:
    """VMs that can be backed up."""
    query = within(scope, ComputeListQuery())
    here.screen.answer(here.client.get("compute/list", RowList[ComputeRow], query), _list_view)


@vm.command("inspect")
@click.argument("name", metavar="VM")
@client_command
def inspect(here: Here, *, name: str) -> None:
    """One VM and its disks."""
    query = ComputeInspectQuery(compute_uuid=names.pick(here.client, "VM", name, names.vms))
    here.screen.answer(here.client.get("compute/inspect", ComputeRow, query), _card)


@vm.command("track")
@click.argument("name", metavar="VM")
@client_command
def track(here: Here, *, name: str) -> None:
    """Track a VM's changes again, after its alert was looked into."""
    uuid = names.pick(here.client, "VM", name, names.vms)
    body = ComputeTrack(compute_uuid=uuid)
    here.screen.answer(
        here.client.post("compute/track", Empty, body), lambda _: f"tracking VM {uuid}"
    )


@vm.command("create")
@click.argument("name")
@click.option("--disk", "disks", multiple=True, type=params.disk, metavar=DISK_METAVAR)
@click.option("--zone", default="", help="Name or uuid.")
@click.option("--group", default="", help="Object group, name or uuid.")
@scoped
@client_command
def create(
    here: Here,
    *,
    name: str,
    disks: Sequence[DiskSpec],
    zone: str,
    group: str,
    scope: ScopeMembers,
) -> None:
    """Put a VM on record.

    A volume that exists in the pool is taken over as it is; one that doesn't is made, sparse, and
    needs a SIZE. There may be many disks.

    \b
      vmkeep vm create web01 --disk sda=default:web01.img
      vmkeep vm create db01 --disk sda=fast:db01-root:20G:SSD --disk sdb=big:db01-data:1T:HDD
    """
    client = here.client
    body = ComputeCreate(
        compute_name=name,
        zone_uuid=zone and names.pick(client, "zone", zone, names.zones),
        object_group=group and names.pick(client, "object group", group, names.groups),
        disks=[
            NewDiskMembers(
                target_device=disk.target_device,
                pool_uuid=names.pick(client, "pool", disk.pool, names.pools),
                volume_name=disk.volume,
                capacity=disk.capacity,
                usd_type=disk.usd_type,
            )
            for disk in disks
        ],
    )
    reply = client.post("compute/create", ComputeCreated, within(scope, body))
    here.screen.answer(reply, lambda made: f"VM {made.compute_uuid} ({name})")


@vm.command("delete")
@click.argument("name", metavar="VM")
@click.option("--volumes", is_flag=True, help="Also delete its volumes, and all that is on them.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@client_command
def delete(here: Here, *, name: str, volumes: bool, yes: bool) -> None:
    """Take a VM off the record. Its backups stay."""
    uuid = names.pick(here.client, "VM", name, names.vms)
    if volumes and not yes:
        click.confirm(f"Delete VM {name} and its volumes?", abort=True, err=True)
    body = ComputeDelete(compute_uuid=uuid, delete_volumes=volumes)
    here.screen.answer(
        here.client.post("compute/delete", Empty, body), lambda _: f"deleted VM {uuid}"
    )


def _list_view(answer: RowList[ComputeRow]) -> Table:
    columns = ("name", "state", "action", ">disks", ">size", "uuid")
    return table(columns, (_row(row) for row in answer.rows))


def _row(row: ComputeRow) -> tuple[str, ...]:
    return (
        row.compute_name,
        row.state,
        row.action,
        str(len(row.disks)),
        units.size(sum(disk.capacity for disk in row.disks)),
        row.compute_uuid,
    )


def _card(row: ComputeRow) -> Table:
    pairs = [
        ("name", row.compute_name),
        ("uuid", row.compute_uuid),
        ("state", row.state),
        ("action", row.action),
        ("last error", row.last_error),
        *(("alert", alert) for alert in row.alerts),
    ]
    return card([*pairs, *((disk.target_device, _disk(disk)) for disk in row.disks)])


def _disk(disk: ComputeDiskRow) -> str:
    pinned = f" ({units.size(disk.pinned)} pinned)" if disk.pinned else ""
    return f"{units.size(disk.capacity)} {disk.usd_type} {disk.path}{pinned}"
