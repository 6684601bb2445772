"""What the Engine's verbs take and answer, beside the rows of engine/model.py.

None of it is stored. Sizes are bytes, times Unix seconds, ids canonical uuids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from engine.errors import EngineError
from engine.model import Backup, BackupPoint, Cluster, Pool
from storage.errors import StorageError

PointStateName: TypeAlias = Literal[
    "opening", "online", "unreachable", "read_only", "full", "unsafe", "damaged", "newer_format"
]
Maintenance: TypeAlias = Literal["verify", "gc", "rebuild"]


class Scope(msgspec.Struct, frozen=True):
    """Which clusters, tenants and namespaces a call is about; "" = no restriction."""

    cluster_uuid: str = ""
    tenant: str = ""
    namespace_uuid: str = ""
    multiple: bool = False  # for the tenant named `default` only: all namespaces, not just one
    vm_type: str = ""  # a label for the operation log, no restriction


EVERYWHERE = Scope()


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupQuery:
    """A page of backups. "" and 0 = no filter; `page` counts from 1."""

    scope: Scope = EVERYWHERE
    vm_uuid: str = ""
    name_part: str = ""
    description_part: str = ""
    point_uuid: str = ""
    start_time: int = 0
    end_time: int = 0
    page: int = 1
    page_size: int = 20


@dataclass(frozen=True, slots=True)
class RangeState:
    """How the query went for one cluster and namespace; `total` as the filters leave it."""

    cluster: Cluster
    namespace_uuid: str
    total: int
    error: EngineError | StorageError | None = None


@dataclass(frozen=True, slots=True)
class BackupPage:
    """`rows` newest first; `total` over all pages."""

    rows: list[Backup]
    total: int
    ranges: list[RangeState]


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool and its room; `error` when it could not be looked at (then both are 0).

    `pinned_bytes`: what the baselines in it take up (see TrackingState).
    """

    pool: Pool
    capacity: int = 0
    free: int = 0
    error: str = ""
    pinned_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HypervisorState:
    """A host that VMs run on. `problem`: why it is away, "" while it is in sight."""

    name: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class TrackingState:
    """How the changes of a disk are found. `off`: why tracking was ended; an operator has to look.

    `why`: why there is no baseline just now, "" when there is one. `pinned_bytes`: room that it
    takes up, as last looked at.
    """

    vm_uuid: str
    target_device: str
    volume: str
    off: str = ""
    why: str = ""
    pinned_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PointState:
    """An attached point as last seen. Sizes and counts are those of the managed clusters."""

    point: BackupPoint
    state: PointStateName = "opening"
    capacity: int = 0
    free: int = 0
    stored_bytes: int = 0
    logical_bytes: int = 0
    chunk_count: int = 0
    pack_count: int = 0
    backup_count: int = 0
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class NewDisk:
    """A disk of a VM to be made. `capacity` is needed only for a volume that is not there yet."""

    target_device: str
    pool_uuid: str
    volume_name: str
    capacity: int | None = None
    usd_type: str = ""
    replica: int = 0  # 0 = the pool's
    share: bool = False


@dataclass(frozen=True, slots=True)
class RestoreTarget:
    """Where a disk of the backup is to go."""

    target_device: str
    pool_uuid: str
    volume_name: str
    usd_type: str = ""


@dataclass(frozen=True, slots=True)
class RemoteBackup:
    """A backup found on a point, and the cluster whose domain it is in."""

    backup: Backup
    cluster: Cluster


@dataclass(frozen=True, slots=True)
class RemoteListing:
    """What is on a point. `unread`: the clusters whose domains could not be read, and why, as the
    error's code."""

    backups: list[RemoteBackup]
    unread: dict[str, str]
