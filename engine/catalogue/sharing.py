"""One object in memory for what many backups of the catalogue say alike.

Decoded, each row has its own copy of the names of its cluster, point and VM, of "sda", of its
notes: more than half of its memory. A VM's machine is not kept in memory at all.
"""

from __future__ import annotations

from msgspec.structs import replace

from engine.model import Backup, DiskBackup


class Sharing:
    """Not thread-safe. When it knows `most` texts it begins anew."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._texts: dict[str, str] = {}
        self._notes: dict[tuple[str, ...], tuple[str, ...]] = {}

    def of(self, row: Backup) -> Backup:
        """The row, equal but for its machine, which it is without."""
        if len(self._texts) + len(self._notes) >= self._most:
            self._texts.clear()
            self._notes.clear()
        text, label = self._texts.setdefault, row.label
        return replace(
            row,
            uuid=text(row.uuid, row.uuid),  # others' parent
            cluster_uuid=text(row.cluster_uuid, row.cluster_uuid),
            point_uuid=text(row.point_uuid, row.point_uuid),
            parent=text(row.parent, row.parent),
            label=replace(
                label,
                vm_uuid=text(label.vm_uuid, label.vm_uuid),
                vm_name=text(label.vm_name, label.vm_name),
                tenant=text(label.tenant, label.tenant),
                tenant_name=text(label.tenant_name, label.tenant_name),
                namespace=text(label.namespace, label.namespace),
                namespace_name=text(label.namespace_name, label.namespace_name),
                description=text(label.description, label.description),
                vm_type=text(label.vm_type, label.vm_type),
                disks=tuple([self._disk(disk) for disk in label.disks]),
                notes=self._notes.setdefault(label.notes, label.notes),
                machine=None,
            ),
        )

    def _disk(self, disk: DiskBackup) -> DiskBackup:
        text = self._texts.setdefault
        return replace(
            disk,
            target_device=text(disk.target_device, disk.target_device),
            usd_type=text(disk.usd_type, disk.usd_type),
            format=text(disk.format, disk.format),
            identity=text(disk.identity, disk.identity),
        )


def without_machine(row: Backup) -> Backup:
    """As it is kept in memory."""
    if row.label.machine is None:
        return row
    return replace(row, label=replace(row.label, machine=None))
