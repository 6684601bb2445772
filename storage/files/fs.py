"""The seam to the file system: everything that storage/ does to a file goes through `Fs`.

So a simulated file system can stand in for the real one in tests, and no durable step hides in a
convenience function. Methods raise plain OSError with the usual errno; the callers translate
(storage.errors.translated). Paths are absolute `str`. All methods may be called from any thread;
the data-moving ones release the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat as stat_bits
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from storage.files.in_flight import in_flight
from storage.files.mounts import MountKind, check_mount, require_sound_mount
from storage.files.uncached import read_once

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap


@dataclass(frozen=True, slots=True)
class FileStat:
    """What storage/ needs to know about a name. Symbolic links are reported, never followed."""

    kind: str  # "file", "directory" or "other"
    size_bytes: int
    inode: int


@dataclass(frozen=True, slots=True)
class Room:
    """Size of the file system and what an unprivileged writer may still use of it, in bytes."""

    capacity_bytes: int
    free_bytes: int


class Fs(Protocol):
    """The file system calls of the backup point's protocol."""

    def open_read(self, path: str) -> int: ...
    def open_new(self, path: str) -> int:
        """Creates `path` (mode 0600) for reading and writing; FileExistsError if it is there."""
        ...

    def open_direct(self, fd: int, path: str) -> int:
        """A second descriptor of open_new's file, which has to be written by whole pages from
        page-aligned memory, past the page cache. NO_FD where the cache is better, or needed."""
        ...

    def close(self, fd: int) -> None:
        """Raises what the file system reports: on NFS a failed write may show only here."""
        ...

    def pread(self, fd: int, size_bytes: int, offset: int) -> bytes:
        """Up to `size_bytes`; shorter only at the end of the file."""
        ...

    def preadv(self, fd: int, buffer: Buffer, offset: int) -> int:
        """Fills `buffer`; returns the byte count, short only at the end of the file."""
        ...

    def forget_cached(self, fd: int) -> None:
        """A hint: the next read of the file is answered by the medium, not by memory."""
        ...

    def pwrite(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        """Writes all pieces, one after the other, at `offset`; returns the byte count."""
        ...

    def allocate(self, fd: int, size_bytes: int) -> None:
        """Makes an empty file that long, reading as zeros, with all of its room set aside."""
        ...

    def start_writeback(self, fd: int, offset: int, size_bytes: int) -> None:
        """A hint: begin to write this range out, so that the later fsync is short."""
        ...

    def fsync(self, fd: int) -> None:
        """Durable on return. A failure is final for this file: never call it again for it."""
        ...

    def fsync_dir(self, path: str) -> None:
        """Makes the names in directory `path` durable."""
        ...

    def link(self, source: str, target: str) -> None:
        """Second name for a file; FileExistsError if `target` is there. Never overwrites."""
        ...

    def unlink(self, path: str) -> None: ...
    def rename(self, source: str, target: str) -> None: ...
    def mkdir(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def listdir(self, path: str) -> list[str]:
        """Names in `path`, sorted, without the `.nfs…` names of files deleted while open."""
        ...

    def stat(self, path: str) -> FileStat: ...
    def room(self, path: str) -> Room: ...
    def mount_kind(self, path: str) -> MountKind:
        """What holds directory `path`. NotADirectoryError; PointUnsafeMount when it does not keep
        what the protocol rests on (storage.files.mounts)."""
        ...


NO_FD = -1
_IOV_MAX = 1024
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class OsFs:
    """The real file system. Each call can be seen from outside while it is under way."""

    @in_flight
    def open_read(self, path: str) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat_bits.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
        except BaseException:
            os.close(fd)
            raise
        return fd

    @in_flight
    def open_new(self, path: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags, 0o600)

    @in_flight
    def open_direct(self, fd: int, path: str) -> int:
        # On NFS, and its like, the cache turns many writes into few durable ones.
        verdict = check_mount(os.path.realpath(path), _mountinfo())
        if verdict.kind == "nfs" or verdict.problem:
            return NO_FD
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return NO_FD

    @in_flight
    def close(self, fd: int) -> None:
        os.close(fd)

    @in_flight
    def pread(self, fd: int, size_bytes: int, offset: int) -> bytes:
        first = os.pread(fd, size_bytes, offset)
        if len(first) == size_bytes or not first:
            return first
        pieces = [first]
        have = len(first)
        while have < size_bytes and (piece := os.pread(fd, size_bytes - have, offset + have)):
            pieces.append(piece)
            have += len(piece)
        return b"".join(pieces)

    @in_flight
    def preadv(self, fd: int, buffer: Buffer, offset: int) -> int:
        view = memoryview(buffer).cast("B")
        have = read_once(fd, view, offset)
        while have < len(view) and (count := os.preadv(fd, [view[have:]], offset + have)):
            have += count
        return have

    @in_flight
    def forget_cached(self, fd: int) -> None:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @in_flight
    def pwrite(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        done = 0
        for start in range(0, len(pieces), _IOV_MAX):
            rest = [memoryview(piece).cast("B") for piece in pieces[start : start + _IOV_MAX]]
            while rest:
                count = os.pwritev(fd, rest, offset + done)
                done += count
                rest = _after(rest, count)
        return done

    @in_flight
    def allocate(self, fd: int, size_bytes: int) -> None:
        os.posix_fallocate(fd, 0, size_bytes)

    @in_flight
    def set_aside(self, fd: int, offset: int, size_bytes: int) -> None:
        """Room for what will be written there. OSError when there is not so much; all else is no
        error: FUSE file systems say no in many ways, and what is broken shows at the write."""
        if _libc.fallocate(fd, 0, ctypes.c_int64(offset), ctypes.c_int64(size_bytes)):
            number = ctypes.get_errno()
            if number in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(number, os.strerror(number))

    @in_flight
    def start_writeback(self, fd: int, offset: int, size_bytes: int) -> None:
        # A hint only: file systems without it (NFS) answer an error, which changes nothing.
        _libc.sync_file_range(
            fd, ctypes.c_int64(offset), ctypes.c_int64(size_bytes), _SYNC_FILE_RANGE_WRITE
        )

    @in_flight
    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    @in_flight
    def fsync_dir(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @in_flight
    def link(self, source: str, target: str) -> None:
        os.link(source, target, follow_symlinks=False)

    @in_flight
    def unlink(self, path: str) -> None:
        os.unlink(path)

    @in_flight
    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    @in_flight
    def mkdir(self, path: str) -> None:
        os.mkdir(path, 0o700)

    @in_flight
    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    @in_flight
    def listdir(self, path: str) -> list[str]:
        return sorted(name for name in os.listdir(path) if not name.startswith(".nfs"))

    @in_flight
    def stat(self, path: str) -> FileStat:
        found = os.lstat(path)
        kind = "other"
        if stat_bits.S_ISREG(found.st_mode):
            kind = "file"
        elif stat_bits.S_ISDIR(found.st_mode):
            kind = "directory"
        return FileStat(kind, found.st_size, found.st_ino)

    @in_flight
    def room(self, path: str) -> Room:
        found = os.statvfs(path)
        return Room(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    @in_flight
    def mount_kind(self, path: str) -> MountKind:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "is no directory", path)
        return require_sound_mount(os.path.realpath(path), _mountinfo()).kind


def _mountinfo() -> str:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` once their first `count` bytes are written."""
    for position, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[position + 1 :]]
        count -= len(view)
    return []
