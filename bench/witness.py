"""A client that remembers what a service acknowledged, and holds it to that: for the soaks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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

LOOK_EVERY_S = 0.02


class Wrong(Exception):
    """A promise was broken."""


def at_once(acts: Sequence[Callable[[], None]]) -> None:
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


@dataclass(slots=True)
class Machine:
    """A VM with one volume, and what was acknowledged of it: backup → SHA-256 of the volume."""

    uuid: str
    volume: Path
    truth: dict[str, str] = field(default_factory=dict)


class Restore(NamedTuple):
    """One that was begun: the new VM, its volume, the job."""

    vm: str
    volume: Path
    job: str


class Witness:
    """One client of a service that has one point, pool, object group and zone.

    `data` is the service's directory; `name` is in the names of all that is restored for it. Used
    by one thread at a time. What the service refuses raises CallFailed.
    """

    def __init__(self, url: str, data: Path, name: str) -> None:
        self.client = Client(url)
        self.point = pick_or_only(self.client, "backup point", "", points)
        self._pool = pick_or_only(self.client, "pool", "", pools)
        self._group = pick_or_only(self.client, "object group", "", groups)
        self._zone = pick_or_only(self.client, "zone", "", zones)
        self._volumes = data / "pool"
        self._name = name
        self._restored = 0

    def close(self) -> None:
        self.client.close()

    def follow(self, url: str) -> None:
        """The service was started again, and listens there now."""
        self.client.close()
        self.client = Client(url)

    def new_vm(self, name: str, content: bytes, size_bytes: int = 0) -> Machine:
        """A VM with that in its volume, and a hole behind it up to `size_bytes`."""
        volume = self._volumes / name
        volume.write_bytes(content)
        os.truncate(volume, max(size_bytes, len(content)))
        disk = NewDiskMembers(target_device="sda", pool_uuid=self._pool, volume_name=name)
        body = ComputeCreate(compute_name=name, disks=[disk])
        uuid = self.client.post("compute/create", ComputeCreated, body).data.compute_uuid
        return Machine(uuid, volume)

    def delete_vm(self, uuid: str) -> None:
        """With its volumes."""
        body = ComputeDelete(compute_uuid=uuid, delete_volumes=True)
        self.client.post("compute/delete", Empty, body)

    def backup(self, vm: Machine, *, full: bool) -> str:
        expected = sha256(vm.volume)
        backup, job = self.start_backup(vm, full=full)
        self.succeed(job)
        vm.truth[backup] = expected
        return backup

    def start_backup(self, vm: Machine, *, full: bool) -> tuple[str, str]:
        """(backup, job)."""
        body = BackupCreate(
            backup_point_uuid=self.point,
            compute_uuid=vm.uuid,
            backup_name="soak",
            full_backup=full,
        )
        reply = self.client.post("compute/backup/create", BackupCreated, body)
        return reply.data.backup_uuid, reply.headers["X-Job-Uuid"]

    def delete(self, vm: Machine, backup: str) -> None:
        self.client.post("compute/backup/delete", Empty, BackupDelete(backup_uuid=backup))
        vm.truth.pop(backup, None)

    def compare(self, backup: str, expected: str) -> None:
        """Restores it as a VM of its own, which goes again; Wrong unless it is bit for bit that."""
        restore = self.start_restore(backup)
        self.succeed(restore.job)
        if sha256(restore.volume) != expected:
            raise Wrong(f"backup {backup} did not come back: see {restore.volume}")
        self.delete_vm(restore.vm)

    def start_restore(self, backup: str) -> Restore:
        self._restored += 1
        name = f"restored-{self._name}-{self._restored}"
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
        return Restore(headers["X-Compute-Uuid"], self._volumes / name, headers["X-Job-Uuid"])

    def maintain(self, verb: str, *, deep: bool = False) -> None:
        """`gc`, `verify` or `rebuild` of the point, to its good end."""
        body = PointMaintenance(backup_point_uuid=self.point, deep=deep)
        self.succeed(self.client.post(f"backup_point/{verb}", JobStarted, body).data.job_uuid)

    def succeed(self, job_uuid: str) -> None:
        """Until the job has ended; Wrong unless it succeeded."""
        job = self.ended(job_uuid)
        if job.state != "succeeded":
            raise Wrong(f"{job.kind} {job.state}: {job.error}; {'; '.join(job.result)}")

    def ended(self, job_uuid: str) -> JobRow:
        while (job := self.look(job_uuid)).state not in ENDED:
            time.sleep(LOOK_EVERY_S)
        return job

    def look(self, job_uuid: str) -> JobRow:
        return self.client.get("job/inspect", JobRow, JobQuery(job_uuid=job_uuid)).data
