"""/v1/compute/backup/…: the contract's calls on this installation's own backups."""

from __future__ import annotations

from typing import NamedTuple

from api.calls import AnyCall, Batch, Call, Reply, scope_of
from api.envelope import Output, failed, succeeded
from api.schemas import Empty, page_of
from api.schemas_backup import (
    BackupCreate,
    BackupCreated,
    BackupDelete,
    BackupInspectQuery,
    BackupList,
    BackupListQuery,
    BackupRecord,
    BackupRestore,
    BatchCreateOutput,
    BatchDeleteOutput,
    ComputeBackupBaseInfo,
    ComputeDiskBackups,
    EachResourceRangeListState,
)
from engine.model import Backup, Cluster
from engine.service import Engine
from engine.verb_types import BackupQuery, RangeState, RestoreTarget

_JOB_HEADER = {"X-Job-Uuid": "uuid of the job that does the work"}


def _list(engine: Engine, query: BackupListQuery) -> Reply[BackupList]:
    page, page_size = page_of(query.page_number, query.page_size)
    found = engine.backups(
        BackupQuery(
            scope=scope_of(query),
            vm_uuid=query.filter_vm_uuid,
            name_part=query.filter_backup_name,
            description_part=query.filter_backup_description,
            point_uuid=query.filter_backup_point_uuid,
            start_time=query.start_time,
            end_time=query.end_time,
            page=page,
            page_size=page_size,
        )
    )
    names = _names(engine)
    return Reply(
        BackupList(
            rows=[_base_info(names, backup) for backup in found.rows],
            total_count=found.total,
            each_range_list_state=[_range_state(state) for state in found.ranges],
        )
    )


def _inspect(engine: Engine, query: BackupInspectQuery) -> Reply[ComputeBackupBaseInfo]:
    backup = engine.backup(scope_of(query), query.backup_uuid)
    return Reply(_base_info(_names(engine), backup))


def _record(engine: Engine, query: BackupInspectQuery) -> Reply[BackupRecord]:
    backup = engine.backup(scope_of(query), query.backup_uuid)
    label = backup.label
    return Reply(
        BackupRecord(
            uuid=backup.uuid,
            parent_uuid=backup.parent,
            full_backup=label.full,
            notes=list(label.notes),
            error=backup.error,
            status=backup.status,
            namespace=label.namespace,
            namespace_name=label.namespace_name,
            vm_type=label.vm_type,
            expired_time=label.expired_time,
        )
    )


def _create(engine: Engine, body: BackupCreate) -> Reply[BackupCreated]:
    backup_uuid, job_uuid = engine.create_backup(
        scope_of(body),
        body.compute_uuid,
        body.backup_point_uuid,
        body.backup_name,
        body.description,
        body.full_backup,
    )
    return Reply(BackupCreated(backup_uuid=backup_uuid), {"X-Job-Uuid": job_uuid})


def _delete(engine: Engine, body: BackupDelete) -> Reply[Empty]:
    engine.delete_backup(scope_of(body), body.backup_uuid)
    return Reply(Empty())


def _restore(engine: Engine, body: BackupRestore) -> Reply[Empty]:
    targets = [
        RestoreTarget(disk.target_device, disk.pool_uuid, disk.volume_name, disk.usd_type)
        for disk in body.restore_disks
    ]
    vm_uuid, job_uuid = engine.restore_backup(
        scope_of(body),
        body.backup_uuid,
        body.new_vm_name,
        targets,
        body.object_group,
        body.zone_uuid,
        allow_damaged=body.allow_damaged,
    )
    return Reply(Empty(), {"X-Compute-Uuid": vm_uuid, "X-Job-Uuid": job_uuid})


class _Names(NamedTuple):
    """Of what backups name by uuid, looked up once for all of an answer's rows."""

    clusters: dict[str, Cluster]
    points: dict[str, str]


