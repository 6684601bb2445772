"""Everybody at once: many clients against one service with many small VMs.

    python -m bench.soak_load [--minutes 10] [--clients 64] [--vms 200] [--seed N] [--dir DIR]

Each client has a connection and some VMs of its own, and does random verbs to them while all others
do theirs: backups, restores that are compared, deletes, cancelled backups, a second job on a busy
VM, lists of everything. One more collects garbage and verifies. No answer may be a 5xx, and none a
refusal but of what was provoked. Half way and at the end all pause: between the two the service may
not have gained a thread, a descriptor or much memory. In the end every backup comes back bit for
bit, no snapshot is left, and the checker is clean.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from api.cli.follow import ENDED
from api.cli.names import groups, pick_or_only, points, pools, zones
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
from bench.lab import descendants
from bench.service import Service
from engine.snapshot import SNAPSHOTS
from storage.check import check_point

MIB = 1 << 20
VOLUME_BYTES = MIB
BACKUPS_OF_A_VM = 3
LOOK_EVERY_S = 0.05
BUSY = frozenset({40900, 40902})  # vm_busy, backup_running
MEMORY_GAIN = 1.2


class Wrong(Exception):
    """A promise was broken."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the service and its children hold."""

    threads: int
    descriptors: int
    resident_bytes: int

    @classmethod
    def by(cls, pid: int) -> Held:
        threads = descriptors = resident_bytes = 0
        for one in (pid, *descendants(pid)):
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            threads += int(status["Threads"])
            resident_bytes += int(status["RssAnon"].split()[0]) * 1024
            descriptors += len(os.listdir(f"/proc/{one}/fd"))
        return cls(threads, descriptors, resident_bytes)


@dataclass(slots=True)
class Machine:
    """A VM and what was acknowledged of it: backup → SHA-256 of the volume."""

    uuid: str
    volume: Path
    truth: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Site:
    """One service, where its things are, and the uuids that calls need."""

    url: str
    directory: Path
    point: str
    pool: str
    group: str
    zone: str


def site_of(url: str, directory: Path) -> Site:
    """The only ones that a fresh service has."""
    with Client(url) as client:
        return Site(
            url,
            directory,
            pick_or_only(client, "backup point", "", points),
            pick_or_only(client, "pool", "", pools),
            pick_or_only(client, "object group", "", groups),
            pick_or_only(client, "zone", "", zones),
        )


