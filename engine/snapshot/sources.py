"""What a backup reads from: one disk, held still, seen as bytes and allocated ranges.

Theory: a source is an open file descriptor, never a path, so that nobody can swap the volume under
a backup. `capacity` is fixed when the source is made. Reading is positional (`preadv`), so any
number of threads share a source without a lock. Holes come from SEEK_DATA/SEEK_HOLE: a file system
that does not know them answers that all of the file is data, which is slow and right.

`VolumeSource` may stand for a reflink clone (nobody else has it, nothing to guard) or for the
volume itself ("direct"). The latter is guarded by a `Mark`: what fstat said when the source was
made. Every read compares it, so that a backup of a volume in use ends at once and not hours later.
Read engine/snapshot/snapshot.py next.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from engine.errors import Conflict, EngineError, PoolFull, PoolUnreachable
from storage.files.in_flight import InFlight

FoundBy: TypeAlias = Literal["scan", "reflink", "bitmap"]
"""How it was found out where a disk differs from its parent backup."""

# The kernel stamps files with a clock that ticks every 1 to 10 ms. A volume that changed less than
# this ago could change again without its times showing it.
_TICK_NS = 20_000_000
_SECOND_NS = 1_000_000_000
SKEW_NS = 60 * _SECOND_NS  # of a file server's clock; more is taken for a time of long ago


BITMAP_PREFIX = "vmkeep-"


@dataclass(frozen=True, slots=True)
class BitmapPlan:
    """Which dirty bitmaps of an image a backup uses: `parent`'s, and `new` for the next one.

    "" for none; `why` is then the reason, if the parent backup had one. `keep`: those that backups
    on other points will build on. `ours`: what the names begin with that are ours to remove.
    `medium`, if it is given, is (device, inode) of the file that all this is about: another one
    found in its place gets none of it, as names may be shared by a VM's disks.
    """

    parent: str = ""
    new: str = ""
    keep: frozenset[str] = frozenset()
    ours: str = BITMAP_PREFIX
    why: str = ""
    medium: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A VM's disk as a file: `path` is absolute, `target_device` the disk's name in its VM.

    `format` is the inventory's word for it and never guessed. The rest is for qcow2 images: the
    directories where what they stand on may be, beside their own, and their bitmaps.
    """

    target_device: str
    path: str
    format: str = "raw"
    backing_roots: tuple[str, ...] = ()
    bitmaps: BitmapPlan = BitmapPlan()


class DiskSource(Protocol):
    """A disk's content at one instant. All methods may be called from any thread."""

    @property
    def capacity(self) -> int:
        """Size of the disk in bytes; does not change."""
        ...

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of all ranges that may hold other bytes than zeros, ascending."""
        ...

    @property
    def found_by(self) -> FoundBy:
        """What `changed_ranges` comes from; `scan` when it is None."""
        ...

    def changed_ranges(self) -> Iterator[tuple[int, int]] | None:
        """(offset, length), offsets ascending: an upper bound of what differs from the parent.

        Byte-granular, below `capacity`, anew at each call. None: not known, all may differ. Whoever
        made the source sees to it that it is about the very backup that is to be built on.
        """
        ...

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills `buffer` from `offset`; returns its length. Never called beyond `capacity`."""
        ...

    def prefetch(self, offset: int, size_bytes: int) -> None:
        """A hint: this range will be read soon."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells whether a volume was touched: identity, size and both times in ns."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Origin:
    """Which file a clone was made of."""

    inode: int
    generation: int


@contextlib.contextmanager
def pool_errors(what: str) -> Iterator[None]:
    """Turns an OSError on a pool's files into an EngineError that names `what`."""
    try:
        yield
    except OSError as error:
        raise from_pool_error(error, what) from error


def from_pool_error(error: OSError, what: str) -> EngineError:
    """PoolFull for no room or quota, PoolUnreachable for all else."""
    detail = f"{what}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PoolFull(detail)
    return PoolUnreachable(detail)


