"""Is our NBD client as fast as libnbd, which is written in C?

Both read the same disk of random data from the same server, in turns: qemu-nbd with a raw volume
and with an image, and nbdkit. We read as a backup does: threads, each with a buffer of its own, one
client with as many connections as a backup has. libnbd reads in the ways that were found best for
it: asynchronously with several requests, over one connection and over one for each of two threads,
into the same buffers; and with two threads that wait for each request, whose data goes to the same
small place again and again. The one whose median is best counts. Nothing is done with the data, all
of it comes from the page cache.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from bench.lab import Cost, Lab, series, times, warm
from bench.results import Figure, Note, Result, ratios
from bench.runner import alone
from engine.backup.pipeline import ITEM_BYTES
from engine.nbd.client import NbdClient
from engine.nbd.connection import NbdAddress
from engine.nbd.source import CONNECTIONS
from storage.files.memory import large_buffer

QUESTION = "Is the NBD client as fast as libnbd?"

MIB = 1 << 20
_DISTRIBUTION_PACKAGES = "/usr/lib/python3/dist-packages"  # libnbd is on no package index
_AIO_BYTES = 256 << 10
_AIO_BYTES_OF_TWO = 512 << 10
_SYNC_BYTES = MIB
_THREADS = 3


def run(lab: Lab) -> Iterator[Result]:
    """Reads a whole disk through each server, ours and libnbd in turns."""
    libnbd = _libnbd()
    missing = [tool for tool in ("qemu-nbd", "nbdkit", "qemu-img") if shutil.which(tool) is None]
    if libnbd is None or missing:
        yield Note(f"no NBD comparison: {', '.join(missing) or 'libnbd'} is not there")
        return
    size_bytes = lab.pick(256, 1024) * MIB
    with lab.scratch() as place:
        raw, image = _disks(place, size_bytes)
        for what, command in _servers(raw, image).items():
            warm(image if "qcow2" in what else raw)
            with _serving(command, place / "s") as path:
                costs = lab.interleave(_acts(libnbd, path))
            yield from series(f"all of {size_bytes // MIB} MiB over NBD, {what}", costs)
            theirs = [each for who, each in costs.items() if who != "vmkeep"]
            best = min((times(each) for each in theirs), key=statistics.median)
            yield Figure("nbd/libnbd", ratios(best, times(costs["vmkeep"])), what)


def _libnbd() -> ModuleType | None:
    sys.path.append(_DISTRIBUTION_PACKAGES)
    try:
        return importlib.import_module("nbd")
    except ImportError:
        return None
    finally:
        sys.path.remove(_DISTRIBUTION_PACKAGES)


def _disks(place: Path, size_bytes: int) -> tuple[Path, Path]:
    raw, image = place / "v.raw", place / "v.qcow2"
    with raw.open("wb") as file:
        for _ in range(size_bytes // MIB):
            file.write(os.urandom(MIB))
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
    subprocess.run([*convert, str(raw), str(image)], check=True)
    return raw, image


def _servers(raw: Path, image: Path) -> dict[str, list[str]]:
    """Commands that lack the socket's path, in the place of {}."""
    qemu = ["qemu-nbd", "-r", "-t", "-e", "16", "-k", "{}", "-f"]
    return {
        "qemu-nbd raw": [*qemu, "raw", str(raw)],
        "qemu-nbd qcow2": [*qemu, "qcow2", str(image)],
        "nbdkit file": ["nbdkit", "-f", "-r", "-U", "{}", "file", str(raw)],
    }


@contextlib.contextmanager
def _serving(command: Sequence[str], path: Path) -> Iterator[str]:
    process = subprocess.Popen([word.format(path) for word in command], stdin=subprocess.DEVNULL)
    try:
        while not _listens(path):
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended")
            time.sleep(0.01)
        yield str(path)
    finally:
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)


def _listens(path: Path) -> bool:
    """A socket's name is there before it listens."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _acts(libnbd: ModuleType, path: str) -> dict[str, Callable[[], Cost]]:
    # As a job has them: once, however large its disks are.
    buffers = [large_buffer(ITEM_BYTES) for _ in range(_THREADS)]
    return {
        "vmkeep": lambda: _timed(lambda: _read_ours(path, buffers)),
        "libnbd aio ×4": lambda: _timed(lambda: _read_aio(libnbd, path, 4, buffers)),
        "libnbd aio ×16": lambda: _timed(lambda: _read_aio(libnbd, path, 16, buffers)),
        "libnbd 2 threads aio ×2": lambda: _timed(lambda: _read_aio_by_two(libnbd, path, buffers)),
        "libnbd 2 threads": lambda: _timed(lambda: _read_sync(libnbd, path, 2)),
    }


def _timed(act: Callable[[], None]) -> Cost:
    started_s, cpu_s = time.perf_counter(), time.process_time()
    act()
    return Cost(time.perf_counter() - started_s, time.process_time() - cpu_s)


def _read_ours(path: str, buffers: Sequence[memoryview]) -> None:
    address = NbdAddress(path)
    with NbdClient.connect(address, "", timeout_s=60, connections=CONNECTIONS) as client:
        size_bytes = client.size_bytes

        def work(number: int) -> None:
            for at in range(number * ITEM_BYTES, size_bytes, len(buffers) * ITEM_BYTES):
                client.read_into(buffers[number][: size_bytes - at], at)

        _in_threads(work, len(buffers))


def _read_aio(libnbd: ModuleType, path: str, depth: int, buffers: Sequence[memoryview]) -> None:
    handle = libnbd.NBD()
    handle.connect_unix(path)
    ring = len(buffers) * ITEM_BYTES
    under_way, offset, size_bytes = set[int](), 0, handle.get_size()
    while under_way or offset < size_bytes:
        while len(under_way) < depth and offset < size_bytes:
            number, at = divmod(offset % ring, ITEM_BYTES)
            place = buffers[number][at : at + _AIO_BYTES]
            under_way.add(handle.aio_pread(place, offset))
            offset += _AIO_BYTES
        handle.poll(-1)
        under_way -= {cookie for cookie in under_way if handle.aio_command_completed(cookie)}
    handle.shutdown()


def _read_aio_by_two(libnbd: ModuleType, path: str, buffers: Sequence[memoryview]) -> None:
    def work(number: int) -> None:
        handle = libnbd.NBD()
        handle.connect_unix(path)
        under_way, at, size_bytes = set[int](), 0, handle.get_size()
        offset = number * _AIO_BYTES_OF_TWO
        while under_way or offset < size_bytes:
            while len(under_way) < 2 and offset < size_bytes:
                place = buffers[number][at : at + _AIO_BYTES_OF_TWO]
                under_way.add(handle.aio_pread(place, offset))
                offset += 2 * _AIO_BYTES_OF_TWO
                at = (at + _AIO_BYTES_OF_TWO) % ITEM_BYTES
            handle.poll(-1)
            under_way -= {cookie for cookie in under_way if handle.aio_command_completed(cookie)}
        handle.shutdown()

    _in_threads(work, 2)


def _read_sync(libnbd: ModuleType, path: str, threads: int) -> None:
    def work(number: int) -> None:
        handle = libnbd.NBD()
        handle.connect_unix(path)
        for at in range(number * _SYNC_BYTES, handle.get_size(), threads * _SYNC_BYTES):
            handle.pread(_SYNC_BYTES, at)
        handle.shutdown()

    _in_threads(work, threads)


def _in_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    sys.exit(alone(__file__))
