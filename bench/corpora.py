"""The disk images that the questions use, made from this machine's own files and from seeds.

    a   an ext4 of this machine's files, 82 % full        d    a clone of (a), 2 % changed
    b   (a) a day later, about 5 % changed                e    1 TiB, sparse, little data; e0: dense
    c0  a database's table space; c: 1 % of it rewritten  f    noise

Images are kept in the lab's cache, by name. The same files make the same image, but for times.
Whoever changes one works on a copy.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from bench.ageing import Churn, age
from bench.disks import make_ext4, missing_tools, stage_files
from bench.lab import Lab, say

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BLOCK = 4096
EXTENTS = 64  # of (e)
FILLED = 82  # per cent of (a)

DAY = Churn(deleted=0.02, upgraded=0.030, added=0.007, edited=0.008)
CLONE = Churn(deleted=0.001, upgraded=0.0, added=0.019, edited=0.0001)


class CannotMake(Exception):
    """This machine lacks what a corpus is made with."""


def corpus(lab: Lab, name: str) -> Path:
    """The image, from the cache, or made now. Raises CannotMake."""
    path = lab.cache / f"{name}.raw"
    if not path.exists():
        say(f"  making corpus ({name})")
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        _MAKERS[name](lab, part)
        part.rename(path)
    return path


@dataclass(frozen=True, slots=True)
class Difference:
    """What two images of one size do not share, in 4 KiB blocks. `compressed_bytes`: zstd-1 of the
    changed blocks of each MiB together."""

    changed_bytes: int
    compressed_bytes: int
    chunks: int


def difference(old: Path, new: Path) -> Difference:
    """Compares two images, block by block."""
    changed = compressed = chunks = 0
    zstd = zstandard.ZstdCompressor(level=1)
    for blocks in changed_blocks(old, new):
        changed += len(blocks)
        compressed += len(zstd.compress(blocks))
        chunks += 1
    return Difference(changed, compressed, chunks)


def changed_blocks(old: Path, new: Path) -> Iterator[bytes]:
    """For each MiB that differs, those 4 KiB blocks of `new` that do, one after the other."""
    with old.open("rb", buffering=0) as before, new.open("rb", buffering=0) as after:
        while now := after.read(MIB):
            was = before.read(MIB)
            if now != was:
                places = range(0, len(now), BLOCK)
                yield b"".join(
                    now[at : at + BLOCK]
                    for at in places
                    if now[at : at + BLOCK] != was[at : at + BLOCK]
                )


def copied(source: Path, target: Path) -> Path:
    """A copy of an image that a question may change; holes stay holes."""
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", source, target], check=True)
    return target


def scribble(image: Path, chance: random.Random, writes: int, size_bytes: int = BLOCK) -> None:
    """So many aligned writes of rows, each at a random place of the image."""
    slots = image.stat().st_size // size_bytes
    with image.open("r+b", buffering=0) as file:
        for at in sorted(chance.sample(range(slots), writes)):
            os.pwrite(file.fileno(), rows(chance, size_bytes), at * size_bytes)


def rows(chance: random.Random, size_bytes: int) -> bytes:
    """Table rows: numbers, names, dates, a few words. zstd-1 makes a bit less than half of it."""
    made = bytearray()
    while len(made) < size_bytes:
        made += b"%d|%s|2026-%02d-%02d|%s|%s\n" % (
            chance.randrange(10**9),
            chance.randbytes(8).hex().encode(),
            chance.randrange(1, 13),
            chance.randrange(1, 29),
            chance.choice(_WORDS),
            chance.choice(_WORDS),
        )
    return bytes(made[:size_bytes])


_WORDS = (b"pending", b"paid", b"shipped", b"returned", b"cancelled", b"north", b"south", b"east")


def _make_a(lab: Lab, target: Path) -> None:
    if lacking := missing_tools():
        raise CannotMake(f"needs {' and '.join(lacking)} (Debian: e2fsprogs)")
    size_bytes = lab.pick(192 * MIB, 4 * GIB)
    files = target.with_suffix(".files")
    shutil.rmtree(files, ignore_errors=True)
    stage_files(files, size_bytes * FILLED // 100, random.Random("a"))
    make_ext4(target, size_bytes, files, seed=1)
    shutil.rmtree(files)


def _make_b(lab: Lab, target: Path) -> None:
    _aged(lab, target, DAY, seed=2)


def _make_d(lab: Lab, target: Path) -> None:
    _aged(lab, target, CLONE, seed=3)


def _aged(lab: Lab, target: Path, churn: Churn, seed: int) -> None:
    copied(corpus(lab, "a"), target)
    with lab.scratch() as scratch:
        age(target, churn, random.Random(seed), scratch)


def _make_c0(lab: Lab, target: Path) -> None:
    """Pages of rows, each with a header of its own, so that no two MiB are the same."""
    size_bytes = lab.pick(96 * MIB, 2 * GIB)
    piece = bytearray(rows(random.Random("c"), lab.pick(4 * MIB, 32 * MIB)))
    with target.open("xb") as file:
        for number in range(size_bytes // BLOCK):
            at = number * BLOCK % len(piece)
            struct.pack_into("<QQQ", piece, at, number, number * 0x9E3779B9, size_bytes)
            if at + BLOCK == len(piece):
                file.write(piece)


def _make_c(lab: Lab, target: Path) -> None:
    copied(corpus(lab, "c0"), target)
    scribble(target, random.Random(4), writes=target.stat().st_size // BLOCK // 100)


def _make_e(lab: Lab, target: Path) -> None:
    dense = corpus(lab, "e0")
    size_bytes = dense.stat().st_size // EXTENTS
    places = sorted(random.Random(5).sample(range(TIB // size_bytes), EXTENTS))
    with dense.open("rb") as source, target.open("xb") as file:
        file.truncate(TIB)
        for place in places:
            os.pwrite(file.fileno(), source.read(size_bytes), place * size_bytes)


def _make_e0(lab: Lab, target: Path) -> None:
    """The first data of (a), without what is zero in it."""
    left = lab.pick(64 * MIB, GIB)
    with corpus(lab, "a").open("rb") as source, target.open("xb") as file:
        while left:
            if not (piece := source.read(MIB)):
                source.seek(0)
            elif len(piece) == MIB and piece.count(0) < MIB // 2:
                file.write(piece)
                left -= MIB


def _make_f(lab: Lab, target: Path) -> None:
    chance = random.Random(6)
    with target.open("xb") as file:
        for _ in range(lab.pick(64, 1024)):
            file.write(chance.randbytes(MIB))


_MAKERS: dict[str, Callable[[Lab, Path], None]] = {
    "a": _make_a,
    "b": _make_b,
    "c0": _make_c0,
    "c": _make_c,
    "d": _make_d,
    "e0": _make_e0,
    "e": _make_e,
    "f": _make_f,
}
