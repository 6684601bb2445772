"""How fast could this machine be at best? Reading an image, zstd of its chunks, writing it.

    python -m bench.limits IMAGE [--dir DIR] [--workers 2]

The physical limits that the other benchmarks are held against, measured in the same run: nothing
here hashes, looks up or remembers anything. zstd runs over chunks that lie in memory already, a
window at a time, so memory is bounded; only the time inside zstd counts.

Writing is measured through the page cache and with O_DIRECT, each with fsync: what the cache costs
depends on the machine (a virtual machine whose host takes free pages back pays for each page that
it touches first). The limit is the faster of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import zstandard

from engine.backup.pages import chunk_runs
from engine.snapshot.sources import allocated_ranges
from storage.format.chunks import is_zero

GIB = 1 << 30
CHUNK_BYTES = 1 << 20
WINDOW_CHUNKS = 256
LEVEL = 1


@dataclass(frozen=True, slots=True)
class Limit:
    """`size_bytes`: what was read, compressed (before), decompressed (after) or written."""

    name: str
    elapsed_s: float
    size_bytes: int

    @property
    def rate_bytes_per_s(self) -> float:
        return self.size_bytes / self.elapsed_s if self.elapsed_s else 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """All of them for one image. `stored_bytes`: its chunks after zstd."""

    read_cold: Limit
    read_warm: Limit
    compress: Limit
    decompress: Limit
    write_buffered: Limit
    write_direct: Limit | None  # None: the file system has no O_DIRECT
    stored_bytes: int

    @property
    def write(self) -> Limit:
        """The faster way of writing the image."""
        direct = self.write_direct
        if direct is not None and direct.elapsed_s < self.write_buffered.elapsed_s:
            return direct
        return self.write_buffered

    @property
    def restore_s(self) -> float:
        """What no restore can beat while it overlaps its steps without any loss."""
        return max(self.decompress.elapsed_s, self.write.elapsed_s)

    def each(self) -> list[Limit]:
        """The measured ones, for a table."""
        reads, zstd = [self.read_cold, self.read_warm], [self.compress, self.decompress]
        writes = [self.write_buffered, *([self.write_direct] if self.write_direct else [])]
        return [*reads, *zstd, *writes]


def measure_limits(image: Path, scratch: Path, workers: int = os.cpu_count() or 1) -> Limits:
    """Measures everything once. `scratch`: a directory on the file system to write to; it needs
    room for the image's data, which is given back. Leaves the image in the page cache."""
    read_cold = measure_read(image, cold=True)
    read_warm = measure_read(image)
    compress, decompress, stored_bytes = measure_zstd(image, workers)
    return Limits(
        read_cold=read_cold,
        read_warm=read_warm,
        compress=compress,
        decompress=decompress,
        write_buffered=measure_write(image, scratch),
        write_direct=_measure_direct(image, scratch),
        stored_bytes=stored_bytes,
    )


def measure_read(image: Path, *, cold: bool = False) -> Limit:
    """`cat image >/dev/null`. Cold: nothing of the image is in the page cache; else it all is."""
    if cold:
        os.sync()
        with image.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        _cat(image)
    elapsed_s = _timed(lambda: _cat(image))
    return Limit(f"read {'cold' if cold else 'warm'}", elapsed_s, image.stat().st_size)


