"""Sorted runs: more small items than memory may take, brought into the order of their chunk ids.

Who has them sorts as many as it likes at a time and adds each part as a run; `ranges` then reads
all runs of several kinds side by side, a range of ids after the other. What is in memory does not
depend on which ids there are: guests choose contents, and so how half of an id's bytes are spread.

Runs lie in a file without a name, but for the newest, so few items make no file at all. One thread
at a time. Plain OSErrors come through; the callers translate.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import BinaryIO

from storage.errors import Damaged
from storage.format.chunks import CHUNK_ID_BYTES

IDS_AT_ONCE = 1 << 20  # about 130 MB as a set


class Runs:
    """Items of one kind and size, each of which begins with a chunk id. `directory`: where the file
    is made when one is needed."""

    def __init__(self, item_bytes: int, directory: str) -> None:
        self.item_bytes = item_bytes
        self._directory = directory
        self._file: BinaryIO | None = None
        self._ends: list[int] = []
        self._newest = b""

    def add(self, items: bytes) -> None:
        """One more run: items whose ids ascend, none twice."""
        if not items:
            return
        if self._newest:
            self._put_away()
        self._newest = items

    def _put_away(self) -> None:
        if self._file is None:
            # Nobody can meet it: it has no name.  close() is its owner's.
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
        rest = memoryview(self._newest)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._ends.append(self._file.tell())

    def opened(self) -> list[_Run]:
        """All runs from their start, oldest first. Valid until the next add()."""
        size = self.item_bytes
        runs = [_Run(size, self._file, start, end) for start, end in pairwise([0, *self._ends])]
        if self._newest:
            runs.append(_Run(size, self._newest, 0, len(self._newest)))
        return runs

    def close(self) -> None:
        """Gives the room back."""
        if self._file is not None:
            self._file.close()
            self._file = None


class _Run:
    """One run being read. `block` has at least as many items as `refill` was asked for, or all."""

    def __init__(
        self, item_bytes: int, source: BinaryIO | bytes | None, start: int, end: int
    ) -> None:
        self._item_bytes = item_bytes
        self._source = source
        self._at = start
        self._end = end
        self.block = b""

    def refill(self, items: int) -> None:
        size_bytes = min(items * self._item_bytes, self._end - self._at)
        if size_bytes and len(self.block) < items * self._item_bytes:
            self.block += self._read(size_bytes)
            self._at += size_bytes

    def _read(self, size_bytes: int) -> bytes:
        if isinstance(self._source, bytes):
            return self._source[self._at : self._at + size_bytes]
        found = os.pread(self._source.fileno(), size_bytes, self._at) if self._source else b""
        if len(found) != size_bytes:
            raise Damaged(f"a sorted run ends at {self._at + len(found)}")
        return found

    def last_known(self) -> bytes | None:
        """The id up to which all items are in the block; None when that is all of the run."""
        if self._at == self._end:
            return None
        return self.block[-self._item_bytes :][:CHUNK_ID_BYTES]

    def take(self, last: bytes | None) -> bytes:
        """Takes the items up to the id `last` out of the block; all for None."""
        size = self._item_bytes
        count = len(self.block) // size
        if last is not None:
            count = bisect_right(range(count), last, key=self._id_at)
        taken, self.block = self.block[: count * size], self.block[count * size :]
        return taken

    def _id_at(self, number: int) -> bytes:
        start = number * self._item_bytes
        return self.block[start : start + CHUNK_ID_BYTES]


def ranges(most_items: int, *kinds: Runs) -> Iterator[list[list[bytes]]]:
    """For each range of ids, ascending, of each kind what each of its runs has there, oldest first.

    An id's items are all in one range. About `most_items` are in memory at once, or as many as
    there are runs.
    """
    opened = [kind.opened() for kind in kinds]
    runs = [run for kind in opened for run in kind]
    while True:
        for run in runs:
            run.refill(max(1, most_items // len(runs)))
        if not any(run.block for run in runs):
            return
        known = [last for run in runs if (last := run.last_known()) is not None]
        last = min(known, default=None)
        yield [[run.take(last) for run in kind] for kind in opened]


class ChunkSet:
    """A set of chunk ids that may be larger than memory. `directory`: where the file is made when
    one is needed."""

    def __init__(self, directory: str) -> None:
        self._runs = Runs(CHUNK_ID_BYTES, directory)
        self._run: set[bytes] = set()

    def update(self, ids: Iterable[bytes]) -> None:
        """Adds them. Not while `parts` is read."""
        self._run.update(ids)
        if len(self._run) >= IDS_AT_ONCE:
            self._sort()

    def _sort(self) -> None:
        self._runs.add(b"".join(sorted(self._run)))
        self._run = set()

    def parts(self) -> Iterator[set[bytes]]:
        """All of them, each in one of the parts. About IDS_AT_ONCE are in a part, or fewer."""
        self._sort()
        for (pieces,) in ranges(IDS_AT_ONCE, self._runs):
            ids = b"".join(pieces)
            starts = range(0, len(ids), CHUNK_ID_BYTES)
            yield {ids[start : start + CHUNK_ID_BYTES] for start in starts}

    def close(self) -> None:
        """Gives the room back."""
        self._runs.close()
