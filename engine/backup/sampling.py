"""Trying a claim that the rest of a disk is unchanged, before a backup relies on it.

A tracker (clones compared, a hypervisor's bitmap) says which ranges may differ from the parent
backup. Of the chunks that it leaves out a random share is read and compared with the parent. One
that differs proves the tracker wrong; then nothing it says counts. A parent's chunk that lies in a
hole now, outside the ranges, proves it as well, and costs no reading.

The last chunk with data among those is always read. An image that was cut off and made as large
again has lost what was behind the cut, and QEMU's bitmaps don't say so. Behind it there are holes,
and what was written since, which the bitmap knows: so the chunk that was cut through is that one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from engine.backup.pages import PagePlan, Ranges, by_page, plan_pages
from engine.backup.pipeline import ItemReader, ignore_page, page_line
from engine.jobs.crew import run_crew
from engine.jobs.jobs import JobContext
from engine.snapshot.sources import DiskSource
from storage.domain.domain import Domain
from storage.domain.maps import DiskMap
from storage.format.chunks import ChunkHasher, is_zero
from storage.format.manifests import PAGE_ENTRIES

SHARE = 0.01
FEWEST_CHUNKS = 4


@dataclass(slots=True)
class Sample:
    """What came of it. `wrong_chunk`: the number of one that differs, -1 when none does."""

    chunks: int = 0
    wrong_chunk: int = -1

    @property
    def sound(self) -> bool:
        return self.wrong_chunk < 0


def try_unchanged(
    domain: Domain,
    source: DiskSource,
    parent: DiskMap,
    changed: Ranges,
    ctx: JobContext,
    workers: int,
    *,
    share: float | None = None,
) -> Sample:
    """Compares `share` (SHARE) of the chunks outside of `changed`, and FEWEST_CHUNKS more.

    Counts what it reads as read. Raises Cancelled, PoolUnreachable, Conflict("volume_changed").
    """
    sample, chunk_size = Sample(), domain.chunk_size
    plans = plan_pages(source.data_ranges(), chunk_size, parent.pages())
    unchanged = _unchanged(plans, by_page(changed, chunk_size))
    drawn = _drawn(unchanged, SHARE if share is None else share, sample)
    line = page_line(drawn, source, chunk_size, ignore_page, workers)

    def work() -> None:
        reader = ItemReader(source, chunk_size)
        while sample.sound and (item := line.pull()) is not None:
            ctx.check()
            read_bytes = 0
            for index, view in reader.read(item):
                read_bytes += len(view)
                if not _same(view, item.page.parent.get(index), domain.hasher):
                    sample.wrong_chunk = item.page.page_no * PAGE_ENTRIES + index
            line.finish(item, {})
            ctx.add(read=read_bytes)

    run_crew(workers, "sample", work, line.stop)
    return sample


def _same(view: memoryview, before: bytes | None, hasher: ChunkHasher) -> bool:
    if before is None:
        return is_zero(view)
    return before.startswith(hasher.fast(view))


def _unchanged(
    plans: Iterable[PagePlan], touched: Callable[[int], frozenset[int]]
) -> Iterator[PagePlan]:
    """The plans without what was touched."""
    for plan in plans:
        out = touched(plan.page_no)
        yield PagePlan(
            plan.page_no,
            tuple(index for index in plan.chunks if index not in out),
            plan.parent,
            tuple(index for index in plan.gone if index not in out),
        )


def _drawn(plans: Iterable[PagePlan], share: float, sample: Sample) -> Iterator[PagePlan]:
    """Some chunks of the plans at random, and the last one of all; ends at a plan one of whose
    parent's chunks is gone."""
    owed = max(FEWEST_CHUNKS - 1.0, 0.0)
    before: PagePlan | None = None
    for plan in chain(plans, [None]):
        if plan is not None and plan.gone:
            sample.wrong_chunk = plan.page_no * PAGE_ENTRIES + plan.gone[0]
            return
        if plan is not None and not plan.chunks:
            continue
        if before is not None:
            owed += share * len(before.chunks)
            last = before.chunks[-1:] if plan is None and FEWEST_CHUNKS else ()
            others = before.chunks[:-1] if last else before.chunks
            count = min(int(owed), len(others))
            owed -= count
            drawn = (*sorted(random.sample(others, count)), *last)
            sample.chunks += len(drawn)
            if drawn:
                yield PagePlan(before.page_no, drawn, before.parent)
        before = plan
