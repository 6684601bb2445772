"""The backup of (c), a database's table space of which 1 % was rewritten, 4 KiB here and there."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench.corpora import corpus, difference
from bench.lab import Lab, times
from bench.limits import measure_zstd
from bench.peers import absent, present
from bench.results import Figure, Note, Result, Series
from bench.rounds import Filled, Kept, later_backups, least_restore, restores, told
from bench.runner import alone

QUESTION = "What do 4 KiB writes all over a database cost?"
PEERS = ("restic", "borg")
MIB = 1 << 20


def run(lab: Lab) -> Iterator[Result]:
    """Reading the bases is taken as decompressing all of them from memory, on all cores."""
    before, volume = corpus(lab, "c0"), corpus(lab, "c")
    yield from absent(*PEERS)
    between = difference(before, volume)
    yield Note(
        f"(c) has {between.changed_bytes / MIB:.1f} MiB of changed blocks,"
        f" {between.compressed_bytes / MIB:.1f} MiB compressed, in {between.chunks} of its"
        f" {volume.stat().st_size // MIB} MiB."
    )
    costs = later_backups(lab, before, volume, present(*PEERS))
    yield from told("backup of (c)", costs)
    for who, each in costs.items():
        stored = tuple(cost.stored_bytes / between.compressed_bytes for cost in each)
        yield Series("backup of (c): stored, of the changed blocks compressed", who, "×", stored)
        if who == "vmkeep":
            yield Figure("patch/stored", stored)
    unchanged = later_backups(lab, before, before, present())
    yield from told("unchanged disk (c0)", unchanged)
    reading = tuple(measure_zstd(before, lab.cores)[1].elapsed_s for _ in range(lab.repeats))
    yield Series("unchanged disk (c0)", "limit: decompressing it", "s", reading)
    ours = times(costs["vmkeep"])
    least = zip(times(unchanged["vmkeep"]), reading, strict=True)
    yield Figure("patch/time", tuple(a / (b + c) for a, (b, c) in zip(ours, least, strict=True)))
    yield from _restored(lab)


def _restored(lab: Lab) -> Iterator[Result]:
    before, volume = corpus(lab, "c0"), corpus(lab, "c")
    with lab.scratch() as root:
        [(who, maker)] = present().items()
        program = Filled(root / who, maker, before).program
        program.backup(volume, "later", "first")
        kept = Kept(root / who, program, "later", volume)
        costs = restores(lab, {who: kept}, "warm")
        yield from told("restore of (c)", costs)
        yield from least_restore(lab, volume, costs[who], "patch/restore", "restore of (c)")


if __name__ == "__main__":
    sys.exit(alone(__file__))
