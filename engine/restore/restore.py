"""Building volumes from a backup.

All disks are written under hidden names in their pools first, complete and durable; only then does
each get its own name, by link(2), so an existing volume is never overwritten and a half-written one
never seen. If any step fails, all that was made is removed. What a kill leaves behind lies in
`<pool>/.vmkeep-restores/`, unlocked, where `clear_leftovers` finds it, and by which `unname_left`
tells what had got its own name already.

Room for all that will be written, on any of the disks, is set aside first. Then, disk by disk, a
crew of threads pulls runs (stretches of a pack) in the plan's order; each reads, checks,
decompresses and writes its run. Only chunks that are not zero are written: the rest of the volume
is a hole. Memory is threads × a run, whatever the disk's size or the chain's length.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.jobs.crew import Stop, run_crew
from engine.jobs.jobs import JobContext
from engine.qemu.new_qcow2 import NewQcow2
from engine.restore.new_volume import NewVolume, VolumeWriter
from engine.restore.stage import Stage
from storage.domain.domain import Domain
from storage.domain.maps import DiskMap
from storage.domain.reader import MAX_RUN_BYTES, ChunkReader, FramePlace, ReadRun, plan_reads
from storage.errors import ChunkDamaged, Damaged
from storage.files.fs import Buffer
from storage.files.memory import large_buffer
from storage.format.manifests import PAGE_ENTRIES
from storage.format.ranges import joined

log = logging.getLogger(__name__)

# A thread that writes waits for the device, and its core is idle if all do (bench/restore.py).
THREADS_PER_WORKER = 2
LOOSE_PIECES = 1 << 16  # of what is missing; more are joined first, as there are millions to a disk


@dataclass(frozen=True, slots=True)
class RestoreDisk:
    """A disk backup, and the absolute path and format of the volume to make of it."""

    disk_uuid: str
    path_final: str
    format: str = "raw"  # or qcow2


def run_restore(
    domain: Domain,
    disks: Sequence[RestoreDisk],
    ctx: JobContext,
    workers: int,
    *,
    backup: str,
    allow_damaged: bool = False,
    has_room: Callable[[], None] = lambda: None,
    complete: Callable[[], None] = lambda: None,
) -> RestoreReport:
    """Makes all volumes, durably, or none. `backup`: the one that `disks` are of; it is held.

    `has_room` is called, before the first write, if all that will be written has its room by then.
    `complete` is called when all have their names; what it raises takes them back, and so does a
    kill before it returns (see `unname_left`).
    With `allow_damaged` what can't be read becomes zeros, and the report says where; else the first
    damage ends the restore. Either way the domain stores it anew with the next backup that has it.
    Raises Conflict("name_taken") when a volume is there already, PoolFull, PoolUnreachable,
    Cancelled, NotOnPoint, Damaged and other StorageErrors; for qcow2 the DiskServer… errors.
    """
    with domain.begin("read", [backup]) as session, contextlib.ExitStack() as undo:
        gaps = [Gaps(disk.disk_uuid) for disk in disks]
        sizes = {row.disk: row.capacity for row in domain.backup(backup).disks}
        maps = [_map_of(domain, missing, sizes, allow_damaged) for missing in gaps]
        ctx.set_total(sum(sizes[disk.disk_uuid] for disk in disks))
        volumes = [undo.enter_context(_new_volume(disk)) for disk in disks]
        have = [_set_aside(*each, ctx) for each in zip(maps, volumes, strict=True)]
        if all(have):
            has_room()
        with contextlib.closing(domain.reader()) as reader:
            for disk_map, volume, missing in zip(maps, volumes, gaps, strict=True):
                if disk_map is None:
                    volume.resize(missing.size_bytes)
                    ctx.add(restored=missing.size_bytes)
                    continue
                gap = missing if allow_damaged else None
                _fill(domain, reader, disk_map, volume, ctx, workers, gap)
        for volume in volumes:
            ctx.check()
            volume.make_durable()
        ctx.check()
        session.end()
        _name_all(volumes, complete)
    return RestoreReport(tuple(gap for gap in gaps if gap.size_bytes))


def _new_volume(disk: RestoreDisk) -> VolumeWriter:
    volume = NewVolume(disk.path_final)
    return NewQcow2(volume, disk.path_final) if disk.format == "qcow2" else volume


def _map_of(
    domain: Domain, gaps: Gaps, sizes: dict[str, int], allow_damaged: bool
) -> DiskMap | None:
    """The disk's map; None, and all of the disk is a gap, when it can't be read and may not."""
    try:
        return domain.disk_map(gaps.disk_uuid)
    except Damaged:
        if not allow_damaged:
            raise
        gaps.add(0, sizes[gaps.disk_uuid])
        return None


def _name_all(volumes: Sequence[VolumeWriter], complete: Callable[[], None]) -> None:
    """All get their names, or none keeps one."""
    with contextlib.ExitStack() as undo:
        for volume in volumes:
            undo.callback(volume.unname)
            volume.name()
        complete()
        undo.pop_all()


def _set_aside(disk_map: DiskMap | None, volume: VolumeWriter, ctx: JobContext) -> bool:
    """Room for a disk's data. Whether the volume has it: some only get it as they are written."""
    needed_bytes = 0
    for offset, size_bytes in () if disk_map is None else _data_ranges(disk_map):
        ctx.check()
        volume.set_aside(offset, size_bytes)
        needed_bytes += size_bytes
    return volume.allocated_bytes() >= needed_bytes


