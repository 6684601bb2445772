"""A simulated file system behind storage.files.fs.Fs: it can lose power, and fail at any call.

`SimFs` is one machine's view of a tests.simdisk.Disk. `watch(call)` runs before each call that
changes something, durably or not: the crash sweep takes its crash images there. `fault` names one
call by its number and says how it fails. One thread at a time but for the lock around each call.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storage.files.fs import Buffer, FileStat, Room
from storage.files.mounts import MountKind
from tests.simdisk import Directory, Disk, File, Node

CAPACITY_BYTES = 64 << 20
CHANGING = frozenset(
    ["open_new", "pwrite", "allocate", "fsync", "fsync_dir", "link", "unlink", "rename"]
)
CHANGING |= {"mkdir", "rmdir"}
# How a call may fail: with an error before it does anything, or after it did all ("lost reply"),
# or, a write, half of it. `exists` is the answer to a repeated request whose first reply was lost.
FAULTS: dict[str, tuple[str, ...]] = {
    "open_read": ("EIO",),
    "pread": ("EIO",),
    "preadv": ("EIO",),
    "listdir": ("EIO",),
    "stat": ("EIO",),
    "room": ("EIO",),
    "close": ("EIO", "ENOSPC"),
    "open_new": ("EIO", "ENOSPC", "EDQUOT", "lost", "exists"),
    "pwrite": ("EIO", "ENOSPC", "EDQUOT", "short"),
    "allocate": ("EIO", "ENOSPC"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "fsync_dir": ("EIO", "ENOSPC"),
    "link": ("EIO", "ENOSPC", "EDQUOT", "lost", "exists"),
    "unlink": ("EIO", "lost"),
    "rename": ("EIO", "ENOSPC", "lost"),
    "mkdir": ("EIO", "ENOSPC", "EDQUOT", "lost", "exists"),
    "rmdir": ("EIO", "lost"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """The call number `at` fails with `kind`; with `lasting` every later one of its name too."""

    at: int
    kind: str
    lasting: bool = False


class Open:
    __slots__ = ("file", "own", "path")

    def __init__(self, file: File, path: str, *, own: bool) -> None:
        self.file = file
        self.path = path
        self.own = own


class SimFs:
    """See the module. `/` exists, nothing else."""

    def __init__(self, disk: Disk | None = None) -> None:
        self.disk = disk or Disk()
        self.capacity_bytes = CAPACITY_BYTES
        self.watch: Callable[[str, str], None] = lambda _call, _path: None
        self.fault: Fault | None = None
        self.faults_met = 0
        self.calls: list[str] = []
        self._lock = threading.RLock()
        self._open: dict[int, Open] = {}
        self._next_fd = 1000

    # Paths.

    def resolve(self, path: str) -> Node:
        node: Node = self.disk.root
        for name in path.split("/")[1:]:
            if not name:
                continue
            if not isinstance(node, Directory):
                raise _error(errno.ENOTDIR, path)
            found = self.lookup(node, name)
            if found is None:
                raise _error(errno.ENOENT, path)
            node = found
        return node

    def lookup(self, directory: Directory, name: str) -> Node | None:
        return directory.names.get(name)

    def directory(self, path: str) -> Directory:
        node = self.resolve(path)
        if not isinstance(node, Directory):
            raise _error(errno.ENOTDIR, path)
        return node

    def parent(self, path: str) -> tuple[Directory, str]:
        head, _, name = path.rpartition("/")
        return self.directory(head or "/"), name

    def creating(self, parent: Directory, name: str) -> None:
        """Before a name is made, which the disk decides, whatever is remembered of it."""

    def named(self, parent: Directory, name: str, node: Node | None) -> None:
        """Every change of a name goes through here."""
        parent.name(name, node)

    # Faults.

    def enter(self, call: str, path: str) -> str:
        """Notes the call. Raises what it fails with at once; returns how it is to fail later."""
        if call in CHANGING:
            self.watch(call, path)
        self.calls.append(call)
        fault = self.fault
        if fault is None:
            return ""
        at = len(self.calls) - 1
        again = fault.lasting and at > fault.at and call == self.calls[fault.at]
        if at != fault.at and not again:
            return ""
        self.faults_met += 1
        if fault.kind in ("lost", "short", "exists") or call in ("fsync", "fsync_dir", "close"):
            return fault.kind
        raise _error(getattr(errno, fault.kind), path)

    @staticmethod
    def leave(failing: str, path: str) -> None:
        """The call was carried out, but says otherwise."""
        if failing == "lost":
            raise _error(errno.EIO, path)
        if failing == "exists":
            raise _error(errno.EEXIST, path)
        if failing:
            raise _error(getattr(errno, failing), path)

    # Files.

    def open_read(self, path: str) -> int:
        with self._lock:
            self.enter("open_read", path)
            node = self.opening(path)
            if not isinstance(node, File):
                raise OSError(errno.EINVAL, "not a regular file", path)
            return self._opened(node, path, own=False)

    def opening(self, path: str) -> Node:
        return self.resolve(path)

    def open_new(self, path: str) -> int:
        with self._lock:
            failing = self.enter("open_new", path)
            parent, name = self.parent(path)
            self.creating(parent, name)
            if name in parent.names:
                raise _error(errno.EEXIST, path)
            file = self.disk.new_file()
            file.links = 1
            self.named(parent, name, file)
            self.leave(failing, path)
            return self._opened(file, path, own=True)

    def _opened(self, file: File, path: str, *, own: bool) -> int:
        self._next_fd += 1
        self._open[self._next_fd] = Open(file, path, own=own)
        return self._next_fd

    def _of(self, fd: int) -> Open:
        found = self._open.get(fd)
        if found is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return found

    def open_direct(self, fd: int, path: str) -> int:
        """Its writes are as durable as any others: O_DIRECT promises nothing."""
        with self._lock:
            return self._opened(self._of(fd).file, path, own=False)

    def close(self, fd: int) -> None:
        with self._lock:
            opened = self._of(fd)
            failing = self.enter("close", opened.path)
            del self._open[fd]
            if opened.own:  # what was only read has nothing to fail with
                if failing:
                    opened.file.fail_sync()
                self.closed(opened.file)
                self.leave(failing, opened.path)

    def closed(self, file: File) -> None:
        """A file that this machine made and wrote is closed."""

    def content(self, opened: Open) -> bytes:
        return opened.file.content

    def pread(self, fd: int, size_bytes: int, offset: int) -> bytes:
        with self._lock:
            opened = self._of(fd)
            self.enter("pread", opened.path)
            return self.content(opened)[offset : offset + size_bytes]

    def preadv(self, fd: int, buffer: Buffer, offset: int) -> int:
        view = memoryview(buffer).cast("B")
        with self._lock:
            opened = self._of(fd)
            self.enter("preadv", opened.path)
            found = self.content(opened)[offset : offset + len(view)]
        view[: len(found)] = found
        return len(found)

    def forget_cached(self, fd: int) -> None:
        self._of(fd)  # there is no cache

    def pwrite(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        body = b"".join(bytes(piece) for piece in pieces)
        with self._lock:
            opened = self._of(fd)
            failing = self.enter("pwrite", opened.path)
            if failing:
                body = body[: len(body) // 2]
            if body:
                opened.file.write(offset, body)
            if failing:
                raise _error(errno.ENOSPC, opened.path)
            return len(body)

    def allocate(self, fd: int, size_bytes: int) -> None:
        with self._lock:
            opened = self._of(fd)
            self.enter("allocate", opened.path)
            opened.file.allocated = size_bytes

    def start_writeback(self, fd: int, offset: int, size_bytes: int) -> None:  # noqa: ARG002
        with self._lock:
            self._of(fd)

    def fsync(self, fd: int) -> None:
        with self._lock:
            opened = self._of(fd)
            failing = self.enter("fsync", opened.path)
            if failing:
                opened.file.fail_sync()
            else:
                opened.file.sync()
            self.leave(failing, opened.path)

    # Names.

    def fsync_dir(self, path: str) -> None:
        with self._lock:
            failing = self.enter("fsync_dir", path)
            directory = self.directory(path)
            if failing:
                directory.fail_sync()
            else:
                directory.sync()
            self.leave(failing, path)

    def link(self, source: str, target: str) -> None:
        with self._lock:
            failing = self.enter("link", target)
            file = self.resolve(source)
            parent, name = self.parent(target)
            if not isinstance(file, File):
                raise _error(errno.EPERM, source)
            self.creating(parent, name)
            if name in parent.names:
                raise _error(errno.EEXIST, target)
            file.links += 1
            self.named(parent, name, file)
            self.leave(failing, target)

    def unlink(self, path: str) -> None:
        with self._lock:
            failing = self.enter("unlink", path)
            parent, name = self.parent(path)
            node = parent.names.get(name)
            if node is None:
                raise _error(errno.ENOENT, path)
            if not isinstance(node, File):
                raise _error(errno.EISDIR, path)
            node.links -= 1
            self.unlinked(node)
            self.named(parent, name, None)
            self.leave(failing, path)

    def unlinked(self, file: File) -> None:
        """This machine took a name of the file away."""

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            failing = self.enter("rename", target)
            node = self.resolve(source)
            old_parent, old_name = self.parent(source)
            parent, name = self.parent(target)
            there = parent.names.get(name)
            if there is node:
                return
            if isinstance(there, File):
                there.links -= 1
                self.unlinked(there)
            self.named(parent, name, node)
            self.named(old_parent, old_name, None)
            self.leave(failing, target)

    def mkdir(self, path: str) -> None:
        with self._lock:
            failing = self.enter("mkdir", path)
            parent, name = self.parent(path)
            self.creating(parent, name)
            if name in parent.names:
                raise _error(errno.EEXIST, path)
            self.named(parent, name, self.disk.new_directory())
            self.leave(failing, path)

    def rmdir(self, path: str) -> None:
        with self._lock:
            failing = self.enter("rmdir", path)
            parent, name = self.parent(path)
            node = self.directory(path)
            if node.names:
                raise _error(errno.ENOTEMPTY, path)
            node.removed = True
            self.named(parent, name, None)
            self.leave(failing, path)

    def listdir(self, path: str) -> list[str]:
        with self._lock:
            self.enter("listdir", path)
            names = self.names_of(self.directory(path))
            return sorted(name for name in names if not name.startswith(".nfs"))

    def names_of(self, directory: Directory) -> list[str]:
        return list(directory.names)

    def stat(self, path: str) -> FileStat:
        with self._lock:
            self.enter("stat", path)
            node = self.resolve(path)
            if isinstance(node, File):
                return FileStat("file", node.size_bytes, node.ino)
            return FileStat("directory", 4096, node.ino)

    def room(self, path: str) -> Room:
        with self._lock:
            self.enter("room", path)
            self.directory(path)
            return Room(self.capacity_bytes, self.capacity_bytes // 2)

    def mount_kind(self, path: str) -> MountKind:
        with self._lock:
            self.directory(path)
            return "nfs"


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)
