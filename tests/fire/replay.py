"""Every state in which a power failure could have left a disk, made of a log of its writes.

    python -m tests.fire.replay [--kind ext4] [--words 400] [--seed N] [--dir DIR]         (as root)

In a small VM (tests/nfs) the work of tests.fire.plug runs on a file system over device mapper's
log-writes, with a mark in the log at each word (tests.fire.logged). Here the log is replayed onto
the disk as it was before. Wherever a flush, a write with FUA or an acknowledgement ends, a copy is
mounted and held against what had been acknowledged by then; and it must go on from there.

The log (Linux, Documentation/admin-guide/device-mapper/log-writes.rst and dm-log-writes.c): a head
of <QQQI (magic, version, entries, sector size); from the next sector on the entries, each a sector
of <QQQQ (sector, sectors, flags, bytes of a mark's text) with the text of a mark, and then the data
that was written.
"""

from __future__ import annotations

import argparse
import json
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from storage.errors import StorageError
from storage.point import ClusterLabel
from tests.fire.loops import enter_own_mounts, mount, unmount
from tests.fire.plug import MAKE_FS, SIZE_BYTES, Broken, Told, image_of, judged
from tests.fire.site import Site
from tests.nfs.kit import ROOT, find_tool, make_kit
from tests.nfs.vm import run_vm
from tests.store import require_rebuilt_alike, save

LOG_BYTES = 8 << 30  # sparse
WORDS_PER_S = 1  # at least, in the emulated machine
BOOT_S = 600  # on a busy machine

_MAGIC = 0x6A736677736872
_HEAD = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD, _MARK = 1, 2, 4, 8
_BEGINNINGS = frozenset({"saving", "forgetting"})


class Entry(NamedTuple):
    """A write to the disk, or a mark (its line of what was told; -1 in a write)."""

    offset: int
    data: bytes
    boundary: bool
    mark: int = -1


def entries(log: Path) -> Iterator[Entry]:
    """What the log has, in its order."""
    with log.open("rb") as file:
        magic, _, count, sector_bytes = _HEAD.unpack(file.read(_HEAD.size))
        if magic != _MAGIC:
            raise ValueError(f"{log} is no log of writes")
        file.seek(sector_bytes)
        for _ in range(count):
            head = file.read(sector_bytes)
            sector, sectors, flags, mark_bytes = _ENTRY.unpack_from(head)
            if flags & _MARK:
                text = head[_ENTRY.size :][:mark_bytes].rstrip(b"\0")
                if text.isdigit():
                    yield Entry(0, b"", False, int(text))
            elif flags & _DISCARD:
                continue  # what a disk then reads is not said: it may be what was there
            else:
                data = file.read(sectors * sector_bytes)
                yield Entry(sector * sector_bytes, data, bool(flags & (_FLUSH | _FUA)))


class Replay:
    """A disk that becomes what it was, step by step. `counts`: what was seen on the way."""

    def __init__(self, root: Path, disk: Path, told: list[str]) -> None:
        self.counts: Counter[str] = Counter()
        self._disk, self._copy, self._place = disk, root / "copy", root / "place"
        self._place.mkdir()
        first, *self._words = [json.loads(line) for line in told]
        self._label = ClusterLabel(cluster_uuid=first[1], cluster_name="c")
        self.told = Told()
        self._due = False

    def run(self, log: Path) -> None:
        """All of it. Broken, a StorageError or an AssertionError when a promise was broken."""
        with self._disk.open("r+b", buffering=0) as disk:
            for entry in entries(log):
                if entry.mark >= 0:
                    self._hear(entry.mark)
                    continue
                if entry.data:
                    self._judge_if_due()
                    disk.seek(entry.offset)
                    disk.write(entry.data)
                    self.counts["writes"] += 1
                self._due |= entry.boundary
        self._judge_if_due()

    def _hear(self, line: int) -> None:
        """A beginning changes what may be true: what was until then is looked at first."""
        verb, what = self._words[line - 1]
        if verb in _BEGINNINGS:
            self._judge_if_due()
        else:
            self._due = True
            self.counts["acknowledged"] += bool(what)
        self.told.hear(json.dumps([verb, what]).encode())

    def _judge_if_due(self) -> None:
        if self._due and self.told.forgotten:  # the first word: there is a point from here on
            self.judge()
            self.counts["crashes"] += 1
        self._due = False

    def judge(self) -> None:
        """Mounts a copy of the disk as it is now, and proves it."""
        subprocess.run(["cp", "--sparse=always", self._disk, self._copy], check=True)
        with mounted(self._copy, self._place):
            self.prove()

    def prove(self) -> None:
        """What was acknowledged is in the mounted file system, and it goes on from there."""
        site = Site(self._place, self._place, found=self._label)
        try:
            self.counts["restored"] += len(judged(site.domain, self.told, set()))
            save(site.domain, image_of(b"1"), None, b"1")
            require_rebuilt_alike(site.domain)
        finally:
            site.domain.close()
        site.check()


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    mount(image, place)
    try:
        yield
    finally:
        unmount(image, place)


def replayed(root: Path, kind: str, words: int, seed: int) -> Counter[str]:
    """The counts of one script, logged and replayed, in the empty directory `root`. NoKit when the
    VM can't be had; Broken, a StorageError or an AssertionError when a promise was broken."""
    kit = make_kit()
    disk, before, log, told = (root / name for name in ("disk", "before", "log", "told"))
    for path, size_bytes in ((disk, SIZE_BYTES[kind]), (log, LOG_BYTES)):
        with path.open("wb") as file:
            file.truncate(size_bytes)
    subprocess.run([find_tool(MAKE_FS[kind][0]), *MAKE_FS[kind][1:], disk], check=True)
    subprocess.run(["cp", "--sparse=always", disk, before], check=True)
    asked = [sys.executable, "-m", "tests.fire.logged", str(told), kind, str(words), str(seed)]
    line = f"cd {shlex.quote(str(ROOT))} && {shlex.join(asked)}"
    ran = run_vm(kit, root, line, [disk, log], BOOT_S + words / WORDS_PER_S)
    if ran.status:
        raise RuntimeError(f"the machine ended with {ran.status}: {ran.console[-3000:]}")
    replay = Replay(root, before, told.read_text().splitlines())
    replay.run(log)
    return replay.counts


def main() -> int:
    """0 when no promise was broken."""
    parser = argparse.ArgumentParser(prog="tests.fire.replay")
    parser.add_argument("--kind", choices=sorted(MAKE_FS), action="append")
    parser.add_argument("--words", type=int, default=400, help="to be told on each kind")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--dir", default=tempfile.gettempdir())
    given = parser.parse_args()
    enter_own_mounts()
    print(f"replay: seed {given.seed}", flush=True)
    for kind in given.kind or sorted(MAKE_FS):
        with tempfile.TemporaryDirectory(prefix="vmkeep-replay-", dir=given.dir) as root:
            began_s = time.monotonic()
            try:
                found = replayed(Path(root), kind, given.words, given.seed)
            except (Broken, StorageError, AssertionError) as broken:
                print(f"replay: {kind}: BROKEN: {broken!r}", file=sys.stderr)
                return 1
            counts = ", ".join(f"{n} {what}" for what, n in found.items())
            print(f"replay: {kind}: {counts}; nothing lost; {time.monotonic() - began_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
