"""How fast is a view with millions of chunks?

A point is made whose packs have true footers, 128 frames in each, and disks of 100,000 chunks, one
COMMIT each; of the frames only the room is there, as nothing here reads one. A second host then
folds record by record (inserts, with LMDB's flushing), is asked for chunks in the pipeline's way,
is made anew from footers and manifests, and opened again.

Memory is what the process has of its own while the view is made anew: neither the mapped file nor
what was there before.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.lab import Lab, say
from bench.results import Figure, Result, Series
from bench.runner import alone
from bench.states import HastyFs, label_of
from storage.domain.domain import Domain
from storage.domain.session import NewBackup
from storage.files.fs import NO_FD, Buffer, OsFs
from storage.format.chunks import CHUNK_ID_BYTES, CODEC_ZSTD, FRAME_HEADER_BYTES, Frame
from storage.point import ClusterLabel, Point

QUESTION = "How fast is a view with millions of chunks?"

CHUNK = 1 << 20
STORED = CHUNK // 2
CHUNKS_PER_DISK = 100_000
FRAMES_AT_ONCE = 128
BATCH = 64
LOOKUPS = 500_000
_PAYLOAD = bytes(STORED)
CLUSTER = ClusterLabel(cluster_uuid=str(uuid.UUID(int=1)), cluster_name="bench")


class _Holes(HastyFs):
    """Frames take no room: they are left out of the file. So they must come here one by one, not
    gathered for the way past the page cache."""

    def open_direct(self, fd: int, path: str) -> int:
        del fd, path
        return NO_FD

    def pwrite(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        if pieces[-1] is not _PAYLOAD:
            return super().pwrite(fd, pieces, offset)
        total = sum(map(len, pieces))
        os.ftruncate(fd, offset + total)
        return total


def run(lab: Lab) -> Iterator[Result]:
    disks = lab.pick(1, 100)
    how = "" if lab.full else f"with {disks * CHUNKS_PER_DISK:,} chunks"
    with lab.scratch() as root:
        Point.create(str(root), "bench", chunk_size=CHUNK).close()
        folding = _opened(root, "folding")
        rates, cpu_s = _filled(root, disks, folding)
        yield Figure("view/inserts", tuple(rates[-10:]), how)
        yield Series("inserts of 100,000, processor", "vmkeep", "s", tuple(cpu_s[-10:]))
        yield Figure("view/lookups", tuple(_lookups(folding) for _ in range(lab.repeats)), how)
        began_s = time.process_time()
        rebuilt_s, own_bytes = _rebuilt(folding)
        yield Series("rebuild, processor", "vmkeep", "s", (time.process_time() - began_s,))
        yield Figure("view/rebuild", (rebuilt_s,), how)
        yield Figure("view/memory", (own_bytes,), how)
        yield Series("the view's file", "vmkeep", "B", (folding.view.size_bytes(),))
        yield Series("proof of all rows", "vmkeep", "s", (_took_s(folding.prove_view),))
        yield Series("closing", "vmkeep", "s", (_took_s(folding.close),))
        opened = [_took_s(lambda: _opened(root, "folding").close()) for _ in range(lab.repeats)]
        yield Series("opening and closing", "vmkeep", "s", tuple(opened))


def _filled(root: Path, disks: int, folding: Domain) -> tuple[list[float], list[float]]:
    """The chunks a second that `folding` took in, and the processor time, of each disk."""
    making = Point.open(str(root), fs=_Holes()).domain(CLUSTER, "making", str(root / "unused"))
    chance = random.Random(4)
    rates: list[float] = []
    cpu_s: list[float] = []
    for number in range(disks):
        _add_disk(making, number, chance.randbytes(CHUNKS_PER_DISK * CHUNK_ID_BYTES))
        os.sync()
        began_s = time.process_time()
        rates.append(_per_s(CHUNKS_PER_DISK, folding.refresh))
        cpu_s.append(time.process_time() - began_s)
        say(f"    disk {number + 1} of {disks}: {rates[-1]:,.0f} inserts/s")
    making.close()
    return rates, cpu_s


def _add_disk(domain: Domain, number: int, all_ids: bytes) -> None:
    starts = range(0, len(all_ids), CHUNK_ID_BYTES)
    ids = [all_ids[at : at + CHUNK_ID_BYTES] for at in starts]
    disk = str(uuid.uuid4())
    header = bytes(FRAME_HEADER_BYTES)
    with domain.begin("backup") as session:
        for first in range(0, len(ids), FRAMES_AT_ONCE):
            some = ids[first : first + FRAMES_AT_ONCE]
            session.store(
                [Frame(one, CHUNK, STORED, CODEC_ZSTD, header, _PAYLOAD, 0) for one in some]
            )
        builder = session.manifest(disk, CHUNKS_PER_DISK * CHUNK, None)
        for first in range(0, len(ids), 1024):
            builder.add_page(first // 1024, dict(enumerate(ids[first : first + 1024])))
        session.commit([NewBackup(str(uuid.uuid4()), label_of(number, disk), [disk])])


def _opened(root: Path, host: str) -> Domain:
    return Point.open(str(root), fs=OsFs()).domain(CLUSTER, host, str(root / "unused"))


def _lookups(domain: Domain) -> float:
    """Of chunks that are there and as many that are not, a second."""
    chance = random.Random(5)
    some = domain.view.ask(lambda state: _some_keys(state.table("chunks").keys_from, chance))
    batches = [chance.choices(some, k=BATCH) for _ in range(LOOKUPS // BATCH)]
    with domain.begin("read") as session:

        def look() -> None:
            for batch in batches:
                session.known(batch)

        rate = _per_s(len(batches) * BATCH, look)
        session.end()
    return rate


def _some_keys(
    keys_from: Callable[[bytes, bytes], Iterator[bytes]], chance: random.Random
) -> list[bytes]:
    there = [next(keys_from(chance.randbytes(4), b""), b"") for _ in range(50_000)]
    return [key for key in there if key] + [chance.randbytes(CHUNK_ID_BYTES) for _ in there]


def _rebuilt(domain: Domain) -> tuple[float, float]:
    """(time, most bytes of the process's own above what it had)."""
    before, peak, done = _own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, _own_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        took_s = _took_s(domain.rebuild)
    finally:
        done.set()
        watching.join()
    return took_s, max(0, peak - before)


def _own_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("the kernel does not tell RssAnon")


def _took_s(act: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    act()
    return time.perf_counter() - began_s


def _per_s(count: int, act: Callable[[], object]) -> float:
    return count / _took_s(act)


if __name__ == "__main__":
    sys.exit(alone(__file__))
