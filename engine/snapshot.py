"""Holding a VM's disks still while they are backed up.

Where the pool's file system has reflinks, each disk is cloned (FICLONE): the VM goes on, the clone
stays. Elsewhere the volume is read itself, and the backup fails if anybody changes it meanwhile
(engine/sources.py); so it is with qcow2 images (engine/qemu/stopped.py). Each disk goes its own
way; all of them are cloned, or marked, within one freeze, so they show one instant.

What takes time is done before the freeze: opening, flushing dirty pages, making the clones' empty
files. Whether a pool can clone is found out by cloning a small file there.

A clone lives in `<pool>/.vmkeep-snapshots/<random>/` and loses its name as soon as it is made: its
blocks go when the last descriptor does, also when we are killed. On NFS the name that the client
keeps for an open file goes with `close`, or with `clear_leftovers`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, TypeAlias

from engine.errors import DiskServerRefused
from engine.freeze import NO_HOOK, FreezeHook, frozen
from engine.model import Machine
from engine.qemu.stopped import Qcow2Source
from engine.sources import (
    DiskFile,
    DiskSource,
    VolumeSource,
    open_volume,
    pool_errors,
    settled_mark,
)

log = logging.getLogger(__name__)

Method: TypeAlias = Literal["reflink", "direct", "live"]

HeldVolume: TypeAlias = VolumeSource | Qcow2Source

SNAPSHOTS = ".vmkeep-snapshots"
RESTORES = ".vmkeep-restores"

_FICLONE = 0x40049409
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_PROBE_BYTES = 4096
_CREATE_ATTEMPTS = 100
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class SnapshotFacts:
    """What a backup's label says about how its disks were held still."""

    methods: dict[str, Method]  # by target device
    capacities: dict[str, int]  # by target device, in bytes
    frozen: bool
    notes: tuple[str, ...] = ()
    identities: Mapping[str, str] = field(default_factory=dict)  # of live disks, by target device
    machine: Machine | None = None

    @property
    def method(self) -> Method:
        """`reflink` only if all disks were cloned, `live` only if QEMU held all of them."""
        found = set(self.methods.values())
        return "direct" if "direct" in found else found.pop() if len(found) == 1 else "reflink"


class Snapshot:
    """A VM's disks at one instant. A context manager; its end closes the sources."""

    def __init__(self, volumes: dict[str, HeldVolume], held: bool, notes: Sequence[str]) -> None:
        self._volumes = volumes
        methods: dict[str, Method] = {
            target: "direct" if volume.guarded else "reflink" for target, volume in volumes.items()
        }
        capacities = {target: volume.capacity for target, volume in volumes.items()}
        self.facts = SnapshotFacts(methods, capacities, held, tuple(notes))

    @property
    def sources(self) -> dict[str, DiskSource]:
        """By target device."""
        return dict(self._volumes)

    @property
    def clones(self) -> dict[str, VolumeSource]:
        """By target device: those that nobody else has."""
        return {
            name: one
            for name, one in self._volumes.items()
            if isinstance(one, VolumeSource) and not one.guarded
        }

    @property
    def method(self) -> Method:
        return self.facts.method

    def verify_unchanged(self) -> None:
        """Raises Conflict("volume_changed") if a volume that is read directly was changed."""
        for volume in self._volumes.values():
            volume.check_unchanged()

    def committed(self) -> None:
        """The backup of these disks is on its point, for others to build on."""
        for volume in self._volumes.values():
            if isinstance(volume, Qcow2Source):
                volume.committed()

    def close(self) -> None:
        for volume in self._volumes.values():
            volume.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def take_snapshot(disks: Sequence[DiskFile], freeze: FreezeHook) -> Snapshot:
    """Holds all `disks` (of one VM) still.

    Raises PoolUnreachable; for qcow2 images also Conflict (volume_in_use, volume_changed) and the
    DiskServer… errors. Then nothing is left behind.
    """
    sources: dict[str, HeldVolume] = {}
    with contextlib.ExitStack() as undo:
        # Nobody may write to an image from here on, so it shows the instant of the clones as well.
        for disk in disks:
            if disk.format != "raw":
                image = _image(disk)
                sources[disk.target_device] = image
                undo.callback(image.close)
        opened = [_open(disk, undo) for disk in disks if disk.format == "raw"]
        # A freeze is worth it only for what lasts an instant: not for reading a volume directly.
        hook = freeze if any(volume.clone_fd is not None for volume in opened) else NO_HOOK
        with frozen(hook) as outcome:
            taken = [(volume, _try_clone(volume)) for volume in opened]
            for volume, cloned in taken:
                source = _source(volume, cloned)
                sources[volume.disk.target_device] = source
                undo.callback(source.close)
        undo.pop_all()
    return Snapshot(sources, outcome.held, outcome.notes)


def _image(disk: DiskFile) -> Qcow2Source:
    if disk.format != "qcow2":
        raise DiskServerRefused(f"{disk.path}: {disk.format!r} is a format that we can't read")
    return Qcow2Source(disk)


