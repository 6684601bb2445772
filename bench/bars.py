"""The figures to reach: every row of the table, whether or not a run has measured it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.results import Unit

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Bar:
    """`limit` is met by values at most (or at least) so large, judged by median or by the worst."""

    key: str
    row: str
    text: str
    limit: float
    kind: Literal["at most", "at least"]
    unit: Unit = "×"
    judge: Literal["median", "worst"] = "median"


FULL = "full backup of (a)"
INCREMENTAL = "incremental (b)"
UNCHANGED = "unchanged scan"
TEMPLATE = "second VM from the same template (d)"
SPARSE = "1 TiB sparse (e)"
RESTORE = "restore of (a), fresh"
CHAIN = "restore of the 365th incremental, scattered changes"
MEMORY = "peak memory, any of these"
PATCH = "database-like (c): 1 % random 4 KiB writes"
API = "API while a backup runs, 100,000 backups"
DELETE = "delete of one of 1,000 backups"
LISTING = "listing a foreign domain with 10,000 backups, cold"
VIEW = "view with 10 million chunks"
START = "start of the service with all that"
NBD = "reading a disk over NBD"
TRACKED = "incremental of 1 TiB sparse on XFS, by its clones"
LIVE = "backup of a running VM"

BARS = (
    Bar("full/zstd", FULL, "time, of zstd-1 of the same chunks from memory", 1.15, "at most"),
    Bar("full/restic", FULL, "times faster than restic", 3.5, "at least"),
    Bar("full/borg", FULL, "times faster than borg", 2.2, "at least"),
    Bar("full/qemu-img", FULL, "times faster than qemu-img", 3, "at least"),
    Bar("incremental/restic", INCREMENTAL, "times faster than restic", 5, "at least"),
    Bar("incremental/borg", INCREMENTAL, "times faster than borg", 3, "at least"),
    Bar("unchanged/restic", UNCHANGED, "times faster than restic re-reading", 25, "at least"),
    Bar("unchanged/cat", UNCHANGED, "time, of cat image >/dev/null", 1.3, "at most"),
    Bar("template/stored", TEMPLATE, "stored, of what changed (compressed)", 1.1, "at most"),
    Bar("sparse/extra", SPARSE, "time beyond its 1 GiB of data", 1, "at most", "s"),
    Bar("restore/restic", RESTORE, "times faster than restic", 5, "at least"),
    Bar("restore/borg", RESTORE, "times faster than borg", 5, "at least"),
    Bar("restore/limit", RESTORE, "time, of max(decompressing, writing)", 1.3, "at most"),
    Bar("chain/fresh", CHAIN, "speed, of the fresh one", 0.8, "at least"),
    Bar("chain/restic", CHAIN, "times faster than restic", 5, "at least"),
    Bar("chain/borg", CHAIN, "times faster than borg", 5, "at least"),
    Bar("chain/limit", CHAIN, "time, of max(decompressing, writing)", 1.3, "at most"),
    Bar("memory/peak", MEMORY, "resident", 128 * MIB, "at most", "B", "worst"),
    Bar("memory/flat", MEMORY, "at 1 TiB, of that at 4 GiB", 1.1, "at most"),
    Bar("patch/stored", PATCH, "stored, of the changed blocks compressed", 1.3, "at most"),
    Bar("patch/time", PATCH, "time, of unchanged scan and reading the bases", 1.5, "at most"),
    Bar("patch/restore", PATCH, "restore, of max(decompressing, writing)", 1.3, "at most"),
    Bar("api/p99", API, "p99 of inspect and list", 0.020, "at most", "s", "worst"),
    Bar("delete/time", DELETE, "time", 0.5, "at most", "s", "worst"),
    Bar("delete/others", DELETE, "time, of one of 10 backups", 1.5, "at most"),
    Bar("delete/gc", DELETE, "gc with 10 × the chunks in as many packs, time", 1.5, "at most"),
    Bar("listing/time", LISTING, "time", 1, "at most", "s", "worst"),
    Bar("view/lookups", VIEW, "lookups", 150_000, "at least", "1/s"),
    Bar("view/inserts", VIEW, "inserts, sustained", 50_000, "at least", "1/s"),
    Bar("view/rebuild", VIEW, "rebuilt from footers in", 120, "at most", "s"),
    Bar("view/memory", VIEW, "memory of its own (not mapped files)", 128 * MIB, "at most", "B"),
    Bar("start/time", START, "ready in", 2, "at most", "s"),
    Bar("nbd/libnbd", NBD, "speed, of libnbd", 0.8, "at least"),
    Bar("tracking/nothing", TRACKED, "nothing changed, time", 1, "at most", "s"),
    Bar("tracking/changed", TRACKED, "1 GiB new, time beyond reading it", 1, "at most", "s"),
    Bar(
        "tracking/alone", TRACKED, "1 GiB new, time beyond backing up that alone", 1, "at most", "s"
    ),
    Bar("live/freeze", LIVE, "guest frozen for", 1, "at most", "s", "worst"),
)


def bar(key: str) -> Bar:
    """Raises KeyError when there is none."""
    return _BY_KEY[key]


def is_met(bar: Bar, values: tuple[float, ...], median: float) -> bool:
    """Whether these values, whose median is given, reach the bar."""
    if bar.kind == "at most":
        return (max(values) if bar.judge == "worst" else median) <= bar.limit
    return (min(values) if bar.judge == "worst" else median) >= bar.limit


_BY_KEY = {bar.key: bar for bar in BARS}
