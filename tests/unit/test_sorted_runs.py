"""storage.view.sorted_runs: all items come, in order, an id's together, a few at a time."""

from __future__ import annotations

import os
import random
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from storage.view import sorted_runs
from storage.view.sorted_runs import ChunkSet, Runs, ranges

ID = 32


def ids(chance: random.Random, count: int, *, alike: bool) -> list[bytes]:
    """Distinct ids, ascending; `alike`: with 30 bytes in common, as a guest may choose them."""
    if alike:
        numbers = chance.sample(range(1 << 16), count)
        return sorted(bytes(30) + number.to_bytes(2, "big") for number in numbers)
    return sorted(chance.randbytes(ID) for _ in range(count))


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("most", [1, 7, 100, 10_000])
def test_all_items_come_in_order_and_those_of_an_id_together(
    tmp_path: Path, most: int, alike: bool
) -> None:
    chance = random.Random(most)
    common = ids(chance, 5, alike=alike)
    kinds, expected = [Runs(ID + 1, str(tmp_path)), Runs(ID + 2, str(tmp_path))], []
    for number, kind in enumerate(kinds):
        for run in range(chance.choice((1, 6))):
            mine = sorted({*ids(chance, chance.randrange(200), alike=alike), *common})
            kind.add(b"".join(chunk + bytes([run] * (number + 1)) for chunk in mine))
            expected += [(chunk, number, run) for chunk in mine]
    found, spans = [], []
    for pieces in ranges(most, *kinds):
        some = []
        for number, (kind, runs) in enumerate(zip(kinds, pieces, strict=True)):
            for piece in runs:
                starts = range(0, len(piece), kind.item_bytes)
                some += [(piece[at : at + ID], number, piece[at + ID]) for at in starts]
        found += sorted(some)
        spans.append((min(some)[0], max(some)[0]))
        runs_in_all = sum(len(runs) for runs in pieces)
        assert len(some) <= max(2 * most, 2 * runs_in_all)
    assert found == sorted(expected)
    assert all(before[1] < after[0] for before, after in pairwise(spans))
    for kind in kinds:
        kind.close()


def test_one_run_makes_no_file_and_none_has_a_name(tmp_path: Path) -> None:
    runs = Runs(ID, str(tmp_path / "absent"))
    assert list(ranges(10, runs)) == []
    runs.add(bytes(ID))
    runs.add(b"")
    assert list(ranges(10, runs)) == [[[bytes(ID)]]]
    runs.close()
    filed = Runs(ID, str(tmp_path))
    filed.add(bytes(ID))
    filed.add(bytes(ID))
    assert os.listdir(tmp_path) == []
    assert list(ranges(10, filed)) == [[[bytes(ID), bytes(ID)]]]
    filed.close()


def test_no_directory_for_the_file_is_an_oserror(tmp_path: Path) -> None:
    runs = Runs(ID, str(tmp_path / "absent"))
    runs.add(bytes(ID))
    with pytest.raises(FileNotFoundError):
        runs.add(bytes(ID))


@pytest.mark.parametrize("most", [1, 7, 100, 10_000])
def test_a_set_gives_each_chunk_once_and_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(sorted_runs, "IDS_AT_ONCE", most)
    chance = random.Random(most)
    chunks = ids(chance, 500, alike=False)
    with closing(ChunkSet(str(tmp_path))) as found:
        for _ in range(40):
            found.update(chance.sample(chunks, 50))
        found.update(chunks)
        for _ in range(2):
            parts = list(found.parts())
            assert sorted(chunk for part in parts for chunk in part) == chunks
            assert max(map(len, parts)) <= max(most, 41)
        found.update([bytes(ID)])
        assert sum(map(len, found.parts())) == 501
    assert os.listdir(tmp_path) == []


def test_an_empty_set_has_no_parts(tmp_path: Path) -> None:
    with closing(ChunkSet(str(tmp_path / "absent"))) as found:
        found.update([])
        assert list(found.parts()) == []
