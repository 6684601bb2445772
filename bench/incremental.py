"""The backup of (b), the disk of (a) a day later, into repositories that hold (a)."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench.corpora import corpus, difference
from bench.lab import Lab
from bench.peers import absent, present
from bench.results import Note, Result
from bench.rounds import faster, later_backups, told
from bench.runner import alone

QUESTION = "How long does the backup of a disk take the day after?"
PEERS = ("restic", "borg")
MIB = 1 << 20


def run(lab: Lab) -> Iterator[Result]:
    before, volume = corpus(lab, "a"), corpus(lab, "b")
    yield from absent(*PEERS)
    between = difference(before, volume)
    part = between.changed_bytes / volume.stat().st_size
    yield Note(
        f"(b) has {between.changed_bytes / MIB:.0f} MiB of changed 4 KiB blocks, {part:.1%} of"
        f" the disk, in {between.chunks} MiB; compressed {between.compressed_bytes / MIB:.0f} MiB."
    )
    costs = later_backups(lab, before, volume, present(*PEERS))
    yield from told("incremental backup of (b)", costs)
    yield from faster(costs, "incremental", PEERS)


if __name__ == "__main__":
    sys.exit(alone(__file__))
