"""How long does a delete take, and does it depend on how many backups there are?

Each backup has chunks of its own in a pack of its own, so that a delete frees a pack. Timed is what
the engine's delete does on the point: FORGET, and the dead pack's RETIRE and unlinking. A gc that
has to copy is timed by itself.
"""

from __future__ import annotations

import os
import random
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.corpora import corpus
from bench.lab import Lab
from bench.results import Figure, Result, Series
from bench.runner import alone
from bench.states import HastyFs, label_of
from storage.domain.domain import Domain
from storage.domain.session import NewBackup
from storage.format.chunks import Encoder
from storage.point import ClusterLabel, Point

QUESTION = "How long does a delete take, and a gc, beside how many others?"

CHUNK = 64 << 10
PIECE = 1 << 20  # a chunk of the gc that copies
CLUSTER = ClusterLabel(cluster_uuid=str(uuid.UUID(int=1)), cluster_name="bench")


def run(lab: Lab) -> Iterator[Result]:
    many = lab.pick(200, 1_000)
    with lab.scratch() as root:
        few_domain, few = _filled(root / "few", 10, 16)
        many_domain, all_of_them = _filled(root / "many", many, 16)
        costs: dict[int, list[float]] = {10: [], many: []}
        for _ in range(5):
            costs[10].append(_deleted(few_domain, few.pop()))
            costs[many].append(_deleted(many_domain, all_of_them.pop(len(all_of_them) // 2)))
        few_domain.close()
        many_domain.close()
    for count, values in costs.items():
        yield Series(f"delete of one of {count:,}", "vmkeep", "s", tuple(values))
    how = "" if lab.full else f"of {many} backups"
    yield Figure("delete/time", tuple(costs[many]), how)
    pairs = zip(costs[many], costs[10], strict=True)
    yield Figure("delete/others", tuple(one / other for one, other in pairs), how)
    yield from _gc(lab)
    yield from _copying(lab)


def _gc(lab: Lab) -> Iterator[Result]:
    """A gc of dead packs: 10 times the chunks in as many packs."""
    packs = lab.pick(20, 100)
    ratios = []
    for number in range(lab.repeats):
        with lab.scratch() as root:
            took = {}
            for chunks in (10, 100) if number % 2 else (100, 10):
                domain, backups = _filled(root / str(chunks), packs, chunks)
                domain.forget(backups)
                began_s = time.perf_counter()
                removed = domain.reclaim(copy_budget_bytes=0).packs_removed
                took[chunks] = time.perf_counter() - began_s
                domain.close()
                if removed != packs:
                    raise RuntimeError(f"{removed} packs removed of {packs}")
        ratios.append(took[100] / took[10])
    yield Figure("delete/gc", tuple(ratios), f"{packs} packs")


def _copying(lab: Lab) -> Iterator[Result]:
    """A gc that copies half of the chunks of each pack, and proves each: real content."""
    pieces = lab.pick(64, 512)
    took = []
    for _ in range(lab.repeats):
        with lab.scratch() as root:
            domain, gone = _interleaved(root, _pieces(corpus(lab, "a"), pieces))
            domain.forget([gone])
            began_s = time.perf_counter()
            report = domain.reclaim(sparse_below=0.9)
            took.append(time.perf_counter() - began_s)
            domain.close()
            if report.packs_repacked == 0:
                raise RuntimeError("no pack was sparse")
    yield Series(f"gc that copies {pieces // 2} chunks of 1 MiB of (a)", "vmkeep", "s", tuple(took))


def _pieces(image: Path, count: int) -> list[bytes]:
    """So many MiB of the image that are not zeros, no two of them equal."""
    found: dict[bytes, None] = {}
    with image.open("rb") as file:
        while len(found) < count:
            piece = file.read(PIECE)
            if not piece:
                raise RuntimeError(f"{image} has no {count} different pieces")
            if piece.count(0) < PIECE:
                found[piece] = None
    return list(found)


def _interleaved(root: Path, pieces: Sequence[bytes]) -> tuple[Domain, str]:
    """A domain with two backups, whose chunks lie in turns in the same packs; and one of them."""
    Point.create(str(root), "bench", chunk_size=PIECE).close()
    domain = Point.open(str(root)).domain(CLUSTER, "bench", str(root / "unused"))
    encoder, ids = Encoder(), [domain.hasher.full(memoryview(piece)) for piece in pieces]
    disks, backups = [str(uuid.uuid4()) for _ in range(2)], [str(uuid.uuid4()) for _ in range(2)]
    with domain.begin("backup") as session:
        for one, piece in zip(ids, pieces, strict=True):
            session.store([encoder.encode(one, memoryview(piece))])
        for turn, disk in enumerate(disks):
            manifest = session.manifest(disk, PIECE * len(pieces), None)
            manifest.add_page(0, dict(enumerate(ids[turn::2])))
        session.commit(
            [
                NewBackup(backup, label_of(number, disk), [disk])
                for number, (backup, disk) in enumerate(zip(backups, disks, strict=True))
            ]
        )
    return domain, backups[0]


def _filled(root: Path, backups: int, chunks: int) -> tuple[Domain, list[str]]:
    """A domain with that many full backups of that many chunks, no two of them equal; opened anew
    so that what is measured waits for the medium."""
    root.mkdir()
    Point.create(str(root), "bench", chunk_size=CHUNK).close()
    hasty = Point.open(str(root), fs=HastyFs()).domain(CLUSTER, "maker", str(root / "unused"))
    chance, encoder, made = random.Random(1), Encoder(), []
    for number in range(backups):
        disk, backup = str(uuid.uuid4()), str(uuid.uuid4())
        with hasty.begin("backup") as session:
            contents = [chance.randbytes(64) for _ in range(chunks)]
            ids = [hasty.hasher.full(memoryview(content)) for content in contents]
            pairs = zip(ids, contents, strict=True)
            session.store([encoder.encode(one, memoryview(content)) for one, content in pairs])
            session.manifest(disk, CHUNK * chunks, None).add_page(0, dict(enumerate(ids)))
            session.commit([NewBackup(backup, label_of(number, disk), [disk])])
        made.append(backup)
    hasty.close()
    os.sync()
    return Point.open(str(root)).domain(CLUSTER, "bench", str(root / "unused")), made


def _deleted(domain: Domain, backup: str) -> float:
    began_s = time.perf_counter()
    domain.forget([backup])
    domain.reclaim(copy_budget_bytes=0)
    return time.perf_counter() - began_s


if __name__ == "__main__":
    sys.exit(alone(__file__))
