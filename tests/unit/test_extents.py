"""engine.snapshot.extents: comparing maps, with what no file system at hand shows on demand."""

from __future__ import annotations

import os

import pytest

from engine.snapshot.extents import Extent, differences, extent_map
from tests.conftest import LoopFs
from tests.rig import write_at
from tests.tracking_rig import KEEP_SIZE, fallocate

BLOCK = 4096
SIZE = 8 * BLOCK
UNKNOWN, DELALLOC, ENCODED, ENCRYPTED = 0x2, 0x4, 0x8, 0x80
NOT_ALIGNED, INLINE, TAIL, UNWRITTEN, MERGED = 0x100, 0x200, 0x400, 0x800, 0x1000
NOT_LEARNT_YET = 0x8000


def extent(first: int, end: int, place: int, flags: int = 0) -> Extent:
    """All in blocks."""
    return Extent(first * BLOCK, end * BLOCK, place * BLOCK, flags)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_the_map_tells_written_from_preallocated(loop_fs: LoopFs, kind: str) -> None:
    path = loop_fs(kind, 400 << 20) / "v"
    path.touch()
    fallocate(path, KEEP_SIZE, 0, 1 << 20)
    write_at(path, 0, bytes(BLOCK))
    os.truncate(path, 1 << 20)
    os.sync()
    with path.open("rb") as file:
        first, *rest = extent_map(file.fileno(), 1 << 20)
    assert (first.start, first.end, first.sure, first.zero) == (0, BLOCK, True, False)
    assert rest
    assert all(one.zero for one in rest)


def changed(before: list[Extent], after: list[Extent]) -> list[tuple[int, int]]:
    """(first, count) in blocks."""
    found = differences(before, after, SIZE)
    return [(at // BLOCK, length // BLOCK) for at, length in found]


def test_the_same_place_is_the_same() -> None:
    assert changed([extent(0, 8, 100)], [extent(0, 8, 100)]) == []
    assert changed([extent(0, 8, 100)], [extent(0, 3, 100), extent(3, 8, 103, MERGED)]) == []


def test_places_are_those_of_each_block() -> None:
    assert changed([extent(0, 8, 100)], [extent(0, 4, 100), extent(4, 8, 100)]) == [(4, 4)]
    assert changed([extent(0, 8, 100)], [extent(1, 8, 100)]) == [(0, 8)]
    assert changed([extent(2, 5, 50)], [extent(2, 4, 50), extent(4, 6, 52)]) == [(5, 1)]


def test_a_hole_is_no_place() -> None:
    assert changed([], []) == []
    assert changed([extent(2, 4, 10)], []) == changed([], [extent(2, 4, 10)]) == [(2, 2)]


def test_preallocated_blocks_that_were_written_where_they_lie() -> None:
    before, after = [extent(0, 8, 100, UNWRITTEN)], [extent(0, 8, 100)]
    assert changed(before, after) == changed(after, before) == [(0, 8)]
    assert changed(before, before) == changed(before, []) == []


@pytest.mark.parametrize(
    "flag",
    [UNKNOWN, DELALLOC, ENCODED, ENCRYPTED, NOT_ALIGNED, INLINE, TAIL, NOT_LEARNT_YET],
)
@pytest.mark.parametrize("also", [0, UNWRITTEN])
def test_what_does_not_say_where_it_is_counts_as_changed(flag: int, also: int) -> None:
    doubtful, plain = [extent(0, 8, 100, flag | also)], [extent(0, 8, 100)]
    for before, after in ((doubtful, doubtful), (plain, doubtful), (doubtful, plain)):
        assert changed(before, after) == [(0, 8)]


def test_place_0_is_none() -> None:
    assert changed([extent(0, 8, 0)], [extent(0, 8, 0)]) == [(0, 8)]
