"""A file that grows at its end: how the large files of a point are written.

Its bytes are gathered and written with O_DIRECT, a few MiB at a time, where the file system has
that (Fs.open_direct). Nobody reads a pack soon after it was written, so a copy of it in the page
cache is of no use, takes memory from the host's guests, and makes a long fsync; on a machine that
has to fetch each page first it was a fifth of a backup's processor time. The rest at the end, and
all of it elsewhere, goes through the cache, and writeback begins early.

One thread at a time. Plain OSErrors come through; after one the only call allowed is abandon().
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from storage.files.fs import NO_FD, Buffer, Fs
from storage.files.memory import large_buffer
from storage.files.publish import close_discarded, discard

STAGE_BYTES = 4 << 20


class GrowingFile:
    """A new file `path`. It is the caller's from finish() on, and gone after abandon()."""

    def __init__(self, fs: Fs, path: str, *, large: bool = False) -> None:
        """`large`: it will have many times STAGE_BYTES."""
        self._fs = fs
        self._path = path
        self._size_bytes = 0
        self._written_bytes = 0  # with a stage; all that is behind lies in it
        self._sent_bytes = 0
        self._open = True
        self._direct_fd = NO_FD
        self._fd = fs.open_new(path)
        self._stage: memoryview | None = None
        if large:
            self._make_stage()

    def _make_stage(self) -> None:
        try:
            self._direct_fd = self._fs.open_direct(self._fd, self._path)
            if self._direct_fd != NO_FD:
                self._stage = large_buffer(STAGE_BYTES)
        except BaseException:
            self.abandon()
            raise

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def append(self, pieces: Sequence[Buffer]) -> int:
        """Puts the pieces at the end; returns the offset of the first. Their buffers are free."""
        offset = self._size_bytes
        if self._stage is None:
            self._size_bytes += self._fs.pwrite(self._fd, pieces, offset)
            self._start_writeback()
        else:
            for piece in pieces:
                self._gather(self._stage, memoryview(piece))
        return offset

    def _gather(self, stage: memoryview, piece: memoryview) -> None:
        while piece:
            at = self._size_bytes - self._written_bytes
            part = piece[: STAGE_BYTES - at]
            stage[at : at + len(part)] = part
            self._size_bytes += len(part)
            piece = piece[len(part) :]
            if at + len(part) == STAGE_BYTES:
                self._write_stage(stage)

    def _write_stage(self, stage: memoryview) -> None:
        try:
            self._fs.pwrite(self._direct_fd, [stage], self._written_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A device with blocks larger than a page, or the rest of a write that was cut short.
            self._fs.pwrite(self._fd, [stage], self._written_bytes)
        self._written_bytes = self._size_bytes

    def _start_writeback(self) -> None:
        unsent_bytes = self._size_bytes - self._sent_bytes
        if unsent_bytes >= STAGE_BYTES:
            self._fs.start_writeback(self._fd, self._sent_bytes, unsent_bytes)
            self._sent_bytes = self._size_bytes

    def finish(self) -> int:
        """Writes what is left; returns the descriptor, which the caller closes. Not durable."""
        if self._stage is not None:
            rest = self._stage[: self._size_bytes - self._written_bytes]
            self._fs.pwrite(self._fd, [rest], self._written_bytes)
            self._stop_direct()
        self._open = False
        return self._fd

    def abandon(self) -> None:
        """Closes and deletes the file. Nothing to do after finish(), or a second time."""
        if self._open:
            self._open = False
            self._stop_direct()
            close_discarded(self._fs, self._fd)
            discard(self._fs, self._path)

    def _stop_direct(self) -> None:
        """All that was written there has been reported already."""
        self._stage = None
        fd, self._direct_fd = self._direct_fd, NO_FD
        if fd != NO_FD:
            close_discarded(self._fs, fd)
