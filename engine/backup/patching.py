"""Storing what a backup found changed: whole, or as patches of what the parent has at its place.

Theory: docs/design.md §5.4. A changed chunk that the domain lacks, and whose predecessor is known,
is compared with its base, which is read for that: the bases of an item together, in the order of
their places, so a few reads for 4 MiB. If it does not pay, or the base can't be read, the chunk is
stored whole. A base that is damaged is told to the domain, which stores it anew with the next full
backup.

Where a disk is written anew from end to end, comparing never pays and costs as much reading as
storing costs writing. So after some chunks in a row that did not pay only a few more are tried,
until one does.

`Bases` is shared by a scan's threads; a `Storing` belongs to one. Its second buffer is made when
the first base is read: a full backup has none.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Iterator

from engine.backup.pages import ItemResult
from storage.domain.domain import Domain
from storage.domain.reader import MAX_RUN_BYTES, plan_chunks
from storage.domain.session import Session
from storage.errors import ChunkDamaged
from storage.files.fs import Buffer
from storage.files.memory import large_buffer
from storage.format.chunks import Encoder, Frame
from storage.format.patches import PatchEncoder

# 16 and 8 stored 5 to 10 % more of a disk on which old and new data take turns; these, no more
# (bench/incremental.py).
TRIES_IN_VAIN = 64
TRIED_THEN = 16  # every so many


class Bases:
    """Reads chunks of the domain to compare with. Any thread; close it after the last one."""

    def __init__(self, domain: Domain) -> None:
        self.chunk_size = domain.chunk_size
        self._domain = domain
        self._reader = domain.reader()
        self._lock = threading.Lock()
        self._unreadable: set[bytes] = set()
        self._in_vain = 0  # comparisons that did not pay, in a row
        self._left_out = 0

    def __enter__(self) -> Bases:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def worth_reading(self, chunks: Iterable[bytes]) -> list[bytes]:
        """Those of the changed chunks that are to be compared with their bases."""
        with self._lock:
            return [chunk for chunk in chunks if self._is_worth_it()]

    def _is_worth_it(self) -> bool:
        if self._in_vain < TRIES_IN_VAIN:
            return True
        self._left_out = (self._left_out + 1) % TRIED_THEN
        return not self._left_out

    def count(self, *, pays: bool) -> None:
        """What a comparison came to."""
        with self._lock:
            self._in_vain = 0 if pays else self._in_vain + 1

    def read(self, ids: list[bytes], buffer: memoryview) -> Iterator[tuple[bytes, Buffer]]:
        """Those of the chunks that can be read, proved; each good until the next is asked for."""
        for run in plan_chunks(self._domain, ids):
            for place, content in self._reader.read_each(run, buffer):
                if isinstance(content, ChunkDamaged):
                    self._miss(place.chunk_id, content)
                else:
                    yield place.chunk_id, content

    def _miss(self, chunk: bytes, damage: ChunkDamaged) -> None:
        if damage.pack:
            self._domain.trust.withdraw(damage.pack, frozenset({damage.chunk}))
        with self._lock:
            self._unreadable.add(chunk)

    @property
    def note(self) -> str:
        """What is to be said of the scan; "" when all bases could be read."""
        count = len(self._unreadable)
        return f"stored chunks whole: {count} of the parent's are damaged" if count else ""


class Storing:
    """One thread's way of storing chunks."""

    def __init__(self, session: Session, bases: Bases | None) -> None:
        self._session = session
        self._bases = bases
        self._whole = Encoder()
        self._patches = PatchEncoder()
        self._buffer: memoryview | None = None

    def store(self, found: ItemResult) -> int:
        """Stores the changed chunks that the domain does not know; returns the bytes stored."""
        ids = list(found.changed)
        if not ids:
            return 0
        known = self._session.known(ids)
        unknown = [chunk_id for chunk_id, is_known in zip(ids, known, strict=True) if not is_known]
        if not unknown:
            return 0
        frames = self._as_patches(found, unknown)
        whole = [chunk for chunk in unknown if chunk not in frames]
        return self._session.store(
            [
                *frames.values(),
                *(self._whole.encode(chunk, found.changed[chunk]) for chunk in whole),
            ]
        )

    def _as_patches(self, found: ItemResult, unknown: list[bytes]) -> dict[bytes, Frame]:
        """The frames of those chunks that are better stored as patches."""
        before = {chunk: found.before[chunk] for chunk in unknown if chunk in found.before}
        if self._bases is None or not before:
            return {}
        bases = self._session.bases(before)
        on_base: dict[bytes, list[bytes]] = {}
        for chunk in self._bases.worth_reading(bases):
            on_base.setdefault(bases[chunk].chunk_id, []).append(chunk)
        frames = {}
        for base_id, content in self._bases.read(list(on_base), self._second_buffer()):
            for chunk in on_base[base_id]:
                stored_len, view = bases[chunk].stored_len, found.changed[chunk]
                frame = self._patches.encode(chunk, view, base_id, content, stored_len)
                self._bases.count(pays=frame is not None)
                if frame is not None:
                    frames[chunk] = frame
        return frames

    def _second_buffer(self) -> memoryview:
        if self._buffer is None:
            assert self._bases is not None
            size_bytes = MAX_RUN_BYTES + self._bases.chunk_size + mmap.PAGESIZE
            self._buffer = large_buffer(size_bytes)
        return self._buffer
