"""A thread's memory between decoding chunks and writing them to a new volume.

Chunks are decoded straight into it, one behind the other, and those that are neighbours on the disk
as well are written with one call.
"""

from __future__ import annotations

from engine.restore.new_volume import VolumeWriter
from storage.files.fs import Buffer
from storage.files.memory import large_buffer

STAGE_BYTES = 4 << 20  # longer writes gain nothing


class Stage:
    """One thread's, for one volume."""

    def __init__(self, volume: VolumeWriter, chunk_size: int) -> None:
        self._volume = volume
        self._chunk_size = chunk_size
        self._memory = large_buffer(max(STAGE_BYTES, chunk_size))
        self._start = self._end = 0  # what waits to be written
        self._offset = 0  # where it goes on the disk
        self._room = self._memory[:0]

    def room(self, size_bytes: int) -> memoryview:
        """Where the next content of at most a chunk may be made, or put."""
        if self._end + size_bytes > len(self._memory):
            self.flush()
            self._start = self._end = 0
        self._room = self._memory[self._end : self._end + size_bytes]
        return self._room

    def put(self, content: Buffer, offset: int) -> None:
        """Writes `content`, which may be what `room` gave last, to the disk: now or later."""
        if content is not self._room:
            self.room(len(content))[:] = content
        self._room = self._memory[:0]  # what lies there is not to be taken for the next content
        if offset != self._offset + self._end - self._start:
            self.flush()
        if self._start == self._end:
            self._offset = offset
        self._end += len(content)
        if len(content) < self._chunk_size:
            # The disk's end. What follows must begin at a page again, and at a multiple of its own
            # length: a copy then lies where what it is made of does, or beside it, never across.
            self.flush()
            self._start = self._end = 0

    def flush(self) -> None:
        """Writes all that waits."""
        if self._end > self._start:
            self._volume.write(self._memory[self._start : self._end], self._offset)
        self._start = self._end
