"""The model finds nothing wrong with the protocol, and something wrong with every broken one."""

from __future__ import annotations

from functools import cache

import pytest

from tests.model.mutations import DEFENCES, MUTATIONS, Mutation
from tests.model.scenarios import EVERYBODY, SMALL, Scenario
from tests.model.search import Broken, search, walk

# What must have happened in the searches, or they would prove little.
MOMENTS = {
    "b1.commit: chunk_missing",
    "b1: store again",
    "b2.commit: session_ended",
    "b4.commit: chunk_missing",
    "b4: store again",
    "b1.commit: settled",
    "b1.commit: raced",
    "gc: fold",
    "gc.retire: raced",
    "gc.abort: session_ended",
    "restore: look up anew",
    "restore.open: backup_not_on_point",
    "import.abort: link",
    "import.commit: link",
    "sweeper.unlink: unlink",
    "reaper.abort: link",
}


counted = cache(search)


@pytest.mark.parametrize("scenario", SMALL, ids=lambda scenario: scenario.name)
def test_no_interleaving_breaks_an_invariant(scenario: Scenario) -> None:
    count = counted(scenario)
    assert count.states >= scenario.at_least
    assert count.ends, "nobody ever came to an end"


def test_the_awkward_moments_occurred() -> None:
    assert frozenset().union(*(counted(scenario).labels for scenario in SMALL)) >= MOMENTS


def test_random_walks_of_everybody_break_no_invariant() -> None:
    assert walk(EVERYBODY, count=100, seed=1).ends == 100


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_broken_rule_is_noticed(mutation: Mutation) -> None:
    scenario = Scenario("mutated", mutation.cast, frozenset(mutation.lossy))
    assert search(scenario).ends, "the rule, unbroken, is no trouble here"
    with mutation.applied(), pytest.raises(Broken) as broken:
        search(scenario, mutation.broken_rules())
    assert broken.value.why.removeprefix("Violation: ").startswith(mutation.says)


@pytest.mark.parametrize("mutation", DEFENCES, ids=lambda mutation: mutation.name)
def test_a_second_rule_stands_behind_it(mutation: Mutation) -> None:
    scenario = Scenario("mutated", mutation.cast, frozenset(mutation.lossy))
    with mutation.applied():
        assert search(scenario, mutation.broken_rules()).ends
