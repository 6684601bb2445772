"""What engine/ can fail with. StorageErrors pass through it unchanged.

Every error has a stable `code`, by which the API's one table finds its `scode` and HTTP status, and
says whether the same call may succeed later without anybody mending anything (`retryable`).
`str(error)` names the object and what was expected of it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from storage.errors import shown

Thing: TypeAlias = Literal[
    "cluster",
    "tenant",
    "namespace",
    "zone",
    "object_group",
    "pool",
    "vm",
    "backup",
    "backup_point",
    "job",
]

ConflictCode: TypeAlias = Literal[
    "vm_busy",
    "vm_no_disks",
    "backup_running",
    "backup_failed",
    "name_taken",
    "volume_in_use",
    "point_in_use",
    "job_finished",
    "disk_not_in_backup",
    "usd_type_not_offered",
    "volume_changed",
    "managed_by_libvirt",
    "domain_busy",
    "domain_stopped",
    "format_not_readable",
    "cancelled",
    "interrupted",
    "shutting_down",
]

# A conflict that ends by itself, when whatever is under way has ended.
_PASSING = frozenset(
    {
        "vm_busy",
        "domain_busy",
        "domain_stopped",
        "backup_running",
        "volume_changed",
        "shutting_down",
    }
)


class EngineError(Exception):
    """Root of this layer."""

    code: str = "engine_failed"
    retryable: bool = False

    def __str__(self) -> str:
        return shown(super().__str__())


class NotFound(EngineError):
    """Nothing of this kind is known by this id. A malformed id is an unknown one."""

    def __init__(self, what: Thing, uuid: str) -> None:
        super().__init__(f"no {what} {uuid!r}")
        self.what = what
        self.uuid = uuid
        self.code = f"{what}_not_found"


class Invalid(EngineError):
    """A member of a request is not what it has to be."""

    code = "invalid_member"

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(f"{member}: {reason}")
        self.member = member
        self.reason = reason


class Conflict(EngineError):
    """The request is sound, but not in the present state of what it names."""

    def __init__(self, code: ConflictCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.retryable = code in _PASSING


class Cancelled(Conflict):
    """The job was told to end: by a caller (`cancelled`), or because we stop (`interrupted`)."""

    def __init__(self, wish: Literal["cancelled", "interrupted"], detail: str) -> None:
        super().__init__(wish, detail)
        self.wish = wish


class PoolFull(EngineError):
    """The pool has no room for what was to be written to it."""

    code = "pool_full"


class PoolUnreachable(EngineError):
    """The pool's directory is not there, or does not answer."""

    code = "pool_unreachable"
    retryable = True


class DiskServerLost(EngineError):
    """The process or host that serves a disk (NBD) is not there, has died, or does not answer."""

    code = "disk_server_lost"
    retryable = True


class DiskServerRefused(EngineError):
    """The disk's server answered, with an error: no such export, an I/O error, read-only, …"""

    code = "disk_server_refused"


class DiskServerBroken(EngineError):
    """The disk's server said what no server may say; nothing that it said is believed."""

    code = "disk_server_broken"


class HypervisorAway(EngineError):
    """The libvirt that has the VM does not answer, or does not let us in."""

    code = "hypervisor_unreachable"
    retryable = True


class HypervisorRefused(EngineError):
    """libvirt answered, with an error that we know no way around."""

    code = "hypervisor_refused"


class ScratchFull(EngineError):
    """There is no room for what a guest overwrites while its backup runs."""

    code = "scratch_full"


class PointStateError(EngineError):
    """The backup point is attached, but still being opened, or being detached."""

    code = "point_not_ready"
    retryable = True


class AlreadyRunning(EngineError):
    """Another process works on this data directory."""

    code = "already_running"


class ConfigInvalid(EngineError):
    """The configuration file does not say what it has to."""

    code = "config_invalid"