def _names(engine: Engine) -> _Names:
    return _Names(
        {cluster.uuid: cluster for cluster in engine.clusters()},
        {state.point.uuid: state.point.name for state in engine.points()},
    )


def _base_info(names: _Names, backup: Backup) -> ComputeBackupBaseInfo:
    label = backup.label
    cluster = names.clusters.get(backup.cluster_uuid) or Cluster(uuid=backup.cluster_uuid, name="")
    return ComputeBackupBaseInfo(
        tenant=label.tenant,
        tenant_name=label.tenant_name,
        cluster_uuid=cluster.uuid,
        cluster_name=cluster.name,
        cluster_mode=cluster.mode,
        namespace=label.namespace,
        uuid=backup.uuid,
        compute_uuid=label.vm_uuid,
        compute_name=label.vm_name,
        backup_point_uuid=backup.point_uuid,
        backup_point_name=names.points.get(backup.point_uuid, ""),
        name=label.name,
        description=label.description,
        create_time=label.create_time,
        status=backup.status,
        disks=[
            ComputeDiskBackups(
                target_device=disk.target_device,
                backup_uuid=disk.disk_uuid,
                capacity=disk.capacity,
                replica=disk.replica,
                share=disk.share,
            )
            for disk in label.disks
        ],
    )


def _range_state(state: RangeState) -> EachResourceRangeListState:
    result: Output[str] = succeeded("") if state.error is None else failed(state.error, "")
    return EachResourceRangeListState(
        cluster_uuid=state.cluster.uuid,
        cluster_name=state.cluster.name,
        namespace_uuid=state.namespace_uuid,
        result=result,
        total_count=state.total,
    )


CREATE = Call(
    method="POST",
    path="/v1/compute/backup/create",
    summary="Start a full or incremental backup of a VM; the data follows.",
    tag="backup",
    request=BackupCreate,
    answer=BackupCreated,
    run=_create,
    pace="slow",
    target="compute_uuid",
    named="backup_name",
    headers=_JOB_HEADER,
)
DELETE = Call(
    method="POST",
    path="/v1/compute/backup/delete",
    summary="Delete a backup and its data on the backup point.",
    tag="backup",
    request=BackupDelete,
    answer=Empty,
    run=_delete,
    pace="slow",
    target="backup_uuid",
    named="backup_name",
)

CALLS: tuple[AnyCall | Batch, ...] = (
    Call(
        method="GET",
        path="/v1/compute/backup/list",
        summary="Backups of the managed clusters, filtered and paged, newest first.",
        tag="backup",
        request=BackupListQuery,
        answer=BackupList,
        run=_list,
    ),
    Call(
        method="GET",
        path="/v1/compute/backup/inspect",
        summary="One backup.",
        tag="backup",
        request=BackupInspectQuery,
        answer=ComputeBackupBaseInfo,
        run=_inspect,
    ),
    Call(
        method="GET",
        path="/v1/compute/backup/record",
        summary="What a backup was built on, what it has to note, and why it failed.",
        tag="backup",
        request=BackupInspectQuery,
        answer=BackupRecord,
        run=_record,
    ),
    CREATE,
    DELETE,
    Call(
        method="POST",
        path="/v1/compute/backup/restore",
        summary="Create a new VM and fill its disks from a backup.",
        tag="backup",
        request=BackupRestore,
        answer=Empty,
        run=_restore,
        pace="slow",
        target="backup_uuid",
        named="new_vm_name",
        headers={"X-Compute-Uuid": "uuid of the new VM", **_JOB_HEADER},
    ),
    Batch(
        path="/v1/compute/backup/batch/create",
        summary="Several creates; one that is refused doesn't stop the others.",
        tag="backup",
        each=CREATE,
        answer=BatchCreateOutput,
    ),
    Batch(
        path="/v1/compute/backup/batch/delete",
        summary="Several deletes; one that is refused doesn't stop the others.",
        tag="backup",
        each=DELETE,
        answer=BatchDeleteOutput,
    ),
)
