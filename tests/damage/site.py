"""A small point with everything on it, and ways to damage it and to look at what is left."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from storage.domain.bundling import Bundling
from storage.domain.domain import Domain
from storage.domain.heartbeats import beat
from storage.domain.reader import MAX_RUN_BYTES, plan_reads
from storage.errors import ChunkDamaged, StorageError
from storage.format import bundles
from storage.point import ClusterLabel, Point
from tests.store import CHUNK, Saved, cluster, edited, open_domain, patches, save

HOST = "host-1"
RECORDS_PER_BUNDLE = 4


@dataclass(frozen=True)
class Image:
    """A backup and what it was made of."""

    saved: Saved
    content: bytes


@dataclass(frozen=True)
class Site:
    """A point with one cluster's four backups, and another cluster's one."""

    path: Path
    label: ClusterLabel
    images: tuple[Image, ...]
    last_record: Path

    @property
    def root(self) -> Path:
        return self.path / "domains" / self.label.cluster_uuid

    @contextlib.contextmanager
    def opened(self) -> Iterator[Domain]:
        """The domain. StorageErrors."""
        domain = open_domain(Point.open(str(self.path)), self.label, HOST)
        try:
            yield domain
        finally:
            domain.close()

    def forget_view(self) -> None:
        shutil.rmtree(self.root / "views", ignore_errors=True)

    def restore_view(self) -> None:
        """The view as it was when everything was whole."""
        self.forget_view()
        shutil.copytree(self.path.parent / "views", self.root / "views")

    def copy(self, where: Path) -> Site:
        shutil.copytree(self.path, where)
        return Site(where, self.label, self.images, where / self.last_record.relative_to(self.path))

    def files(self) -> dict[str, list[Path]]:
        """The files by kind; the view is not among them."""
        mine = {"POINT": [self.path / "POINT"], "DOMAIN": [self.root / "DOMAIN"]}
        for kind in ("log", "packs", "manifests", "checkpoints", "hosts"):
            mine[kind] = sorted(path for path in (self.root / kind).rglob("*") if path.is_file())
        mine["bundles"] = [path for path in mine["log"] if path.suffix == bundles.SUFFIX]
        mine["log"] = [path for path in mine["log"] if path not in mine["bundles"]]
        return mine


def make_site(where: Path) -> Site:
    """Full, incremental on it, a full one that shares chunks, and one of a page's end."""
    where.mkdir()
    (where / "point").mkdir()
    point = Point.create(str(where / "point"), "p", chunk_size=CHUNK)
    label, chance = cluster("mine"), random.Random(7)

    def chunk(*, dense: bool = True) -> bytes:
        return chance.randbytes(CHUNK) if dense else chance.randbytes(400) * (CHUNK // 400 + 1)

    def full(count: int) -> list[bytes]:
        return [chunk(dense=at % 3 == 0)[:CHUNK] for at in range(count)]

    first = full(12)
    first[5] = bytes(CHUNK)
    second = [*first[:3], *full(2), bytes(CHUNK), *first[6:]]
    second[6], second[9] = edited(second[6], 5), edited(second[9], 1, 15)  # stored as patches
    third = [*full(4), *first[:2]]
    images: list[Image] = []
    domain = open_domain(point, label, HOST)
    images.append(Image(save(domain, b"".join(first)), b"".join(first)))
    images.append(Image(save(domain, b"".join(second), images[0].saved), b"".join(second)))
    tail = b"".join(third) + chance.randbytes(1000)
    images.append(Image(save(domain, tail), tail))
    domain.checkpoint()
    last = edited(b"".join([*second[:-1], *full(1)]), 9 * 16 + 3)  # another one on the same base
    images.append(Image(save(domain, last, images[1].saved), last))
    assert len(patches(domain)) == 3
    beat(domain, 1)
    with mock.patch.object(bundles, "RECORDS_PER_BUNDLE", RECORDS_PER_BUNDLE):
        assert Bundling().go_on(domain) == 2
    domain.close()
    other = open_domain(point, cluster("other"), "host-2")
    save(other, b"".join(full(3)))
    other.close()
    records = (where / "point" / "domains" / label.cluster_uuid / "log").rglob("?" * 16)
    newest = max(path for path in records if path.is_file())
    site = Site(where / "point", label, tuple(images), newest)
    shutil.copytree(site.root / "views", where / "views")
    return site


def look(domain: Domain, saved: Saved) -> tuple[bytes, list[tuple[int, int]]]:
    """What can be read of a backup, zeros elsewhere, and (offset, length) of what can't."""
    found = domain.disk_map(saved.disk)
    content = bytearray(found.capacity)
    holes: list[tuple[int, int]] = []
    buffer = memoryview(bytearray(MAX_RUN_BYTES + CHUNK + 4096))
    with contextlib.closing(domain.reader()) as reader:
        for run in plan_reads(domain, found):
            for place, raw in reader.read_each(run, buffer):
                for target in place.targets:
                    at = target * CHUNK
                    if isinstance(raw, ChunkDamaged):
                        holes.append((at, min(CHUNK, found.capacity - at)))
                    else:
                        content[at : at + len(raw)] = raw
    return bytes(content), holes


def readable(domain: Domain, image: Image) -> list[tuple[int, int]]:
    """What of an image can't be read; AssertionError when anything wrong comes back."""
    try:
        content, holes = look(domain, image.saved)
    except StorageError:
        return [(0, len(image.content))]
    expected = bytearray(image.content)
    for at, length in holes:
        expected[at : at + length] = bytes(length)
    assert content == bytes(expected), "wrong bytes came back"
    return holes


# Ways of damaging a file. Each returns the new content, or None to take the file away.

Damage = Callable[[random.Random, bytes, bytes], bytes | None]


def flip(chance: random.Random, content: bytes, _other: bytes) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]


