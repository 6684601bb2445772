"""/v1/compute/backup/remote/…: what is on a backup point, whoever made it."""

from __future__ import annotations

from collections.abc import Sequence

from api.calls import AnyCall, Call, Reply
from api.schemas import page_of
from api.schemas_backup import (
    BackupVmInfo,
    ComputeRemoteBackup,
    ComputeVmBackupDiskInfo,
    ImportedBackups,
    RemoteBackupList,
    RemoteImport,
    RemoteListQuery,
)
from engine.service import Engine
from engine.verb_types import RemoteBackup, Scope

MOST_UNREAD = 64  # a client takes 8 KiB of a header


def _list(engine: Engine, query: RemoteListQuery) -> Reply[RemoteBackupList]:
    listing = engine.remote_backups(query.cluster_uuid, query.backup_point_uuid)
    found = listing.backups
    page, page_size = page_of(query.page_number, query.page_size)
    shown = found[(page - 1) * page_size : page * page_size]
    return Reply(
        RemoteBackupList(
            total_count=len(found),
            backups=[_remote_backup(remote) for remote in shown],
            vm_infos=_vm_infos(engine, shown),
        ),
        _unread(listing.unread),
    )


def _unread(found: dict[str, str]) -> dict[str, str]:
    """The header that names domains that are not in the list. `data` is as the document has it."""
    words = [f"{cluster_uuid} {code}" for cluster_uuid, code in sorted(found.items())]
    return {"X-Unread-Clusters": ", ".join(words[:MOST_UNREAD])} if words else {}


def _import(engine: Engine, body: RemoteImport) -> Reply[ImportedBackups]:
    wanted = [(entry.uuid, entry.point_uuid) for entry in body.backup]
    imported = engine.import_backups(body.cluster_uuid, wanted)
    return Reply(
        ImportedBackups(
            backups=[_remote_backup(remote) for remote in imported],
            vm_infos=_vm_infos(engine, imported),
        )
    )


def _newest_first(remote: RemoteBackup) -> tuple[int, str]:
    return -remote.backup.label.create_time, remote.backup.uuid


def _remote_backup(remote: RemoteBackup) -> ComputeRemoteBackup:
    backup, cluster, label = remote.backup, remote.cluster, remote.backup.label
    return ComputeRemoteBackup(
        uuid=backup.uuid,
        namespace=label.namespace,
        vm_uuid=label.vm_uuid,
        point_uuid=backup.point_uuid,
        name=label.name,
        description=label.description,
        create_time=label.create_time,
        disks={
            disk.target_device: ComputeVmBackupDiskInfo(
                backup_uuid=disk.disk_uuid,
                capacity=disk.capacity,
                replica=disk.replica,
                snapshot_uuid=disk.snapshot_uuid,
                share=disk.share,
            )
            for disk in label.disks
        },
        status=backup.status,
        filename=f"{cluster.uuid}/{backup.uuid}",
        expired_time=label.expired_time,
        cluster_uuid=cluster.uuid,
        cluster_name=cluster.name,
        cluster_mode=cluster.mode,
    )


def _vm_infos(engine: Engine, shown: Sequence[RemoteBackup]) -> dict[str, BackupVmInfo]:
    """Current names of the VMs that still exist here; of the others the newest backup's."""
    current = {vm.uuid: vm.name for vm in engine.vms(Scope())}
    infos: dict[str, BackupVmInfo] = {}
    for remote in sorted(shown, key=_newest_first):
        label = remote.backup.label
        name = current.get(label.vm_uuid, label.vm_name)
        infos.setdefault(label.vm_uuid, BackupVmInfo(name=name))
    return infos


CALLS: tuple[AnyCall, ...] = (
    Call(
        method="GET",
        path="/v1/compute/backup/remote/list",
        summary="Everything on a backup point, other clusters' backups included.",
        tag="remote",
        request=RemoteListQuery,
        answer=RemoteBackupList,
        run=_list,
        pace="slow",
        headers={
            "X-Unread-Clusters": "clusters whose domains there could not be read, each with the "
            "error's name; not sent when all could"
        },
    ),
    Call(
        method="POST",
        path="/v1/compute/backup/remote/import",
        summary="Take backups that are on a point into this cluster. All or nothing.",
        tag="remote",
        request=RemoteImport,
        answer=ImportedBackups,
        run=_import,
        pace="slow",
        target="cluster_uuid",
    ),
)
