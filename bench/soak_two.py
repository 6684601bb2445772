"""Two of everything, with clocks three days apart: does anybody get in anybody's way?

    python -m bench.soak_two [--rounds 1000] [--hosts-rounds 200] [--dir DIR]

`two_clusters`: two services in different clusters on one backup point. Each round one makes a
backup, then deletes it (and collects garbage, now and then) while the other imports it. Either the
import came first, and then the backup restores there bit for bit, or it is told that there is none.

`two_hosts`: two services of one cluster, so in one domain. Both back up, delete and collect garbage
at the same time, and restore what the other one made.

The second service's clock is three days off (libfaketime, if it is installed). In the end every
backup restores and every byte of the point is verified.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
import uuid as uuids
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

from api.cli.follow import ENDED
from api.cli.names import clusters, groups, pick_or_only, points, pools, zones
from api.client import CallFailed, Client
from api.schemas import Empty
from api.schemas_backup import (
    BackupCreate,
    BackupCreated,
    BackupDelete,
    BackupList,
    BackupListQuery,
    BackupRestore,
    ComputeBackupRestoreDisk,
    ImportedBackups,
    RemoteBackupRef,
    RemoteImport,
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
from storage.check import check_point

MIB = 1 << 20
VOLUME_BYTES = 3 * MIB
PATIENCE_S = 60.0
GONE = frozenset({40408, 40411})  # backup_not_found, backup_not_on_point
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


class Wrong(Exception):
    """A promise was broken."""


def shifted_clock(shift: str) -> dict[str, str]:
    """The environment of a process whose wall clock is off by `shift` ("+3d"); none without
    libfaketime."""
    found = [FAKETIME, *Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    for path in found:
        if path.exists():
            return {"LD_PRELOAD": str(path), "FAKETIME": shift, "DONT_FAKE_MONOTONIC": "1"}
    return {}


class Side:
    """One service on the shared point, with one VM. Used by one thread at a time."""

    def __init__(
        self, root: Path, name: str, point: Path, cluster: str, env: Mapping[str, str]
    ) -> None:
        self.truth: dict[str, str] = {}  # acknowledged backup → SHA-256 of the volume
        self._chance = random.Random(name)
        self._data = root / name
        config = root / f"{name}.toml"
        config.write_text(
            f'[limits]\npoint_refresh_s = 0.2\n[[clusters]]\nname = "{cluster[:8]}"\n'
            f'uuid = "{cluster}"\n[[points]]\nname = "shared"\npath = "{point}"\n'
        )
        self.cluster = cluster
        self._restored = 0
        self._service = Service(
            self._data, "--config", str(config), log=root / f"{name}.log", env=env
        )
        self.client = Client(self._service.url)
        self.point = pick_or_only(self.client, "backup point", "", points)
        self._pool = pick_or_only(self.client, "pool", "", pools)
        self._group = pick_or_only(self.client, "object group", "", groups)
        self._zone = pick_or_only(self.client, "zone", "", zones)
        assert [row.uuid for row in clusters(self.client)] == [cluster]
        self._volume = self._data / "pool" / "volume"
        self._volume.write_bytes(self._chance.randbytes(VOLUME_BYTES))
        disk = NewDiskMembers(target_device="sda", pool_uuid=self._pool, volume_name="volume")
        body = ComputeCreate(compute_name=name, disks=[disk])
        self._vm = self.client.post("compute/create", ComputeCreated, body).data.compute_uuid

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()
        self._service.stop()

    def backup(self) -> str:
        with self._volume.open("r+b") as file:
            file.seek(self._chance.randrange(VOLUME_BYTES - MIB))
            file.write(self._chance.randbytes(MIB // 2))
        expected = sha256(self._volume)
        body = BackupCreate(
            backup_point_uuid=self.point,
            compute_uuid=self._vm,
            backup_name="two",
            full_backup=self._chance.random() < 0.2,
        )
        reply = self.client.post("compute/backup/create", BackupCreated, body)
        self._succeed(reply.headers["X-Job-Uuid"])
        self.truth[reply.data.backup_uuid] = expected
        return reply.data.backup_uuid

    def delete(self, backup: str) -> None:
        self.client.post("compute/backup/delete", Empty, BackupDelete(backup_uuid=backup))
        self.truth.pop(backup, None)

    def delete_all_but(self, count: int) -> None:
        for backup in list(self.truth)[: max(len(self.truth) - count, 0)]:
            self.delete(backup)

    def take(self, backup: str, expected: str) -> bool:
        """Imports it; False when it is there no more."""
        ref = RemoteBackupRef(uuid=backup, point_uuid=self.point)
        body = RemoteImport(cluster_uuid=self.cluster, backup=[ref])
        try:
            self.client.post("compute/backup/remote/import", ImportedBackups, body)
        except CallFailed as error:
            if error.output.scode in GONE:
                return False
            raise
        self.truth[backup] = expected
        return True

    def collect(self) -> None:
        self._maintain("gc")

    def compare(self, backup: str, expected: str) -> None:
        """Restores it as a VM of its own; Wrong when it is not bit for bit what it was."""
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
        self._succeed(headers["X-Job-Uuid"])
        if sha256(self._data / "pool" / name) != expected:
            raise Wrong(f"backup {backup} did not come back in {self._data}")
        gone = ComputeDelete(compute_uuid=headers["X-Compute-Uuid"], delete_volumes=True)
        self.client.post("compute/delete", Empty, gone)

    def await_listed(self, backup: str) -> None:
        """Until this host has seen a backup that another host of its cluster made."""
        deadline_s = time.monotonic() + PATIENCE_S
        query = BackupListQuery(page_size=1000)
        while True:
            rows = self.client.get("compute/backup/list", BackupList, query).data
            if any(row.uuid == backup and row.status == 0 for row in rows.rows):
                return
            if time.monotonic() > deadline_s:
                raise Wrong(f"backup {backup} is not seen in {self._data}")

    def verify(self) -> None:
        self._maintain("verify", deep=True)

    def _maintain(self, verb: str, *, deep: bool = False) -> None:
        body = PointMaintenance(backup_point_uuid=self.point, deep=deep)
        self._succeed(self.client.post(f"backup_point/{verb}", JobStarted, body).data.job_uuid)

    def _succeed(self, job_uuid: str) -> None:
        while True:
            job = self.client.get("job/inspect", JobRow, JobQuery(job_uuid=job_uuid)).data
            if job.state in ENDED:
                break
        if job.state != "succeeded":
            raise Wrong(f"{job.kind} {job.state}: {job.error}; {'; '.join(job.result)}")


def at_once(*acts: Callable[[], None]) -> None:
    """Runs them side by side; raises the first one's error."""
    errors: list[BaseException] = []

    def run(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - handed on below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def two_clusters(root: Path, rounds: int) -> Counter[str]:
    """See the module; what was done, counted."""
    point = root / "point"
    point.mkdir()
    done: Counter[str] = Counter(clock_off=bool(shifted_clock("+3d")))
    ours, theirs = str(uuids.uuid4()), str(uuids.uuid4())
    with (
        Side(root, "maker", point, ours, {}) as maker,
        Side(root, "taker", point, theirs, shifted_clock("+3d")) as taker,
    ):
        for number in range(rounds):
            backup = maker.backup()
            expected = maker.truth[backup]

            def remove(backup: str = backup, number: int = number) -> None:
                # A verb or a gc before it, or none: so that now one and now the other is first.
                if number % 4 == 1:
                    maker.backup()
                if number % 4 >= 2:
                    maker.collect()
                maker.delete(backup)
                maker.delete_all_but(3)

            def take(backup: str = backup, expected: str = expected) -> None:
                done["imported" if taker.take(backup, expected) else "too late"] += 1

            at_once(*((remove, take) if number % 2 else (take, remove)))
            if backup in taker.truth and done["imported"] % 3 == 1:
                taker.compare(backup, expected)
                done["compared"] += 1
            taker.delete_all_but(4)
            if number % 5 == 0:
                taker.collect()
        finish(point, maker, taker)
    return done


def two_hosts(root: Path, rounds: int) -> Counter[str]:
    """See the module; what was done, counted."""
    point = root / "point"
    point.mkdir()
    done: Counter[str] = Counter(clock_off=bool(shifted_clock("-3d")))
    cluster = str(uuids.uuid4())
    with (
        Side(root, "one", point, cluster, {}) as one,
        Side(root, "other", point, cluster, shifted_clock("-3d")) as other,
    ):
        for number in range(rounds):

            def work(side: Side, gc: bool) -> None:
                side.backup()
                side.delete_all_but(3)
                if gc:
                    side.collect()

            at_once(
                partial(work, one, number % 4 == 0),
                partial(work, other, number % 4 == 2),
            )
            done["backups"] += 2
            if number % 5 == 0:
                for here, there in ((one, other), (other, one)):
                    backup, expected = list(there.truth.items())[-1]
                    here.await_listed(backup)
                    here.compare(backup, expected)
                    done["compared"] += 1
        finish(point, one, other)
    return done


def finish(point: Path, *sides: Side) -> None:
    """Every backup comes back where it is, and the point is clean."""
    for side in sides:
        for backup, expected in side.truth.items():
            side.compare(backup, expected)
        side.verify()
        side.collect()
    report = check_point(str(point), deep=True)
    if report.findings:
        raise Wrong(f"the point is not clean: {report.findings[0]}")


def main() -> int:
    """Runs both; 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(prog="bench.soak_two")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--hosts-rounds", type=int, default=200)
    parser.add_argument("--dir", default=tempfile.gettempdir())
    given = parser.parse_args()
    for act, rounds in ((two_clusters, given.rounds), (two_hosts, given.hosts_rounds)):
        root = Path(tempfile.mkdtemp(prefix="vmkeep-two-", dir=given.dir))
        began = time.monotonic()
        try:
            done = act(root, rounds)
        except (Wrong, CallFailed) as wrong:
            print(f"{act.__name__}: {wrong}; see {root}", file=sys.stderr)
            return 1
        shutil.rmtree(root)
        told = ", ".join(f"{count} {what}" for what, count in done.most_common())
        print(f"{act.__name__}: {rounds} rounds in {time.monotonic() - began:.0f} s: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
