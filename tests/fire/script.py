"""One verb on a prepared domain, with the file system failing or the process dying at call N.

    python -m tests.fire.script VERB PLACE        (what strace runs: see below.py)

Single-threaded as far as the product is: a session seals its packs in a thread of its own.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from storage.domain.domain import Domain
from storage.files.fs import Buffer, FileStat, OsFs, Room
from storage.point import ClusterLabel, Point
from tests.fire.site import HOST, changed, noise
from tests.store import PACK, Saved, load, save

CHUNKS = 20
PAST = 3


@functools.cache
def image(number: int) -> bytes:
    """The VM's volume at its backup `number`: each differs from the one before."""
    content = noise(CHUNKS, 1)
    for seed in range(2, number + 2):
        content = changed(content, 4, seed)
    return content


class Facts:
    """What is on a prepared place: made by `prepare`, kept in a file beside the point."""

    def __init__(self, place: Path, labels: Sequence[ClusterLabel], past: Sequence[Saved]) -> None:
        self.place = place
        self.labels = labels
        self.past = past  # acknowledged backups; number n has image(n)
        self.tell: Callable[[str], None] = lambda _: None  # hears of what is acknowledged

    def store(self) -> None:
        labels = [[label.cluster_uuid, label.cluster_name] for label in self.labels]
        past = [[saved.backup, saved.disk, saved.parent] for saved in self.past]
        (self.place / "facts").write_text(json.dumps([labels, past]))

    @classmethod
    def load(cls, place: Path) -> Facts:
        labels, past = json.loads((place / "facts").read_text())
        return cls(
            place,
            [ClusterLabel(cluster_uuid=uuid, cluster_name=name) for uuid, name in labels],
            [Saved(*names) for names in past],
        )

    def open(self, which: int = 0, fs: OsFs | None = None) -> Domain:
        point = Point.open(str(self.place / "point"), fs=fs)
        return point.domain(
            self.labels[which],
            HOST,
            str(self.place / "views"),
            pack_size_bytes=PACK,
            seen_path=str(self.place / f"seen-{which}"),
        )


def prepare(place: Path, labels: Sequence[ClusterLabel]) -> Facts:
    """A point with two clusters' domains; the first has a chain of PAST backups."""
    (place / "point").mkdir()
    Point.create(str(place / "point"), "p", chunk_size=64 << 10).close()
    facts = Facts(place, labels, [])
    facts.open(1).close()
    domain = facts.open()
    past: list[Saved] = []
    for number in range(PAST):
        past.append(save(domain, image(number), past[-1] if past else None))
    domain.close()
    facts.past = past
    facts.store()
    return facts


FULL = noise(CHUNKS, 99)

# The verbs. Each returns after its last acknowledgement.


def full(facts: Facts, domain: Domain) -> None:
    facts.tell(save(domain, FULL).backup)


def incremental(facts: Facts, domain: Domain) -> None:
    facts.tell(save(domain, image(PAST), facts.past[-1]).backup)


def delete(facts: Facts, domain: Domain) -> None:
    domain.forget([facts.past[0].backup])
    facts.tell(facts.past[0].backup)
    domain.reclaim(sparse_below=1.0)


def restore(facts: Facts, domain: Domain) -> None:
    assert load(domain, facts.past[-1]) == image(PAST - 1)


def take_over(facts: Facts, domain: Domain) -> None:
    source = facts.labels[0].cluster_uuid
    domain.import_backups(source, [saved.backup for saved in facts.past[:2]], lambda _: b"")
    facts.tell("imported")


def checkpoint(_facts: Facts, domain: Domain) -> None:
    domain.checkpoint()


def rebuild(_facts: Facts, domain: Domain) -> None:
    domain.rebuild()


Verb: TypeAlias = Callable[[Facts, Domain], None]
VERBS: dict[str, Verb] = {
    verb.__name__: verb
    for verb in (full, incremental, delete, restore, take_over, checkpoint, rebuild)
}


def run(facts: Facts, verb: str, fs: OsFs | None = None) -> None:
    """Opens the domain, as a service does when it starts, does the verb, closes."""
    domain = facts.open(1 if verb == "take_over" else 0, fs)
    try:
        VERBS[verb](facts, domain)
    finally:
        domain.close()


# The file system that fails.


class FailsAt(OsFs):
    """Before its N-th call, of whatever thread, it does `act`: which raises, or ends us."""

    def __init__(self, n: int, act: Callable[[], None]) -> None:
        self.calls = 0
        self._n = n
        self._act = act
        self._lock = threading.Lock()

    def _next(self) -> None:
        with self._lock:
            self.calls += 1
            due = self.calls == self._n
        if due:
            self._act()

    def open_read(self, path: str) -> int:
        self._next()
        return super().open_read(path)

    def open_new(self, path: str) -> int:
        self._next()
        return super().open_new(path)

    def close(self, fd: int) -> None:
        # Linux frees the descriptor, whatever close reports.
        try:
            self._next()
        finally:
            super().close(fd)

    def pread(self, fd: int, size_bytes: int, offset: int) -> bytes:
        self._next()
        return super().pread(fd, size_bytes, offset)

    def preadv(self, fd: int, buffer: Buffer, offset: int) -> int:
        self._next()
        return super().preadv(fd, buffer, offset)

    def pwrite(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        self._next()
        return super().pwrite(fd, pieces, offset)

    def allocate(self, fd: int, size_bytes: int) -> None:
        self._next()
        super().allocate(fd, size_bytes)

    def fsync(self, fd: int) -> None:
        self._next()
        super().fsync(fd)

    def fsync_dir(self, path: str) -> None:
        self._next()
        super().fsync_dir(path)

    def link(self, source: str, target: str) -> None:
        self._next()
        super().link(source, target)

    def unlink(self, path: str) -> None:
        self._next()
        super().unlink(path)

    def rename(self, source: str, target: str) -> None:
        self._next()
        super().rename(source, target)

    def mkdir(self, path: str) -> None:
        self._next()
        super().mkdir(path)

    def rmdir(self, path: str) -> None:
        self._next()
        super().rmdir(path)

    def listdir(self, path: str) -> list[str]:
        self._next()
        return super().listdir(path)

    def stat(self, path: str) -> FileStat:
        self._next()
        return super().stat(path)

    def room(self, path: str) -> Room:
        self._next()
        return super().room(path)


def _raise(number: int) -> None:
    raise OSError(number, os.strerror(number))


def failing_at(n: int, number: int) -> FailsAt:
    """Call `n` raises that errno; the process goes on."""
    return FailsAt(n, functools.partial(_raise, number))


def dying_at(n: int) -> FailsAt:
    """kill -9 before call `n`."""
    return FailsAt(n, functools.partial(os.kill, os.getpid(), signal.SIGKILL))


if __name__ == "__main__":
    found = Facts.load(Path(sys.argv[2]))
    found.tell = functools.partial(print, flush=True)
    run(found, sys.argv[1])
