"""A volume in the making: a hidden file in its pool that gets its name when it is durable.

It keeps its hidden name, too, until its VM has been noted as restored. So after a kill a volume is
the restore's if a hidden name is the same file, which nobody else's is (`unname_left`).

Written with O_DIRECT where the file system has it. A restore writes each byte once and reads none
again, so the page cache would only cost: a copy of everything, memory that the host's guests could
use, and a long fsync at the end. On a machine that has to fetch each page first (a fresh one, or
one whose hypervisor takes free pages back) that copy was most of a restore's time.

NFS keeps the page cache, which turns many writes into few durable ones; so does what says no to
O_DIRECT. There the file system orders the writes to a file by spinning, so a lock does it instead:
the threads that wait leave their cores to those that decompress. Writeback begins early.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from engine.errors import Conflict
from engine.snapshot.snapshot import RESTORES
from engine.snapshot.sources import pool_errors
from storage.files.fs import NO_FD, OsFs
from storage.files.in_flight import InFlight

_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_NAME_TRIES = 100
# At least every device's block, and a page, which is what memory has to be aligned to.
DIRECT_BYTES = 4096


class VolumeWriter(Protocol):
    """What a restore writes a disk into. A context manager; its end leaves what has a name.

    `write` may be called by any thread, the others by one, in this order: `set_aside`, `resize`,
    writes, `make_durable`, `name`, `unname`. What is not written reads as zeros.
    """

    def set_aside(self, offset: int, size_bytes: int) -> None:
        """Room for what will be written there, if that is of use; PoolFull when there is none."""
        ...

    def allocated_bytes(self) -> int:
        """The room that it has by now."""
        ...

    def resize(self, size_bytes: int) -> None: ...
    def write(self, content: memoryview, offset: int) -> None:
        """`content` begins at a page, `offset` is a multiple of DIRECT_BYTES."""
        ...

    def make_durable(self) -> None: ...
    def name(self) -> None: ...
    def unname(self) -> None: ...
    def __enter__(self) -> VolumeWriter: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class NewVolume:
    """A raw volume. A context manager: its end removes the hidden name.

    `write` may be called by any thread, the others by one. The file stays locked (flock) as long as
    it is open, which keeps `clear_leftovers` off.
    """

    def __init__(self, path_final: str) -> None:
        """Raises Conflict("name_taken") when `path_final` is there, PoolFull, PoolUnreachable."""
        self._path_final = path_final
        self._pool, self._name = os.path.split(path_final)
        self._fs = OsFs()
        self._writing = threading.Lock()
        self._direct_fd = NO_FD
        with self._errors():
            if os.path.lexists(path_final):
                raise self._taken()
            self._path, self._fd = _hidden_file(f"{self._pool}/{RESTORES}")
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._direct_fd = self._fs.open_direct(self._fd, self._path)
            except BaseException:
                self.close()
                raise

    @property
    def fd(self) -> int:
        """The hidden file, open for reading and writing until the end."""
        return self._fd

    def __enter__(self) -> NewVolume:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets the hidden file go; what has its name by now stays."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(self._path))
        self._stop_direct()
        # The data was made durable, or is not wanted: an error here means nothing.
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def set_aside(self, offset: int, size_bytes: int) -> None:
        """Before the first write, as the file system waits here for all that are under way.

        ext4 lets one thread at a time write into a hole past the cache, for as long as the device
        takes, but any number where blocks are set aside. And what has no room fails at once, not
        after hours.
        """
        if self._direct_fd != NO_FD:
            with self._errors():
                self._fs.set_aside(self._fd, offset, size_bytes)

    def allocated_bytes(self) -> int:
        with self._errors():
            return os.fstat(self._fd).st_blocks * 512

    def resize(self, size_bytes: int) -> None:
        with self._errors():
            os.ftruncate(self._fd, size_bytes)

    def write(self, content: memoryview, offset: int) -> None:
        """Whole pages go past the cache, what is left of the disk's last one through it."""
        direct_bytes = 0 if self._direct_fd == NO_FD else len(content) & -DIRECT_BYTES
        with self._errors():
            if direct_bytes:
                self._write_direct(content[:direct_bytes], offset)
            if direct_bytes < len(content):
                self._write_cached(content[direct_bytes:], offset + direct_bytes)

    def _write_cached(self, content: memoryview, offset: int) -> None:
        with self._writing:
            self._fs.pwrite(self._fd, [content], offset)
        # So that the last fsync is short, and the host never has much to write at once.
        self._fs.start_writeback(self._fd, offset, len(content))

    def _write_direct(self, content: memoryview, offset: int) -> None:
        try:
            self._fs.pwrite(self._direct_fd, [content], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A device with larger blocks, or the rest of a write that was cut short.
            self._write_cached(content, offset)

    def make_durable(self) -> None:
        """The file, and its hidden name."""
        with self._errors():
            os.fsync(self._fd)
            self._fs.fsync_dir(os.path.dirname(self._path))

    def name(self) -> None:
        """Gives the volume its name, durably; Conflict("name_taken") if somebody was first."""
        with self._errors():
            try:
                os.link(self._path, self._path_final, follow_symlinks=False)
            except FileExistsError:
                raise self._taken() from None
            self._fs.fsync_dir(self._pool)

    def unname(self) -> None:
        """Takes the name back, if it is still this file's."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(self._path_final), os.fstat(self._fd)):
                os.unlink(self._path_final)
                self._fs.fsync_dir(self._pool)

    def _stop_direct(self) -> None:
        fd, self._direct_fd = self._direct_fd, NO_FD
        if fd != NO_FD:
            with contextlib.suppress(OSError):
                os.close(fd)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        with pool_errors(self._path_final), InFlight(self._path_final):
            yield

    def _taken(self) -> Conflict:
        return Conflict("name_taken", f"there is a volume {self._name!r} in {self._pool} already")


def unname_left(path_final: str) -> bool:
    """Takes a name back that a restore which was killed has given; False, and nothing is done, when
    the file is not such a one, or is not there. PoolFull, PoolUnreachable."""
    pool = os.path.dirname(path_final)
    with pool_errors(path_final):
        if not _is_left(path_final, f"{pool}/{RESTORES}"):
            return False
        os.unlink(path_final)
        OsFs().fsync_dir(pool)
        return True


def _is_left(path: str, directory: str) -> bool:
    """Whether the file at `path` has a name in `directory`, too, and nobody works on it."""
    if os.path.islink(directory):
        return False
    with contextlib.suppress(FileNotFoundError), contextlib.closing(os.scandir(directory)) as names:
        found = os.lstat(path)
        for entry in names:
            if os.path.samestat(found, entry.stat(follow_symlinks=False)):
                return stat.S_ISREG(found.st_mode) and not _is_locked(entry.path)
    return False


def _is_locked(path: str) -> bool:
    # NFS locks for writers only what is open for writing.
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _hidden_file(directory: str) -> tuple[str, int]:
    """(path, descriptor) of a new file in `directory`, which is made if it is not there."""
    path = f"{directory}/{secrets.token_hex(8)}"
    for attempt in range(_NAME_TRIES):
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        try:
            return path, os.open(path, _NEW_FILE, 0o600)
        except FileNotFoundError:  # another restore, just done, removed the empty directory
            if attempt == _NAME_TRIES - 1:
                raise
        except OSError:
            with contextlib.suppress(OSError):
                os.rmdir(directory)
            raise
    raise AssertionError("not reached")
