"""Holding a VM's disks still while they are backed up.

Where the pool's file system has reflinks, each disk is cloned (FICLONE): the VM goes on, the clone
stays. Elsewhere the volume is read itself, and the backup fails if anybody changes it meanwhile
(engine/snapshot/sources.py); so it is with qcow2 images (engine/qemu/stopped.py). Each disk goes
its own way; all of them are cloned, or marked, within one freeze, so they show one instant.

What takes time is done before the freeze: opening, flushing dirty pages, making the clones' empty
files. Whether a pool can clone is found out by cloning a small file there.

A clone has no name (O_TMPFILE): its blocks go when the last descriptor does, also when we are
killed, unless it is kept as a baseline (engine/snapshot/baselines.py). Where there is no O_TMPFILE
it gets a name in `<pool>/.vmkeep-snapshots/<random>/` and loses it at once. On NFS the name that
the client keeps for an open file goes with `close`, or with `clear_leftovers`.

Writers of a volume stand still while it is cloned, for longer the more extents it has (15 to
45 µs each). `CloneLimits` bounds that: above one count of extents the guest is not frozen for it,
above another the volume is read directly. How long it took is in the facts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, TypeAlias

from engine.errors import DiskServerRefused
from engine.model import Machine
from engine.qemu.stopped import Qcow2Source
from engine.snapshot.extents import clone_into, count_extents, generation, share_cow_flag
from engine.snapshot.freeze import NO_HOOK, Freeze, FreezeHook, frozen
from engine.snapshot.sources import (
    DiskFile,
    DiskSource,
    Origin,
    VolumeSource,
    open_volume,
    pool_errors,
    settled_mark,
)
from storage.files.in_flight import InFlight

log = logging.getLogger(__name__)

Method: TypeAlias = Literal["reflink", "direct", "live"]

HeldVolume: TypeAlias = VolumeSource | Qcow2Source

SNAPSHOTS = ".vmkeep-snapshots"
RESTORES = ".vmkeep-restores"

_PROBE_BYTES = 4096
_CREATE_ATTEMPTS = 100
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_OLD_FILE = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class SnapshotFacts:
    """What a backup's label says about how its disks were held still."""

    methods: dict[str, Method]  # by target device
    capacities: dict[str, int]  # by target device, in bytes
    frozen: bool
    notes: tuple[str, ...] = ()
    clone_s: float = 0.0  # how long the VM's writes stood still for the clones, at most
    freeze_s: float = 0.0  # from frozen to thawed; 0 when it was not frozen
    identities: Mapping[str, str] = field(default_factory=dict)  # of live disks, by target device
    machine: Machine | None = None
    recording: frozenset[str] = frozenset()  # targets whose images record changes from now on

    @property
    def method(self) -> Method:
        """`reflink` only if all disks were cloned, `live` only if QEMU held all of them."""
        found = set(self.methods.values())
        return "direct" if "direct" in found else found.pop() if len(found) == 1 else "reflink"


class Snapshot:
    """A VM's disks at one instant. A context manager; its end closes the sources."""

    def __init__(
        self,
        volumes: dict[str, HeldVolume],
        freeze: Freeze,
        notes: Sequence[str] = (),
        clone_s: float = 0.0,
    ) -> None:
        self._volumes = volumes
        methods: dict[str, Method] = {
            target: "direct" if volume.guarded else "reflink" for target, volume in volumes.items()
        }
        images = {t: volume for t, volume in volumes.items() if isinstance(volume, Qcow2Source)}
        untracked = [
            f"{t} full read: {image.untracked}" for t, image in images.items() if image.untracked
        ]
        self.facts = SnapshotFacts(
            methods=methods,
            capacities={target: volume.capacity for target, volume in volumes.items()},
            frozen=freeze.held,
            notes=(*notes, *freeze.notes, *untracked),
            clone_s=clone_s,
            freeze_s=freeze.held_s,
            recording=frozenset(t for t, image in images.items() if image.recording),
        )

    @property
    def sources(self) -> dict[str, DiskSource]:
        """By target device."""
        return dict(self._volumes)

    @property
    def clones(self) -> dict[str, VolumeSource]:
        """By target device: those that nobody else has."""
        return {
            target: volume
            for target, volume in self._volumes.items()
            if isinstance(volume, VolumeSource) and not volume.guarded
        }

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


@dataclass(frozen=True, slots=True)
class CloneLimits:
    """How many extents a VM's disks may have, all together; 0 = any number.

    `frozen`: for the guest to be frozen meanwhile. `cloned`: for its disks to be cloned at all.
    """

    frozen: int = 0
    cloned: int = 0


NO_LIMITS = CloneLimits()


def take_snapshot(
    disks: Sequence[DiskFile], freeze: FreezeHook, limits: CloneLimits = NO_LIMITS
) -> Snapshot:
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
        hook, notes = _within(limits, opened, freeze)
        with frozen(hook) as outcome:
            clones_s = 0.0
            taken = []
            for volume in opened:
                cloned, clone_s = _try_clone(volume)
                clones_s += clone_s
                taken.append((volume, cloned))
            for volume, cloned in taken:
                source = _source(volume, cloned)
                sources[volume.disk.target_device] = source
                undo.callback(source.close)
        undo.pop_all()
    return Snapshot(sources, outcome, notes, clones_s)


