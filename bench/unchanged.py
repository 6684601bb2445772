"""The backup of (a) when nothing has changed since the last one: a scan."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from bench.corpora import corpus
from bench.lab import Cost, Lab, times
from bench.peers import absent, present
from bench.results import Figure, Result, ratios
from bench.rounds import faster, later_backups, prepare, told
from bench.runner import alone

QUESTION = "How long does the backup of an unchanged disk take, without being told so?"
PEERS = ("restic", "borg")
CAT = "limit: cat"


def run(lab: Lab) -> Iterator[Result]:
    """All programs read the disk again; its times are no proof for a VM's disk."""
    volume = corpus(lab, "a")
    yield from absent(*PEERS)
    limits = {CAT: lambda: _cat(lab, volume)}
    costs = later_backups(lab, volume, volume, present(*PEERS), limits=limits)
    yield from told("unchanged disk (a)", costs)
    yield from faster(costs, "unchanged", ("restic",))
    yield Figure("unchanged/cat", ratios(times(costs["vmkeep"]), times(costs[CAT])))


def _cat(lab: Lab, volume: Path) -> Cost:
    prepare(volume, "warm")
    return lab.measure(["cat", volume])


if __name__ == "__main__":
    sys.exit(alone(__file__))
