"""Reading backups: plan runs in pack order, then read, decompress and check each chunk.

A run is a stretch of one pack read at once. The plan of a window of pages is sorted by place, so
speed does not depend on how scattered the disk's chunks are, and a chunk that occurs often in the
window is read once. A pack that gc moved meanwhile is looked up again.

A patch is read with its base: the base is in the run, at its own place, and the patches on it that
are wanted go with it. So a base is decoded once for all of them, and reading a disk of patches
reads its bases in order and little more. A base that nobody wants for itself is not proved, since
what is made with it is.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from storage.domain.maps import DiskMap
from storage.errors import (
    ChunkDamaged,
    Damaged,
    PointNewerFormat,
    ViewDamaged,
    from_os_error,
)
from storage.files.bad_places import BadPlace, open_to_read, read_into
from storage.files.fs import Buffer
from storage.files.publish import close_discarded
from storage.files.uncached import lead_bytes
from storage.format.chunks import CODEC_PATCH, FRAME_HEADER_BYTES, Decoder
from storage.format.manifests import PAGE_ENTRIES
from storage.format.packs import FrameView, parse_frame
from storage.format.patches import base_of, patched
from storage.view import tables
from storage.view.tables import LOST_PACK, ChunkRow, Tables, unpack_chunk_row

if TYPE_CHECKING:
    from storage.domain.domain import Domain

MAX_RUN_BYTES = 4 << 20
MAX_GAP_BYTES = 64 << 10
WINDOW_PAGES = 16
OPEN_PACKS = 64
RELOCATE_ATTEMPTS = 3

log = logging.getLogger(__name__)

Room: TypeAlias = Callable[[int], memoryview]
"""Gives memory of so many bytes for the content of a chunk."""


@dataclass(frozen=True, slots=True)
class FramePlace:
    """A frame in a run; `targets`: chunk indexes of the disk that it fills. A base of `patches` may
    fill none itself."""

    offset_in_run: int
    stored_len: int
    chunk_id: bytes
    targets: tuple[int, ...]
    patches: tuple[PatchPlace, ...] = ()


@dataclass(frozen=True, slots=True)
class PatchPlace:
    """A patch, where it lies: the offset is in its pack. `place` says what it fills."""

    pack: str
    offset: int
    place: FramePlace


@dataclass(frozen=True, slots=True)
class ReadRun:
    """A stretch of a pack: `size_bytes` from `offset`, with the frames wanted from it, in the order
    of what they fill. `held`: a session holds what has these chunks, so that none may be gone."""

    pack: str
    offset: int
    size_bytes: int
    frames: tuple[FramePlace, ...]
    held: bool = True


def plan_reads(domain: Domain, disk_map: DiskMap) -> Iterator[ReadRun]:
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
        if pages_held == WINDOW_PAGES:
            yield from _runs(domain, targets, held=True)
            targets, pages_held = {}, 0
    yield from _runs(domain, targets, held=True)


def plan_chunks(domain: Domain, ids: Sequence[bytes]) -> Iterator[ReadRun]:
    """The runs that read those of these chunks that are on the point; targets are places in `ids`.

    Nobody need hold them: one that goes meanwhile is left out, and is no sign of damage.
    """
    targets: dict[bytes, list[int]] = {}
    for at, chunk in enumerate(ids):
        targets.setdefault(chunk, []).append(at)
    return _runs(domain, targets, held=False)


def _runs(domain: Domain, targets: dict[bytes, list[int]], *, held: bool) -> Iterator[ReadRun]:
    if not targets:
        return
    plan = domain.view.ask(partial(_planned, targets, held))
    run: list[_Place] = []
    for place in sorted(plan.places()):
        if run and not _joins(run, place):
            yield plan.run(run)
            run = []
        run.append(place)
    if run:
        yield plan.run(run)


def _planned(targets: dict[bytes, list[int]], held: bool, state: Tables) -> _Plan:
    """Where the chunks and their bases are, with the names of the packs."""
    rows = _rows(state, list(targets), sure=held)
    there = {chunk: targets[chunk] for chunk in rows}
    bases = {row.base for row in rows.values() if row.base}
    rows |= _rows(state, list(bases - rows.keys()), sure=True)
    names = {number: _pack_name(state, number) for number in {r.pack for r in rows.values()}}
    return _Plan(there, rows, names, held)


def _pack_name(state: Tables, number: int) -> str:
    return "" if number == LOST_PACK else tables.pack_id(state, number)


def _rows(state: Tables, ids: Sequence[bytes], *, sure: bool) -> dict[bytes, ChunkRow]:
    """`sure`: each has to be there."""
    found = state.table("chunks").get_many(ids)
    for chunk in ids if sure else ():
        if chunk not in found:
            raise ViewDamaged(f"view: chunk {chunk.hex()} is in a backup, but nowhere on the point")
    return {chunk: unpack_chunk_row(value) for chunk, value in found.items()}


class _Place(NamedTuple):
    """A frame in the order in which frames are read."""

    pack: int
    offset: int
    size_bytes: int
    chunk_id: bytes


def _joins(run: list[_Place], place: _Place) -> bool:
    end = run[-1].offset + run[-1].size_bytes
    return (
        run[0].pack == place.pack
        and place.offset - end <= MAX_GAP_BYTES
        and place.offset + place.size_bytes - run[0].offset <= MAX_RUN_BYTES
    )


class _Plan:
    """A window's chunks: `rows` says where all of `targets`, and their bases, lie."""

    def __init__(
        self,
        targets: dict[bytes, list[int]],
        rows: dict[bytes, ChunkRow],
        names: dict[int, str],
        held: bool,
    ) -> None:
        self._held = held
        self._targets = targets
        self._rows = rows
        self._names = names
        self._patches: dict[bytes, list[PatchPlace]] = {}
        self._baseless: list[bytes] = []
        for chunk in targets:
            row = rows[chunk]
            if row.base and rows[row.base].base:
                # Of a view that lacks something: the pack that held the base whole is lost.
                self._baseless.append(chunk)
            elif row.base:
                patch = PatchPlace(names[row.pack], row.offset, self._frame(0, chunk))
                self._patches.setdefault(row.base, []).append(patch)

    def places(self) -> Iterator[_Place]:
        """What is read whole: wanted chunks, and bases of wanted ones."""
        for chunk, row in self._rows.items():
            if not row.base:
                size_bytes = FRAME_HEADER_BYTES + row.stored_len
                yield _Place(row.pack, row.offset, size_bytes, chunk)
        for chunk in self._baseless:
            yield _Place(LOST_PACK, 0, 0, chunk)

    def _frame(self, offset_in_run: int, chunk: bytes) -> FramePlace:
        targets = tuple(self._targets.get(chunk, ()))
        patches = tuple(self._patches.get(chunk, ()))
        return FramePlace(offset_in_run, self._rows[chunk].stored_len, chunk, targets, patches)

    def run(self, places: list[_Place]) -> ReadRun:
        start = places[0].offset
        end = places[-1].offset + places[-1].size_bytes
        frames = [self._frame(place.offset - start, place.chunk_id) for place in places]
        # In the disk's order: who writes them finds neighbours behind one another.
        frames.sort(key=_first_target)
        name = self._names.get(places[0].pack, "")
        return ReadRun(name, start, end - start, tuple(frames), self._held)