def open_volume(path: str) -> int:
    """A volume's file, for reading. Raises OSError unless `path` itself is a regular file."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd


def mark_of(found: os.stat_result) -> Mark:
    """The part of a stat that a write, a truncation or a replacement changes."""
    return Mark(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def settled_mark(fd: int) -> Mark:
    """The mark of `fd`, taken when any later change is sure to give the file another time.

    Of a file that was changed lately that is so once it has been seen for a tick of the file
    system's clock. Which is a server's, perhaps: within SKEW_NS what ours says is not believed.
    Who writes all the time is waited for twice, and found out by a later comparison anyway.
    """
    mark = mark_of(os.fstat(fd))
    for _ in range(2):
        if abs(time.time_ns() - max(mark.mtime_ns, mark.ctime_ns)) >= SKEW_NS:
            break
        time.sleep(_tick_ns(mark) / 1e9)
        seen, mark = mark, mark_of(os.fstat(fd))
        if mark == seen:
            break
    return mark


def _tick_ns(mark: Mark) -> int:
    """How long after the times of `mark` another change might not show.

    ext4 with inodes of 128 bytes, ext3 and NFS of them keep whole seconds. That is told by ctime,
    since mtime may be set to any time.
    """
    return _TICK_NS if mark.ctime_ns % _SECOND_NS else _TICK_NS + _SECOND_NS


class VolumeSource:
    """A DiskSource over a file descriptor, which it owns.

    With a `mark` the file is somebody's volume: `check_unchanged` and every read raise
    Conflict("volume_changed") once it differs. Writes through a shared mapping show only when the
    kernel writes them back; no hypervisor writes raw volumes that way.
    """

    def __init__(
        self, fd: int, path: str, mark: Mark | None = None, origin: Origin | None = None
    ) -> None:
        """`path` and `origin`, if that is known, are those of the volume, also for a clone."""
        self.origin = origin
        self._fd = fd
        self._path = path
        self._mark = mark
        self._capacity = mark.size_bytes if mark else os.fstat(fd).st_size
        self._changed: Sequence[tuple[int, int]] | None = None
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def fd(self) -> int:
        """Open until `close`."""
        return self._fd

    @property
    def guarded(self) -> bool:
        """Whether this is the volume itself, which others might write to."""
        return self._mark is not None

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        with pool_errors(self._path):
            yield from allocated_ranges(self._fd, self._capacity)

    @property
    def found_by(self) -> FoundBy:
        return "scan" if self._changed is None else "reflink"

    def changed_ranges(self) -> Iterator[tuple[int, int]] | None:
        return None if self._changed is None else iter(self._changed)

    def track(self, changed: Sequence[tuple[int, int]]) -> None:
        """From now on `changed_ranges` is this: what two held clones differ in."""
        self._changed = changed

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Raises Conflict("volume_changed"), PoolUnreachable."""
        have = 0
        with pool_errors(self._path), InFlight(self._path):
            while have < len(buffer):
                count = os.preadv(self._fd, [buffer[have:]], offset + have)
                if count == 0:
                    raise self._was_changed("it became shorter")
                have += count
        self._check_open_file()
        return have

    def prefetch(self, offset: int, size_bytes: int) -> None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, offset, size_bytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raises Conflict("volume_changed") if anybody wrote to, resized or replaced the volume."""
        if self._mark is None:
            return
        require_named(self._path, self._mark)
        self._check_open_file()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _check_open_file(self) -> None:
        if self._mark is None:
            return
        with pool_errors(self._path), InFlight(self._path):
            now = mark_of(os.fstat(self._fd))
        if now != self._mark:
            raise self._was_changed("somebody wrote to it")

    def _was_changed(self, how: str) -> Conflict:
        return was_changed(
            self._path, f"{how}. Stop the VM, or use a pool whose file system has reflinks"
        )


def require_named(path: str, mark: Mark) -> None:
    """Raises Conflict("volume_changed") unless `path` still names the file that `mark` is of.

    From then on a descriptor of the file tells what was written before, by other hosts too. Else an
    NFS client tells for up to a minute what it remembers; it asks the server when a file is opened.
    """
    try:
        with InFlight(path):
            named = os.stat(path, follow_symlinks=False)
            same = (named.st_dev, named.st_ino) == (mark.device, mark.inode)
            if same:
                os.close(open_volume(path))
    except FileNotFoundError:
        raise was_changed(path, "it was deleted or renamed") from None
    except OSError as error:
        raise from_pool_error(error, path) from error
    if not same:
        raise was_changed(path, "it was replaced")


def was_changed(path: str, how: str) -> Conflict:
    return Conflict("volume_changed", f"{path} changed while it was read: {how}")


def allocated_ranges(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what SEEK_DATA calls data below `size_bytes`, ascending.

    All of the file is one range where the file system has no SEEK_DATA. Raises OSError.
    """
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            start, end = position, size_bytes
        if start < position or end <= start:
            # Not an answer that the calls may give; reading too much is the safe reading of it.
            start, end = position, size_bytes
        if start >= size_bytes:
            return
        yield start, min(end, size_bytes) - start
        position = end