def measure_zstd(image: Path, workers: int) -> tuple[Limit, Limit, int]:
    """zstd of the chunks that are not zero, and back, `workers` threads; and the bytes between."""
    compress_s = decompress_s = 0.0
    raw_bytes = stored_bytes = 0
    encoders = [zstandard.ZstdCompressor(level=LEVEL) for _ in range(workers)]
    decoders = [zstandard.ZstdDecompressor() for _ in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        for window in _windows(image):
            elapsed_s, packed = _mapped(pool, [one.compress for one in encoders], window)
            compress_s += elapsed_s
            elapsed_s, _ = _mapped(pool, [one.decompress for one in decoders], packed, keep=False)
            decompress_s += elapsed_s
            raw_bytes += sum(len(chunk) for chunk in window)
            stored_bytes += sum(len(chunk) for chunk in packed)
    return (
        Limit("compress, zstd-1", compress_s, raw_bytes),
        Limit("decompress", decompress_s, raw_bytes),
        stored_bytes,
    )


def measure_write(image: Path, scratch: Path, *, direct: bool = False) -> Limit:
    """Writes as many chunks to the same places of a new sparse file, and makes them durable.

    One thread, a chunk at a time, as a restore's are: a file system orders the writes to one file.
    The image's last chunk is written in full, so that O_DIRECT has its alignment.
    """
    offsets = list(_data_offsets(image))
    stage = memoryview(mmap.mmap(-1, CHUNK_BYTES))
    stage[:] = os.urandom(CHUNK_BYTES)
    target = scratch / f"limit-{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
    with contextlib.ExitStack() as undo:
        undo.callback(target.unlink, missing_ok=True)
        fd = os.open(target, flags, 0o600)
        undo.callback(os.close, fd)

        def write() -> None:
            os.ftruncate(fd, image.stat().st_size)
            for offset in offsets:
                os.pwrite(fd, stage, offset)
            os.fsync(fd)

        os.sync()
        elapsed_s = _timed(write)
    name = f"write, {'O_DIRECT' if direct else 'page cache'}"
    return Limit(name, elapsed_s, len(offsets) * CHUNK_BYTES)


def least_write(image: Path, scratch: Path) -> Limit:
    """The faster of the two ways of writing the image."""
    buffered, direct = measure_write(image, scratch), _measure_direct(image, scratch)
    return direct if direct is not None and direct.elapsed_s < buffered.elapsed_s else buffered


def _measure_direct(image: Path, scratch: Path) -> Limit | None:
    try:
        return measure_write(image, scratch, direct=True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _mapped(
    pool: ThreadPoolExecutor,
    functions: Sequence[Callable[[memoryview | bytes], bytes]],
    pieces: Sequence[memoryview | bytes],
    *,
    keep: bool = True,
) -> tuple[float, list[bytes]]:
    """Applies one of the functions a thread to the pieces; the time, and the results if wanted."""
    results = [b""] * len(pieces)
    turns = itertools.count()  # next() on it is atomic

    def work(function: Callable[[memoryview | bytes], bytes]) -> None:
        while (at := next(turns)) < len(pieces):
            result = function(pieces[at])
            if keep:
                results[at] = result

    elapsed_s = _timed(lambda: list(pool.map(work, functions)))
    return elapsed_s, results


def _windows(image: Path) -> Iterator[list[memoryview]]:
    """The chunks that are not zero, some at a time, in memory until the next are asked for."""
    memory = memoryview(mmap.mmap(-1, WINDOW_CHUNKS * CHUNK_BYTES))
    offsets = _data_offsets(image)
    with image.open("rb", buffering=0) as file:
        while places := list(itertools.islice(offsets, WINDOW_CHUNKS)):
            chunks = []
            for number, offset in enumerate(places):
                chunk = memory[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
                count = os.preadv(file.fileno(), [chunk], offset)
                if not is_zero(chunk[:count]):
                    chunks.append(chunk[:count])
            yield chunks


def _data_offsets(image: Path) -> Iterator[int]:
    """Where the chunks are that are data in part at least."""
    with image.open("rb") as file:
        for first, end in chunk_runs(
            allocated_ranges(file.fileno(), image.stat().st_size), CHUNK_BYTES
        ):
            yield from range(first * CHUNK_BYTES, end * CHUNK_BYTES, CHUNK_BYTES)


def _cat(image: Path) -> None:
    subprocess.run(["cat", image], stdout=subprocess.DEVNULL, check=True)


def _timed(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    limits = measure_limits(given.image, given.dir, given.workers)
    print(f"{'limit':24}{'s':>8}{'GiB':>8}{'GiB/s':>8}")
    for limit in limits.each():
        size, rate = limit.size_bytes / GIB, limit.rate_bytes_per_s / GIB
        print(f"{limit.name:24}{limit.elapsed_s:8.2f}{size:8.2f}{rate:8.2f}")
    print(f"stored: {limits.stored_bytes / GIB:.2f} GiB; no restore under {limits.restore_s:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
