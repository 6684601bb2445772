"""The first backup of (f), noise: nothing to gain by zstd, so what is the price of trying?"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench.corpora import corpus
from bench.lab import Cost, Lab, series
from bench.limits import measure_write
from bench.peers import absent, present
from bench.results import Result
from bench.rounds import first_backups, told
from bench.runner import alone

QUESTION = "How long does the first backup of incompressible data take?"
PEERS = ("restic", "borg", "qemu-img")
WHAT = "full backup of (f)"


def run(lab: Lab) -> Iterator[Result]:
    """No bar; the limit is writing as much, durably, through the page cache or past it."""
    volume = corpus(lab, "f")
    yield from absent(*PEERS)
    yield from told(WHAT, first_backups(lab, volume, present(*PEERS), "warm"))
    with lab.scratch() as scratch:
        writes = [Cost(measure_write(volume, scratch).elapsed_s) for _ in range(lab.repeats)]
    yield from series(WHAT, {"limit: writing": writes})


if __name__ == "__main__":
    sys.exit(alone(__file__))
