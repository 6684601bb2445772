"""Reading backups: plan runs in pack order, then read, decompress and check each chunk.

A run is a stretch of one pack read at once. The plan of a window of pages is sorted by place, so
speed does not depend on how scattered the disk's chunks are, and a chunk that occurs often in the
window is read once. A pack that gc moved meanwhile is looked up again.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from storage import tables
from storage.chunks import FRAME_HEADER_BYTES, ChunkHasher, Decoder
from storage.errors import (
    ChunkDamaged,
    Damaged,
    PointNewerFormat,
    ViewDamaged,
    from_os_error,
)
from storage.fs import Buffer
from storage.manifests import PAGE_ENTRIES
from storage.maps import DiskMap
from storage.packs import parse_frame
from storage.tables import LOST_PACK, Tables, unpack_chunk_row

if TYPE_CHECKING:
    from storage.domain import Domain

MAX_RUN_BYTES = 8 << 20
MAX_GAP_BYTES = 64 << 10
OPEN_PACKS = 64
RELOCATE_ATTEMPTS = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FramePlace:
    """A frame in a run; `targets`: chunk indexes of the disk that it fills."""

    offset_in_run: int
    stored_len: int
    chunk_id: bytes
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadRun:
    """A stretch of a pack: `size_bytes` from `offset`, with the frames wanted from it."""

    pack: str
    offset: int
    size_bytes: int
    frames: tuple[FramePlace, ...]


def plan_reads(domain: Domain, disk_map: DiskMap, window_pages: int = 16) -> Iterator[ReadRun]:
    """All runs that make the disk up, window by window. Memory: one window's entries.

    Raises ViewDamaged when a chunk is not in the index, nor in one that was made anew.
    """
    limit = -(-disk_map.capacity // disk_map.chunk_size)
    targets: dict[bytes, list[int]] = {}
    pages_held = 0
    for page_no, page in disk_map.pages():
        for at, chunk in page.items():
            target = page_no * PAGE_ENTRIES + at
            if target < limit:
                targets.setdefault(chunk, []).append(target)
        pages_held += 1
        if pages_held == window_pages:
            yield from _runs(domain, targets)
            targets, pages_held = {}, 0
    yield from _runs(domain, targets)


def _runs(domain: Domain, targets: dict[bytes, list[int]]) -> Iterator[ReadRun]:
    if not targets:
        return
    places, names = domain.view.ask(partial(_placed, list(targets)))
    run: list[tuple[int, int, int, bytes]] = []
    for place in sorted(places):
        if run and not _joins(run, place):
            yield _run(names[run[0][0]], run, targets)
            run = []
        run.append(place)
    if run:
        yield _run(names[run[0][0]], run, targets)


def _placed(
    ids: Sequence[bytes], state: Tables
) -> tuple[list[tuple[int, int, int, bytes]], dict[int, str]]:
    """Each chunk's place, and the names of the packs by their numbers."""
    places = _places(state, ids)
    return places, {number: _pack_name(state, number) for number in {p[0] for p in places}}


def _pack_name(state: Tables, number: int) -> str:
    return "" if number == LOST_PACK else tables.pack_id(state, number)


def _places(state: Tables, ids: Sequence[bytes]) -> list[tuple[int, int, int, bytes]]:
    """(pack number, offset, frame bytes, id) of each chunk."""
    rows = state.table("chunks").get_many(ids)
    places = []
    for chunk in ids:
        value = rows.get(chunk)
        if value is None:
            raise ViewDamaged(f"view: chunk {chunk.hex()} is in a backup, but nowhere on the point")
        row = unpack_chunk_row(value)
        places.append((row.pack, row.offset, FRAME_HEADER_BYTES + row.stored_len, chunk))
    return places


def _joins(run: list[tuple[int, int, int, bytes]], place: tuple[int, int, int, bytes]) -> bool:
    pack, offset, size_bytes, _ = place
    end = run[-1][1] + run[-1][2]
    return (
        run[0][0] == pack
        and offset - end <= MAX_GAP_BYTES
        and offset + size_bytes - run[0][1] <= MAX_RUN_BYTES
    )


def _run(
    pack: str, places: list[tuple[int, int, int, bytes]], targets: dict[bytes, list[int]]
) -> ReadRun:
    start = places[0][1]
    end = places[-1][1] + places[-1][2]
    frames = tuple(
        FramePlace(offset - start, size - FRAME_HEADER_BYTES, chunk, tuple(targets[chunk]))
        for _, offset, size, chunk in places
    )
    return ReadRun(pack, start, end - start, frames)


