"""The first backup of (a), the image in the page cache and not, beside peers and zstd alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench.corpora import corpus
from bench.lab import Lab, times
from bench.peers import absent, present
from bench.results import Figure, Result, Series, ratios
from bench.rounds import ZSTD, faster, first_backups, told, zstd_cost
from bench.runner import alone

QUESTION = "How long does the first backup of a disk take?"
PEERS = ("restic", "borg", "qemu-img")


def run(lab: Lab) -> Iterator[Result]:
    """The bars are judged with the image in the page cache, as zstd has it in memory too."""
    volume = corpus(lab, "a")
    yield from absent(*PEERS)
    yield Series("corpus (a)", "vmkeep", "B", (float(volume.stat().st_size),))
    limits = {ZSTD: lambda: zstd_cost(volume, lab.cores)}
    costs = first_backups(lab, volume, present(*PEERS), "warm", limits)
    yield from told("full backup of (a), warm", costs)
    yield Figure("full/zstd", ratios(times(costs["vmkeep"]), times(costs[ZSTD])))
    yield from faster(costs, "full", PEERS)
    yield from told("full backup of (a), cold", first_backups(lab, volume, present(*PEERS), "cold"))


if __name__ == "__main__":
    sys.exit(alone(__file__))
