"""`make soak`: does everything that was acknowledged restore, whatever is done in whatever order?

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
from api.cli.names import groups, pick_or_only, points, pools, zones
from api.client import Client
from api.schemas import Empty
from api.schemas_backup import (
    BackupCreate,
    BackupCreated,
    BackupDelete,
    BackupRestore,
    ComputeBackupRestoreDisk,
)
from api.schemas_companion import (
    ComputeCreate,
    ComputeCreated,
    ComputeDelete,
    JobQuery,
    JobRow,
    JobStarted,
    NewDiskMembers,
    PointMaintenance,
)
from bench.disks import sha256
from bench.service import Service

MIB = 1 << 20
VOLUME_BYTES = 192 * MIB
MOST_BACKUPS = 12
LOOK_EVERY_S = 0.02


class Wrong(Exception):
    """A promise was broken."""


class Soak:
    """One service and what must be true of it."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.chance = chance
        self.truth: dict[str, str] = {}  # acknowledged backup → SHA-256 of the volume
        self._data = root / "data"
        self._restored = 0
        self._start()
        self._point = pick_or_only(self.client, "backup point", "", points)
        self._pool = pick_or_only(self.client, "pool", "", pools)
        self._group = pick_or_only(self.client, "object group", "", groups)
        self._zone = pick_or_only(self.client, "zone", "", zones)
        self._volume = self._data / "pool" / "volume"
        with self._volume.open("xb") as file:
            file.truncate(VOLUME_BYTES)
        disk = NewDiskMembers(target_device="sda", pool_uuid=self._pool, volume_name="volume")
        body = ComputeCreate(compute_name="soak", disks=[disk])
        self._vm = self.client.post("compute/create", ComputeCreated, body).data.compute_uuid

    def scribble(self) -> None:
        """Noise, zeros and repeats at random places, not aligned to anything."""
        with self._volume.open("r+b") as file:
            for _ in range(self.chance.randint(1, 20)):
                size_bytes = self.chance.randint(1, 6 * MIB)
                file.seek(self.chance.randint(0, VOLUME_BYTES - size_bytes))
                kind = self.chance.choice(["noise", "zeros", "repeat"])
                same = random.Random(size_bytes % 3) if kind == "repeat" else self.chance
                file.write(bytes(size_bytes) if kind == "zeros" else same.randbytes(size_bytes))

    def backup(self) -> None:
        expected = sha256(self._volume)
        backup, job = self._start_backup()
        self._succeed(job)
        self.truth[backup] = expected
        while len(self.truth) > MOST_BACKUPS:
            self.delete()

    def restore(self) -> None:
        if self.truth:
            self._compare(self.chance.choice(list(self.truth)))

    def delete(self) -> None:
        if self.truth:
            backup = self.chance.choice(list(self.truth))
            self.client.post("compute/backup/delete", Empty, BackupDelete(backup_uuid=backup))
            del self.truth[backup]

    def collect(self) -> None:
        self._maintain("gc")

    def rebuild(self) -> None:
        self._maintain("rebuild")

    def verify(self) -> None:
        self._maintain("verify")

    def kill(self) -> None:
        """kill -9 at a random place of a backup or a restore. What had succeeded by then counts."""
        expected = sha256(self._volume)
        backup, vm = "", ""
        if self.truth and self.chance.random() < 0.3:
            vm, _, job = self._start_restore(self.chance.choice(list(self.truth)))
        else:
            backup, job = self._start_backup()
        time.sleep(self.chance.random() ** 2)
        self._service.kill()
        self.client.close()
        self._start()
        state = self._look(job).state
        if state not in ENDED:
            raise Wrong(f"job {job} is {state} after the restart")
        if backup and state == "succeeded":
            self.truth[backup] = expected
        if vm:
            self._delete_vm(vm)

    def finish(self) -> None:
        """Every backup comes back, and every byte is sound."""
        for backup in self.truth:
            self._compare(backup)
        self._maintain("verify", deep=True)
        self.client.close()
        if self._service.stop() != 0:
            raise Wrong("the service did not end well")

    def _compare(self, backup: str) -> None:
        vm, volume, job = self._start_restore(backup)
        self._succeed(job)
        if sha256(volume) != self.truth[backup]:
            raise Wrong(f"backup {backup} did not come back: see {volume}")
        self._delete_vm(vm)

    def _start(self) -> None:
        self._service = Service(self._data, log=self._data.parent / "service.log")
        self.client = Client(self._service.url)

    def _start_backup(self) -> tuple[str, str]:
        full = self.chance.random() < 0.2
        body = BackupCreate(
            backup_point_uuid=self._point,
            compute_uuid=self._vm,
            backup_name="soak",
            full_backup=full,
        )
        reply = self.client.post("compute/backup/create", BackupCreated, body)
        return reply.data.backup_uuid, reply.headers["X-Job-Uuid"]

    def _start_restore(self, backup: str) -> tuple[str, Path, str]:
        self._restored += 1
        name = f"restored-{self._restored}"
        disk = ComputeBackupRestoreDisk(
            target_device="sda", pool_uuid=self._pool, volume_name=name, usd_type="SSD"
        )
        body = BackupRestore(
            backup_uuid=backup,
            new_vm_name=name,
            restore_disks=[disk],
            object_group=self._group,
            zone_uuid=self._zone,
        )
        headers = self.client.post("compute/backup/restore", Empty, body).headers
        return headers["X-Compute-Uuid"], self._data / "pool" / name, headers["X-Job-Uuid"]

    def _delete_vm(self, vm: str) -> None:
        body = ComputeDelete(compute_uuid=vm, delete_volumes=True)
        self.client.post("compute/delete", Empty, body)

    def _maintain(self, verb: str, *, deep: bool = False) -> None:
        body = PointMaintenance(backup_point_uuid=self._point, deep=deep)
        self._succeed(self.client.post(f"backup_point/{verb}", JobStarted, body).data.job_uuid)

    def _succeed(self, job_uuid: str) -> None:
        while (job := self._look(job_uuid)).state not in ENDED:
            time.sleep(LOOK_EVERY_S)
        if job.state != "succeeded":
            raise Wrong(f"{job.kind} {job.state}: {job.error}; {'; '.join(job.result)}")

    def _look(self, job_uuid: str) -> JobRow:
        return self.client.get("job/inspect", JobRow, JobQuery(job_uuid=job_uuid)).data


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
