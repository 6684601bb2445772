"""The companion calls' requests and answers: clusters to pools, VMs, points, jobs, operations."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from api.schemas import (
    MAX_DISKS,
    AbsolutePath,
    Answer,
    DeviceName,
    Id,
    Label,
    OptionalId,
    Request,
    ScopeMembers,
    ShortName,
    SizeBytes,
    VolumeName,
)
from engine.model import JobKind, JobState, VmAction


class ClusterRow(Answer, frozen=True, kw_only=True):
    uuid: str
    name: str
    mode: str


class NamedRow(Answer, frozen=True, kw_only=True):
    """A tenant, a zone or an object group."""

    uuid: str
    name: str


class NamespaceRow(Answer, frozen=True, kw_only=True):
    uuid: str
    name: str
    tenant: str


class PoolRow(Answer, frozen=True, kw_only=True):
    pool_uuid: str
    name: str
    path: str
    usd_types: list[str]
    replica: int
    capacity: int
    free: int
    error: Annotated[str, Meta(description="Why size and room are unknown (0).")]
    pinned: Annotated[int, Meta(description="Bytes that clones kept for tracking take up.")]


class ComputeListQuery(ScopeMembers, frozen=True, kw_only=True):
    pass


class ComputeInspectQuery(ScopeMembers, frozen=True, kw_only=True):
    compute_uuid: Id


class NewDiskMembers(Request, frozen=True, kw_only=True):
    target_device: DeviceName
    pool_uuid: Id
    volume_name: VolumeName
    capacity: Annotated[
        SizeBytes, Meta(description="Of a volume to make; 0 or absent for one that exists.")
    ] = 0
    usd_type: Label = ""
    replica: Annotated[int, Meta(ge=0, le=100, description="0 = the pool's.")] = 0
    share: bool = False


class ComputeCreate(ScopeMembers, frozen=True, kw_only=True):
    compute_name: ShortName
    zone_uuid: OptionalId = ""
    object_group: OptionalId = ""
    disks: Annotated[list[NewDiskMembers], Meta(max_length=MAX_DISKS)]


class ComputeDelete(ScopeMembers, frozen=True, kw_only=True):
    compute_uuid: Id
    delete_volumes: bool = False


class ComputeTrack(ScopeMembers, frozen=True, kw_only=True):
    compute_uuid: Id


class ComputeCreated(Answer, frozen=True, kw_only=True):
    compute_uuid: str


class ComputeDiskRow(Answer, frozen=True, kw_only=True):
    target_device: str
    pool_uuid: str
    volume_name: str
    path: str
    capacity: int
    usd_type: str
    replica: int
    share: bool
    format: str
    pinned: Annotated[int, Meta(description="Bytes that the clone kept for tracking takes up.")]


class ComputeRow(Answer, frozen=True, kw_only=True):
    compute_uuid: str
    compute_name: str
    cluster_uuid: str
    tenant: str
    namespace: str
    zone_uuid: str
    object_group: str
    vm_type: str
    state: str
    action: VmAction
    disks: list[ComputeDiskRow]
    alerts: Annotated[list[str], Meta(description="Defects that somebody has to look into.")]
    last_error: str
    host: Annotated[str, Meta(description="The libvirt that has it.")]


class PointInspectQuery(Request, frozen=True, kw_only=True):
    backup_point_uuid: Id


class PointCreate(Request, frozen=True, kw_only=True):
    name: ShortName
    kind: Literal["local", "nfs"]
    path: AbsolutePath


class PointDelete(Request, frozen=True, kw_only=True):
    backup_point_uuid: Id
    erase: Annotated[bool, Meta(description="Also erase this cluster's domain.")] = False


class PointMaintenance(Request, frozen=True, kw_only=True):
    backup_point_uuid: Id
    deep: Annotated[bool, Meta(description="verify: read every stored byte.")] = False


class PointCreated(Answer, frozen=True, kw_only=True):
    backup_point_uuid: str


class PointRow(Answer, frozen=True, kw_only=True):
    backup_point_uuid: str
    name: str
    kind: str
    path: str
    state: str
    capacity: int
    free: int
    stored_bytes: int
    logical_bytes: int
    chunk_count: int
    pack_count: int
    backup_count: int
    last_error: str


class JobQuery(Request, frozen=True, kw_only=True):
    job_uuid: Id


class JobStarted(Answer, frozen=True, kw_only=True):
    job_uuid: str


class ProgressMembers(Answer, frozen=True, kw_only=True):
    """Bytes; `rate` in bytes a second; `eta_s` -1 = unknown."""

    bytes_total: int
    bytes_scanned: int
    bytes_read: int
    bytes_changed: int
    bytes_stored: int
    bytes_restored: int
    rate: float
    eta_s: float


class JobRow(Answer, frozen=True, kw_only=True):
    """Times are Unix seconds, 0 = not yet."""

    job_uuid: str
    kind: JobKind
    backup_uuid: str
    compute_uuid: str
    backup_point_uuid: str
    state: JobState
    error: str
    created_at: float
    started_at: float
    finished_at: float
    progress: ProgressMembers
    stalled_s: Annotated[
        float,
        Meta(
            description="Seconds for which the job has not got on because files that it needs don't"
            " answer (such as on an NFS server that is away); 0 while it moves. It goes on by"
            " itself when they do."
        ),
    ]
    stalled_on: Annotated[
        str, Meta(description='What does not answer, such as `backup point nas`; "" if all does.')
    ]
    result: Annotated[list[str], Meta(description="What the job has to say, a line each.")]


class OperationRow(Answer, frozen=True, kw_only=True):
    seq: int
    at: Annotated[float, Meta(description="Unix seconds.")]
    who: Annotated[str, Meta(description="Remote address.")]
    what: Annotated[str, Meta(description="The call, such as `compute/backup/create`.")]
    target: str
    name: str
    vm_type: str
    scode: int
    desc: str


class Health(Answer, frozen=True, kw_only=True):
    state: Literal["ready"]
    version: str
