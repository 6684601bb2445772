"""The configuration: one TOML file → one frozen Config, passed down from the composition root.

Every member has a default; with none given there is the embedded default
(engine/inventory/seed.py). A real installation lists its clusters, pools, points and VMs here:

```toml
[limits]
max_jobs = 2

[[pools]]
name = "fast"
path = "/srv/pools/fast"
usd_types = ["SSD"]

[[vms]]
name = "mail"
disks = [{ target_device = "sda", pool = "fast", volume_name = "mail.raw" }]
```

A thing may have its own `uuid`; one that has none gets one when it is first seen, and keeps it as
long as it keeps its name. References (`tenant`, `pool`, …) are names or uuids.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from engine.errors import ConfigInvalid

_MOST_CONFIG_BYTES = 16 << 20

_NO_NUL = r"^[^\x00]*$"

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200, pattern=_NO_NUL)]
# Of disks and their types: no longer than the API takes it, or nothing could be restored.
ShortName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64, pattern=_NO_NUL)]
Word: TypeAlias = Annotated[str, Meta(min_length=1, pattern=_NO_NUL)]
Path: TypeAlias = Annotated[str, Meta(max_length=4000, pattern=r"^/[^\x00]*$")]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=256)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base: a misspelt member is an error, not a default."""


class Limits(Section, frozen=True):
    max_jobs: Count = 2
    # Threads of one job, twice as many of a restore; 0 = cores + 1.
    workers: Annotated[int, Meta(ge=0, le=256)] = 0
    point_probe_timeout_s: Annotated[float, Meta(gt=0, le=300)] = 5.0
    point_refresh_s: Annotated[float, Meta(gt=0, le=120)] = 30.0  # well below a host's patience
    stalled_after_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0  # a job whose files don't answer
    verify_bytes_per_s: Annotated[int, Meta(ge=0)] = 0  # of a deep verify; 0 = as fast as it goes
    point_reserve_bytes: Annotated[int, Meta(ge=0)] = 64 << 20  # less free than this is full


class Gc(Section, frozen=True):
    sparse_below: Annotated[float, Meta(ge=0, le=1)] = 0.6
    copy_budget_bytes: Annotated[int, Meta(ge=0)] = 1 << 30


class Freeze(Section, frozen=True):
    """What is run around a snapshot: `command… freeze VM_UUID`, then `command… thaw VM_UUID`."""

    command: tuple[Word, ...] = ()
    timeout_s: Annotated[float, Meta(gt=0, le=600)] = 10.0  # of each run of the command
    hold_s: Annotated[float, Meta(gt=0, le=600)] = 10.0  # thawed after this, come what may


class Clone(Section, frozen=True):
    """How many extents a VM's disks may have, all together; 0 = any number.

    A clone takes some 15 to 45 µs an extent, and the disk's writers stand still meanwhile. So with
    the default a guest is frozen for about a second at most (docs/benchmarks/findings.md).
    """

    most_frozen_extents: Annotated[int, Meta(ge=0)] = 25_000  # with more: cloned without a freeze
    most_extents: Annotated[int, Meta(ge=0)] = 0  # with more: not cloned, but read directly


class Tracking(Section, frozen=True):
    """Finding changes by comparing clones, on XFS and btrfs."""

    enabled: bool = True
    pool_reserve_share: Annotated[float, Meta(ge=0, le=1)] = 0.1  # less free: baselines are dropped
    look_every_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0  # at the room in the pools


class Log(Section, frozen=True):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    form: Literal["json", "text"] = "json"


class Api(Section, frozen=True):
    """`host_names`: what callers by way of a proxy on this machine may call it (api/origins.py)."""

    host_names: tuple[Name, ...] = ()


class ClusterConfig(Section, frozen=True):
    name: Name
    uuid: str = ""
    mode: str = ""


class TenantConfig(Section, frozen=True):
    name: Name
    uuid: str = ""


class NamespaceConfig(Section, frozen=True):
    name: Name
    tenant: str = ""
    uuid: str = ""


class ZoneConfig(Section, frozen=True):
    name: Name
    uuid: str = ""


