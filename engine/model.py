"""What the engine keeps about clusters, VMs, points, backups and jobs: the rows of the state.

All are frozen; a change is `msgspec.structs.replace(row, …)` put back. Stored as msgpack maps, so
that members can be added with a default. Sizes are bytes, times Unix seconds, ids canonical uuids.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

JobKind: TypeAlias = Literal["backup", "restore", "verify", "gc", "rebuild"]
JobState: TypeAlias = Literal["queued", "running", "succeeded", "failed", "cancelled"]
VmAction: TypeAlias = Literal["", "backing_up", "restoring"]
PointKind: TypeAlias = Literal["local", "nfs"]

BACKUP_DONE = 0
BACKUP_RUNNING = 1
BACKUP_FAILED = 2


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Base of all rows. They can't be in a cycle, so the collector need not know them: it would
    walk through every one of a hundred thousand backups again and again."""


class Cluster(Row, frozen=True):
    uuid: str
    name: str
    mode: str = ""


class Tenant(Row, frozen=True):
    uuid: str
    name: str


class Namespace(Row, frozen=True):
    uuid: str
    name: str
    tenant: str


class Zone(Row, frozen=True):
    uuid: str
    name: str


class ObjectGroup(Row, frozen=True):
    uuid: str
    name: str


class Pool(Row, frozen=True):
    """A directory that volumes live in. `path` is absolute."""

    uuid: str
    name: str
    path: str
    usd_types: tuple[str, ...] = ("HDD", "SSD")
    replica: int = 1
    format: str = ""  # of the volumes that restores make here; "" = as those backed up had


class Directory(Row, frozen=True):
    """Where a domain of a libvirt host had a volume: a pool that libvirt does not know of."""

    uuid: str  # the pool's
    host: str
    path: str


class Disk(Row, frozen=True):
    """A VM's disk: the volume file `volume_name` in a pool.

    A disk that is no file in a directory has no pool; `volume_name` is then its source.
    """

    target_device: str
    pool_uuid: str
    volume_name: str
    capacity: int
    usd_type: str
    replica: int = 1
    share: bool = False
    format: str = "raw"


class Vm(Row, frozen=True):
    uuid: str
    name: str
    cluster_uuid: str
    tenant: str
    namespace: str
    zone_uuid: str
    object_group: str
    disks: tuple[Disk, ...]
    vm_type: str = ""
    state: str = "stopped"  # stopped, running, paused, restoring, restore_failed, unreachable
    action: VmAction = ""
    last_error: str = ""
    host: str = ""  # the libvirt that has it; "" = the embedded inventory


class BackupPoint(Row, frozen=True):
    """A point that this host is attached to."""

    uuid: str
    name: str
    kind: PointKind
    path: str
    last_error: str = ""


FOREIGN_IDENTITY = "another cluster's"


class DiskBackup(Row, frozen=True):
    """One disk in a backup; `disk_uuid` names the disk backup itself (API: disks[].backup_uuid)."""

    target_device: str
    disk_uuid: str
    capacity: int
    replica: int = 1
    share: bool = False
    usd_type: str = ""
    snapshot_uuid: str = ""
    format: str = "raw"  # of the volume; what a restore makes, unless the pool says otherwise
    # Which file it was, for the next backup; "" if that needs nothing of it. FOREIGN_IDENTITY: this
    # was imported, so none builds on it.
    identity: str = ""


class Machine(Row, frozen=True):
    """What a restore needs to make the VM again where it was, each deflated (zlib). Bounded."""

    xml: bytes
    checkpoint: bytes = b""  # what the next backup builds on
    nvram: bytes = b""
    tpm: bytes = b""


class BackupLabel(Row, frozen=True):
    """What travels with a backup on the point (storage keeps it as opaque bytes)."""

    vm_uuid: str
    vm_name: str
    tenant: str
    tenant_name: str
    namespace: str
    namespace_name: str
    name: str
    description: str
    create_time: int
    full: bool
    disks: tuple[DiskBackup, ...]
    vm_type: str = ""
    expired_time: int = 0
    notes: tuple[str, ...] = ()  # e.g. "full: nothing to build on"; "snapshot: reflink"
    frozen: bool = False  # whether the guest's file systems were; else as after a power failure
    machine: Machine | None = None


class Backup(Row, frozen=True):
    """A backup in the catalogue, finished or not. `seq`: the record of its domain's log that
    committed it; 0 until the domain was read since."""

    uuid: str
    cluster_uuid: str
    point_uuid: str
    label: BackupLabel
    status: int = BACKUP_DONE
    parent: str = ""
    error: str = ""
    seq: int = 0


class Progress(Row, frozen=True):
    """All counts in bytes; `rate` in bytes a second of scanning or restoring; -1 = eta unknown."""

    bytes_total: int = 0
    bytes_scanned: int = 0
    bytes_read: int = 0
    bytes_changed: int = 0
    bytes_stored: int = 0
    bytes_restored: int = 0
    rate: float = 0.0
    eta_s: float = -1.0


class Job(Row, frozen=True):
    uuid: str
    kind: JobKind
    state: JobState = "queued"
    backup_uuid: str = ""
    compute_uuid: str = ""
    backup_point_uuid: str = ""
    deep: bool = False
    error: str = ""
    created_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0
    progress: Progress = Progress()
    stalled_s: float = 0.0  # for how long it has not got on, as `stalled_on` does not answer
    stalled_on: str = ""  # e.g. "backup point nas"; "" while it moves
    result: tuple[str, ...] = ()  # what a verify, gc or rebuild has to say, a line each


class Distrust(Row, frozen=True):
    """Chunks of a pack that were found damaged there; none named: all of the pack."""

    point_uuid: str
    cluster_uuid: str
    pack: str
    chunks: tuple[bytes, ...] = ()


class PackRead(Row, frozen=True):
    """When a verify last read a pack of a point in full, whatever it found there."""

    point_uuid: str
    pack: str  # <cluster uuid>/<FileId>
    at: float


class Baseline(Row, frozen=True):
    """What is known of a disk's baseline: the clone that its newest backup was read from.

    `file` is its path, "" when there is none, and `why` says why not. `off`, once it is set, is why
    the disk's changes are not tracked any more.
    """

    vm_uuid: str
    target_device: str
    volume: str  # the volume's path
    backup_uuid: str = ""
    disk_uuid: str = ""
    size_bytes: int = 0
    inode: int = 0  # of the volume
    generation: int = 0
    file: str = ""
    file_system: str = ""
    file_inode: int = 0
    file_generation: int = 0
    file_mtime_ns: int = 0
    file_ctime_ns: int = 0
    why: str = ""
    off: str = ""
    off_at: float = 0.0


class Operation(Row, frozen=True):
    """One line of the operation log."""

    seq: int
    at: float
    who: str
    what: str  # the call, e.g. "compute/backup/create"
    target: str  # the uuid or name that it was about
    name: str = ""
    vm_type: str = ""
    scode: int = 0
    desc: str = ""
