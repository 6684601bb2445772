"""Deep checks that are interrupted, held back, and gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.model import PackRead
from engine.packreads import PackReads
from engine.state import State
from storage import check_report
from storage.check import Cancelled, check_point
from tests.damage.site import Site


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(str(tmp_path / "state"))
    yield state
    state.close()


class Ticks:
    """A clock that moves by one each time it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def interrupted(site: Site, reads: PackReads, after: int) -> None:
    """A check that is stopped when it has read `after` packs."""
    begun = {"done": 0}

    def on_progress(_done: int, _total: int) -> None:
        begun["done"] += 1

    with pytest.raises(Cancelled):
        check_point(
            str(site.path),
            deep=True,
            reads=reads,
            on_progress=on_progress,
            cancelled=lambda: begun["done"] >= after,
        )
    reads.flush()


def test_it_goes_on_where_it_stopped_and_then_begins_anew(site: Site, state: State) -> None:
    clock = Ticks()
    interrupted(site, PackReads(state, "p", clock), 2)
    read = {row.pack for row in state.pack_reads.values() if row.pack}
    assert len(read) == 2
    again = PackReads(state, "p", clock)
    report = check_point(str(site.path), deep=True, reads=again)
    again.flush()
    assert report.packs == 5
    assert report.packs_skipped == 2
    PackReads.end(state, "p")
    fresh = PackReads(state, "p", clock)
    assert check_point(str(site.path), deep=True, reads=fresh).packs_skipped == 0


def test_what_was_not_read_for_longest_comes_first(
    site: Site, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Ticks()
    first = PackReads(state, "p", clock)
    check_point(str(site.path), deep=True, reads=first)
    first.flush()
    PackReads.end(state, "p")
    order = sorted((row for row in state.pack_reads.values()), key=lambda row: row.at)
    mine = [row.pack for row in order if row.pack.startswith(site.label.cluster_uuid)]
    newest_first = PackReads(state, "p", clock)
    state.pack_reads.put(newest_first._row(mine[0], clock()))
    state.pack_reads.delete("p/")
    second = PackReads(state, "p", clock)
    noted: list[str] = []
    done = second.done
    monkeypatch.setattr(second, "done", lambda pack: (noted.__iadd__([pack]), done(pack)))
    check_point(str(site.path), deep=True, reads=second)
    assert [pack for pack in noted if pack in mine] == [*mine[1:], mine[0]]


def test_what_a_clock_that_was_ahead_has_read_is_read_again(site: Site, state: State) -> None:
    late = Ticks()
    late.now = 1e9
    ahead = PackReads(state, "p", late)
    check_point(str(site.path), deep=True, reads=ahead)
    ahead.flush()
    PackReads.end(state, "p")
    clock = Ticks()
    interrupted(site, PackReads(state, "p", clock), 2)
    again = PackReads(state, "p", clock)
    assert check_point(str(site.path), deep=True, reads=again).packs_skipped == 2


def test_packs_that_are_gone_are_forgotten(site: Site, state: State) -> None:
    clock = Ticks()
    gone = f"{site.label.cluster_uuid}/gone"
    state.pack_reads.put_all(PackRead(point_uuid=p, pack=gone, at=clock()) for p in "pq")
    reads = PackReads(state, "p", clock)
    check_point(str(site.path), deep=True, reads=reads)
    reads.flush()
    PackReads.end(state, "p")
    rows = [(row.point_uuid, row.pack) for row in state.pack_reads.values()]
    assert ("q", gone) in rows
    assert ("p", gone) not in rows
    assert len(rows) == 1 + 5


class Sleeper:
    """In the place of `time`: nothing but sleeping takes any."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize("rate", [0.25, 1, 4])
def test_it_is_held_back(site: Site, monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    """What is read takes as long as the rate says, when reading itself takes no time."""
    whole = check_point(str(site.path), deep=True).bytes_read
    clock = Sleeper()
    monkeypatch.setattr(check_report, "time", clock)
    check_point(str(site.path), deep=True, rate_bytes_per_s=int(whole * rate))
    assert clock.now_s == pytest.approx(1 / rate, rel=0.01)
    clock.now_s = 0.0
    check_point(str(site.path), deep=True)
    assert clock.now_s == 0.0
