"""Power failures and failing calls at every call of every script, in numbers that fit a check."""

from __future__ import annotations

import pytest

from tests.crash_scripts import SCRIPTS
from tests.crash_sweep import sweep

POINTS = 10_000
FAULTS_EVERY = 40


def test_nothing_is_lost_wherever_it_stops(capsys: pytest.CaptureFixture[str]) -> None:
    tally = sweep(seed=1, points=POINTS, faults_every=FAULTS_EVERY)
    with capsys.disabled():
        print(f" {tally.points} crash points, {tally.faults} failing calls", end=" ")
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.points >= POINTS
    assert tally.faults >= 10 * len(SCRIPTS)