@dataclass(slots=True)
class _Opened:
    """A volume on its way to a source. `clone_fd`: an empty file to clone it to, if that works."""

    disk: DiskFile
    fd: int
    clone_fd: int | None = None


def _open(disk: DiskFile, undo: contextlib.ExitStack) -> _Opened:
    """Opens a volume, and flushes it so that the clone is short; `undo` closes what is left."""
    with pool_errors(disk.path):
        volume = _Opened(disk, open_volume(disk.path))
        undo.callback(_close_left, volume)
        pool_path = os.path.dirname(disk.path)
        if can_clone(pool_path):
            volume.clone_fd = _nameless_file(pool_path)
            _share_cow_flag(volume.fd, volume.clone_fd)
            os.fsync(volume.fd)
    return volume


def _close_left(volume: _Opened) -> None:
    for fd in (volume.fd, volume.clone_fd):
        if fd is not None and fd >= 0:
            os.close(fd)


def _try_clone(volume: _Opened) -> bool:
    """Whether the volume was cloned. If not, it will be read directly, which is sound as well."""
    if volume.clone_fd is None:
        return False
    try:
        fcntl.ioctl(volume.clone_fd, _FICLONE, volume.fd)
    except OSError as error:
        log.warning("clone_failed", extra={"volume": volume.disk.path, "why": str(error)})
        return False
    return True


def _source(volume: _Opened, cloned: bool) -> VolumeSource:
    """The source over the clone, or over the volume itself; closes the other descriptor."""
    path = volume.disk.path
    fd, spare_fd = (volume.clone_fd, volume.fd) if cloned else (volume.fd, volume.clone_fd)
    assert fd is not None
    with pool_errors(path):
        source = VolumeSource(fd, path, None if cloned else settled_mark(fd))
    if spare_fd is not None:
        os.close(spare_fd)
    volume.fd, volume.clone_fd = -1, None
    return source


def can_clone(pool_path: str) -> bool:
    """Whether files in this directory can be cloned, found out by doing it."""
    try:
        source_fd = _nameless_file(pool_path)
        try:
            os.pwrite(source_fd, bytes(_PROBE_BYTES), 0)
            target_fd = _nameless_file(pool_path)
            try:
                fcntl.ioctl(target_fd, _FICLONE, source_fd)
            finally:
                os.close(target_fd)
        finally:
            os.close(source_fd)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV):
            log.warning("clone_probe_failed", extra={"pool": pool_path, "why": str(error)})
        return False
    return True


def _nameless_file(pool_path: str) -> int:
    """A new empty file in the pool whose name is gone already. Raises OSError."""
    root = f"{pool_path}/{SNAPSHOTS}"
    for attempt in range(_CREATE_ATTEMPTS):
        try:
            return _made_and_unlinked(root, f"{root}/{secrets.token_hex(8)}")
        except FileNotFoundError:  # another snapshot, just done, removed the empty directory
            if attempt == _CREATE_ATTEMPTS - 1:
                raise
    raise AssertionError("not reached")


def _made_and_unlinked(root: str, place: str) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(root, 0o700)
    try:
        os.mkdir(place, 0o700)
        fd = os.open(f"{place}/clone", _NEW_FILE, 0o600)
        with contextlib.suppress(OSError):
            os.unlink(f"{place}/clone")
    finally:
        for path in (place, root):
            with contextlib.suppress(OSError):
                os.rmdir(path)
    return fd


def _share_cow_flag(source_fd: int, target_fd: int) -> None:
    """btrfs clones only between files that are both copy-on-write, or both not (libvirt's are)."""
    with contextlib.suppress(OSError):
        (flags,) = struct.unpack("i", fcntl.ioctl(source_fd, _FS_IOC_GETFLAGS, bytes(4)))
        if flags & _FS_NOCOW_FL:
            fcntl.ioctl(target_fd, _FS_IOC_SETFLAGS, struct.pack("i", _FS_NOCOW_FL))


def clear_leftovers(pool_path: str) -> int:
    """Deletes what backups and restores that were killed left in a pool; returns how many files.

    Safe at any time: what somebody works on is locked (flock), or needs its name no more. Raises
    nothing; what cannot be deleted is logged and stays.
    """
    count = 0
    for root in (f"{pool_path}/{SNAPSHOTS}", f"{pool_path}/{RESTORES}"):
        if os.path.islink(root):
            continue
        for place, _, names in os.walk(root, topdown=False):
            count += sum(_clear_file(f"{place}/{name}") for name in names)
            with contextlib.suppress(OSError):
                os.rmdir(place)
    return count


def _clear_file(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        log.warning("leftover_kept", extra={"path": path, "why": str(error)})
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError as error:
        log.info("leftover_kept", extra={"path": path, "why": str(error)})
        return False
    finally:
        os.close(fd)
    return True
