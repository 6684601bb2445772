"""What a question works with: sizes, directories, commands whose cost is measured, pairs.

Peak memory is that of a whole process tree: every few milliseconds the resident sizes of a command
and of all that it started are added up. What maps a file counts its resident pages too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench.results import Series

T = TypeVar("T")

LOOK_EVERY_S = 0.02
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Cost:
    """What one act took. `stored_bytes`: what it added to the place where backups are."""

    elapsed_s: float
    cpu_s: float = 0.0
    peak_bytes: int = 0
    stored_bytes: int = 0


class CommandFailed(Exception):
    """A measured command's exit status was not 0."""


@dataclass(frozen=True, slots=True)
class Lab:
    """`cache` holds corpora from run to run, `work` what is gone after it: on one file system."""

    full: bool
    cache: Path
    work: Path
    repeats: int
    cores: int

    def pick(self, quick: T, full: T) -> T:
        """A size by the run's scale."""
        return full if self.full else quick

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new, empty directory; removed with all that is in it."""
        path = Path(tempfile.mkdtemp(prefix="scratch-", dir=self.work))
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def measure(self, argv: Sequence[str | Path]) -> Cost:
        """Runs a command to its end, with nothing on its input. Raises CommandFailed.

        Its output goes nowhere, its errors into the exception.
        """
        return _cost(argv, subprocess.DEVNULL, None, None)

    def interleave(self, acts: Mapping[str, Callable[[], Cost]]) -> dict[str, list[Cost]]:
        """Each act `repeats` times, in turns; every other round backwards, so that none always
        follows the same one."""
        costs: dict[str, list[Cost]] = {who: [] for who in acts}
        for number in range(self.repeats):
            for who in acts if number % 2 == 0 else reversed(list(acts)):
                say(f"    {who} …")
                costs[who].append(acts[who]())
        return costs


def say(text: str) -> None:
    """A line of progress."""
    print(text, flush=True)


def measured(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> tuple[Cost, str]:
    """The cost of a command, and its output. Raises CommandFailed with its errors.

    `env` is added to this process's.
    """
    with tempfile.TemporaryFile() as out:
        cost = _cost(argv, out.fileno(), cwd, env)
        out.seek(0)
        return cost, out.read().decode()


def _cost(
    argv: Sequence[str | Path], out: int, cwd: Path | None, env: Mapping[str, str] | None
) -> Cost:
    with tempfile.TemporaryFile() as errors:
        started_s = time.perf_counter()
        child = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            cwd=cwd or _ROOT,
            env={**os.environ, **(env or {})},
        )
        with _watched(child.pid) as watch:
            _, status, usage = os.wait4(child.pid, 0)
            elapsed_s = time.perf_counter() - started_s
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace")
            raise CommandFailed(f"{argv[0]}: exit {child.returncode}: {said}")
        return Cost(elapsed_s, usage.ru_utime + usage.ru_stime, watch.peak_bytes)


def series(what: str, costs: Mapping[str, Sequence[Cost]]) -> Iterator[Series]:
    """Times, and what else was measured, of each who."""
    for who, each in costs.items():
        yield Series(what, who, "s", tuple(cost.elapsed_s for cost in each))
    for who, each in costs.items():
        if any(cost.peak_bytes for cost in each):
            peaks = tuple(float(cost.peak_bytes) for cost in each)
            yield Series(f"{what}: peak memory", who, "B", peaks)
    for who, each in costs.items():
        if any(cost.stored_bytes for cost in each):
            stored = tuple(float(cost.stored_bytes) for cost in each)
            yield Series(f"{what}: stored", who, "B", stored)


def times(costs: Sequence[Cost]) -> tuple[float, ...]:
    return tuple(cost.elapsed_s for cost in costs)


def tree_bytes(path: Path) -> int:
    """The room that a directory's files take."""
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())


def drop_from_cache(path: Path) -> None:
    """The file's pages leave the page cache; those not written yet are written first."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def drop_all(*paths: Path) -> None:
    """As drop_from_cache for all files there; as root also names, inodes and free pages."""
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                drop_from_cache(file)
    with contextlib.suppress(PermissionError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def warm(path: Path) -> None:
    """All of the file's data in the page cache, and no old writes under way."""
    os.sync()
    with path.open("rb", buffering=0) as file:
        at = 0
        while (at := _next_data(file.fileno(), at)) >= 0:
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            os.lseek(file.fileno(), at, os.SEEK_SET)
            while at < end:
                at += len(file.read(min(8 << 20, end - at)))


def _next_data(fd: int, at: int) -> int:
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError:
        return -1


class _Watch:
    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            size = sum(resident_bytes(pid) for pid in [self._pid, *descendants(self._pid)])
            self.peak_bytes = max(self.peak_bytes, size)
            if self._over.wait(LOOK_EVERY_S):
                return


@contextlib.contextmanager
def _watched(pid: int) -> Iterator[_Watch]:
    watch = _Watch(pid)
    try:
        yield watch
    finally:
        watch.stop()


def resident_bytes(pid: int) -> int:
    """A process's resident size now; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def peak_bytes(pid: int) -> int:
    """The largest resident size that a process has had. (getrusage's has its parent's in it.)"""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/PID/status")


def descendants(pid: int) -> list[int]:
    """All processes below a process."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
    return found
