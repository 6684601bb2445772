"""Rounds of random writes and mishaps, a tracked backup after each, and never a wrong one.

A round writes to the volume in some of the ways that hypervisors and operators do, perhaps has a
mishap befall the volume, the baseline or us, makes a backup on top of the last one, and compares
what that says with the volume, chunk by chunk; now and then it restores. The sample is off, so that
it covers nothing up. The sweep fails, too, if the comparison was hardly ever used.

    python -m tests.reflink_sweep --rounds 10000 [--seed 7]
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

from engine.backup import sampling
from engine.snapshot.baselines import Baselines
from engine.snapshot.snapshot import SNAPSHOTS, clear_leftovers
from storage.format.manifests import PAGE_ENTRIES
from tests.rig import found_by, write_at
from tests.tracking_rig import (
    CHUNK,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    TrackedRig,
    clone_range,
    fallocate,
    run,
)

SIZE = 24 * CHUNK
BLOCK = 4096
RESTORE_EVERY = 10
FEWEST_TRACKED = 0.4

Step = Callable[[], None]


class Sweep:
    """One volume through many rounds. `remount` unmounts the pool's file system and mounts it."""

    def __init__(self, rig: TrackedRig, seed: int, remount: Step) -> None:
        self.rig = rig
        self.dice = random.Random(seed)
        self.remount = remount
        self.tally: Counter[str] = Counter()
        self.trail: list[str] = []
        self.writes: list[Step] = [
            self.write,
            self.write,
            self.write_unsynced_block,
            self.rewrite_the_same,
            self.punch,
            self.zero,
            self.preallocate,
            self.copy_blocks,
            self.truncate_and_back,
        ]
        self.mishaps: list[Step] = [
            self.resize,
            self.replace_volume,
            self.swap_in_a_reflink,
            self.delete_baseline,
            self.forge_baseline,
            self.defragment,
            self.remount_pool,
            self.die_after_the_commit,
            self.die_while_keeping,
            self.fall_short_of_room,
            self.lose_parent,
        ]
        rig.volume.write_bytes(self.dice.randbytes(SIZE))
        self.back_up()

    def round(self, number: int) -> None:
        """Raises AssertionError when a backup is not what the volume is."""
        steps = self.dice.choices(self.writes, k=self.dice.randint(0, 4))
        if self.dice.random() < 0.35:
            steps.insert(self.dice.randint(0, len(steps)), self.dice.choice(self.mishaps))
        self.trail = [step.__name__ for step in steps]
        for step in steps:
            step()
        if self.dice.random() < 0.3:
            os.sync()
        self.back_up()
        if number % RESTORE_EVERY == 0:
            assert self.rig.restored() == self.rig.volume.read_bytes(), self.trail

    def back_up(self) -> None:
        before = self.rig.last
        made = self.rig.next()
        self.tally[found_by(made)] += 1
        hasher, content = self.rig.domain.hasher, self.rig.volume.read_bytes()
        pages = dict(self.rig.domain.disk_map(made.disks["vda"]).pages())
        for start in range(0, len(content), CHUNK):
            page_no, index = divmod(start // CHUNK, PAGE_ENTRIES)
            chunk = content[start : start + CHUNK]
            known = pages.get(page_no, {}).get(index)
            wanted = hasher.full(chunk) if any(chunk) else None
            assert known == wanted, f"chunk {start // CHUNK} after {self.trail}"
        if before is not None:
            self.rig.domain.forget([before.backup])

    # Writes ---------------------------------------------------------------------------------

    def place(self) -> tuple[int, int]:
        """(offset, length) of whole blocks in the volume, whatever its size is just now."""
        blocks = max(self.rig.volume.stat().st_size // BLOCK, 1)
        first = self.dice.randrange(blocks)
        return first * BLOCK, min(self.dice.choice([1, 1, 3, 40]), blocks - first) * BLOCK

    def write(self) -> None:
        offset, length = self.place()
        write_at(self.rig.volume, offset, self.dice.randbytes(length))

    def write_unsynced_block(self) -> None:
        offset, _ = self.place()
        write_at(self.rig.volume, offset + 7, b"%08x" % self.dice.getrandbits(32))

    def rewrite_the_same(self) -> None:
        offset, length = self.place()
        write_at(self.rig.volume, offset, self.rig.volume.read_bytes()[offset : offset + length])

    def punch(self) -> None:
        fallocate(self.rig.volume, PUNCH_HOLE | KEEP_SIZE, *self.place())

    def zero(self) -> None:
        fallocate(self.rig.volume, ZERO_RANGE | KEEP_SIZE, *self.place())

    def preallocate(self) -> None:
        fallocate(self.rig.volume, KEEP_SIZE, *self.place())

    def copy_blocks(self) -> None:
        offset, length = self.place()
        to, room = self.place()
        length = min(length, room, abs(to - offset))  # ranges that overlap are refused
        if length:
            clone_range(self.rig.volume, offset, length, self.rig.volume, to)

    def truncate_and_back(self) -> None:
        size_bytes = self.rig.volume.stat().st_size
        os.truncate(self.rig.volume, self.dice.randrange(size_bytes))
        os.truncate(self.rig.volume, size_bytes)

    # Mishaps --------------------------------------------------------------------------------

    def resize(self) -> None:
        os.truncate(self.rig.volume, SIZE + self.dice.randint(-8, 8) * 1000)

    def replace_volume(self) -> None:
        fresh = self.rig.pool / "fresh"
        fresh.write_bytes(self.dice.randbytes(self.rig.volume.stat().st_size))
        os.rename(fresh, self.rig.volume)

    def swap_in_a_reflink(self) -> None:
        fresh = self.rig.pool / "fresh"
        run("cp", "--reflink=always", self.rig.volume, fresh)
        write_at(fresh, self.place()[0], b"changed")
        os.rename(fresh, self.rig.volume)

    def baseline(self) -> Path | None:
        row = self.rig.row()
        return Path(row.file) if row.file else None

    def delete_baseline(self) -> None:
        path = self.baseline()
        if path is not None:
            path.unlink()
            os.sync()
            self.write()

    def forge_baseline(self) -> None:
        """It is now what the volume is just now, changes included."""
        self.write()
        path = self.baseline()
        if path is None:
            return
        if self.dice.random() < 0.5:
            path.unlink()
        run("cp", "--reflink=always", self.rig.volume, path)

    def defragment(self) -> None:
        os.sync()
        if self.kind() == "btrfs":
            run("btrfs", "filesystem", "defragment", "-f", self.rig.volume)
        else:
            tool = ["xfs_fsr", str(self.rig.volume)]
            subprocess.run(tool, check=False, capture_output=True)

    def kind(self) -> str:
        found = ["stat", "-f", "-c", "%T", str(self.rig.pool)]
        return subprocess.run(found, check=True, capture_output=True, text=True).stdout.strip()

    def remount_pool(self) -> None:
        self.remount()

    def die_after_the_commit(self) -> None:
        with mock.patch.object(Baselines, "keep"):
            self.back_up()
        self.write()

    def die_while_keeping(self) -> None:
        """Between naming the clone and its row; the next start clears what that left."""
        with mock.patch.object(self.rig.state.baselines, "put", side_effect=KeyboardInterrupt):
            try:
                self.rig.next()
            except KeyboardInterrupt:
                self.rig.last = None  # its uuids are not known here: a full one is next
        clear_leftovers(str(self.rig.pool), self.rig.baselines.files())
        self.write()

    def fall_short_of_room(self) -> None:
        with mock.patch.object(Baselines, "short_of_room", return_value=True):
            self.back_up()
        assert not (self.rig.pool / SNAPSHOTS).exists()

    def lose_parent(self) -> None:
        """The newest backup is deleted; the next one is full."""
        assert self.rig.last is not None
        self.rig.domain.forget([self.rig.last.backup])
        self.rig.last = None


def sweep(rig: TrackedRig, rounds: int, seed: int, remount: Step) -> Counter[str]:
    """How often changes were found in which way."""
    with (
        mock.patch.object(sampling, "FEWEST_CHUNKS", 0),
        mock.patch.object(sampling, "SHARE", 0.0),
    ):
        one = Sweep(rig, seed, remount)
        for number in range(rounds):
            one.round(number)
    assert one.tally["reflink"] >= FEWEST_TRACKED * rounds, one.tally
    return one.tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    for kind, make in (("xfs", ["mkfs.xfs", "-q", "-m", "reflink=1"]), ("btrfs", ["mkfs.btrfs"])):
        with tempfile.TemporaryDirectory(prefix="vmkeep-reflink-") as root:
            image, pool = Path(root, "image"), Path(root, "fs")
            pool.mkdir()
            with image.open("wb") as file:
                file.truncate(400 << 20)
            run(*make, image)
            run("mount", "-o", "loop", image, pool)
            try:
                with TrackedRig(Path(root), pool) as rig:
                    tally = sweep(
                        rig, options.rounds // 2, options.seed, partial(remount, image, pool)
                    )
                    rig.state.close()
            finally:
                run("umount", pool)
        print(f"{kind}: {options.rounds // 2} rounds, {dict(tally)}", flush=True)
    return 0


def remount(image: Path, pool: Path) -> None:
    """The file system goes and comes back."""
    run("umount", pool)
    run("mount", "-o", "loop", image, pool)


if __name__ == "__main__":
    sys.exit(main())