class ChunkReader:
    """Reads runs and proves what comes out. Shared by threads. Close it when done."""

    def __init__(self, domain: Domain, hasher: ChunkHasher) -> None:
        self._domain = domain
        self._hasher = hasher
        self._packs = _OpenPacks(domain)
        self._threads = threading.local()

    def read(self, run: ReadRun, buffer: memoryview) -> Iterator[tuple[FramePlace, Buffer]]:
        """Yields each frame's place and its content, good until the next one is asked for.

        `buffer` holds at least run.size_bytes: at most MAX_RUN_BYTES, or one frame if it is larger.
        Raises ChunkDamaged naming pack and offset, PointUnreachable.
        """
        for place, found in self.read_each(run, buffer):
            if isinstance(found, ChunkDamaged):
                raise found
            yield place, found

    def read_each(
        self, run: ReadRun, buffer: memoryview
    ) -> Iterator[tuple[FramePlace, Buffer | ChunkDamaged]]:
        """As `read`, but what is wrong with a chunk is yielded in place of its content."""
        yield from self._read(run, buffer, attempts=RELOCATE_ATTEMPTS)

    def _read(
        self, run: ReadRun, buffer: memoryview, attempts: int
    ) -> Iterator[tuple[FramePlace, Buffer | ChunkDamaged]]:
        if not run.pack:
            yield from _all_damaged(run, "the pack that held it is damaged or gone")
            return
        part = buffer[: run.size_bytes]
        try:
            count = self._packs.read(run.pack, part, run.offset)
        except FileNotFoundError:
            yield from self._read_elsewhere(run, buffer, attempts - 1)
            return
        for place in run.frames:
            what = f"{self._domain.paths.pack(run.pack)} at {run.offset + place.offset_in_run}"
            found: Buffer | ChunkDamaged
            try:
                found = self._content(part[:count], place, what)
            except (Damaged, PointNewerFormat) as error:
                found = ChunkDamaged(str(error), run.pack, place.chunk_id)
            yield place, found

    def _read_elsewhere(
        self, run: ReadRun, buffer: memoryview, attempts: int
    ) -> Iterator[tuple[FramePlace, Buffer | ChunkDamaged]]:
        """The pack's name is gone: gc has moved its live chunks. Looks them up anew."""
        log.info("pack_moved pack=%s", run.pack)
        self._domain.refresh()
        targets = {place.chunk_id: list(place.targets) for place in run.frames}
        for moved in _runs(self._domain, targets):
            if not attempts:
                path = self._domain.paths.pack(moved.pack)
                yield from _all_damaged(moved, f"{path} is live, but not there")
                continue
            yield from self._read(moved, buffer, attempts)

    def _content(self, part: memoryview, place: FramePlace, what: str) -> Buffer:
        frame = parse_frame(part[place.offset_in_run :], self._domain.chunk_size, what)
        if frame.chunk_id != place.chunk_id:
            raise Damaged(f"{what}: holds another chunk than the index says")
        try:
            raw = self._decoder().decode(frame.codec, frame.payload, frame.raw_len)
        except Damaged as error:
            raise Damaged(f"{what}: {error}") from error
        if self._hasher.full(raw) != place.chunk_id:
            raise Damaged(f"{what}: content does not have its id")
        return raw

    def _decoder(self) -> Decoder:
        decoder: Decoder | None = getattr(self._threads, "decoder", None)
        if decoder is None:
            decoder = self._threads.decoder = Decoder()
        return decoder

    def close(self) -> None:
        """No read may be under way."""
        self._packs.close()


def _all_damaged(run: ReadRun, reason: str) -> Iterator[tuple[FramePlace, ChunkDamaged]]:
    for place in run.frames:
        chunk = place.chunk_id
        yield place, ChunkDamaged(f"chunk {chunk.hex()}: {reason}", run.pack, chunk)


class _OpenPacks:
    """File descriptors of the packs read last; one is never closed while it is being read."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._lock = threading.Lock()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._reading: dict[str, int] = {}
        self._stale: list[int] = []

    def read(self, pack: str, buffer: memoryview, offset: int) -> int:
        """FileNotFoundError when the pack has no name any more and is not open here."""
        path = self._domain.paths.pack(pack)
        try:
            fd = self._take(pack, path)
            try:
                return self._domain.fs.preadv(fd, buffer, offset)
            finally:
                self._give_back(pack)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise from_os_error(error, path) from error
            # Another NFS client deleted the file that is open here: its name tells what is there.
            self._set_aside(pack)
            raise FileNotFoundError(path) from error

    def _take(self, pack: str, path: str) -> int:
        with self._lock:
            fd = self._open.get(pack)
            if fd is None:
                fd = self._open[pack] = self._domain.fs.open_read(path)
            self._open.move_to_end(pack)
            self._reading[pack] = self._reading.get(pack, 0) + 1
            return fd

    def _give_back(self, pack: str) -> None:
        with self._lock:
            self._reading[pack] -= 1
            if not self._reading[pack]:
                del self._reading[pack]
            idle = [name for name in self._open if name not in self._reading]
            for name in idle[: max(0, len(self._open) - OPEN_PACKS)]:
                self._domain.fs.close(self._open.pop(name))

    def _set_aside(self, pack: str) -> None:
        with self._lock:
            fd = self._open.pop(pack, None)
            if fd is not None:
                self._stale.append(fd)  # others may be reading from it

    def close(self) -> None:
        with self._lock:
            while self._stale:
                self._domain.fs.close(self._stale.pop())
            while self._open:
                self._domain.fs.close(self._open.popitem()[1])
