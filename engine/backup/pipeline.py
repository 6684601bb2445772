"""The data path of a backup: read, compare, hash, compress, store.

A crew of threads pulls items (4 MiB of chunks of one page) from a `PageLine`. Each thread owns one
page-aligned buffer and one Encoder, does everything about an item by itself, and gives back the
item's entries. So no data is handed from thread to thread; what is heavy (preadv, XXH3, BLAKE3,
zstd, pwrite) runs without the GIL. Memory is workers × 4 MiB plus the pages under way, whatever the
disk's size.

Per chunk: all zeros? nothing, or a zero mark. Same XXH3 half as the parent's chunk at this place?
unchanged. Else its whole id; and its frame goes to the session if the domain does not know that id,
as a patch of the parent's chunk if that pays (engine/backup/patching.py).
Without a parent no XXH3 shortcut is taken (docs/design.md §9). Where a source knows what changed
since the parent, only that is read; engine/backup/sampling.py tries it first. Read
engine/backup/pages.py first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from engine.backup.likeness import Lender
from engine.backup.pages import (
    Emit,
    Item,
    ItemResult,
    PageLine,
    PagePlan,
    Ranges,
    plan_changed,
    plan_pages,
)
from engine.backup.patching import Bases, Storing
from engine.jobs.crew import run_crew
from engine.jobs.jobs import JobContext
from engine.snapshot.sources import DiskSource
from storage.domain.domain import Domain
from storage.domain.maps import DiskMap
from storage.domain.session import ManifestBuilder, Session
from storage.files.memory import large_buffer
from storage.format.chunks import FAST_BYTES, ZERO_MARK, ChunkHasher, Encoder, is_zero
from storage.format.manifests import PAGE_ENTRIES

ITEM_BYTES = 4 << 20


def scan_disk(
    domain: Domain,
    source: DiskSource,
    session: Session,
    builder: ManifestBuilder,
    parent: DiskMap | None,
    ctx: JobContext,
    workers: int,
    *,
    changed: Ranges | None = None,
    bases: Bases | None = None,
    lender: Lender | None = None,
) -> None:
    """Stores in `session` what the domain lacks of a disk, and gives all its pages to `builder`.

    With a `parent` (same capacity and chunk size, held by the session) only what differs from it;
    with `changed` too (see DiskSource.changed_ranges) only what that touches is looked at. What is
    stored may be patches if `bases` is given: on the parent's chunks, or else on the `lender`'s.
    Counts the whole capacity as scanned. Raises Cancelled, StorageError, PoolUnreachable,
    Conflict("volume_changed"); then `builder` is incomplete and of no use.
    """
    ranges, chunk_size = source.data_ranges(), domain.chunk_size
    if parent is not None and changed is not None:
        plans = plan_changed(changed, ranges, chunk_size, parent.page)
    else:
        plans = plan_pages(ranges, chunk_size, parent.pages() if parent else ())
    line = page_line(plans, source, chunk_size, builder.add_page, workers)

    def work() -> None:
        reader, storing = ItemReader(source, chunk_size), Storing(session, bases)
        while (item := line.pull()) is not None:
            ctx.check()
            found = _examine(reader, item, domain.hasher)
            if lender is not None:
                found.borrow(lender.page(item.page.page_no))
            stored_bytes = storing.store(found)
            line.finish(item, found.entries)
            ctx.add(
                scanned=item.span_bytes,
                read=found.read_bytes,
                changed=found.changed_bytes,
                stored=stored_bytes,
            )

    run_crew(workers, "scan", work, line.stop)
    ctx.add(scanned=source.capacity - line.scanned_bytes)


def store_again(
    domain: Domain,
    source: DiskSource,
    session: Session,
    wanted: Collection[bytes],
    ctx: JobContext,
    workers: int,
    *,
    within: Ranges | None = None,
) -> None:
    """Stores every chunk of a disk whose id is in `wanted`, whether or not the domain knows it.

    For chunks that a commit found gone. The whole disk is read again, which is rare and needs no
    memory of which chunk was where; or only `within` these ranges. Raises as scan_disk does.
    """
    hasher, chunk_size = domain.hasher, domain.chunk_size
    fast_halves = frozenset(chunk_id[:FAST_BYTES] for chunk_id in wanted)
    plans = plan_pages(source.data_ranges(), chunk_size, ())
    if within is not None:
        plans = plan_changed(within, source.data_ranges(), chunk_size, lambda _: {})
    line = page_line(plans, source, chunk_size, ignore_page, workers)

    def work() -> None:
        reader, encoder = ItemReader(source, chunk_size), Encoder()
        while (item := line.pull()) is not None:
            ctx.check()
            found: dict[bytes, memoryview] = {}
            for _, view in reader.read(item):
                fast = hasher.fast(view)
                if fast in fast_halves:
                    found[hasher.full_from(fast, view)] = view
            frames = [encoder.encode(*one) for one in found.items() if one[0] in wanted]
            stored_bytes = session.store(frames, again=True) if frames else 0
            line.finish(item, {})
            ctx.add(stored=stored_bytes)

    run_crew(workers, "store-again", work, line.stop)


def page_line(
    plans: Iterator[PagePlan], source: DiskSource, chunk_size: int, emit: Emit, workers: int
) -> PageLine:
    """The line for a crew of `workers` over a source."""
    item_chunks = max(1, ITEM_BYTES // chunk_size)
    return PageLine(
        plans, source.capacity, chunk_size, item_chunks, ZERO_MARK, emit, lookahead=max(1, workers)
    )


def ignore_page(_page_no: int, _entries: Mapping[int, bytes]) -> None:
    """The `emit` of a line whose entries nobody wants."""
    return


def _examine(reader: ItemReader, item: Item, hasher: ChunkHasher) -> ItemResult:
    """Reads an item and compares it with the parent's page."""
    found = ItemResult()
    parent = item.page.parent
    for index, view in reader.read(item):
        found.read_bytes += len(view)
        before = parent.get(index)
        if is_zero(view):
            if before is not None:
                found.entries[index] = ZERO_MARK
                found.changed_bytes += len(view)
            continue
        fast = hasher.fast(view)
        if before is not None and before.startswith(fast):
            continue
        chunk_id = hasher.full_from(fast, view)
        found.entries[index] = chunk_id
        found.changed[chunk_id] = view
        if before is not None:
            found.before[chunk_id] = before
        found.changed_bytes += len(view)
    return found


