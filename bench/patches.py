"""What do 1 % of random 4 KiB writes cost to store, to back up and to restore?

    PYTHONPATH=. python -m bench.patches [--size-mib 1024] [--days 20] [--dir DIR] [--repeat 3]

The volume is dense and compresses somewhat, as a database's does; all runs read it from the page
cache. Stored bytes are held against the changed 4 KiB blocks, compressed one by one with zstd-1.
The backup's time is held against that of an unchanged scan plus that of reading the bases (every
chunk has changed, so a restore to nowhere). `--days` of such writes, a backup each, make a chain;
its last backup's restore is held against that of a fresh full backup. Pairs are interleaved.

`--shares` only simulates: blocks stored a day when a patch may be that share of its chunk.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import zstandard

from bench.lab import say
from storage.reader import MAX_RUN_BYTES, plan_reads
from tests.rig import Made, Rig

MIB = 1 << 20
BLOCK = 4096
SHARE = 0.01
SHARES = (1 / 16, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--days", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dir", default=tempfile.gettempdir())
    parser.add_argument("--shares", action="store_true")
    options = parser.parse_args()
    if options.shares:
        return _simulate()
    with tempfile.TemporaryDirectory(dir=options.dir) as directory, Rig(Path(directory)) as rig:
        _measure(rig, options.size_mib * MIB, options.days, options.repeat)
    return 0


def _measure(rig: Rig, size_bytes: int, days: int, repeat: int) -> None:
    chance = random.Random(1)
    path = rig.pool / "volume"
    with path.open("wb") as file:
        for _ in range(size_bytes // BLOCK):
            file.write(_block(chance))
    full = rig.back_up(path)
    changed_bytes = _scatter(path, chance)
    costs: dict[str, list[float]] = {"patches": [], "unchanged": [], "bases": []}
    for _ in range(repeat):
        with _timed(costs["patches"]):
            first = rig.back_up(path, parent=full)
        with _timed(costs["unchanged"]):
            same = rig.back_up(path, parent=first)
        with _timed(costs["bases"]):
            _read_all(rig, full)
        stored = first.context.progress().bytes_stored
        rig.domain.forget([first.backup, same.backup])  # or the next one would find it there
    _say_times(costs)
    say(f"stored {stored} bytes, {stored / changed_bytes:.2f} × the changed blocks by zstd-1")
    _chain(rig, path, chance, full, days, repeat)


def _say_times(costs: dict[str, list[float]]) -> None:
    took = {name: statistics.median(times) for name, times in costs.items()}
    whole = took["unchanged"] + took["bases"]
    say(
        f"backup {took['patches']:.2f} s; unchanged {took['unchanged']:.2f} s + reading the bases "
        f"{took['bases']:.2f} s: {took['patches'] / whole:.2f} ×"
    )


def _chain(rig: Rig, path: Path, chance: random.Random, full: Made, days: int, repeat: int) -> None:
    last, stored = full, 0
    for _ in range(days):
        _scatter(path, chance)
        last = rig.back_up(path, parent=last)
        stored += last.context.progress().bytes_stored
    costs: dict[str, list[float]] = {"fresh": [], "chain": []}
    for _ in range(repeat):
        for name, made in (("fresh", full), ("chain", last)):
            with _timed(costs[name]):
                restored = rig.restore(made)
            restored.unlink()
    took = {name: statistics.median(times) for name, times in costs.items()}
    say(
        f"{days} days stored {stored / MIB:.0f} MiB; fresh restore {took['fresh']:.2f} s,"
        f" of the last {took['chain']:.2f} s: {took['fresh'] / took['chain']:.2f} × its speed"
    )


def _block(chance: random.Random) -> bytes:
    """A page of a database: a part of it is noise."""
    return chance.randbytes(1400) + bytes(chance.choices(b"abcdefgh", k=8)) * 337


def _scatter(path: Path, chance: random.Random) -> int:
    """Writes SHARE of the blocks anew; returns what they compress to, one by one."""
    packer = zstandard.ZstdCompressor(level=1)
    count = path.stat().st_size // BLOCK
    total = 0
    with path.open("r+b", buffering=0) as file:
        for at in sorted(chance.sample(range(count), int(count * SHARE))):
            block = _block(chance)
            total += len(packer.compress(block))
            os.pwrite(file.fileno(), block, at * BLOCK)
        os.fsync(file.fileno())
    return total


@contextlib.contextmanager
def _timed(into: list[float]):  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    yield
    into.append(time.perf_counter() - start)


def _read_all(rig: Rig, made: Made) -> None:
    """Reads and proves all chunks of a backup in as many threads as a backup has."""
    from engine.crew import Stop, run_crew
    from engine.restore import _SharedRuns

    disk_map = rig.domain.disk_map(made.disks["vda"])
    runs = _SharedRuns(plan_reads(rig.domain, disk_map))
    with contextlib.closing(rig.domain.reader()) as reader:

        def work() -> None:
            buffer = memoryview(mmap.mmap(-1, MAX_RUN_BYTES + disk_map.chunk_size + mmap.PAGESIZE))
            while (run := runs.pull()) is not None:
                for _ in reader.read(run, buffer):
                    pass

        run_crew(3, "read", work, Stop())


def _simulate() -> int:
    """The table in docs/adr/0006."""
    for count in (0.5, 1, 2.6, 5, 10, 25, 50):
        stored = [f"{_blocks_a_day(count, share):4.0f}" for share in SHARES]
        say(f"{count:5} blocks a day: {' '.join(stored)}")
    return 0


def _blocks_a_day(count: float, share: float, days: int = 365, blocks: int = 256) -> float:
    chance = random.Random(1)
    differ: set[int] = set()
    stored = 0
    for _ in range(days):
        fresh = int(count) + (chance.random() < count % 1)
        differ.update(chance.randrange(blocks) for _ in range(fresh))
        if fresh and len(differ) <= blocks * share:
            stored += len(differ)
        elif fresh:
            stored += blocks
            differ = set()
    return stored / days


if __name__ == "__main__":
    raise SystemExit(main())
