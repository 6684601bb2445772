"""Which chunks of a disk to look at, and putting the results together in page order.

`plan_pages` merges a source's allocated ranges with the parent's pages into one ascending stream of
`PagePlan`: the chunks that have to be read, and the parent's chunks that lie in holes now, which
need no reading to become zero marks. Holes in both cost nothing, however large.
`plan_changed` does so for the changed part of a disk only: what it leaves out stays the parent's.

A page is cut into items of a few chunks. Many threads pull items and finish them in any order; a
page is emitted when it is complete and all before it are. So that one slow item does not let the
others run ahead without end, only `OPEN_PAGES` pages are under way at once. Memory: these pages.

`PageLine` is a monitor: `_lock` guards everything in it. Pulling and emitting happen under it; both
are short (a few lseek calls, one LMDB page; one append to a buffered file).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from engine.jobs.crew import Stop
from storage.format.manifests import PAGE_ENTRIES

OPEN_PAGES = 16

_NO_MORE = 1 << 62  # above every page number

Ranges: TypeAlias = Iterable[tuple[int, int]]
ParentPage: TypeAlias = Callable[[int], Mapping[int, bytes]]
ParentPages: TypeAlias = Iterable[tuple[int, Mapping[int, bytes]]]
Emit: TypeAlias = Callable[[int, Mapping[int, bytes]], None]


@dataclass(frozen=True, slots=True)
class PagePlan:
    """A page that something is to be done about.

    `chunks`: indexes in the page of what is to be read, ascending. `gone`: those of the parent's
    chunks that lie in holes now.
    """

    page_no: int
    chunks: tuple[int, ...]
    parent: Mapping[int, bytes]
    gone: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """Some chunks of one page (indexes in the page, ascending), for one thread.

    `span_bytes`: how far the disk's scan gets with this item, holes before it included.
    `ahead`: chunks of the same page that will be read soon, for the file system to fetch.
    """

    page: OpenPage
    chunks: tuple[int, ...]
    span_bytes: int
    ahead: tuple[int, ...]


@dataclass(slots=True)
class ItemResult:
    """What one item came to. `entries`: index in the page → chunk id or zero mark.

    `changed`: id → content, each once; views of the thread's buffer. `before`: id → the id that the
    parent (or a lender) has at its place, if any.
    """

    entries: dict[int, bytes] = field(default_factory=dict)
    changed: dict[bytes, memoryview] = field(default_factory=dict)
    before: dict[bytes, bytes] = field(default_factory=dict)
    read_bytes: int = 0
    changed_bytes: int = 0

    def borrow(self, page: Mapping[int, bytes]) -> None:
        """Takes what another disk has at the places for what was there before."""
        for index, chunk_id in self.entries.items():
            if index in page:
                self.before.setdefault(chunk_id, page[index])


@dataclass(slots=True, eq=False)
class OpenPage:
    """A page under way: the entries found so far, and how many items are still out."""

    page_no: int
    parent: Mapping[int, bytes]
    entries: dict[int, bytes]
    waiting: deque[tuple[int, ...]]
    out: int = 0

    @property
    def complete(self) -> bool:
        return not self.waiting and not self.out


def chunk_runs(ranges: Ranges, chunk_size: int) -> Iterator[tuple[int, int]]:
    """(first, past the last) chunk that each of the ranges touches, ascending, never overlapping.

    `ranges` are (offset, length), ascending. A chunk that is data in part counts as a whole.
    """
    done = 0
    for offset, length in ranges:
        first = max(offset // chunk_size, done)
        end = -(-(offset + length) // chunk_size)
        if end > first:
            yield first, end
            done = end


def chunk_pages(runs: Ranges) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(page number, indexes in the page) of the runs' chunks, ascending."""
    page_no, chunks = -1, list[int]()
    for first, end in runs:
        while first < end:
            if first // PAGE_ENTRIES != page_no:
                if chunks:
                    yield page_no, tuple(chunks)
                page_no, chunks = first // PAGE_ENTRIES, []
            start = first - page_no * PAGE_ENTRIES
            past = min(end - page_no * PAGE_ENTRIES, PAGE_ENTRIES)
            chunks.extend(range(start, past))
            first = page_no * PAGE_ENTRIES + past
    if chunks:
        yield page_no, tuple(chunks)


def plan_pages(ranges: Ranges, chunk_size: int, parent: ParentPages) -> Iterator[PagePlan]:
    """All pages with data in `ranges` or entries in `parent`, both ascending; lazily."""
    data = chunk_pages(chunk_runs(ranges, chunk_size))
    old = iter(parent)
    data_page, old_page = next(data, None), next(old, None)
    while data_page is not None or old_page is not None:
        if old_page is None or (data_page is not None and data_page[0] < old_page[0]):
            assert data_page is not None
            yield PagePlan(data_page[0], data_page[1], {})
            data_page = next(data, None)
        elif data_page is None or old_page[0] < data_page[0]:
            yield PagePlan(old_page[0], (), old_page[1], tuple(old_page[1]))
            old_page = next(old, None)
        else:
            present = frozenset(data_page[1])
            gone = tuple(index for index in old_page[1] if index not in present)
            yield PagePlan(data_page[0], data_page[1], old_page[1], gone)
            data_page, old_page = next(data, None), next(old, None)


