"""The first backup of (e), 1 TiB with little data, beside the same data without the holes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.corpora import corpus
from bench.lab import Cost, Lab
from bench.peers import absent, installed
from bench.results import Figure, Note, Result, ratios
from bench.rounds import Costs, first_backups, prepare, told
from bench.runner import alone
from bench.vmkeep import VmkeepPoint

QUESTION = "What do holes cost? 1 TiB of disk with little data"
SPARSE, DENSE, SMALL = "1 TiB, sparse", "the same data, dense", "(a)"


def run(lab: Lab) -> Iterator[Result]:
    """The data is 1 GiB in the full run, 64 MiB in a quick one."""
    volumes = {SPARSE: corpus(lab, "e"), DENSE: corpus(lab, "e0"), SMALL: corpus(lab, "a")}
    costs = _backups(lab, volumes)
    for what, each in costs.items():
        yield from told(f"full backup of {what}", {"vmkeep": each})
    pairs = list(zip(costs[SPARSE], costs[DENSE], strict=True))
    yield Figure("sparse/extra", tuple(one.elapsed_s - other.elapsed_s for one, other in pairs))
    peaks = {what: tuple(float(cost.peak_bytes) for cost in each) for what, each in costs.items()}
    yield Figure("memory/flat", ratios(peaks[SPARSE], peaks[SMALL]))
    yield from absent("qemu-img")
    theirs = first_backups(lab, volumes[SPARSE], installed("qemu-img"), "warm")
    yield from told(f"full backup of {SPARSE}", theirs)
    yield Note("restic and borg are left out here: restic would read a TiB of zeros.")


def _backups(lab: Lab, volumes: dict[str, Path]) -> Costs:
    def act(volume: Path) -> Callable[[], Cost]:
        def run() -> Cost:
            with lab.scratch() as root:
                prepare(volume, "warm")
                return VmkeepPoint(root).backup(volume, "first")

        return run

    return lab.interleave({what: act(volume) for what, volume in volumes.items()})


if __name__ == "__main__":
    sys.exit(alone(__file__))
