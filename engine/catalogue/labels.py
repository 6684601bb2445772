"""The label that travels with a backup on its point: ours to write, anybody's to have written.

A domain of another cluster, or of a newer vmkeep, may hold anything under that name. What can't be
read becomes a placeholder, so that the backup can still be seen and deleted. Disks and capacities
are believed from the domain, whose record fixes them, not from the label.
"""

from __future__ import annotations

import logging

import msgspec
from msgspec.structs import replace

from engine.inventory.inventory import Places, default_of
from engine.libvirt.foreign import harmless
from engine.model import FOREIGN_IDENTITY, Backup, BackupLabel, DiskBackup
from storage.view.listing import BackupRow

log = logging.getLogger(__name__)

UNREADABLE_NAME = "(unreadable label)"

_decoder = msgspec.msgpack.Decoder(BackupLabel)
_encoder = msgspec.msgpack.Encoder()


def encode_label(label: BackupLabel) -> bytes:
    """The label's bytes on the point."""
    return _encoder.encode(label)


def decode_label(row: BackupRow) -> BackupLabel:
    """The label of a backup on a point. Never fails."""
    try:
        label = _decoder.decode(row.label)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        log.warning("label_unreadable", extra={"backup": row.backup, "error": str(error)})
        label = _placeholder()
    return replace(label, disks=_true_disks(label, row))


def settled_backup(row: BackupRow, cluster_uuid: str, point_uuid: str, places: Places) -> Backup:
    """The catalogue's row for a backup of a managed cluster's domain.

    One whose namespace is not known here stands in the default one.
    """
    label = at_home(decode_label(row), places)
    return Backup(
        uuid=row.backup,
        cluster_uuid=cluster_uuid,
        point_uuid=point_uuid,
        label=label,
        parent=row.parent,
        seq=row.seq,
    )


def at_home(label: BackupLabel, places: Places) -> BackupLabel:
    """The label, moved to the default namespace if its own is not known here."""
    if any(label.namespace == namespace.uuid for namespace in places.namespaces):
        return label
    namespace = default_of(places.namespaces)
    tenant = next(row for row in places.tenants if row.uuid == namespace.tenant)
    return replace(
        label,
        namespace=namespace.uuid,
        namespace_name=namespace.name,
        tenant=tenant.uuid,
        tenant_name=tenant.name,
    )


def imported(label: BackupLabel, places: Places) -> BackupLabel:
    """Another cluster's label as it stands in one of ours: at home, and with no more of a machine
    than may be made here (engine.libvirt.foreign).

    It may say that it is of a VM of ours. So its disks say whose they are, and none builds on it.
    """
    disks = tuple(replace(disk, identity=FOREIGN_IDENTITY) for disk in label.disks)
    label = replace(at_home(label, places), disks=disks)
    if label.machine is None:
        return label
    machine, notes = harmless(label.machine)
    return replace(label, machine=machine, notes=(*label.notes, *notes))


def _true_disks(label: BackupLabel, row: BackupRow) -> tuple[DiskBackup, ...]:
    """The disks that the backup has, in the label's order; those that it hides at the end."""
    capacities = {disk.disk: disk.capacity for disk in row.disks}
    disks = []
    devices: set[str] = set()
    for disk in label.disks:
        capacity = capacities.pop(disk.disk_uuid, None)
        if capacity is not None and disk.target_device not in devices:
            devices.add(disk.target_device)
            disks.append(replace(disk, capacity=capacity))
    for number, (uuid, capacity) in enumerate(capacities.items()):
        device = f"unknown{number}"
        disks.append(DiskBackup(target_device=device, disk_uuid=uuid, capacity=capacity))
    return tuple(disks)


def _placeholder() -> BackupLabel:
    return BackupLabel(
        vm_uuid="",
        vm_name="",
        tenant="",
        tenant_name="",
        namespace="",
        namespace_name="",
        name=UNREADABLE_NAME,
        description="",
        create_time=0,
        full=False,
        disks=(),
    )
