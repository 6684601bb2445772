"""The first backup of (d), a clone of (a) for another VM, where (a) is on the point already."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench.corpora import corpus, difference
from bench.lab import Lab
from bench.peers import absent, present
from bench.results import Figure, Note, Result
from bench.rounds import later_backups, told
from bench.runner import alone

QUESTION = "How much does a second VM from the same template take?"
PEERS = ("restic", "borg")
MIB = 1 << 20


def run(lab: Lab) -> Iterator[Result]:
    """What changed is counted in 4 KiB blocks."""
    before, volume = corpus(lab, "a"), corpus(lab, "d")
    yield from absent(*PEERS)
    between = difference(before, volume)
    yield Note(
        f"(d) has {between.changed_bytes / MIB:.0f} MiB of changed 4 KiB blocks in"
        f" {between.chunks} MiB of the disk; compressed {between.compressed_bytes / MIB:.1f} MiB."
    )
    costs = later_backups(lab, before, volume, present(*PEERS), parent=False)
    yield from told("first backup of (d)", costs)
    stored = tuple(cost.stored_bytes / between.compressed_bytes for cost in costs["vmkeep"])
    yield Figure("template/stored", stored)


if __name__ == "__main__":
    sys.exit(alone(__file__))
