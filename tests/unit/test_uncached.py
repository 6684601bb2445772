"""storage.files.uncached: what is in no cache does not get there by being read."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.domain.reader import MAX_RUN_BYTES, plan_reads
from storage.files.fs import OsFs
from storage.files.memory import large_buffer
from storage.files.uncached import LEAST_BYTES, PAGE_BYTES, is_cached, lead_bytes, read_once
from tests.store import CHUNK, cluster, live_files, new_point, save

FILE_BYTES = (6 << 20) + 4321
CONTENT = random.Random(1).randbytes(FILE_BYTES)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of which nothing is in the cache."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    yield fd
    os.close(fd)


def require_uncached(fd: int) -> None:
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no way past its cache")
    if is_cached(fd, FILE_BYTES, 0):
        pytest.skip("this file system keeps its files in memory")


@pytest.mark.parametrize("offset", [0, 1, PAGE_BYTES, 12_345])
@pytest.mark.parametrize("size_bytes", [LEAST_BYTES, LEAST_BYTES + 1, (4 << 20) - 1])
def test_a_large_read_leaves_nothing_in_the_cache(fd: int, offset: int, size_bytes: int) -> None:
    require_uncached(fd)
    lead = lead_bytes(offset)
    part = large_buffer(lead + size_bytes)[lead:]
    assert OsFs().preadv(fd, part, offset) == size_bytes
    assert part == CONTENT[offset : offset + size_bytes]
    assert not is_cached(fd, size_bytes, offset)
    assert read_once(fd, part, offset) == size_bytes  # all of it went that way


def test_what_is_cached_is_left_to_an_ordinary_read(fd: int) -> None:
    os.pread(fd, FILE_BYTES, 0)
    assert is_cached(fd, FILE_BYTES, 0)
    assert read_once(fd, large_buffer(FILE_BYTES), 0) == 0


@pytest.mark.parametrize("cached", [None, (0, 3 << 20), (2 << 20, PAGE_BYTES), (3 << 20, 3 << 20)])
@pytest.mark.parametrize("shift", [0, 1, PAGE_BYTES])
def test_any_read_gives_what_the_file_has(
    fd: int, cached: tuple[int, int] | None, shift: int
) -> None:
    if cached:
        os.pread(fd, cached[1], cached[0])
    for offset in (0, 1, PAGE_BYTES, 2_000_000, FILE_BYTES - LEAST_BYTES - 1, FILE_BYTES - 5):
        for size_bytes in (1, LEAST_BYTES - 1, LEAST_BYTES, LEAST_BYTES + 1, FILE_BYTES):
            start = lead_bytes(offset) + shift
            buffer = large_buffer(start + size_bytes)[start:]
            want = CONTENT[offset : offset + size_bytes]
            assert OsFs().preadv(fd, buffer, offset) == len(want)
            assert buffer[: len(want)] == want
            assert not any(buffer[len(want) : len(want) + PAGE_BYTES])


def test_a_backup_is_read_past_the_cache(fd: int, tmp_path: Path) -> None:
    require_uncached(fd)
    point = new_point(tmp_path)
    domain = point.domain(cluster(), "host-1", str(tmp_path / "unused"))
    image = random.Random(2).randbytes(40 * CHUNK)
    saved = save(domain, image)
    (name,) = (name for name in live_files(domain) if name.startswith("packs/"))
    pack_fd = os.open(f"{domain.paths.root}/{name}", os.O_RDONLY)
    os.posix_fadvise(pack_fd, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = large_buffer(MAX_RUN_BYTES + PAGE_BYTES)
    made = bytearray(len(image))
    with contextlib.closing(domain.reader()) as reader:
        for run in plan_reads(domain, domain.disk_map(saved.disk)):
            for place, content in reader.read(run, buffer):
                for target in place.targets:
                    made[target * CHUNK : (target + 1) * CHUNK] = content
    assert made == image
    assert not is_cached(pack_fd, 30 * CHUNK, CHUNK)
    os.close(pack_fd)
    domain.close()
