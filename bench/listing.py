"""How long does it take to list a domain that nobody here has read before?

The domain of another cluster, with a log of two records a backup; the point is opened anew and the
log is dropped from the page cache before each look. The time is that of Point.foreign_backups.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from bench.lab import Lab
from bench.results import Figure, Result, Series
from bench.runner import alone
from bench.states import write_log
from storage.point import ClusterLabel, Point

QUESTION = "How long does it take to list another cluster's domain, cold?"


def run(lab: Lab) -> Iterator[Result]:
    count = lab.pick(1_000, 10_000)
    with lab.scratch() as root:
        point = Point.create(str(root), "bench")
        cluster = ClusterLabel(cluster_uuid=str(uuid.uuid4()), cluster_name="other")
        write_log(point, cluster, count)
        os.sync()
        cold, again = [], []
        for _ in range(lab.repeats):
            _drop(root)
            fresh = Point.open(str(root))
            cold.append(_list(fresh, cluster, count))
            again.append(_list(fresh, cluster, count))
    yield Series(f"{count:,} backups, again", "vmkeep", "s", tuple(again))
    yield Series("a backup more, cold", "vmkeep", "s", tuple(took / count for took in cold))
    how = "" if lab.full else f"with {count:,} backups"
    yield Figure("listing/time", tuple(cold), how)


def _list(point: Point, cluster: ClusterLabel, count: int) -> float:
    began_s = time.perf_counter()
    found = len(point.foreign_backups(cluster.cluster_uuid))
    took_s = time.perf_counter() - began_s
    if found != count:
        raise RuntimeError(f"{found} backups listed of {count}")
    return took_s


def _drop(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


if __name__ == "__main__":
    sys.exit(alone(__file__))
