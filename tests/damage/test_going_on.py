"""Deep checks that are interrupted, held back, and gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.points.pack_reads import PackReads
from engine.state import State
from storage.check import report as check_report
from storage.check.check import Cancelled, check_point
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
    again.end()
    fresh = PackReads(state, "p", clock)
    assert check_point(str(site.path), deep=True, reads=fresh).packs_skipped == 0


def test_what_was_not_read_for_longest_comes_first(
    site: Site, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Ticks()
    first = PackReads(state, "p", clock)
    check_point(str(site.path), deep=True, reads=first)
    first.end()
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


def packs_of(state: State) -> set[str]:
    return {row.pack for row in state.pack_reads.values()}


def test_what_is_remembered_of_packs_that_are_gone_goes(state: State) -> None:
    """Else the state would grow with every pack that there ever was."""
    clock = Ticks()
    first = PackReads(state, "p", clock)
    for pack in ("stays", "goes"):
        first.done(pack)
    first.end()
    assert packs_of(state) == {"stays", "goes"}
    other = PackReads(state, "q", clock)
    other.done("theirs")
    other.flush()
    second = PackReads(state, "p", clock)
    second.done("stays")
    second.flush()
    assert packs_of(state) == {"", "stays", "goes", "theirs"}
    resumed = PackReads(state, "p", clock)
    assert resumed.skip("stays")
    resumed.end()
    assert packs_of(state) == {"", "stays", "theirs"}  # "": the other point's verify


def test_a_clock_that_was_set_back_skips_nothing(state: State) -> None:
    late, early = Ticks(), Ticks()
    late.now = 1e9
    first = PackReads(state, "p", late)
    first.done("one")
    first.done("two")
    first.end()
    second = PackReads(state, "p", early)
    second.done("one")
    second.flush()
    resumed = PackReads(state, "p", early)
    assert (resumed.skip("one"), resumed.skip("two")) == (True, False)


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
