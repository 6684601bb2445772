"""A part of `make soak`: does all that was acknowledged restore, whatever is done in what order?

    python -m bench.soak [--minutes 5] [--seed N] [--dir DIR]

A real service, one VM, and random verbs for some minutes: the volume is scribbled on, backed up,
restored and compared, backups are deleted, garbage is collected, the view is rebuilt, and the
service is killed in the middle of a backup or a restore. At the end every backup is restored once
more, and every byte of the point is verified. The first thing that is wrong ends it, and leaves
the data for a look. It goes on until each verb was done.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from api.cli.follow import ENDED
from bench.disks import sha256
from bench.service import Service
from bench.witness import Witness, Wrong

MIB = 1 << 20
VOLUME_BYTES = 192 * MIB
MOST_BACKUPS = 12


class Soak:
    """One service and what must be true of it."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.chance = chance
        self._data = root / "data"
        self._service = self._started()
        self._witness = Witness(self._service.url, self._data, "soak")
        self._vm = self._witness.new_vm("volume", b"", VOLUME_BYTES)

    def scribble(self) -> None:
        """Noise, zeros and repeats at random places, not aligned to anything."""
        with self._vm.volume.open("r+b") as file:
            for _ in range(self.chance.randint(1, 20)):
                size_bytes = self.chance.randint(1, 6 * MIB)
                file.seek(self.chance.randint(0, VOLUME_BYTES - size_bytes))
                kind = self.chance.choice(["noise", "zeros", "repeat"])
                same = random.Random(size_bytes % 3) if kind == "repeat" else self.chance
                file.write(bytes(size_bytes) if kind == "zeros" else same.randbytes(size_bytes))

    def backup(self) -> None:
        self._witness.backup(self._vm, full=self._sometimes_full())
        while len(self._vm.truth) > MOST_BACKUPS:
            self.delete()

    def restore(self) -> None:
        if self._vm.truth:
            self._witness.compare(*self.chance.choice(list(self._vm.truth.items())))

    def delete(self) -> None:
        if self._vm.truth:
            self._witness.delete(self._vm, self.chance.choice(list(self._vm.truth)))

    def collect(self) -> None:
        self._witness.maintain("gc")

    def rebuild(self) -> None:
        self._witness.maintain("rebuild")

    def verify(self) -> None:
        self._witness.maintain("verify")

    def kill(self) -> None:
        """kill -9 at a random place of a backup or a restore. What had succeeded by then counts."""
        expected = sha256(self._vm.volume)
        backup, vm = "", ""
        if self._vm.truth and self.chance.random() < 0.3:
            vm, _, job = self._witness.start_restore(self.chance.choice(list(self._vm.truth)))
        else:
            backup, job = self._witness.start_backup(self._vm, full=self._sometimes_full())
        time.sleep(self.chance.random() ** 2)
        self._service.kill()
        self._service = self._started()
        self._witness.follow(self._service.url)
        state = self._witness.look(job).state
        if state not in ENDED:
            raise Wrong(f"job {job} is {state} after the restart")
        if backup and state == "succeeded":
            self._vm.truth[backup] = expected
        if vm:
            self._witness.delete_vm(vm)

    def finish(self) -> None:
        """Every backup comes back, and every byte is sound."""
        for backup, expected in self._vm.truth.items():
            self._witness.compare(backup, expected)
        self._witness.maintain("verify", deep=True)
        self._witness.close()
        if self._service.stop() != 0:
            raise Wrong("the service did not end well")

    def _started(self) -> Service:
        return Service(self._data, log=self._data.parent / "service.log")

    def _sometimes_full(self) -> bool:
        return self.chance.random() < 0.2


def main() -> int:
    """Runs it; 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(prog="bench.soak")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--dir", default=tempfile.gettempdir())
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="vmkeep-soak-", dir=given.dir))
    print(f"soak: seed {given.seed}, {given.minutes:g} minutes, in {root}", flush=True)
    soak = Soak(root, random.Random(given.seed))
    try:
        done = run(soak, given.minutes * 60)
        soak.finish()
    except Wrong as wrong:
        print(f"soak: seed {given.seed}: {wrong}", file=sys.stderr)
        return 1
    shutil.rmtree(root)
    print("soak: nothing wrong;", ", ".join(f"{n} {verb}" for verb, n in done.most_common()))
    return 0


def run(soak: Soak, seconds: float) -> Counter[str]:
    """Random verbs until the time is over and each of them was done; how often each was."""
    verbs: dict[Callable[[], None], int] = {
        soak.scribble: 6,
        soak.backup: 6,
        soak.restore: 4,
        soak.delete: 3,
        soak.collect: 2,
        soak.kill: 2,
        soak.verify: 1,
        soak.rebuild: 1,
    }
    done: Counter[str] = Counter()
    began = time.monotonic()
    while time.monotonic() - began < seconds or len(done) < len(verbs):
        [verb] = soak.chance.choices(list(verbs), list(verbs.values()))
        verb()
        done[verb.__name__] += 1
    return done


if __name__ == "__main__":
    sys.exit(main())
