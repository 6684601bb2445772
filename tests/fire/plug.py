"""Pulling the plug: the file system's shutdown ioctl, at any moment of backups and deletes.

    python -m tests.fire.plug [--kind ext4] [--count 5000] [--seed N] [--dir DIR]      (as root)

A child works on a domain and tells of each operation when it begins and when it is acknowledged.
We shut its file system down without flushing the journal, as a power failure does, mount it again
and hold what is there against what the child had told *before* that: an fsync that races with the
shutdown may return success for something lost, which no power failure can do.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from storage.domain.domain import Domain
from storage.errors import StorageError
from storage.view.listing import BackupRow
from tests.fire.loops import enter_own_mounts, mount, unmount
from tests.fire.site import Site, changed, noise
from tests.store import Saved, load, require_rebuilt_alike, save

MAKE_FS = {
    "ext4": ["mke2fs", "-q", "-t", "ext4", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}
PULLS_OF_ONE = 50  # on one file system: each leaves records, all of which are read after each
SIZE_BYTES = {"ext4": 128 << 20, "xfs": 320 << 20}
IMAGE_CHUNKS = 20
MOST_BACKUPS = 6
MOST_TOLD = 10  # the pull comes after as many words of the child, half of them acknowledgements
LONGEST_WAIT_S = 0.02  # and this much later

_SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
_NO_LOG_FLUSH = 2


class Broken(Exception):
    """A promise was broken."""


def image_of(label: bytes) -> bytes:
    """A backup's content follows from its label: the seeds of all changes since the first."""
    first, *later = [int(seed) for seed in label.split(b",")]
    image = noise(IMAGE_CHUNKS, first)
    for seed in later:
        image = changed(image, 1 + seed % 5, seed)
    return image


@dataclass
class Told:
    """What a child said: labels of saves and uuids of forgets, begun and acknowledged."""

    saving: set[bytes] = field(default_factory=set)
    saved: set[str] = field(default_factory=set)
    forgetting: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)

    def hear(self, line: bytes) -> None:
        verb, what = json.loads(line)
        if verb == "saving":
            self.saving.add(what.encode())
        else:
            getattr(self, verb).add(what)


Tell = Callable[[str, str], None]


def judged(domain: Domain, told: Told, truth: set[str]) -> set[str]:
    """The uuids of the backups that are there, each of which restores. Broken when one is not that
    must be, of the `truth` of before and what was told since, or one is that must not."""
    rows = {row.backup: row for row in domain.backups()}
    lost = (truth | told.saved) - told.forgetting - rows.keys()
    risen = told.forgotten & rows.keys()
    if lost or risen:
        raise Broken(f"lost {lost}, back from the dead {risen}")
    for row in rows.values():
        if load(domain, Saved(row.backup, row.disks[0].disk)) != image_of(row.label):
            raise Broken(f"backup {row.backup} does not come back")
    return set(rows)


# The child.


def work(site: Site, seed: int, tell: Tell) -> None:
    """Backups, deletes and gcs until the file system, or who is told, fails."""
    chance = random.Random(seed)
    domain = site.opened()
    tell("forgotten", "")  # ready
    while True:
        rows = domain.backups()
        if len(rows) > MOST_BACKUPS or (rows and chance.random() < 0.2):
            gone = chance.choice(sorted(row.backup for row in rows))
            tell("forgetting", gone)
            domain.forget([gone])
            tell("forgotten", gone)
            domain.reclaim(sparse_below=0.9, copy_budget_bytes=chance.choice([0, 1 << 30]))
        else:
            _save_one(domain, rows, chance, tell)


def _save_one(domain: Domain, rows: list[BackupRow], chance: random.Random, tell: Tell) -> None:
    seed = str(chance.getrandbits(40)).encode()
    parent = chance.choice(sorted(rows, key=lambda row: row.backup)) if rows else None
    if parent is None or chance.random() < 0.3:
        label, base = seed, None
    else:
        label, base = parent.label + b"," + seed, Saved(parent.backup, parent.disks[0].disk)
    tell("saving", label.decode())
    saved = save(domain, image_of(label), base, label)
    tell("saved", saved.backup)


def _start(site: Site, seed: int) -> tuple[int, int]:
    """(child, the end of the pipe to hear it on)."""
    heard, out = os.pipe()
    child = os.fork()
    if child:
        os.close(out)
        return child, heard

    def tell(verb: str, what: str) -> None:
        os.write(out, json.dumps([verb, what]).encode() + b"\n")

    code = 1
    try:
        os.close(heard)
        work(site, seed, tell)
    except StorageError:
        code = 0
    except BaseException:  # noqa: BLE001 (what the child fails with is its result)
        traceback.print_exc()
    finally:
        os._exit(code)


