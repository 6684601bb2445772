"""Power failures and failing calls at every call of every script, in numbers that fit a check."""

from __future__ import annotations

import pytest

from storage.session import Session
from tests.crash_scripts import SCRIPTS
from tests.crash_sweep import sweep
from tests.crash_world import Chance, World, repeatable

POINTS = 10_000
FAULTS_EVERY = 40


def test_nothing_is_lost_wherever_it_stops(capsys: pytest.CaptureFixture[str]) -> None:
    tally = sweep(seed=1, points=POINTS, faults_every=FAULTS_EVERY)
    with capsys.disabled():
        print(f" {tally.points} crash points, {tally.faults} failing calls", end=" ")
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.points >= POINTS
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
