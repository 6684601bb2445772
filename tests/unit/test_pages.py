"""engine.backup.pages, engine.jobs.crew: which chunks are looked at, in which order they come."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backup.pages import (
    OPEN_PAGES,
    Item,
    PageLine,
    PagePlan,
    ascending,
    chunk_runs,
    plan_changed,
    plan_pages,
)
from engine.jobs.crew import Stop, run_crew
from storage.format.manifests import PAGE_ENTRIES

CHUNK = 64 << 10
GONE = b"gone"


@st.composite
def disk_ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(offset, length), ascending and apart, over a few pages."""
    bounds = draw(st.lists(st.integers(0, 5 * PAGE_ENTRIES * CHUNK), unique=True, max_size=40))
    bounds.sort()
    return [(a, b - a) for a, b in zip(bounds[::2], bounds[1::2], strict=False)]


parents = st.dictionaries(
    st.integers(0, 6),
    st.dictionaries(st.integers(0, PAGE_ENTRIES - 1), st.just(b"old"), min_size=1, max_size=5),
    max_size=4,
).map(lambda pages: sorted(pages.items()))


def touched(ranges: list[tuple[int, int]]) -> set[int]:
    """The chunks that the ranges touch, the slow way."""
    return {
        chunk
        for offset, length in ranges
        for chunk in range(offset // CHUNK, (offset + length - 1) // CHUNK + 1)
    }


def line_of(
    plans: list[PagePlan], out: list[tuple[int, dict[int, bytes]]], item_chunks: int = 8
) -> PageLine:
    def emit(page_no: int, entries: Mapping[int, bytes]) -> None:
        out.append((page_no, dict(entries)))

    return PageLine(iter(plans), 1 << 60, CHUNK, item_chunks, GONE, emit)


@given(disk_ranges())
def test_runs_are_what_the_ranges_touch(ranges: list[tuple[int, int]]) -> None:
    runs = list(chunk_runs(ranges, CHUNK))
    chunks = [chunk for first, end in runs for chunk in range(first, end)]
    assert chunks == sorted(touched(ranges))


def test_two_ranges_in_one_chunk_count_once() -> None:
    assert list(chunk_runs([(0, 10), (20, 10), (CHUNK - 1, 2)], CHUNK)) == [(0, 1), (1, 2)]


@given(disk_ranges(), parents)
def test_plans_have_all_chunks_and_all_parents_pages(
    ranges: list[tuple[int, int]], parent: list[tuple[int, dict[int, bytes]]]
) -> None:
    plans = list(plan_pages(ranges, CHUNK, parent))
    numbers = [plan.page_no for plan in plans]
    assert numbers == sorted(set(numbers))
    chunks = [plan.page_no * PAGE_ENTRIES + at for plan in plans for at in plan.chunks]
    assert chunks == sorted(touched(ranges))
    assert [(plan.page_no, plan.parent) for plan in plans if plan.parent] == parent


@given(disk_ranges(), parents, st.integers(1, 200))
def test_items_cover_the_plan_and_marks_the_rest(
    ranges: list[tuple[int, int]], parent: list[tuple[int, dict[int, bytes]]], item_chunks: int
) -> None:
    out: list[tuple[int, dict[int, bytes]]] = []
    line = line_of(list(plan_pages(ranges, CHUNK, parent)), out, item_chunks)
    seen: list[int] = []
    while (item := line.pull()) is not None:
        assert 0 < len(item.chunks) <= item_chunks
        seen += [item.page.page_no * PAGE_ENTRIES + at for at in item.chunks]
        line.finish(item, dict.fromkeys(item.chunks, b"new"))
    assert seen == sorted(touched(ranges))
    found = {no * PAGE_ENTRIES + at: entry for no, page in out for at, entry in page.items()}
    expected = {no * PAGE_ENTRIES + at: GONE for no, page in parent for at in page}
    expected |= dict.fromkeys(seen, b"new")
    assert found == expected
    assert [no for no, _ in out] == sorted({no for no, _ in out})


def pull(line: PageLine) -> Item:
    item = line.pull()
    assert item is not None
    return item


@given(disk_ranges(), disk_ranges(), parents)
def test_changed_plans_are_the_changed_part_of_all(
    changed: list[tuple[int, int]],
    ranges: list[tuple[int, int]],
    parent: list[tuple[int, dict[int, bytes]]],
) -> None:
    pages, wanted = dict(parent), touched(changed)
    plans = list(plan_changed(changed, ranges, CHUNK, lambda page_no: pages.get(page_no, {})))
    numbers = [plan.page_no for plan in plans]
    assert numbers == sorted(set(numbers))
    whole = list(plan_pages(ranges, CHUNK, parent))
    for kind in ("chunks", "gone"):
        found = [plan.page_no * PAGE_ENTRIES + at for plan in plans for at in getattr(plan, kind)]
        every = {plan.page_no * PAGE_ENTRIES + at for plan in whole for at in getattr(plan, kind)}
        assert found == sorted(every & wanted)
    assert all(plan.parent == pages.get(plan.page_no, {}) for plan in plans)


@pytest.mark.parametrize("ranges", [[(CHUNK, 1), (0, 1)], [(5, -1)], [(-1, 3)]])
def test_changed_ranges_out_of_order_are_refused(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="range"):
        list(plan_changed(ranges, [], CHUNK, lambda _: {}))


def test_changed_ranges_may_overlap() -> None:
    assert list(ascending([(0, 9), (0, 3), (5, 1)])) == [(0, 9), (0, 3), (5, 1)]
    plans = list(plan_changed([(0, 2 * CHUNK), (CHUNK, 1)], [(0, 9 * CHUNK)], CHUNK, lambda _: {}))
    assert plans == [PagePlan(0, (0, 1), {})]


def full_pages(count: int) -> list[PagePlan]:
    return [PagePlan(number, (0, 1), {}) for number in range(count)]


def test_pages_come_out_in_order_whatever_the_order_of_finishing() -> None:
    out: list[tuple[int, dict[int, bytes]]] = []
    line = line_of(full_pages(3), out, item_chunks=1)
    items = [pull(line) for _ in range(6)]
    for item in reversed(items):
        assert out == []
        line.finish(item, {item.chunks[0]: b"x"})
    assert out == [(number, {0: b"x", 1: b"x"}) for number in range(3)]
    assert line.pull() is None


def test_a_page_is_not_emitted_while_items_of_it_wait() -> None:
    out: list[tuple[int, dict[int, bytes]]] = []
    line = line_of(full_pages(1), out, item_chunks=1)
    line.finish(pull(line), {0: b"x"})
    assert out == []
    line.finish(pull(line), {1: b"x"})
    assert out == [(0, {0: b"x", 1: b"x"})]


def test_nobody_runs_ahead_of_a_slow_item_without_end() -> None:
    out: list[tuple[int, dict[int, bytes]]] = []
    line = line_of(full_pages(OPEN_PAGES + 5), out)
    slow = pull(line)
    for _ in range(OPEN_PAGES - 1):
        line.finish(item := pull(line), {item.chunks[0]: b"x"})
    pulled: list[Item | None] = []
    waiting = threading.Thread(target=lambda: pulled.append(line.pull()))
    waiting.start()
    assert pulled == []
    line.finish(slow, {0: b"x"})
    waiting.join(30)
    assert len(pulled) == 1
    assert pulled[0] is not None
    assert pulled[0].page.page_no == OPEN_PAGES
    assert len(out) == OPEN_PAGES


def test_many_pages_that_need_no_reading_do_not_wait_for_anybody() -> None:
    out: list[tuple[int, dict[int, bytes]]] = []
    parent = [(number, {7: b"old"}) for number in range(3 * OPEN_PAGES)]
    line = line_of(list(plan_pages([], CHUNK, parent)), out)
    assert line.pull() is None
    assert out == [(number, {7: GONE}) for number in range(3 * OPEN_PAGES)]


def test_a_failure_wakes_who_waits() -> None:
    line = line_of(full_pages(OPEN_PAGES + 1), [])
    for _ in range(OPEN_PAGES):
        pull(line)
    pulled: list[Item | None] = []
    waiting = threading.Thread(target=lambda: pulled.append(line.pull()))
    waiting.start()
    line.stop.fail(KeyError())
    waiting.join(30)
    assert pulled == [None]


def test_spans_add_up_to_the_end_of_the_last_chunk() -> None:
    plans = list(plan_pages([(5 * CHUNK, 10), (3000 * CHUNK, CHUNK)], CHUNK, []))
    line = line_of(plans, [])
    spans = [pull(line).span_bytes for _ in range(2)]
    assert spans == [6 * CHUNK, 2995 * CHUNK]
    assert line.scanned_bytes == 3001 * CHUNK


def test_crew_raises_the_first_error_when_all_have_ended() -> None:
    stop = Stop()
    barrier = threading.Barrier(3)
    ended: list[str] = []

    def work() -> None:
        barrier.wait()
        if threading.current_thread().name == "t-0":
            raise KeyError("first")
        while not stop:
            pass
        ended.append(threading.current_thread().name)

    with pytest.raises(KeyError, match="first"):
        run_crew(3, "t", work, stop)
    assert sorted(ended) == ["t-1", "t-2"]


def test_crew_of_none_is_one() -> None:
    ran: list[bool] = []
    run_crew(0, "t", lambda: ran.append(True), Stop())
    assert ran == [True]