# The round.


class Bench:
    """A loop file system with a site on it, and what must be true of it. A context manager."""

    def __init__(self, root: Path, kind: str) -> None:
        self.kind = kind
        self.counts: Counter[str] = Counter()
        self._image, self._place = root / f"{kind}.img", root / kind
        self._place.mkdir()
        with self._image.open("wb") as file:
            file.truncate(SIZE_BYTES[kind])
        subprocess.run([*MAKE_FS[kind], str(self._image)], check=True)
        mount(self._image, self._place)
        self.site = Site(self._place, self._place)
        self.site.domain.close()
        self.truth: set[str] = set()  # uuids of acknowledged backups

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        if os.path.ismount(self._place):  # not after a Held
            unmount(self._image, self._place)

    def round(self, seed: int) -> None:
        """One pull at a moment that `seed` chooses, and what must be true after it. Broken."""
        chance = random.Random(seed)
        child, heard = _start(self.site, seed)
        try:
            told = self._pull(heard, chance)
            self.counts[self._end(child)] += 1
        finally:
            os.close(heard)
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        unmount(self._image, self._place)
        mount(self._image, self._place)
        self._judge(told, seed)
        self.counts["pulls"] += 1

    def _pull(self, heard: int, chance: random.Random) -> Told:
        place = os.open(self._place, os.O_RDONLY)
        with os.fdopen(heard, "rb", buffering=0, closefd=False) as pipe:
            told, text = Told(), pipe.readline()
            text = b"" if text else b"?"
            for _ in range(chance.randrange(MOST_TOLD)):
                text += pipe.readline()
            end_s = time.monotonic() + chance.random() * LONGEST_WAIT_S
            while (left_s := end_s - time.monotonic()) > 0:
                if select.select([pipe], [], [], left_s)[0]:
                    text += os.read(heard, 1 << 16)
            fcntl.ioctl(place, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        os.close(place)
        for line in text[: text.rfind(b"\n") + 1].splitlines():
            told.hear(line)
        return told

    def _end(self, child: int) -> str:
        """How the child ended; it may only have met an error of the storage, or of memory that
        the file system no longer gives."""
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, -signal.SIGBUS):
            raise Broken(f"the child ended with {code}")
        return "by error" if code == 0 else "by SIGBUS"

    def _judge(self, told: Told, seed: int) -> None:
        self.counts["acknowledged"] += len(told.saved) + len(told.forgotten - {""})
        domain = self.site.opened()
        try:
            self.truth = judged(domain, told, self.truth)
            self.counts["restored"] += len(self.truth)
            require_rebuilt_alike(domain)
        except Broken as broken:
            raise Broken(f"seed {seed}: {broken}") from broken
        finally:
            domain.close()
        self.site.check()


def pulled(bench: Bench, rounds: range) -> Iterator[int]:
    """Does the rounds with these seeds."""
    for seed in rounds:
        bench.round(seed)
        yield seed


def _on_a_new_one(parent: str, kind: str, seeds: range) -> Counter[str]:
    """The rounds with these seeds on a new file system; what was done."""
    with (
        tempfile.TemporaryDirectory(prefix="vmkeep-plug-", dir=parent) as root,
        Bench(Path(root), kind) as bench,
    ):
        for _ in pulled(bench, seeds):
            pass
        return bench.counts


def main() -> int:
    """0 when no promise was broken."""
    parser = argparse.ArgumentParser(prog="tests.fire.plug")
    parser.add_argument("--kind", choices=sorted(MAKE_FS), action="append")
    parser.add_argument("--count", type=int, default=5000, help="pulls, shared by the kinds")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    # In memory: what the plug is pulled on is the file system, not what it lies on.
    parser.add_argument("--dir", default="/dev/shm")
    given = parser.parse_args()
    kinds = given.kind or sorted(MAKE_FS)
    enter_own_mounts()
    print(f"plug: seed {given.seed}, {given.count} pulls on {', '.join(kinds)}", flush=True)
    for kind in kinds:
        count = given.count // len(kinds)
        counts: Counter[str] = Counter()
        began_s = time.monotonic()
        try:
            while counts["pulls"] < count:
                first = given.seed + counts["pulls"]
                few = min(count - counts["pulls"], PULLS_OF_ONE)
                counts += _on_a_new_one(given.dir, kind, range(first, first + few))
                told = ", ".join(f"{n} {what}" for what, n in counts.items())
                print(f"plug: {kind}: {told}; {time.monotonic() - began_s:.0f} s", flush=True)
        except (Broken, StorageError, AssertionError) as broken:
            print(f"plug: {kind}: BROKEN: {broken!r}", file=sys.stderr)
            return 1
        print(f"plug: {kind}: nothing lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