def _first_target(frame: FramePlace) -> int:
    return min((*frame.targets, *(at for patch in frame.patches for at in patch.place.targets)))


class _Memory(NamedTuple):
    """What a run is read into, and what its chunks are made in."""

    run: memoryview
    room: Room | None


class ChunkReader:
    """Reads runs and proves what comes out. Shared by threads. Close it when done."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._hasher = domain.hasher
        self._packs = _OpenPacks(domain)
        self._threads = threading.local()

    def read(self, run: ReadRun, buffer: memoryview) -> Iterator[tuple[FramePlace, Buffer]]:
        """Yields each frame's place and its content, good until the next one is asked for.

        `buffer` holds at least run.size_bytes: at most MAX_RUN_BYTES, or one frame if it is larger.
        A page more, and beginning at one, it can be filled past the page cache.
        Raises ChunkDamaged naming pack and offset, PointUnreachable.
        """
        for place, found in self.read_each(run, buffer):
            if isinstance(found, ChunkDamaged):
                raise found
            yield place, found

    def read_each(
        self, run: ReadRun, buffer: memoryview, room: Room | None = None
    ) -> Iterator[tuple[FramePlace, Buffer | ChunkDamaged]]:
        """As `read`, but what is wrong with a chunk is yielded in place of its content.

        Most contents are made in what `room` gives, if there is one, and are that very memory then.
        """
        yield from self._read(run, _Memory(buffer, room), attempts=RELOCATE_ATTEMPTS)

    def _read(
        self, run: ReadRun, memory: _Memory, attempts: int
    ) -> Iterator[tuple[FramePlace, Buffer | ChunkDamaged]]:
        if not run.pack:
            yield from _all_damaged(run, "the pack that held it is damaged or gone")
            return
        lead = lead_bytes(run.offset)
        if lead + run.size_bytes > len(memory.run):
            lead = 0
        part = memory.run[lead : lead + run.size_bytes]
        try:
            count = self._packs.read(run.pack, part, run.offset)
        except FileNotFoundError:
            yield from self._read_elsewhere(run, memory, attempts - 1)
            return
        except BadPlace as error:
            yield from self._read_around(run, memory, attempts, str(error))
            return
        moved: dict[bytes, list[int]] = {}
        for place in run.frames:
            what = f"{self._domain.paths.pack(run.pack)} at {run.offset + place.offset_in_run}"
            # A base outlives what its patches are made in.
            room = None if place.patches else memory.room
            found: Buffer | ChunkDamaged
            try:
                found = self._whole(part[:count], place, room, what)
            except (Damaged, PointNewerFormat) as error:
                found = ChunkDamaged(str(error), run.pack, place.chunk_id)
            if place.targets:
                yield place, found
            for patch in place.patches:
                try:
                    content = self._patched(patch, found, run.pack, place.chunk_id, memory.room)
                except FileNotFoundError:
                    moved[patch.place.chunk_id] = list(patch.place.targets)
                else:
                    yield patch.place, content
        if moved:
            yield from self._read_anew(moved, run.held, memory, attempts - 1)

    def _read_around(
        self, run: ReadRun, memory: _Memory, attempts: int, reason: str
    ) -> Iterator[tuple[FramePlace, Buffer | ChunkDamaged]]:
        """Part of the run can't be read: each frame by itself, so that only those are lost."""
        if len(run.frames) == 1:
            place = run.frames[0]
            found = ChunkDamaged(reason, run.pack, place.chunk_id)
            if place.targets:
                yield place, found
            for patch in place.patches:
                yield patch.place, self._patched(patch, found, run.pack, place.chunk_id, None)
            return
        for place in run.frames:
            size_bytes = FRAME_HEADER_BYTES + place.stored_len
            alone = replace(place, offset_in_run=0)
            start = run.offset + place.offset_in_run
            one = replace(run, offset=start, size_bytes=size_bytes, frames=(alone,))
            yield from self._read(one, memory, attempts)

    def _read_elsewhere(
        self, run: ReadRun, memory: _Memory, attempts: int
    ) -> Iterator[tuple[FramePlace, Buffer | ChunkDamaged]]:
        """The pack's name is gone: gc has moved its live chunks. Looks them up anew."""
        log.info("pack_moved", extra={"pack": run.pack})
        frames = [*run.frames, *(patch.place for f in run.frames for patch in f.patches)]
        targets = {place.chunk_id: list(place.targets) for place in frames if place.targets}
        yield from self._read_anew(targets, run.held, memory, attempts)

    def _read_anew(
        self, targets: dict[bytes, list[int]], held: bool, memory: _Memory, attempts: int
    ) -> Iterator[tuple[FramePlace, Buffer | ChunkDamaged]]:
        self._domain.refresh()
        for moved in _runs(self._domain, targets, held=held):
            if not attempts:
                path = self._domain.paths.pack(moved.pack)
                yield from _all_damaged(moved, f"{path} is live, but not there")
                continue
            yield from self._read(moved, memory, attempts)

    def _whole(self, part: memoryview, place: FramePlace, room: Room | None, what: str) -> Buffer:
        """A whole frame's content, proved if it is wanted for itself."""
        frame = self._frame(part[place.offset_in_run :], place, what)
        into = room(frame.raw_len) if room else None
        try:
            raw = self._decoder().decode(frame.codec, frame.payload, frame.raw_len, into)
        except Damaged as error:
            raise Damaged(f"{what}: {error}") from error
        if place.targets:
            self._prove(raw, place.chunk_id, what)
        return raw

    def _frame(self, part: memoryview, place: FramePlace, what: str) -> FrameView:
        frame = parse_frame(part, self._domain.chunk_size, what)
        if frame.chunk_id != place.chunk_id:
            raise Damaged(f"{what}: holds another chunk than the index says")
        return frame

    def _prove(self, content: Buffer, chunk_id: bytes, what: str) -> None:
        if self._hasher.full(content) != chunk_id:
            raise Damaged(f"{what}: content does not have its id")

    def _patched(
        self,
        patch: PatchPlace,
        base: Buffer | ChunkDamaged,
        pack: str,
        base_id: bytes,
        room: Room | None,
    ) -> Buffer | ChunkDamaged:
        """A patch's content. What is wrong with its base, in `pack`, is said of the base.
        FileNotFoundError when the patch's own pack has gone."""
        place = patch.place
        what = f"{self._domain.paths.pack(patch.pack)} at {patch.offset}"
        if isinstance(base, ChunkDamaged):
            return ChunkDamaged(f"{what}: a patch of a damaged chunk: {base}", pack, base_id)
        frame = memoryview(bytearray(FRAME_HEADER_BYTES + place.stored_len))
        if not patch.pack:
            return _damaged(place, "the pack that held it is damaged or gone", "")
        try:
            count = self._packs.read(patch.pack, frame, patch.offset)
            view = self._frame(frame[:count], place, what)
            content = self._applied(view, base, base_id, room, what)
            if self._hasher.full(content) == place.chunk_id:
                return content
        except (Damaged, PointNewerFormat) as error:
            return ChunkDamaged(str(error), patch.pack, place.chunk_id)
        if self._hasher.full(base) != base_id:
            return ChunkDamaged(f"{what}: its base does not have its id", pack, base_id)
        return ChunkDamaged(f"{what}: content does not have its id", patch.pack, place.chunk_id)

    def _applied(
        self, view: FrameView, base: Buffer, base_id: bytes, room: Room | None, what: str
    ) -> Buffer:
        if view.codec != CODEC_PATCH or base_of(view.payload) != base_id:
            raise Damaged(f"{what}: is not the patch that the index says")
        into = room(view.raw_len) if room else None
        try:
            return patched(view.payload, view.raw_len, base, self._decoder(), into)
        except Damaged as error:
            raise Damaged(f"{what}: {error}") from error

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
        damage = _damaged(place, reason, run.pack)
        if place.targets:
            yield place, damage
        for patch in place.patches:
            yield patch.place, damage


