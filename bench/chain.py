"""The restore of a backup at the end of a long chain of incrementals with scattered changes."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.corpora import copied, corpus, scribble
from bench.lab import Lab, say, times
from bench.peers import Maker, absent, installed
from bench.results import Figure, Note, Result, ratios
from bench.rounds import Kept, least_restore, restores, told
from bench.runner import alone
from bench.vmkeep import VmkeepPoint, backup_here, opened

QUESTION = "How long does a restore take from the end of a year of daily incrementals?"
PEERS = ("restic", "borg")
KIB = 1 << 10
WRITES, WRITE_BYTES = 24, 16 * KIB  # of one day, each at a random place


def run(lab: Lab) -> Iterator[Result]:
    """The peers' chains are shorter, which is to their good: each of their backups takes long."""
    days, their_days = lab.pick((20, 2), (365, 12))
    yield from absent(*PEERS)
    yield Note(
        f"vmkeep's chain has {days} incrementals, the peers' {their_days}; each day has {WRITES}"
        f" writes of {WRITE_BYTES // KIB} KiB at random places."
    )
    with lab.scratch() as root:
        volume = copied(corpus(lab, "a"), root / "disk.raw")
        ours = _our_chain(root, volume, days)
        fresh = _fresh(root, volume)
        costs = restores(lab, {"vmkeep": ours, "vmkeep, fresh": fresh}, "warm")
        yield from told("restore from the end of the chain", costs)
        speeds = ratios(times(costs["vmkeep, fresh"]), times(costs["vmkeep"]))
        yield Figure("chain/fresh", speeds, f"after {days} incrementals")
        yield from least_restore(lab, volume, costs["vmkeep"], "chain/limit", "restore from it")
        for who, maker in installed(*PEERS).items():
            yield from _beside(lab, root, who, maker, ours, their_days)


def _our_chain(root: Path, volume: Path, days: int) -> Kept:
    """The chain's point, its end being what the volume is then."""
    (root / "ours").mkdir()
    point = VmkeepPoint(root / "ours")
    point.backup(volume, "0")
    domain = opened(root / "ours" / "vmkeep-point")
    for day in range(1, days + 1):
        scribble(volume, random.Random(day), WRITES, WRITE_BYTES)
        backup_here(domain, volume, str(day), str(day - 1))
        if day % 50 == 0:
            say(f"    {day} incrementals")
    domain.close()
    return Kept(root / "ours", point, str(days), volume)


def _fresh(root: Path, volume: Path) -> Kept:
    (root / "fresh").mkdir()
    point = VmkeepPoint(root / "fresh")
    point.backup(volume, "first")
    return Kept(root / "fresh", point, "first", volume)


def _beside(
    lab: Lab, root: Path, who: str, maker: Maker, ours: Kept, days: int
) -> Iterator[Result]:
    """Ours and theirs in turns. Their disk goes another way, from the same start by equal steps."""
    (root / who).mkdir()
    volume = copied(corpus(lab, "a"), root / f"{who}.raw")
    program = maker(root / who)
    program.backup(volume, "0")
    for day in range(1, days + 1):
        scribble(volume, random.Random(day), WRITES, WRITE_BYTES)
        program.backup(volume, str(day))
    theirs = Kept(root / who, program, str(days), volume)
    costs = restores(lab, {"vmkeep": ours, who: theirs}, "warm")
    yield from told(f"restore from the end of the chain, beside {who}", costs)
    how = f"{who}'s chain has {days} incrementals."
    yield Figure(f"chain/{who}", ratios(times(costs[who]), times(costs["vmkeep"])), how)
    shutil.rmtree(root / who)
    volume.unlink()


if __name__ == "__main__":
    sys.exit(alone(__file__))