def plan_changed(
    changed: Ranges, ranges: Ranges, chunk_size: int, parent_page: ParentPage
) -> Iterator[PagePlan]:
    """As plan_pages, for the chunks that `changed` touches; lazily.

    `changed` is (offset, length) with ascending offsets, ValueError otherwise; overlaps are fine.
    """
    present = by_page(ranges, chunk_size)
    for page_no, touched in chunk_pages(chunk_runs(ascending(changed), chunk_size)):
        here, parent = present(page_no), parent_page(page_no)
        yield PagePlan(
            page_no,
            tuple(index for index in touched if index in here),
            parent,
            tuple(index for index in touched if index in parent and index not in here),
        )


def by_page(ranges: Ranges, chunk_size: int) -> Callable[[int], frozenset[int]]:
    """Which indexes the ranges touch, by page number; to be asked for in ascending order."""
    pages = chunk_pages(chunk_runs(ascending(ranges), chunk_size))
    page_no, chunks = -1, tuple[int, ...]()

    def touched(wanted_no: int) -> frozenset[int]:
        nonlocal page_no, chunks
        while page_no < wanted_no:
            page_no, chunks = next(pages, (_NO_MORE, ()))
        return frozenset(chunks) if page_no == wanted_no else frozenset()

    return touched


def ascending(ranges: Ranges) -> Iterator[tuple[int, int]]:
    """The same (offset, length); ValueError where an offset goes back or a length is negative."""
    last = 0
    for offset, length in ranges:
        if offset < last or length < 0:
            raise ValueError(f"range {offset}+{length} after one at {last}")
        last = offset
        yield offset, length


@dataclass(slots=True, eq=False)
class PageLine:
    """Hands out items and emits finished pages. Any thread.

    `emit(page_no, entries)` is called with ascending page numbers, never twice at a time, and not
    for pages without entries. `absent` is the entry of a parent's chunk that lies in a hole now.
    `lookahead` is how many items further on the one to fetch ahead is: the size of the crew.
    """

    plans: Iterator[PagePlan]
    capacity: int
    chunk_size: int
    item_chunks: int
    absent: bytes
    emit: Emit
    lookahead: int = 1
    stop: Stop = field(init=False)
    _open: deque[OpenPage] = field(default_factory=deque, init=False)
    _planned: bool = field(default=False, init=False)
    _scanned_bytes: int = field(default=0, init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)

    def __post_init__(self) -> None:
        self.stop = Stop(self._wake)

    @property
    def scanned_bytes(self) -> int:
        """Sum of the span_bytes of all items handed out so far."""
        return self._scanned_bytes

    def pull(self) -> Item | None:
        """The next item; None when there are no more, or the crew is to stop.

        Waits while as many pages are under way as may be.
        """
        with self._changed:
            while not self.stop:
                if self._open and self._open[-1].waiting:
                    return self._take(self._open[-1])
                self._emit_complete()
                if self._planned:
                    return None
                if len(self._open) >= OPEN_PAGES:
                    self._changed.wait()
                else:
                    self._open_next()
            return None

    def finish(self, item: Item, entries: Mapping[int, bytes]) -> None:
        """Gives an item's result in: index in the page → chunk id or zero mark."""
        with self._changed:
            item.page.entries.update(entries)
            item.page.out -= 1
            if item.page.complete:
                self._emit_complete()

    def _take(self, page: OpenPage) -> Item:
        chunks = page.waiting.popleft()
        page.out += 1
        last = page.page_no * PAGE_ENTRIES + chunks[-1]
        end = min((last + 1) * self.chunk_size, self.capacity)
        span_bytes, self._scanned_bytes = end - self._scanned_bytes, end
        ahead = page.waiting[self.lookahead - 1] if len(page.waiting) >= self.lookahead else ()
        return Item(page, chunks, span_bytes, ahead)

    def _open_next(self) -> None:
        plan = next(self.plans, None)
        if plan is None:
            self._planned = True
            self._emit_complete()
            return
        gone = dict.fromkeys(plan.gone, self.absent)
        size = self.item_chunks
        parts = (plan.chunks[at : at + size] for at in range(0, len(plan.chunks), size))
        self._open.append(OpenPage(plan.page_no, plan.parent, gone, deque(parts)))

    def _emit_complete(self) -> None:
        # The newest page counts as complete only when no item of it waits, so none is missed here.
        while self._open and self._open[0].complete:
            page = self._open.popleft()
            if page.entries:
                self.emit(page.page_no, page.entries)
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
