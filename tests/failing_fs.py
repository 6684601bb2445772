"""The real file system, with one call that fails, and a record of the calls."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from storage.files.fs import Buffer, OsFs


class FailingFs(OsFs):
    """Notes each durable step by name; `fail` maps a step's name to the errno that it raises.

    With `after` the step is carried out first, as when a server's reply is lost.
    """

    def __init__(self, fail: dict[str, int] | None = None, after: bool = False) -> None:
        self.calls: list[str] = []
        self.fail = fail or {}
        self.after = after

    def open_new(self, path: str) -> int:
        self._note("open_new")
        return super().open_new(path)

    def pwrite(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        self._note("pwrite")
        return super().pwrite(fd, pieces, offset)

    def start_writeback(self, fd: int, offset: int, size_bytes: int) -> None:
        self.calls.append(f"start_writeback {offset} {size_bytes}")
        super().start_writeback(fd, offset, size_bytes)

    def fsync(self, fd: int) -> None:
        self._note("fsync")
        super().fsync(fd)

    def close(self, fd: int) -> None:
        # Linux frees the descriptor whatever close reports.
        super().close(fd)
        self._note("close")

    def link(self, source: str, target: str) -> None:
        if self.after:
            super().link(source, target)
        self._note("link")
        if not self.after:
            super().link(source, target)

    def fsync_dir(self, path: str) -> None:
        self._note("fsync_dir")
        super().fsync_dir(path)

    def unlink(self, path: str) -> None:
        self._note("unlink")
        super().unlink(path)

    def mkdir(self, path: str) -> None:
        self._note("mkdir")
        super().mkdir(path)

    def _note(self, step: str) -> None:
        self.calls.append(step)
        if step in self.fail:
            raise OSError(self.fail[step], os.strerror(self.fail[step]))


class HookFs(OsFs):
    """Calls `hook`, once, when a file below `root` is opened."""

    root = "/nowhere"
    hook: Callable[[], None] | None = None

    def open_read(self, path: str) -> int:
        if self.hook and path.startswith(self.root):
            hook, self.hook = self.hook, None
            hook()
        return super().open_read(path)


def open_below(directory: str | Path) -> list[str]:
    """The files below a directory that this process has open; those of other tests, closed
    whenever the collector comes by, are none of the caller's business."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(path for path in found if path.startswith(f"{directory}/"))


def is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError as error:
        return error.errno == errno.EBADF
    return False