def flip_near_an_end(chance: random.Random, content: bytes, other: bytes) -> bytes:
    """Headers, tables and tails are few bytes among many; so they are aimed at."""
    edge = min(len(content), 160)
    if chance.random() < 0.5:
        return flip(chance, content[:edge], other) + content[edge:]
    return content[:-edge] + flip(chance, content[-edge:], other)


def zero(chance: random.Random, content: bytes, _other: bytes) -> bytes:
    at = chance.randrange(len(content))
    length = min(chance.choice((1, 16, 512, 4096)), len(content) - at)
    return content[:at] + bytes(length) + content[at + length :]


def truncate(chance: random.Random, content: bytes, _other: bytes) -> bytes:
    return content[: chance.randrange(len(content))]


def grow(chance: random.Random, content: bytes, _other: bytes) -> bytes:
    return content + chance.randbytes(chance.choice((1, 48, 512)))


def exchange(chance: random.Random, content: bytes, _other: bytes) -> bytes:
    """Two sectors have changed places."""
    size = min(512, len(content) // 2)
    one, two = sorted(chance.randrange(len(content) // size) * size for _ in range(2))
    body = bytearray(content)
    body[one : one + size], body[two : two + size] = (
        content[two : two + size],
        content[one : one + size],
    )
    return bytes(body[: len(content)])


def repeat(chance: random.Random, content: bytes, _other: bytes) -> bytes:
    """A sector was written twice, the second time over another."""
    size = min(512, len(content) // 2)
    one, two = (chance.randrange(len(content) // size) * size for _ in range(2))
    return content[:two] + content[one : one + size] + content[two + size :]


def replaced(_chance: random.Random, _content: bytes, other: bytes) -> bytes:
    """Another file of its kind is in its place."""
    return other


def gone(_chance: random.Random, _content: bytes, _other: bytes) -> None:
    return None


WAYS: tuple[Damage, ...] = (
    flip,
    flip,
    flip_near_an_end,
    flip_near_an_end,
    zero,
    truncate,
    grow,
    exchange,
    repeat,
    replaced,
    gone,
)


@contextlib.contextmanager
def damaged(path: Path, content: bytes | None) -> Iterator[None]:
    """The file holds `content` (None: is not there) inside the block, and is whole after it."""
    whole, mode = path.read_bytes(), path.stat().st_mode
    path.unlink()
    try:
        if content is not None:
            path.write_bytes(content)
            path.chmod(mode)
        yield
    finally:
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)  # a sweep removes empty directories
        path.write_bytes(whole)
        path.chmod(mode)


def cant_read(monkeypatch: pytest.MonkeyPatch, path: Path) -> int:
    """From now on nobody can read the file, which has the inode that is returned, by any call."""
    inode = path.stat().st_ino
    read, pread = os.read, os.pread

    def meet(fd: int) -> None:
        if os.fstat(fd).st_ino == inode:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def failing_read(fd: int, size_bytes: int) -> bytes:
        meet(fd)
        return read(fd, size_bytes)

    def failing_pread(fd: int, size_bytes: int, offset: int) -> bytes:
        meet(fd)
        return pread(fd, size_bytes, offset)

    monkeypatch.setattr(os, "read", failing_read)
    monkeypatch.setattr(os, "pread", failing_pread)
    return inode