class ObjectGroupConfig(Section, frozen=True):
    name: Name
    uuid: str = ""


class PoolConfig(Section, frozen=True):
    name: Name
    path: Path
    uuid: str = ""
    usd_types: Annotated[tuple[ShortName, ...], Meta(min_length=1)] = ("HDD", "SSD")
    replica: Count = 1
    format: Literal["", "raw", "qcow2"] = ""  # of restored volumes; "" = as they were


class PointConfig(Section, frozen=True):
    name: Name
    path: Path
    kind: Literal["local", "nfs"] = "local"


class DiskConfig(Section, frozen=True):
    """A volume that exists. Its size is read from the file, its format never guessed."""

    target_device: ShortName
    volume_name: Name
    pool: str = ""
    usd_type: str = ""
    replica: Annotated[int, Meta(ge=0, le=256)] = 0
    share: bool = False
    format: Literal["raw", "qcow2"] = "raw"


class VmConfig(Section, frozen=True):
    name: Name
    disks: tuple[DiskConfig, ...]
    uuid: str = ""
    cluster: str = ""
    namespace: str = ""
    zone: str = ""
    object_group: str = ""
    vm_type: str = ""
    state: Literal["stopped", "running"] = "stopped"


class LibvirtHost(Section, frozen=True):
    """A libvirt that this service is on the same machine with. `cluster` is its VMs'."""

    uri: Name
    cluster: str = ""


class LibvirtRule(Section, frozen=True):
    """Where domains belong whose name matches (`*`, `?`, `[…]`). The first that matches counts."""

    match: Name
    namespace: str = ""
    zone: str = ""
    object_group: str = ""
    vm_type: str = ""
    leave_out: bool = False


class Libvirt(Section, frozen=True):
    """`scratch`: a directory that QEMU may write to while a backup runs. Live backups need it."""

    hosts: tuple[LibvirtHost, ...] = ()
    rules: tuple[LibvirtRule, ...] = ()
    scratch: Annotated[str, Meta(pattern=r"^(/[^\x00]*)?$", max_length=80)] = ""  # with sockets
    scratch_reserve_bytes: Annotated[int, Meta(ge=0)] = 1 << 30  # less free than this ends a backup
    scratch_limit_bytes: Annotated[int, Meta(ge=0)] = 0  # of one backup; 0 = no limit of its own
    tpm_directory: Path = "/var/lib/libvirt/swtpm"  # libvirt's


class Config(Section, frozen=True):
    """All of it. An empty list means: the embedded default's one."""

    inventory: Literal["embedded", "libvirt"] = "embedded"
    libvirt: Libvirt = Libvirt()
    limits: Limits = Limits()
    gc: Gc = Gc()
    freeze: Freeze = Freeze()
    clone: Clone = Clone()
    tracking: Tracking = Tracking()
    log: Log = Log()
    api: Api = Api()
    clusters: tuple[ClusterConfig, ...] = ()
    tenants: tuple[TenantConfig, ...] = ()
    namespaces: tuple[NamespaceConfig, ...] = ()
    zones: tuple[ZoneConfig, ...] = ()
    object_groups: tuple[ObjectGroupConfig, ...] = ()
    pools: tuple[PoolConfig, ...] = ()
    points: tuple[PointConfig, ...] = ()
    vms: tuple[VmConfig, ...] = ()

    @property
    def worker_count(self) -> int:
        """Threads of one job: reading, hashing and compressing overlap, so one above the cores."""
        return self.limits.workers or len(os.sched_getaffinity(0)) + 1


def load_config(path: str) -> Config:
    """The configuration in the file; ConfigInvalid names the file, the place and the fault."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigInvalid(f"{path}: {error.strerror or error}") from error
    if len(text) > _MOST_CONFIG_BYTES:
        raise ConfigInvalid(f"{path}: over {_MOST_CONFIG_BYTES} bytes")
    return parse_config(text, path)


def parse_config(text: bytes, source: str) -> Config:
    """The configuration that `text` (TOML) says; `source` is for the message."""
    try:
        return msgspec.toml.decode(text, type=Config)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigInvalid(f"{source}: {error}") from error
