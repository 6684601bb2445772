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
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from api.client import CallFailed
from api.schemas import Empty
from api.schemas_backup import BackupList, BackupListQuery
from api.schemas_companion import JobQuery
from bench.disks import sha256
from bench.lab import descendants
from bench.service import Service
from bench.witness import Machine, Witness, Wrong, at_once
from engine.snapshot.snapshot import SNAPSHOTS
from storage.check.check import check_point

MIB = 1 << 20
VOLUME_BYTES = MIB
BACKUPS_OF_A_VM = 3
BUSY = frozenset({40900, 40902})  # vm_busy, backup_running
MEMORY_GAIN = 1.2


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


class Caller:
    """One client with VMs of its own. Used by one thread at a time."""

    def __init__(self, service: Service, data: Path, number: int, vms: int, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._chance = random.Random(f"{seed} {number}")
        self._witness = Witness(service.url, data, str(number))
        self._machines = [self._new_vm(f"vm-{number}-{at}") for at in range(vms)]

    def close(self) -> None:
        self._witness.close()

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
        client = self._witness.client
        query = BackupListQuery(filter_vm_uuid=vm.uuid, page_size=1000)
        rows = client.get("compute/backup/list", BackupList, query).data.rows
        if missing := vm.truth.keys() - {row.uuid for row in rows if row.status == 0}:
            raise Wrong(f"not listed: {missing}")
        client.get("compute/backup/list", BackupList, BackupListQuery(page_size=50))

    def backup(self, vm: Machine) -> None:
        with vm.volume.open("r+b") as file:
            file.seek(self._chance.randrange(VOLUME_BYTES - 4096))
            file.write(self._chance.randbytes(4096))
        self._witness.backup(vm, full=self._sometimes_full())
        if len(vm.truth) > BACKUPS_OF_A_VM:
            self.delete(vm)

    def restore(self, vm: Machine) -> None:
        if vm.truth:
            self._witness.compare(*self._chance.choice([*vm.truth.items()]))

    def delete(self, vm: Machine) -> None:
        if vm.truth:
            self._witness.delete(vm, self._chance.choice([*vm.truth]))

    def cancel(self, vm: Machine) -> None:
        """A backup that is cancelled; it may have been done before."""
        expected = sha256(vm.volume)
        backup, job = self._witness.start_backup(vm, full=self._sometimes_full())
        try:
            self._witness.client.post("job/cancel", Empty, JobQuery(job_uuid=job))
        except CallFailed as refused:
            if refused.status != 409:
                raise
        if self._witness.ended(job).state == "succeeded":
            vm.truth[backup] = expected

    def collide(self, vm: Machine) -> None:
        """A second backup of a VM in the middle of one is refused by name, or is a second one."""
        expected = sha256(vm.volume)
        started = [self._witness.start_backup(vm, full=self._sometimes_full())]
        try:
            started.append(self._witness.start_backup(vm, full=self._sometimes_full()))
        except CallFailed as refused:
            if refused.output.scode not in BUSY:
                raise
            self.done["refused as busy"] += 1
        for backup, job in started:
            self._witness.succeed(job)
            vm.truth[backup] = expected

    def finish(self) -> None:
        """Every backup comes back."""
        for vm in self._machines:
            for backup, expected in vm.truth.items():
                self._witness.compare(backup, expected)
                self.done["compared in the end"] += 1

    def _new_vm(self, name: str) -> Machine:
        same = random.Random(7).randbytes(VOLUME_BYTES // 2)
        return self._witness.new_vm(name, same + self._chance.randbytes(VOLUME_BYTES // 2))

    def _sometimes_full(self) -> bool:
        return self._chance.random() < 0.2


class Keeper(Caller):
    """Collects garbage and verifies, in turns."""

    def work(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            self.maintain()

    def maintain(self) -> None:
        self._witness.maintain("gc")
        self._witness.maintain("verify", deep=True)
        self.done.update(("gc", "verify"))


def load(root: Path, seconds: float, clients: int, vms: int, seed: int) -> Counter[str]:
    """See the module; how often each verb was done. Raises Wrong."""
    data = root / "data"
    with Service(data, log=root / "service.log") as service, ExitStack() as closing:
        keeper = Keeper(service, data, clients, 0, seed)
        shares = [len(range(number, vms, clients)) for number in range(clients)]
        callers = [
            Caller(service, data, number, share, seed) for number, share in enumerate(shares)
        ]
        everybody = [*callers, keeper]
        for caller in everybody:
            closing.callback(caller.close)
        held = [_worked(service, everybody, seconds / 2) for _ in range(2)]
        compare_held(*held)
        at_once([caller.finish for caller in callers])
        keeper.maintain()
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