def _damaged(place: FramePlace, reason: str, pack: str) -> ChunkDamaged:
    return ChunkDamaged(f"chunk {place.chunk_id.hex()}: {reason}", pack, place.chunk_id)


class _OpenPacks:
    """File descriptors of the packs read last; one is never closed while it is being read."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._lock = threading.Lock()
        self._open: OrderedDict[str, int] = OrderedDict()
        self._reading: dict[str, int] = {}
        self._stale: list[int] = []

    def read(self, pack: str, buffer: memoryview, offset: int) -> int:
        """FileNotFoundError when the pack has no name any more and is not open here; BadPlace."""
        path = self._domain.paths.pack(pack)
        try:
            fd = self._take(pack, path)
            try:
                return read_into(self._domain.fs, fd, buffer, offset, path)
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
                fd = self._open[pack] = open_to_read(self._domain.fs, path)
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
                close_discarded(self._domain.fs, self._open.pop(name))

    def _set_aside(self, pack: str) -> None:
        with self._lock:
            fd = self._open.pop(pack, None)
            if fd is not None:
                self._stale.append(fd)  # others may be reading from it

    def close(self) -> None:
        with self._lock:
            while self._stale:
                close_discarded(self._domain.fs, self._stale.pop())
            while self._open:
                close_discarded(self._domain.fs, self._open.popitem()[1])
