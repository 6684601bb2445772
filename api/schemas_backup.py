"""The seven calls of the contract, and the two batch calls: requests and answers.

Shapes, spellings (PascalCase in ComputeVmBackup, but `share`) and member order are the contract's.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, field

from api.envelope import Output
from api.schemas import (
    MAX_DISKS,
    MAX_ITEMS,
    Answer,
    Description,
    DeviceName,
    Empty,
    Id,
    Label,
    Name,
    OptionalId,
    OptionalName,
    PageNumber,
    PageSize,
    Paging,
    Request,
    ScopeMembers,
    ShortName,
    UnixTime,
    VolumeName,
)

_STATUS = "0: done, 1: running, 2: failed."


class BackupListQuery(ScopeMembers, frozen=True, kw_only=True):
    filter_vm_uuid: Annotated[OptionalId, Meta(description="Exact.")] = ""
    filter_backup_name: Annotated[OptionalName, Meta(description="Case-sensitive substring.")] = ""
    filter_backup_point_uuid: Annotated[OptionalId, Meta(description="Exact.")] = ""
    filter_backup_description: Annotated[
        Description, Meta(description="Case-sensitive substring.")
    ] = ""
    start_time: Annotated[UnixTime, Meta(description="Not older than; 0 = no filter.")] = 0
    end_time: Annotated[UnixTime, Meta(description="Not newer than; 0 = no filter.")] = 0
    page_number: PageNumber = 0
    page_size: PageSize = 0


class BackupInspectQuery(ScopeMembers, frozen=True, kw_only=True):
    backup_uuid: Id


class BackupCreate(ScopeMembers, frozen=True, kw_only=True):
    backup_point_uuid: Id
    compute_uuid: Id
    backup_name: Name
    description: Description = ""
    full_backup: Annotated[bool, Meta(description="false: incremental, if there is a base.")] = (
        False
    )


class BackupDelete(ScopeMembers, frozen=True, kw_only=True):
    backup_uuid: Id
    backup_name: Annotated[OptionalName, Meta(description="For the operation log only.")] = ""


class ComputeBackupRestoreDisk(Request, frozen=True, kw_only=True):
    target_device: DeviceName
    pool_uuid: Id
    volume_name: VolumeName
    usd_type: Annotated[Label, Meta(min_length=1, description="One that the pool offers.")]


class BackupRestore(ScopeMembers, frozen=True, kw_only=True):
    backup_uuid: Id
    backup_name: Annotated[OptionalName, Meta(description="For the operation log only.")] = ""
    new_vm_name: ShortName
    restore_disks: Annotated[
        list[ComputeBackupRestoreDisk], Meta(min_length=1, max_length=MAX_DISKS)
    ]
    object_group: Id
    zone_uuid: Id
    allow_damaged: Annotated[
        bool,
        Meta(description="Restore what is left of a damaged backup; the job lists what is zeros."),
    ] = False


class RemoteListQuery(Paging, frozen=True, kw_only=True):
    cluster_uuid: Id
    backup_point_uuid: Id


class RemoteBackupRef(Request, frozen=True, kw_only=True):
    """A ComputeVmBackup as the caller sends it: all but these two members is not read."""

    uuid: Id = field(name="UUID")
    point_uuid: Id = field(name="BpUUID")


class RemoteImport(Request, frozen=True, kw_only=True):
    cluster_uuid: Id
    backup: Annotated[list[RemoteBackupRef], Meta(min_length=1, max_length=MAX_ITEMS)]


class BatchRequest(Request, frozen=True, kw_only=True):
    """Every item is a body of the single call, checked and answered by itself."""

    items: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_ITEMS)]


class ComputeDiskBackups(Answer, frozen=True, kw_only=True):
    target_device: str
    backup_uuid: Annotated[str, Meta(description="Of the disk's own backup.")]
    capacity: int
    replica: int
    share: bool


class ComputeBackupBaseInfo(Answer, frozen=True, kw_only=True):
    tenant: str
    tenant_name: str
    cluster_uuid: str
    cluster_name: str
    cluster_mode: str
    namespace: str
    uuid: str
    compute_uuid: str
    compute_name: str
    backup_point_uuid: str
    backup_point_name: str
    name: str
    description: str
    create_time: int
    status: Annotated[int, Meta(description=_STATUS)]
    disks: list[ComputeDiskBackups]


class EachResourceRangeListState(Answer, frozen=True, kw_only=True):
    cluster_uuid: str
    cluster_name: str
    namespace_uuid: str
    result: Output[str]
    total_count: int


class BackupList(Answer, frozen=True, kw_only=True):
    rows: list[ComputeBackupBaseInfo] = field(name="list")
    total_count: int
    each_range_list_state: list[EachResourceRangeListState]


class BackupCreated(Answer, frozen=True, kw_only=True):
    backup_uuid: str


class ComputeVmBackupDiskInfo(Answer, frozen=True, kw_only=True):
    backup_uuid: str = field(name="BackupUUID")
    capacity: int = field(name="Capacity")
    replica: int = field(name="Replica")
    snapshot_uuid: str = field(name="VolSnapUUID")
    share: bool


class ComputeRemoteBackup(Answer, frozen=True, kw_only=True):
    """ComputeVmBackup and ClusterIdentifier."""

    uuid: str = field(name="UUID")
    namespace: str = field(name="NsUUID")
    vm_uuid: str = field(name="VmUUID")
    point_uuid: str = field(name="BpUUID")
    name: str = field(name="Name")
    description: str = field(name="Desc")
    create_time: int = field(name="Ctime")
    disks: Annotated[dict[str, ComputeVmBackupDiskInfo], Meta(description="By target device.")] = (
        field(name="DiskBackups")
    )
    status: Annotated[int, Meta(description=_STATUS)] = field(name="Status")
    filename: Annotated[str, Meta(description="<cluster uuid>/<backup uuid>")] = field(
        name="Filename"
    )
    expired_time: Annotated[int, Meta(description="Unix seconds; 0 = never.")] = field(
        name="ExpiredTime"
    )
    cluster_uuid: str
    cluster_name: str
    cluster_mode: str


class BackupVmInfo(Answer, frozen=True, kw_only=True):
    name: Annotated[str, Meta(description="Now, or else when it was backed up.")] = field(
        name="Name"
    )


class RemoteBackupList(Answer, frozen=True, kw_only=True):
    total_count: int
    backups: list[ComputeRemoteBackup]
    vm_infos: Annotated[dict[str, BackupVmInfo], Meta(description="By VM uuid.")]


class ImportedBackups(Answer, frozen=True, kw_only=True):
    backups: list[ComputeRemoteBackup]
    vm_infos: Annotated[dict[str, BackupVmInfo], Meta(description="By VM uuid.")]


class BatchCreateOutput(Answer, frozen=True, kw_only=True):
    """BatchOutput. `results` are in the order of the items; a failed one's `data` is null."""

    success: int
    fail: int
    results: list[Output[BackupCreated | None]]


class BatchDeleteOutput(Answer, frozen=True, kw_only=True):
    """BatchOutput, of calls that answer `{}`."""

    success: int
    fail: int
    results: list[Output[Empty | None]]


class BackupRecord(Answer, frozen=True, kw_only=True):
    """What is known of a backup beyond ComputeBackupBaseInfo."""

    uuid: str
    parent_uuid: Annotated[
        str, Meta(description="What it was built on; empty if full, or when that was deleted.")
    ]
    full_backup: bool
    notes: Annotated[list[str], Meta(description="Such as why it became a full one.")]
    error: Annotated[str, Meta(description="Why it failed.")]
    status: Annotated[int, Meta(description=_STATUS)]
    namespace: str
    namespace_name: str
    vm_type: str
    expired_time: int
