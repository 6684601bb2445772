"""A restore's target that is a qcow2 image: sparse, complete and durable before it has its name.

The hidden file, its lock and its naming are NewVolume's; a qemu-nbd of ours fills it, and ends by
writing the last of the image's tables. QEMU does not lock the file: it has no name, and on NFS our
own lock would be in the way.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from types import TracebackType

from engine.errors import DiskServerLost, DiskServerRefused, PoolFull
from engine.nbd.client import NbdClient
from engine.qemu.empty import empty_qcow2
from engine.qemu.process import QemuNbd, image_options
from engine.restore.new_volume import NewVolume
from engine.snapshot.sources import pool_errors

# How NBD and QEMU's last words put it.
_NO_ROOM = ("ENOSPC", os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
ANSWER_TIMEOUT_S = 300.0  # a flush of all that the page cache holds


class NewQcow2:
    """A VolumeWriter. Owns `volume`. Raises, beside what that does, the DiskServer… errors."""

    def __init__(self, volume: NewVolume, path_final: str) -> None:
        self._volume = volume
        self._path_final = path_final
        self._server: QemuNbd | None = None
        self._client: NbdClient | None = None

    def __enter__(self) -> NewQcow2:
        self._volume.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._stop()
        finally:
            self._volume.__exit__(kind, error, trace)

    def set_aside(self, offset: int, size_bytes: int) -> None:
        """Nothing: where in the image a cluster lies is known only when it is written."""

    def allocated_bytes(self) -> int:
        return self._volume.allocated_bytes()

    def resize(self, size_bytes: int) -> None:
        """Makes the empty image, and opens it. Once, before anything is written."""
        with pool_errors(self._path_final):
            os.pwrite(self._volume.fd, empty_qcow2(self._path_final, size_bytes), 0)
        place = f"/proc/self/fd/{self._volume.fd}"
        image = image_options("qcow2", place, "file.locking=off", "discard=unmap")
        options = ["--cache=writeback", "--discard=unmap", "--image-opts", image]
        self._server = server = QemuNbd(self._path_final, options, [self._volume.fd])
        self._client = server.connected(
            lambda: NbdClient.connect(
                server.address, "", timeout_s=ANSWER_TIMEOUT_S, place=self._path_final
            )
        )

    def write(self, content: memoryview, offset: int) -> None:
        assert self._client is not None
        with self._room_errors():
            self._client.write(offset, content)

    def make_durable(self) -> None:
        if self._client is not None and self._server is not None:
            with self._room_errors():
                self._client.flush()
                self._client.close()
                self._server.wait()
        self._volume.make_durable()

    def name(self) -> None:
        self._volume.name()

    def unname(self) -> None:
        self._volume.unname()

    @contextlib.contextmanager
    def _room_errors(self) -> Iterator[None]:
        try:
            yield
        except DiskServerRefused as error:
            if any(sign in str(error) for sign in _NO_ROOM):
                raise PoolFull(str(error)) from error
            raise

    def _stop(self) -> None:
        if self._client is not None:
            with contextlib.suppress(DiskServerLost):
                self._client.close()
        if self._server is not None:
            self._server.close()
