"""The restore of (a) from a fresh backup, beside peers, and decompressing or writing alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench.corpora import corpus
from bench.lab import Lab
from bench.peers import absent, present
from bench.results import Result
from bench.rounds import Filled, Kept, faster, least_restore, restores, told
from bench.runner import alone

QUESTION = "How long does the restore of a disk take?"
PEERS = ("restic", "borg", "qemu-img")


def run(lab: Lab) -> Iterator[Result]:
    """A restore ends when the volume is durable, for all of them. The bars: packs in the cache."""
    volume = corpus(lab, "a")
    yield from absent(*PEERS)
    with lab.scratch() as root:
        backups = {
            who: Kept(root / who, Filled(root / who, maker, volume).program, "first", volume)
            for who, maker in present(*PEERS).items()
        }
        costs = restores(lab, backups, "warm")
        yield from told("restore of (a), warm", costs)
        yield from faster(costs, "restore", ("restic", "borg"))
        yield from least_restore(lab, volume, costs["vmkeep"], "restore/limit", "restore of (a)")
        yield from told("restore of (a), cold", restores(lab, backups, "cold"))


if __name__ == "__main__":
    sys.exit(alone(__file__))
