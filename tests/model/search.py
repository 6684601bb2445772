"""Breadth-first search through every interleaving of the log protocol's processes.

    python -m tests.model.search [--full] [--only NAME] [--walks N]

The fold, the index, gc's plan, the orphans' judgement, the rebuild and the ops' builders are the
real ones; the disk, the hosts and the order of things are a model (tests.model.world). Every state
of a scenario is visited, and in each the invariants of docs/design.md hold, also after a crash of
everybody just there (tests.model.recovery). All processes at once have more states than there is
time for: these are sampled by random walks to the end. Prints what was counted.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

from storage.domain import gc
from tests.model.recovery import Recovery
from tests.model.scenarios import EVERYBODY, FULL, SMALL, Scenario, start
from tests.model.world import Model, Rules, World

# So that a chain of two manifests is long enough to be folded.
CHAIN_LIMIT = 1


@dataclass(frozen=True, slots=True)
class Count:
    """What a search visited. `crashes`: different (log, disk) that were recovered from; `labels`:
    the steps that occurred, each once."""

    states: int = 0
    steps: int = 0
    nodes: int = 0
    records: int = 0
    crashes: int = 0
    ends: int = 0
    labels: frozenset[str] = frozenset()

    def __add__(self, other: Count) -> Count:
        return Count(
            self.states + other.states,
            self.steps + other.steps,
            self.nodes + other.nodes,
            self.records + other.records,
            self.crashes + other.crashes,
            self.ends + other.ends,
            self.labels | other.labels,
        )

    def __str__(self) -> str:
        return (
            f"{self.states} states, {self.steps} steps, {self.records} records folded to "
            f"{self.nodes} log states, {self.crashes} crashes recovered from, {self.ends} ends"
        )


class Broken(Exception):
    """A violation, with the steps that lead to it."""

    def __init__(self, why: str, trace: Sequence[str]) -> None:
        super().__init__("\n  ".join([why, *trace]))
        self.why = why


def search(scenario: Scenario, rules: Rules | None = None, limit: int = 0) -> Count:
    """Visits every state, nearest first; no more than `limit` if there is one. Raises Broken."""
    with patch.object(gc, "CHAIN_LIMIT", CHAIN_LIMIT):
        model, world = start(scenario, rules)
        return _Search(model, world).run(limit)


class _Search:
    def __init__(self, model: Model, world: World) -> None:
        self.model = model
        self.recovery = Recovery(model)
        self.seen: dict[World, World | None] = {world: None}
        self.labels: set[str] = set()
        self.steps = self.ends = 0

    def run(self, limit: int) -> Count:
        level = list(self.seen)
        while level and not (limit and len(self.seen) >= limit):
            level = [after for world in level for after in self._visit(world)]
        return self.count()

    def _visit(self, world: World) -> list[World]:
        """Checks a state; returns those that follow it and are new."""
        new = []
        steps, label = 0, "its own check"
        try:
            self.model.check(world)
            self.recovery.check(world)
            for label, after in self.model.steps(world):
                steps += 1
                self.labels.add(label)
                if after not in self.seen:
                    self.seen[after] = world
                    new.append(after)
        except Exception as error:
            raise Broken(f"{type(error).__name__}: {error}", self._trace(world, label)) from error
        self.steps += steps
        self.ends += not steps
        return new

    def count(self) -> Count:
        return Count(
            states=len(self.seen),
            steps=self.steps,
            nodes=sum(len(chain.nodes) for chain in self.model.chains),
            records=sum(len(chain.edges) for chain in self.model.chains),
            crashes=self.recovery.count,
            ends=self.ends,
            labels=frozenset(self.labels),
        )

    def _trace(self, world: World, last: str) -> list[str]:
        labels = [f"then, after {last}"]
        while (before := self.seen[world]) is not None:
            labels += [label for label, after in self.model.steps(before) if after == world][:1]
            world = before
        return labels[::-1]


def walk(scenario: Scenario, count: int, seed: int) -> Count:
    """Random walks, each until nobody has a step left. Raises Broken."""
    with patch.object(gc, "CHAIN_LIMIT", CHAIN_LIMIT):
        model, first = start(scenario)
        searcher = _Walks(model, first)
        chance = random.Random(seed)
        for _ in range(count):
            searcher.once(first, chance)
        return searcher.count()


class _Walks(_Search):
    def once(self, world: World, chance: random.Random) -> None:
        trace: list[str] = []
        try:
            while True:
                self.model.check(world)
                self.recovery.check(world)
                steps = list(self.model.steps(world))
                if not steps:
                    break
                self.steps += 1
                label, world = chance.choice(steps)
                self.labels.add(label)
                trace.append(label)
                self.seen.setdefault(world, None)
        except Exception as error:
            raise Broken(f"{type(error).__name__}: {error}", trace) from error
        self.ends += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="minutes rather than seconds")
    parser.add_argument("--only", default="", help="one scenario")
    parser.add_argument("--walks", type=int, default=0, help="random walks of everybody at once")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    scenarios = FULL if options.full else SMALL
    walks = options.walks or (3_000 if options.full else 200)
    total = Count()
    try:
        for scenario in scenarios:
            if options.only in ("", scenario.name):
                total += _timed(scenario.name, partial(_complete, scenario))
        if options.only in ("", EVERYBODY.name):
            total += _timed(EVERYBODY.name, partial(walk, EVERYBODY, walks, options.seed))
    except Broken as error:
        print(f"VIOLATION: {error}")
        return 1
    print(f"model: {total}; no violation")
    return 0


def _complete(scenario: Scenario) -> Count:
    count = search(scenario)
    if count.states < scenario.at_least:
        raise Broken(f"{scenario.name}: {scenario.at_least} states were expected", [str(count)])
    return count


def _timed(name: str, run: Callable[[], Count]) -> Count:
    begun = time.monotonic()
    count = run()
    print(f"model {name}: {count} in {time.monotonic() - begun:.1f} s", flush=True)
    return count


if __name__ == "__main__":
    sys.exit(main())
