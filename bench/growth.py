"""Cost and growth: what 1, 1,000 and 100,000 VMs of 100 GiB with 365 daily backups come to.

Everything is arithmetic on a few measured figures; the fleet's habits are assumptions, which stand
beside the table. A file or a request on the point is what one pack, manifest or record takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.results import Run, Series, Unit, spread
from bench.summary import amount

GIB, MIB = 1 << 30, 1 << 20
CHUNK_BYTES, PACK_BYTES = MIB, 64 * MIB
FLEETS = (1, 1_000, 100_000)

# What the design fixes (docs/design.md §4, §8). The overhead of LMDB's trees is measured by nobody
# yet: entries take about 1.5 times their bytes in pages that were filled in random order.
CHUNK_ENTRY_BYTES = 32 + 16
PAGE_ENTRY_BYTES = 34
TREE_FACTOR = 1.5
RECORDS_PER_BACKUP = 2  # OPEN and COMMIT
REQUESTS_PER_FILE = 4  # create, close after fsync, link, unlink of the first name


@dataclass(frozen=True, slots=True)
class Fleet:
    """The assumptions: VMs of one size, all from one template, each backed up once a day."""

    vms: int
    disk_bytes: int = 100 * GIB
    days: int = 365
    own: float = 0.5  # of a disk's chunks, those that no other VM has
    changed: float = 0.02  # of a disk's chunks, in a day


@dataclass(frozen=True, slots=True)
class Rates:
    """What a run measured, in bytes of a disk and second."""

    full_bytes_per_s: float
    scan_bytes_per_s: float
    stored: float  # of a byte of data, after zstd


@dataclass(frozen=True, slots=True)
class Cost:
    """What a fleet comes to at the end of its year."""

    chunks: int
    stored_bytes: float
    packs: int
    files: int
    index_bytes: float
    requests_per_day: float
    first_day_s: float
    day_s: float


def cost(fleet: Fleet, rates: Rates) -> Cost:
    """By the assumptions and rates. Times are for one host."""
    per_disk = fleet.disk_bytes // CHUNK_BYTES
    first = per_disk + (fleet.vms - 1) * int(per_disk * fleet.own)
    daily = int(per_disk * fleet.changed)
    chunks = first + fleet.vms * daily * (fleet.days - 1)
    stored = chunks * CHUNK_BYTES * rates.stored
    backups = fleet.vms * fleet.days
    # Each backup ends its last pack, however small.
    packs = int(first * CHUNK_BYTES * rates.stored / PACK_BYTES) + backups
    packs += int(daily * CHUNK_BYTES * rates.stored / PACK_BYTES) * fleet.vms * (fleet.days - 1)
    files_per_day = fleet.vms * (RECORDS_PER_BACKUP + 1) + packs / fleet.days
    entries = per_disk * fleet.vms + daily * fleet.vms * (fleet.days - 1)
    index = (chunks * CHUNK_ENTRY_BYTES + entries * PAGE_ENTRY_BYTES) * TREE_FACTOR
    return Cost(
        chunks=chunks,
        stored_bytes=stored,
        packs=packs,
        files=packs + backups * (RECORDS_PER_BACKUP + 1),
        index_bytes=index,
        requests_per_day=files_per_day * REQUESTS_PER_FILE,
        first_day_s=fleet.vms * fleet.disk_bytes / rates.full_bytes_per_s,
        day_s=fleet.vms * fleet.disk_bytes / rates.scan_bytes_per_s,
    )


def rates_of(run: Run) -> Rates | None:
    """From the questions "full" and "unchanged"; None when one was not run."""
    size = _value(run, "corpus (a)", "vmkeep", "B")
    full = _value(run, "full backup of (a), warm", "vmkeep", "s")
    scan = _value(run, "unchanged disk (a)", "vmkeep", "s")
    stored = _value(run, "full backup of (a), warm: stored", "vmkeep", "B")
    if size is None or full is None or scan is None or stored is None:
        return None
    return Rates(size / full, size / scan, stored / size)


def growth_table(run: Run) -> Iterator[str]:
    """The table as Markdown, each line marked: measured, or extrapolated from what was."""
    yield "## Cost and growth"
    yield ""
    rates = rates_of(run)
    if rates is None:
        yield "Not in this run: it needs the questions `full` and `unchanged`."
        return
    shape = Fleet(1)
    yield (
        f"VMs of {amount(shape.disk_bytes, 'B')}, {shape.days} daily backups kept, on one host."
        f" Assumed: the first VM is the template, {shape.own:.0%} of every other's chunks are its"
        f" own; {shape.changed:.0%} of all chunks change in a day. **Extrapolated**, all: from"
        f" two **measured** rates of the data path, {amount(rates.full_bytes_per_s, 'B')}/s for a"
        f" first backup and {amount(rates.scan_bytes_per_s, 'B')}/s for a scan, the measured"
        f" {rates.stored:.0%} that is left after zstd, and the sizes of the format."
    )
    yield ""
    costs = [cost(Fleet(vms), rates) for vms in FLEETS]
    yield "| at the end of the year | " + " | ".join(f"{vms:,} VMs" for vms in FLEETS) + " |"
    yield "|---|" + "---|" * len(FLEETS)
    for name, values in _lines(costs):
        yield f"| {name} | " + " | ".join(values) + " |"
    yield ""
    yield _first_to_give_out(costs[-1])


def _lines(costs: list[Cost]) -> Iterator[tuple[str, list[str]]]:
    yield "first backup of all, one host after the other", [_days(one.first_day_s) for one in costs]
    yield "one day's backups, unchanged parts scanned", [_days(one.day_s) for one in costs]
    yield "stored on the point", [amount(one.stored_bytes, "B") for one in costs]
    yield "chunks", [amount(one.chunks, "count") for one in costs]
    yield "files on the point", [amount(one.files, "count") for one in costs]
    yield "requests a day that make files", [amount(one.requests_per_day, "count") for one in costs]
    yield "LMDB", [amount(one.index_bytes, "B") for one in costs]


def _first_to_give_out(largest: Cost) -> str:
    hosts = largest.day_s / 86_400
    return (
        f"What gives out first is the time to scan: {FLEETS[-1]:,} VMs need {hosts:,.0f} hosts that"
        " do nothing else, unless the hypervisor says what changed. Next comes the view: each host"
        f" of the domain keeps an LMDB of {amount(largest.index_bytes, 'B')}, so a fleet of that"
        " size is several clusters, each a domain of its own."
    )


def _days(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.1f} s"


def _value(run: Run, what: str, who: str, unit: Unit) -> float | None:
    for answer in run.answers:
        for result in answer.results:
            if isinstance(result, Series) and (result.what, result.who) == (what, who):
                return spread(result.values).median if result.unit == unit else None
    return None
