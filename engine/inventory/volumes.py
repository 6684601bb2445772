"""Volume files in pools: plain names only, so that no path ever leaves its pool.

A volume is a regular file directly in the pool's directory, raw or qcow2 as declared. Symbolic
links are never followed. OSErrors become PoolFull or PoolUnreachable here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import PurePath
from typing import TypeAlias

from engine.errors import Conflict, Invalid, PoolUnreachable
from engine.model import Pool
from engine.probes import Probes
from engine.qemu.header import read_header
from engine.snapshot.sources import open_volume, pool_errors
from storage.files.fs import OsFs

MOST_NAME_BYTES = 200  # leaves room for the hidden names that stand beside it while it is made
MOST_CAPACITY_BYTES = 1 << 60
DIRECTORY_TIMEOUT_S = 2.0

DirectoryId: TypeAlias = tuple[int, int]  # device, inode
Directory: TypeAlias = str | DirectoryId


def require_plain_name(name: str) -> None:
    """Raises Invalid unless `name` can only name a visible file directly in a directory."""
    reason = name_fault(name)
    if reason:
        raise Invalid("volume_name", f"{name!r} {reason}")


def name_fault(name: str) -> str:
    """What is wrong with a volume's name; "" for a plain one."""
    if not name:
        return "is empty"
    if "/" in name or "\\" in name:
        return "has a path separator"
    if name.startswith("."):
        return "begins with a dot"
    if any(ord(char) < 32 or ord(char) == 127 for char in name):
        return "has a control character"
    try:
        size_bytes = len(name.encode())
    except UnicodeEncodeError:
        return "is not text"
    return f"is over {MOST_NAME_BYTES} bytes" if size_bytes > MOST_NAME_BYTES else ""


def offered_type(pool: Pool, usd_type: str) -> str:
    """The type of a disk in the pool, its first one for "". Conflict(usd_type_not_offered)."""
    if usd_type and usd_type not in pool.usd_types:
        offered = ", ".join(pool.usd_types)
        raise Conflict("usd_type_not_offered", f"pool {pool.name} offers {offered}")
    return usd_type or pool.usd_types[0]


def volume_path(pool: Pool, volume_name: str) -> str:
    """The volume's absolute path. Invalid unless the name is plain."""
    require_plain_name(volume_name)
    return os.path.join(pool.path, volume_name)


def errors_of(pool: Pool) -> AbstractContextManager[None]:
    """Turns an OSError inside the block into an EngineError that names the pool."""
    return pool_errors(f"pool {pool.name}")


def pool_room(pool: Pool) -> tuple[int, int]:
    """(capacity, free) of the pool's file system. PoolUnreachable. May hang with the medium."""
    with errors_of(pool):
        found = os.statvfs(pool.path)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def volume_size(pool: Pool, volume_name: str, volume_format: str = "raw") -> int | None:
    """The size of the disk in a volume; None if nothing is there.

    Conflict(name_taken) if it is no plain file, DiskServerRefused if it is not of that format.
    """
    path = volume_path(pool, volume_name)
    with errors_of(pool):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            os.stat(pool.path)  # a pool that is gone is another thing than a volume that is
            return None
    if not stat.S_ISREG(found.st_mode):
        raise Conflict("name_taken", f"{volume_name!r} in pool {pool.name} is not a regular file")
    return found.st_size if volume_format == "raw" else _qcow2_size(pool, path)


def _qcow2_size(pool: Pool, path: str) -> int:
    with errors_of(pool):
        fd = open_volume(path)
        try:
            return read_header(fd, path).size_bytes
        finally:
            os.close(fd)


def bounded_volume_size(
    probes: Probes, pool: Pool, volume_name: str, timeout_s: float, volume_format: str = "raw"
) -> int | None:
    """volume_size, but PoolUnreachable when the pool does not answer in time. One that hangs holds
    a single thread, however many volumes are asked for, and how often."""
    key = f"volume {pool.path}/{volume_name}"
    try:
        probes.ask(f"pool {pool.uuid}", lambda: pool_room(pool), timeout_s)
        return probes.ask(key, lambda: volume_size(pool, volume_name, volume_format), timeout_s)
    except TimeoutError as error:
        raise PoolUnreachable(f"pool {pool.name}: {error}") from None


def directory_ids(probes: Probes, paths: Iterable[str]) -> dict[str, DirectoryId]:
    """Which directory that is, by whatever path (a link, a bind mount): (device, inode). Without
    those that are not there, or do not answer in time."""

    def look(path: str) -> DirectoryId:
        found = os.stat(path)
        return found.st_dev, found.st_ino

    keys = {f"directory {path}": path for path in paths}
    asked = {key: partial(look, path) for key, path in keys.items()}
    found = probes.ask_each(asked, DIRECTORY_TIMEOUT_S)
    return {keys[key]: one for key, one in found.items() if not isinstance(one, Exception)}


def directories_above(probes: Probes, paths: Iterable[str]) -> dict[str, frozenset[Directory]]:
    """Each of these directories and all that it is in, by their paths and by their ids. Of one that
    does not answer in time the paths only, as they are written."""

    def look(path: str) -> frozenset[Directory]:
        found: set[Directory] = {os.path.normpath(path)}
        for place in _upwards(os.path.realpath(path)):
            found.add(place)
            with contextlib.suppress(OSError):
                stated = os.stat(place)
                found.add((stated.st_dev, stated.st_ino))
        return frozenset(found)

    keys = {f"directories above {path}": path for path in paths}
    asked = {key: partial(look, path) for key, path in keys.items()}
    above = dict[str, frozenset[Directory]]()
    for key, found in probes.ask_each(asked, DIRECTORY_TIMEOUT_S).items():
        if isinstance(found, TimeoutError):
            above[keys[key]] = frozenset(_upwards(os.path.normpath(keys[key])))
        elif isinstance(found, Exception):
            raise found
        else:
            above[keys[key]] = found
    return above


def _upwards(path: str) -> list[str]:
    return [path, *map(str, PurePath(path).parents)]


def make_volume(pool: Pool, volume_name: str, capacity: int) -> None:
    """A new sparse volume, durable on return. Conflict(name_taken), PoolFull, PoolUnreachable."""
    path = volume_path(pool, volume_name)
    with errors_of(pool):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path, flags, 0o600)
        except FileExistsError:
            raise Conflict("name_taken", f"{volume_name!r} is in pool {pool.name}") from None
        try:
            _extend(fd, capacity)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        OsFs().fsync_dir(pool.path)


def remove_volume(pool: Pool, volume_name: str) -> None:
    """The volume is gone on return, durably. None there is no error. PoolUnreachable."""
    path = volume_path(pool, volume_name)
    with errors_of(pool):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        OsFs().fsync_dir(pool.path)


def _extend(fd: int, capacity: int) -> None:
    try:
        os.ftruncate(fd, capacity)
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.EINVAL):
            raise Invalid("capacity", f"{capacity} is more than the pool can hold") from error
        raise
    os.fsync(fd)