class ItemReader:
    """One thread's buffer over a source."""

    def __init__(self, source: DiskSource, chunk_size: int) -> None:
        self._source = source
        self._chunk_size = chunk_size
        self._view = large_buffer(max(ITEM_BYTES, chunk_size))

    def read(self, item: Item) -> Iterator[tuple[int, memoryview]]:
        """(index in the page, content) of the item's chunks; valid until the next read.

        Neighbours are read with one call. The disk's last chunk may be short.
        """
        first_chunk = item.page.page_no * PAGE_ENTRIES
        if item.ahead:
            # Measured cold: a quarter less time for an unchanged disk. Warm: no difference.
            start = (first_chunk + item.ahead[0]) * self._chunk_size
            self._source.prefetch(start, len(item.ahead) * self._chunk_size)
        for run in _neighbours(item.chunks):
            start = (first_chunk + run[0]) * self._chunk_size
            end = min((first_chunk + run[-1] + 1) * self._chunk_size, self._source.capacity)
            at = item.chunks.index(run[0]) * self._chunk_size
            view = self._view[at : at + end - start]
            self._source.read_into(view, start)
            for number, index in enumerate(run):
                place = number * self._chunk_size
                yield index, view[place : place + self._chunk_size]


def _neighbours(chunks: Sequence[int]) -> Iterator[Sequence[int]]:
    """The ascending indexes, cut where one is left out."""
    start = 0
    for at in range(1, len(chunks) + 1):
        if at == len(chunks) or chunks[at] != chunks[at - 1] + 1:
            yield chunks[start:at]
            start = at