def _fill(
    domain: Domain,
    reader: ChunkReader,
    disk_map: DiskMap,
    volume: VolumeWriter,
    ctx: JobContext,
    workers: int,
    gaps: Gaps | None,
) -> None:
    """Writes a disk's chunks into `volume` and counts its whole capacity as restored."""
    volume.resize(disk_map.capacity)
    runs = _SharedRuns(plan_reads(domain, disk_map))

    def work() -> None:
        # One run, or one frame that is larger than a run may be.
        buffer = large_buffer(MAX_RUN_BYTES + disk_map.chunk_size + mmap.PAGESIZE)
        stage = Stage(volume, disk_map.chunk_size)
        while (run := runs.pull()) is not None:
            ctx.check()
            count = 0
            for place, found in reader.read_each(run, buffer, stage.room):
                if isinstance(found, ChunkDamaged):
                    _miss(domain, disk_map, place, found, gaps)
                    continue
                for target in place.targets:
                    count += _put_chunk(stage, disk_map, target, found)
            stage.flush()
            runs.count(count)
            ctx.add(restored=count)

    run_crew(workers * THREADS_PER_WORKER, "restore", work, runs.stop)
    ctx.add(restored=disk_map.capacity - runs.written_bytes)


def _data_ranges(disk_map: DiskMap) -> Iterator[tuple[int, int]]:
    """(offset, length) in bytes of what is not a hole, ascending; at most a page's at once."""
    size, capacity = disk_map.chunk_size, disk_map.capacity
    for page_no, page in disk_map.pages():
        start = page_no * PAGE_ENTRIES * size
        offsets = (start + at * size for at in page)
        yield from joined((at, min(size, capacity - at)) for at in offsets if at < capacity)


def _miss(
    domain: Domain,
    disk_map: DiskMap,
    place: FramePlace,
    damage: ChunkDamaged,
    gaps: Gaps | None,
) -> None:
    """Notes what can't be read, or raises it."""
    if damage.pack:
        domain.trust.withdraw(damage.pack, frozenset({damage.chunk}))
    if gaps is None:
        raise damage
    log.warning("chunk_damaged", extra={"detail": str(damage)})
    for target in place.targets:
        offset = target * disk_map.chunk_size
        gaps.add(offset, min(disk_map.chunk_size, disk_map.capacity - offset))


def _put_chunk(stage: Stage, disk_map: DiskMap, target: int, content: Buffer) -> int:
    offset = target * disk_map.chunk_size
    expected_bytes = min(disk_map.chunk_size, disk_map.capacity - offset)
    if len(content) != expected_bytes:
        raise Damaged(f"chunk {target} has {len(content)} bytes, not {expected_bytes}")
    stage.put(content, offset)
    return expected_bytes


@dataclass(slots=True)
class Gaps:
    """Where a restored volume has zeros because the backup's data is damaged. Any thread adds."""

    disk_uuid: str
    size_bytes: int = 0
    _pieces: list[tuple[int, int]] = field(default_factory=list)
    _most_pieces: int = LOOSE_PIECES
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, offset: int, size_bytes: int) -> None:
        with self._lock:
            self.size_bytes += size_bytes
            self._pieces.append((offset, size_bytes))
            if len(self._pieces) > self._most_pieces:
                self._pieces = joined(self._pieces)
                self._most_pieces = 2 * len(self._pieces) + LOOSE_PIECES

    def ranges(self) -> list[tuple[int, int]]:
        """(offset, length) in bytes, ascending, joined where they touch."""
        with self._lock:
            return joined(self._pieces)


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """The disks that are not complete; none without allow_damaged."""

    gaps: tuple[Gaps, ...] = ()


class _SharedRuns:
    """The plan's runs for many threads, and the sum of what they wrote."""

    def __init__(self, runs: Iterator[ReadRun]) -> None:
        self.stop = Stop()
        self.written_bytes = 0
        self._runs = runs
        self._lock = threading.Lock()

    def pull(self) -> ReadRun | None:
        with self._lock:
            return None if self.stop else next(self._runs, None)

    def count(self, size_bytes: int) -> None:
        with self._lock:
            self.written_bytes += size_bytes
