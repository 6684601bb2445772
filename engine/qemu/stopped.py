"""A stopped VM's qcow2 volume as a source: what qemu-nbd shows of it, flattened.

Nobody is locked out. qemu-nbd shares the image with everybody (force-share), so that somebody may
start the VM at any time, and wins: the first write of QEMU to any file of the chain changes its
times, and the backup ends with `volume_changed`, as for a raw volume that is read directly. What
was read before is consistent, since until then nobody wrote. That must hold from the beginning: a
running QEMU keeps metadata in its memory, so an image that somebody has open for writing (QEMU's
locks tell) is refused.

Changes are known by a bitmap in the image. The one for the next backup is added before the marks
are taken, so it records too much rather than too little. Where libvirt has the VM the bitmaps have
its checkpoints' names (engine/libvirt/resting.py), so that backups of the running and of the
stopped domain build on each other. An image that stands on another one is read in full: a bitmap
knows nothing of writes to what is below. At the end the bitmaps that no backup will build on any
more are removed, after a failure the new one. All of that is best effort: what remains is removed
by a later backup, and a bitmap that is missing costs a full read. Adding and removing locks the
image, for some milliseconds each; a start just then has to be repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import (
    Conflict,
    DiskServerBroken,
    DiskServerLost,
    DiskServerRefused,
    EngineError,
)
from engine.nbd.source import CONNECTIONS, NbdSource
from engine.qemu.bitmaps import add_bitmap, bitmaps_of, remove_bitmap
from engine.qemu.header import chain_below, read_header
from engine.qemu.process import QemuNbd, image_options
from engine.snapshot.sources import (
    DiskFile,
    FoundBy,
    Mark,
    mark_of,
    open_volume,
    pool_errors,
    require_named,
    settled_mark,
    was_changed,
)

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 120.0
_QEMU_WRITES_BYTE = 101  # where QEMU locks a file that it may write to
_F_OFD_GETLK = 36
_FLOCK = struct.Struct("hhxxxxqqixxxx")


@dataclass(frozen=True, slots=True)
class _Member:
    """A file of the chain, held open."""

    path: str
    fd: int
    mark: Mark


class Qcow2Source:
    """A DiskSource over a stopped qcow2 volume.

    `recording`: whether the image has the bitmap for the next backup. `untracked`: why what changed
    since the parent backup is not known; "" if it is, or if there is no parent.
    """

    guarded = True  # others might write to it

    def __init__(self, disk: DiskFile) -> None:
        """Raises Conflict (volume_in_use, volume_changed), PoolUnreachable, DiskServer… errors."""
        self._disk = disk
        self._committed = False
        self.recording = False
        self.untracked = disk.bitmaps.why
        with contextlib.ExitStack() as undo:
            self._members = self._open_chain(undo)
            parent_bitmap = self._believable_bitmap()
            self._server = undo.enter_context(self._serve(parent_bitmap))
            self._nbd = self._server.connected(
                lambda: NbdSource.open(
                    self._server.address,
                    bitmap=parent_bitmap,
                    timeout_s=ANSWER_TIMEOUT_S,
                    place=disk.path,
                )
            )
            undo.callback(self._nbd.close)
            self.check_unchanged()
            self._undo = undo.pop_all()

    @property
    def capacity(self) -> int:
        return self._nbd.capacity

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        return self._nbd.data_ranges()

    @property
    def found_by(self) -> FoundBy:
        return self._nbd.found_by

    def changed_ranges(self) -> Iterator[tuple[int, int]] | None:
        return self._nbd.changed_ranges()

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Raises Conflict("volume_changed"), PoolUnreachable, DiskServer… errors."""
        try:
            count = self._nbd.read_into(buffer, offset)
        except (DiskServerLost, DiskServerRefused, DiskServerBroken):
            self._check_open_files()  # which may be the reason
            raise
        self._check_open_files()
        return count

    def prefetch(self, offset: int, size_bytes: int) -> None:
        self._nbd.prefetch(offset, size_bytes)

    def check_unchanged(self) -> None:
        """Raises Conflict("volume_changed") if anybody wrote to or replaced a file of the chain."""
        for member in self._members:
            require_named(member.path, member.mark)
        self._check_open_files()

    def committed(self) -> None:
        """The backup is on its point: the next one may build on it."""
        self._committed = True

    def close(self) -> None:
        self._undo.close()

    def _open_chain(self, undo: contextlib.ExitStack) -> list[_Member]:
        """The volume, then what it stands on; a new bitmap is in the volume if that can be."""
        path = self._disk.path
        fd = self._opened(path, undo)
        header = read_header(fd, path)
        below = chain_below(path, header, self._disk.backing_roots)
        fds = [(path, fd), *((one, self._opened(one, undo)) for one in below)]
        for name, one in fds:
            _require_unused(name, one)
        if not below and header.version > 2 and self._is_planned_for(fd):
            self._add_bitmap(undo)
        with pool_errors(path):
            return [_Member(name, one, settled_mark(one)) for name, one in fds]

    def _opened(self, path: str, undo: contextlib.ExitStack) -> int:
        with pool_errors(path):
            fd = open_volume(path)
        undo.callback(os.close, fd)
        return fd

    def _add_bitmap(self, undo: contextlib.ExitStack) -> None:
        name = self._disk.bitmaps.new
        if not name:
            return
        try:
            add_bitmap(self._disk.path, name)
        except EngineError as error:
            log.info("bitmap_not_added", extra={"volume": self._disk.path, "why": str(error)})
            return
        self.recording = True
        undo.callback(self._settle_bitmaps)

    def _is_planned_for(self, fd: int) -> bool:
        """Whether the bitmaps' plan is about this very file."""
        medium = self._disk.bitmaps.medium
        if medium is None:
            return True
        with pool_errors(self._disk.path):
            found = os.fstat(fd)
        return medium == (found.st_dev, found.st_ino)

    def _believable_bitmap(self) -> str:
        """The parent's bitmap if it is there and whole, else ""."""
        wanted = self._disk.bitmaps.parent
        if not wanted:
            return ""
        self.untracked = self._why_not(wanted)
        return "" if self.untracked else wanted

    def _why_not(self, bitmap: str) -> str:
        if len(self._members) > 1:
            return "it stands on another image"
        if not self._is_planned_for(self._members[0].fd):
            return "its medium is another one"
        found = bitmaps_of(self._disk.path)
        if bitmap not in found:
            return "the parent's bitmap is gone"
        return "" if found[bitmap] else "the parent's bitmap is incomplete: was QEMU killed?"

    def _serve(self, bitmap: str) -> QemuNbd:
        # By descriptor where that can be: the name may mean another file by now. What a name in the
        # image is relative to is the image's directory, so that needs the path.
        alone = len(self._members) == 1
        fd = self._members[0].fd
        place = f"/proc/self/fd/{fd}" if alone else self._disk.path
        options = ["--read-only", f"--shared={CONNECTIONS}"]
        options += ["--bitmap", bitmap] if bitmap else []
        image = image_options("qcow2", place, "force-share=on")
        return QemuNbd(self._disk.path, [*options, "--image-opts", image], [fd] if alone else [])

    def _check_open_files(self) -> None:
        for member in self._members:
            with pool_errors(member.path):
                now = mark_of(os.fstat(member.fd))
            if now != member.mark:
                raise was_changed(member.path, "somebody wrote to it. Was the VM started?")

    def _settle_bitmaps(self) -> None:
        """Removes our bitmaps that no backup will build on any more. Never fails."""
        try:
            for name in filter(self._is_stale, bitmaps_of(self._disk.path)):
                remove_bitmap(self._disk.path, name)
        except EngineError as error:
            log.info("bitmaps_kept", extra={"volume": self._disk.path, "why": str(error)})

    def _is_stale(self, bitmap: str) -> bool:
        plan = self._disk.bitmaps
        if not self._committed:
            return bitmap == plan.new
        return bitmap.startswith(plan.ours) and bitmap not in {*plan.keep, plan.new}


def _require_unused(path: str, fd: int) -> None:
    """Raises Conflict("volume_in_use") if a QEMU has the file open for writing."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _QEMU_WRITES_BYTE, 1, 0)
    with pool_errors(path):
        kind = _FLOCK.unpack(fcntl.fcntl(fd, _F_OFD_GETLK, asked))[0]
    if kind != fcntl.F_UNLCK:
        raise Conflict(
            "volume_in_use",
            f"{path} is open for writing. Stop the VM, or let libvirt back it up as it runs",
        )
