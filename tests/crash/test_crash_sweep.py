"""Power failures and failing calls at every call of every script, in numbers that fit a check."""

from __future__ import annotations

import pytest

from storage.domain.session import Session
from storage.errors import StorageError
from tests import crash_sweep
from tests.crash_scripts import FULL, SCRIPTS
from tests.crash_sweep import Proved, Tally, crash, sweep
from tests.crash_world import Broken, Chance, World, repeatable
from tests.store import Saved

POINTS = 10_000
FAULTS_EVERY = 40


def test_nothing_is_lost_wherever_it_stops(capsys: pytest.CaptureFixture[str]) -> None:
    tally = sweep(seed=1, points=POINTS, faults_every=FAULTS_EVERY)
    with capsys.disabled():
        print(f" {tally}", end=" ")
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.points >= POINTS
    assert POINTS // 2 < tally.images < tally.points
    assert tally.faults >= 10 * len(SCRIPTS)


def test_what_was_interrupted_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the script that is about it would prove nothing of it."""
    adopted: list[bool] = []
    adopt = Session._adopt_salvaged

    def noting(session: Session, path: str) -> bool:
        adopted.append(adopt(session, path))
        return adopted[-1]

    monkeypatch.setattr(Session, "_adopt_salvaged", noting)
    with repeatable() as scratch, Chance.seeded("interrupted"):
        world = World(scratch)
        for step in SCRIPTS["interrupted"]:
            step(world)
        world.discard()
    assert adopted.count(True) >= 4


def test_an_image_is_proved_once_for_each_thing_that_is_expected_of_it() -> None:
    proved: Proved = {}
    with repeatable() as scratch, Chance.seeded("once"):
        world = World(scratch)
        world.save(FULL)
        tallies = [crash(world, "none", f"{at}", proved) for at in range(40)]
        assert sum(tally.points for tally in tallies) > 42
        # With the view and without; but those in whose recovery the power fails, too, have others.
        assert sum(tally.images - (tally.points - 1) for tally in tallies) == len(proved) == 2
        world.sides[0].live[Saved("22222222-2222-4222-8222-222222222222", "", "")] = FULL
        with pytest.raises(Broken, match="lost"):
            crash(world, "none", "0", proved)
        world.sides[0].live.popitem()
        assert crash(world, "none", "0", proved) == Tally(points=1)
        world.fs.directory(f"{world.domain().paths.log}/00000000").durable.popitem()
        with pytest.raises((Broken, StorageError)):
            crash(world, "none", "0", proved)
        world.discard()


def test_a_thorough_proof_is_not_spared_by_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    prove = World.prove

    def noting(world: World, *, thorough: bool) -> None:
        asked.append(thorough)
        prove(world, thorough=thorough)

    monkeypatch.setattr(World, "prove", noting)
    with repeatable() as scratch, Chance.seeded("thorough"):
        world = World(scratch)
        world.save(FULL)
        proved: Proved = {}
        for every, thorough in ((1e9, False), (1e-9, True)):
            monkeypatch.setattr(crash_sweep, "THOROUGH_EVERY", every)
            for at in range(10):
                crash(world, "none", f"{at}", proved)
            assert set(proved.values()) == {thorough}
            asked.clear()
            assert crash(world, "none", "0", proved) == Tally(points=1)
            assert asked == []
        world.discard()
