"""Finding a disk on the point that a new one resembles: its template, or another clone of that.

Without a parent all that is not on the point yet would be stored whole, also what differs in a few
blocks from what another disk has at the same place. So a few chunks, from all over the disk, are
looked for in other disks' maps; the disk that has most of them at their places lends its chunks as
bases of patches (docs/design.md §5.4), and is good for nothing else. Each chunk is read, hashed and
looked up as it would be without; a poor choice costs time and room. The lender is not held: if it
is deleted meanwhile, the commit says which chunks have to be stored whole.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator, Mapping, Sequence

from engine.backup.pages import chunk_runs
from engine.jobs.jobs import JobContext
from engine.snapshot.sources import DiskSource
from storage.domain.domain import Domain
from storage.domain.maps import DiskMap
from storage.errors import Damaged, NotOnPoint
from storage.format.chunks import ChunkHasher, is_zero
from storage.format.manifests import PAGE_ENTRIES

SAMPLED_CHUNKS = 16
# Below it most chunks that are stored would be compared with a base in vain.
LIKE_SHARE = 0.5


class Lender:
    """A disk whose chunks may be bases. Any thread."""

    def __init__(self, disk_map: DiskMap) -> None:
        self._map = disk_map
        self._last: tuple[int, Mapping[int, bytes]] = (-1, {})

    def page(self, page_no: int) -> Mapping[int, bytes]:
        """Index in the page → chunk id; nothing once the disk is gone."""
        last_no, page = self._last
        if last_no != page_no:
            try:
                page = self._map.page(page_no)
            except (NotOnPoint, Damaged):
                page = {}
            self._last = (page_no, page)
        return page

    def shared(self, sample: Mapping[int, bytes]) -> int:
        """How many of the sample's chunks (by number) it has at the same places."""
        return sum(
            self.page(chunk // PAGE_ENTRIES).get(chunk % PAGE_ENTRIES) == chunk_id
            for chunk, chunk_id in sample.items()
        )


def find_lender(
    domain: Domain, source: DiskSource, candidates: Sequence[str], ctx: JobContext
) -> Lender | None:
    """That of the `candidates` (disk backups) which `source` resembles most, if any does.

    Counts what it reads as read. Raises Cancelled, PoolUnreachable, Conflict("volume_changed").
    """
    if not candidates:
        return None
    sample = _sample(source, domain.hasher, domain.chunk_size, ctx)
    shared = {lender: lender.shared(sample) for lender in _lenders(domain, candidates)}
    best = max(shared, key=lambda lender: shared[lender], default=None)
    if best is None or not sample or shared[best] < LIKE_SHARE * len(sample):
        return None
    return best


def _lenders(domain: Domain, candidates: Sequence[str]) -> Iterator[Lender]:
    """Those of them that are there and whole."""
    for disk in candidates:
        try:
            yield Lender(domain.disk_map(disk))
        except (NotOnPoint, Damaged):
            continue


def _sample(
    source: DiskSource, hasher: ChunkHasher, chunk_size: int, ctx: JobContext
) -> dict[int, bytes]:
    """Number → id of some chunks with data, ascending."""
    buffer = memoryview(mmap.mmap(-1, chunk_size))
    sample = {}
    for chunk in _drawn(source, chunk_size):
        ctx.check()
        start = chunk * chunk_size
        view = buffer[: min(chunk_size, source.capacity - start)]
        source.read_into(view, start)
        ctx.add(read=len(view))
        if not is_zero(view):
            sample[chunk] = hasher.full(view)
    return sample


def _drawn(source: DiskSource, chunk_size: int) -> Iterator[int]:
    """Numbers of chunks at random, ascending, each as likely as any other with data.

    The ranges are gone through twice rather than kept: a disk may have millions of them.
    """
    count = sum(end - first for first, end in chunk_runs(source.data_ranges(), chunk_size))
    wanted = sorted(random.sample(range(count), min(count, SAMPLED_CHUNKS)))
    before = 0
    for first, end in chunk_runs(source.data_ranges(), chunk_size):
        while wanted and wanted[0] < before + end - first:
            yield first + wanted.pop(0) - before
        if not wanted:
            return
        before += end - first
