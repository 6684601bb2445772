"""How long does it take to list a domain that nobody here has read before?

The domain of another cluster, with a log of two records a backup and the bundles that its hosts
make of it; beside it the same without bundles, as it is where they have not got to it yet. Before
each look the point is opened anew and all that the kernel remembers of it is dropped (without root:
the contents of its files only). The time is that of Point.foreign_backups.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from bench.lab import Lab
from bench.results import Figure, Result, Series
from bench.runner import alone
from bench.states import write_bundles, write_log
from storage.point import ClusterLabel, Point

QUESTION = "How long does it take to list another cluster's domain, cold?"


def run(lab: Lab) -> Iterator[Result]:
    count = lab.pick(1_000, 10_000)
    cluster = ClusterLabel(cluster_uuid=str(uuid.uuid4()), cluster_name="other")
    with lab.scratch() as root, lab.scratch() as bare:
        for path in (root, bare):
            write_log(Point.create(str(path), "bench"), cluster, count)
        write_bundles(Point.open(str(root)), cluster)
        os.sync()
        cold, busy, again, without = [], [], [], []
        for _ in range(lab.repeats):
            _drop(root)
            fresh = Point.open(str(root))
            began_s = time.process_time()
            cold.append(_list(fresh, cluster, count))
            busy.append(time.process_time() - began_s)
            again.append(_list(fresh, cluster, count))
            _drop(bare)
            without.append(_list(Point.open(str(bare)), cluster, count))
    yield Series(f"{count:,} backups, cold: processor time", "vmkeep", "s", tuple(busy))
    yield Series(f"{count:,} backups, again", "vmkeep", "s", tuple(again))
    yield Series(f"{count:,} backups without bundles, cold", "vmkeep", "s", tuple(without))
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
    with contextlib.suppress(PermissionError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


if __name__ == "__main__":
    sys.exit(alone(__file__))