def _within(
    limits: CloneLimits, opened: Sequence[_Opened], freeze: FreezeHook
) -> tuple[FreezeHook, list[str]]:
    """The hook to use; what is too much to clone is not going to be cloned."""
    to_clone = [volume for volume in opened if volume.clone_fd is not None]
    # A freeze is worth it only for what lasts an instant: not for reading a volume directly.
    if not to_clone:
        return NO_HOOK, []
    extents = _extents(to_clone) if limits != NO_LIMITS else 0
    if limits.cloned and extents > limits.cloned:
        for volume in to_clone:
            _give_up_clone(volume)
        return NO_HOOK, [f"not cloned: {extents} extents, {limits.cloned} are the limit"]
    if freeze.command and limits.frozen and extents > limits.frozen:
        return NO_HOOK, [
            f"not frozen: {extents} extents, {limits.frozen} are the limit: "
            "the snapshot is crash-consistent"
        ]
    return freeze, []


def _extents(volumes: Sequence[_Opened]) -> int:
    """Of all volumes; what can't be counted counts as none."""
    count = 0
    for volume in volumes:
        with contextlib.suppress(OSError):
            count += count_extents(volume.fd)
    return count


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
    with pool_errors(disk.path), InFlight(disk.path):
        volume = _Opened(disk, open_volume(disk.path))
        undo.callback(_close_left, volume)
        pool_path = os.path.dirname(disk.path)
        if can_clone(pool_path):
            volume.clone_fd = _nameless_file(pool_path)
            with contextlib.suppress(OSError):
                share_cow_flag(volume.fd, volume.clone_fd)
            os.fsync(volume.fd)
    return volume


def _give_up_clone(volume: _Opened) -> None:
    if volume.clone_fd is not None:
        os.close(volume.clone_fd)
        volume.clone_fd = None


def _close_left(volume: _Opened) -> None:
    for fd in (volume.fd, volume.clone_fd):
        if fd is not None and fd >= 0:
            os.close(fd)


def _try_clone(volume: _Opened) -> tuple[bool, float]:
    """(whether the volume was cloned, seconds). If not, it is read directly, as sound as this."""
    if volume.clone_fd is None:
        return False, 0.0
    began_s = time.monotonic()
    try:
        with InFlight(volume.disk.path):
            clone_into(volume.clone_fd, volume.fd)
    except OSError as error:
        log.warning("clone_failed", extra={"volume": volume.disk.path, "why": str(error)})
        return False, time.monotonic() - began_s
    return True, time.monotonic() - began_s


def _source(volume: _Opened, cloned: bool) -> VolumeSource:
    """The source over the clone, or over the volume itself; closes the other descriptor."""
    path = volume.disk.path
    fd, spare_fd = (volume.clone_fd, volume.fd) if cloned else (volume.fd, volume.clone_fd)
    assert fd is not None
    with pool_errors(path):
        if cloned:
            source = VolumeSource(fd, path, origin=_origin(volume.fd))
        else:
            source = VolumeSource(fd, path, settled_mark(fd))
    if spare_fd is not None:
        os.close(spare_fd)
    volume.fd, volume.clone_fd = -1, None
    return source


def _origin(volume_fd: int) -> Origin | None:
    try:
        return Origin(os.fstat(volume_fd).st_ino, generation(volume_fd))
    except OSError:
        return None  # a file system without generations


def can_clone(pool_path: str) -> bool:
    """Whether files in this directory can be cloned, found out by doing it."""
    try:
        source_fd = _nameless_file(pool_path)
        try:
            os.pwrite(source_fd, bytes(_PROBE_BYTES), 0)
            target_fd = _nameless_file(pool_path)
            try:
                clone_into(target_fd, source_fd)
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
    """A new empty file in the pool that has no name. Raises OSError."""
    try:
        return os.open(pool_path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # EISDIR: from kernels and file systems that never heard of it.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
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


def clear_leftovers(pool_path: str, kept: Collection[str] = ()) -> int:
    """Deletes what backups and restores that were killed left in a pool; returns how many files.

    `kept` are the paths of files that are no leftovers: baselines. Safe at any time: what somebody
    works on is locked (flock), or needs its name no more. Raises nothing; what cannot be deleted is
    logged and stays.
    """
    count = 0
    for root in (f"{pool_path}/{SNAPSHOTS}", f"{pool_path}/{RESTORES}"):
        count += _clear_directory(root, kept)
    return count


def _clear_directory(path: str, kept: Collection[str], parent_fd: int | None = None) -> int:
    """One of a pool, and with a `parent_fd` one in that, where there are no more. By descriptors:
    whoever may write to the pool can put a link to any other directory in the place of one."""
    count, name = 0, path if parent_fd is None else os.path.basename(path)
    with contextlib.suppress(OSError):
        fd = os.open(name, _DIRECTORY, dir_fd=parent_fd)
        try:
            for below in os.listdir(fd):
                place = f"{path}/{below}"
                if parent_fd is None and _is_directory(below, fd):
                    count += _clear_directory(place, kept, fd)
                elif place not in kept:
                    count += _clear_file(place, fd)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=parent_fd)
    return count


def _is_directory(name: str, parent_fd: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent_fd, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _clear_file(path: str, parent_fd: int) -> bool:
    name = os.path.basename(path)
    try:
        fd = os.open(name, _OLD_FILE, dir_fd=parent_fd)
    except OSError as error:
        log.warning("leftover_kept", extra={"path": path, "why": str(error)})
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=parent_fd)
    except OSError as error:
        log.info("leftover_kept", extra={"path": path, "why": str(error)})
        return False
    finally:
        os.close(fd)
    return True