class Caller:
    """One client with VMs of its own. Used by one thread at a time."""

    def __init__(self, site: Site, number: int, vms: int, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._site, self._number = site, number
        self._chance = random.Random(f"{seed} {number}")
        self._client = Client(site.url)
        self._restored = 0
        self._machines = [self._created(f"vm-{number}-{at}") for at in range(vms)]

    def close(self) -> None:
        self._client.close()

    def work(self, end_s: float) -> None:
        """Random verbs until the time is over."""
        verbs: dict[Callable[[Machine], None], int] = {
            self.list: 8,
            self.backup: 6,
            self.restore: 3,
            self.delete: 2,
            self.cancel: 1,
            self.collide: 1,
        }
        while time.monotonic() < end_s:
            [verb] = self._chance.choices(list(verbs), list(verbs.values()))
            verb(self._chance.choice(self._machines))
            self.done[verb.__name__] += 1

    def list(self, vm: Machine) -> None:
        """The VM's backups, each acknowledged one among them, and a page of everybody's."""
        query = BackupListQuery(filter_vm_uuid=vm.uuid, page_size=1000)
        rows = self._client.get("compute/backup/list", BackupList, query).data.rows
        if missing := vm.truth.keys() - {row.uuid for row in rows if row.status == 0}:
            raise Wrong(f"not listed: {missing}")
        self._client.get("compute/backup/list", BackupList, BackupListQuery(page_size=50))

    def backup(self, vm: Machine) -> None:
        with vm.volume.open("r+b") as file:
            file.seek(self._chance.randrange(VOLUME_BYTES - 4096))
            file.write(self._chance.randbytes(4096))
        expected = sha256(vm.volume)
        backup, job = self._start_backup(vm)
        self._succeed(job)
        vm.truth[backup] = expected
        if len(vm.truth) > BACKUPS_OF_A_VM:
            self.delete(vm)

    def restore(self, vm: Machine) -> None:
        if vm.truth:
            self._compare(vm, self._chance.choice([*vm.truth]))

    def delete(self, vm: Machine) -> None:
        if vm.truth:
            backup = self._chance.choice([*vm.truth])
            self._client.post("compute/backup/delete", Empty, BackupDelete(backup_uuid=backup))
            del vm.truth[backup]

    def cancel(self, vm: Machine) -> None:
        """A backup that is cancelled; it may have been done before."""
        expected = sha256(vm.volume)
        backup, job = self._start_backup(vm)
        try:
            self._client.post("job/cancel", Empty, JobQuery(job_uuid=job))
        except CallFailed as refused:
            if refused.status != 409:
                raise
        if self._ended(job).state == "succeeded":
            vm.truth[backup] = expected

    def collide(self, vm: Machine) -> None:
        """A second backup of a VM in the middle of one is refused by name, or is a second one."""
        expected = sha256(vm.volume)
        started = [self._start_backup(vm)]
        try:
            started.append(self._start_backup(vm))
        except CallFailed as refused:
            if refused.output.scode not in BUSY:
                raise
            self.done["refused as busy"] += 1
        for backup, job in started:
            self._succeed(job)
            vm.truth[backup] = expected

    def finish(self) -> None:
        """Every backup comes back."""
        for vm in self._machines:
            for backup in vm.truth:
                self._compare(vm, backup)
                self.done["compared in the end"] += 1

    def _created(self, name: str) -> Machine:
        volume = self._site.directory / "pool" / name
        same = random.Random(7).randbytes(VOLUME_BYTES // 2)
        volume.write_bytes(same + self._chance.randbytes(VOLUME_BYTES // 2))
        disk = NewDiskMembers(
            target_device="sda", pool_uuid=self._site.pool, volume_name=volume.name
        )
        body = ComputeCreate(compute_name=name, disks=[disk])
        uuid = self._client.post("compute/create", ComputeCreated, body).data.compute_uuid
        return Machine(uuid, volume)

    def _start_backup(self, vm: Machine) -> tuple[str, str]:
        body = BackupCreate(
            backup_point_uuid=self._site.point,
            compute_uuid=vm.uuid,
            backup_name="load",
            full_backup=self._chance.random() < 0.2,
        )
        reply = self._client.post("compute/backup/create", BackupCreated, body)
        return reply.data.backup_uuid, reply.headers["X-Job-Uuid"]

    def _compare(self, vm: Machine, backup: str) -> None:
        self._restored += 1
        name = f"back-{self._number}-{self._restored}"
        disk = ComputeBackupRestoreDisk(
            target_device="sda", pool_uuid=self._site.pool, volume_name=name, usd_type="SSD"
        )
        body = BackupRestore(
            backup_uuid=backup,
            new_vm_name=name,
            restore_disks=[disk],
            object_group=self._site.group,
            zone_uuid=self._site.zone,
        )
        headers = self._client.post("compute/backup/restore", Empty, body).headers
        self._succeed(headers["X-Job-Uuid"])
        if sha256(self._site.directory / "pool" / name) != vm.truth[backup]:
            raise Wrong(f"backup {backup} did not come back: see {name}")
        gone = ComputeDelete(compute_uuid=headers["X-Compute-Uuid"], delete_volumes=True)
        self._client.post("compute/delete", Empty, gone)

    def _succeed(self, job_uuid: str) -> None:
        job = self._ended(job_uuid)
        if job.state != "succeeded":
            raise Wrong(f"{job.kind} {job.state}: {job.error}; {'; '.join(job.result)}")

    def _ended(self, job_uuid: str) -> JobRow:
        query = JobQuery(job_uuid=job_uuid)
        while (job := self._client.get("job/inspect", JobRow, query).data).state not in ENDED:
            time.sleep(LOOK_EVERY_S)
        return job


class Keeper(Caller):
    """Collects garbage and verifies, in turns."""

    def work(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            for verb, deep in (("gc", False), ("verify", True)):
                self.maintain(verb, deep=deep)

    def maintain(self, verb: str, *, deep: bool = False) -> None:
        body = PointMaintenance(backup_point_uuid=self._site.point, deep=deep)
        started = self._client.post(f"backup_point/{verb}", JobStarted, body).data
        self._succeed(started.job_uuid)
        self.done[verb] += 1


def at_once(acts: list[Callable[[], None]]) -> None:
    """Each in a thread of its own; Wrong with the first error of any."""
    errors: list[BaseException] = []

    def run(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise Wrong(f"{len(errors)} failed, first: {errors[0]!r}") from errors[0]


def load(root: Path, seconds: float, clients: int, vms: int, seed: int) -> Counter[str]:
    """See the module; how often each verb was done. Raises Wrong."""
    data = root / "data"
    with Service(data, log=root / "service.log") as service, ExitStack() as closing:
        site = site_of(service.url, data)
        keeper = Keeper(site, clients, 0, seed)
        shares = [len(range(number, vms, clients)) for number in range(clients)]
        callers = [Caller(site, number, share, seed) for number, share in enumerate(shares)]
        everybody = [*callers, keeper]
        for caller in everybody:
            closing.callback(caller.close)
        held = [_worked(service, everybody, seconds / 2) for _ in range(2)]
        compare_held(*held)
        at_once([caller.finish for caller in callers])
        for verb in ("gc", "verify"):
            keeper.maintain(verb, deep=verb == "verify")
        done = sum((caller.done for caller in everybody), Counter())
        if service.stop() != 0:
            raise Wrong("the service did not end well")
    _nothing_left(data, service)
    return done


def _worked(service: Service, callers: list[Caller], seconds: float) -> Held:
    end_s = time.monotonic() + seconds
    at_once([lambda one=caller: one.work(end_s) for caller in callers])  # type: ignore[misc]
    held = Held.by(service.pid)
    print(f"load: {held}", flush=True)
    return held


def compare_held(half_way: Held, end: Held) -> None:
    """Wrong when something grew that must not."""
    if (
        end.threads > half_way.threads
        or end.descriptors > half_way.descriptors
        or end.resident_bytes > half_way.resident_bytes * MEMORY_GAIN
    ):
        raise Wrong(f"the service held {half_way} half way, and {end} at the end")


def _nothing_left(data: Path, service: Service) -> None:
    pool = data / "pool"
    odd = [path.name for path in pool.iterdir() if not path.name.startswith("vm-")]
    snapshots = [*(pool / SNAPSHOTS).iterdir()] if (pool / SNAPSHOTS).exists() else []
    if snapshots or set(odd) - {SNAPSHOTS}:
        raise Wrong(f"left in the pool: {odd} {snapshots}")
    if wrong := [line for line in service.output if "Traceback" in line]:
        raise Wrong(f"the service's log has {len(wrong)} tracebacks")
    for point in data.glob("point*"):
        report = check_point(str(point), deep=True)
        if report.findings:
            raise Wrong(f"the point is not clean: {report.findings[0]}")


def main() -> int:
    """Runs it; 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(prog="bench.soak_load")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--vms", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--dir", default=tempfile.gettempdir())
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="vmkeep-load-", dir=given.dir))
    print(f"load: seed {given.seed}, in {root}", flush=True)
    try:
        done = load(root, given.minutes * 60, given.clients, given.vms, given.seed)
    except Wrong as wrong:
        print(f"load: seed {given.seed}: {wrong}", file=sys.stderr)
        return 1
    shutil.rmtree(root)
    print("load: nothing wrong;", ", ".join(f"{n} {verb}" for verb, n in done.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
