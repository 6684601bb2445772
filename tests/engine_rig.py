"""A whole engine on a data directory of its own, and short ways to use it in tests."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from engine.config import Config, Limits
from engine.core import Core
from engine.jobs.jobs import JobContext, new_job
from engine.model import Backup, Disk, Job, Vm
from engine.service import Engine
from engine.verb_types import BackupQuery, NewDisk, RestoreTarget, Scope
from tests.rig import random_bytes

ANYWHERE = Scope()
PATIENCE_S = 60.0
ONE_JOB = Config(limits=Limits(max_jobs=1))


class EngineRig:
    """A context manager. `config` holds for every start."""

    def __init__(self, data: Path, config: Config | None = None) -> None:
        self.data = data
        self.config = config or Config()
        self.engine = Engine.start(str(data), self.config)

    def __enter__(self) -> EngineRig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.engine.stop(PATIENCE_S)

    @property
    def core(self) -> Core:
        return self.engine._core

    def restart(self) -> None:
        self.engine.stop(PATIENCE_S)
        self.engine = Engine.start(str(self.data), self.config)

    # The embedded default's parts.

    @property
    def pool_path(self) -> Path:
        return Path(self.engine.pools()[0].pool.path)

    @property
    def pool_uuid(self) -> str:
        return self.engine.pools()[0].pool.uuid

    @property
    def point_uuid(self) -> str:
        return self.engine.points()[0].point.uuid

    @property
    def cluster_uuid(self) -> str:
        return self.engine.clusters()[0].uuid

    # VMs.

    def make_vm(self, name: str, *contents: bytes) -> Vm:
        """A VM with a disk (sda, sdb, …) for each content."""
        disks = []
        for number, content in enumerate(contents):
            volume = f"{name}-{number}.raw"
            (self.pool_path / volume).write_bytes(content)
            disks.append(NewDisk(f"sd{chr(ord('a') + number)}", self.pool_uuid, volume))
        return self.engine.vm(self.engine.create_vm(ANYWHERE, name, "", "", disks))

    def volume(self, disk: Disk) -> Path:
        return Path(self.engine.volume_path(disk))

    # Backups.

    def ask_backup(self, vm: Vm, *, full: bool = False, name: str = "b") -> tuple[str, str]:
        return self.engine.create_backup(ANYWHERE, vm.uuid, self.point_uuid, name, "", full)

    def back_up(self, vm: Vm, *, full: bool = False, name: str = "b") -> Backup:
        """A finished backup."""
        backup, job = self.ask_backup(vm, full=full, name=name)
        self.succeed(job)
        return self.engine.backup(ANYWHERE, backup)

    def ask_restore(
        self,
        backup: Backup,
        vm_name: str,
        *,
        volumes: Sequence[str] = (),
        allow_damaged: bool = False,
    ) -> tuple[str, str]:
        """(the new VM's uuid, the job's)."""
        names = volumes or [f"{vm_name}-{disk.target_device}" for disk in backup.label.disks]
        targets = [
            RestoreTarget(disk.target_device, self.pool_uuid, volume, "SSD")
            for disk, volume in zip(backup.label.disks, names, strict=False)
        ]
        return self.engine.restore_backup(
            ANYWHERE,
            backup.uuid,
            vm_name,
            targets,
            self.engine.object_groups()[0].uuid,
            self.engine.zones()[0].uuid,
            allow_damaged=allow_damaged,
        )

    def restore(self, backup: Backup, vm_name: str) -> list[bytes]:
        """The content of the volumes of a new VM made from the backup."""
        vm_uuid, job = self.ask_restore(backup, vm_name)
        self.succeed(job)
        return [self.volume(disk).read_bytes() for disk in self.engine.vm(vm_uuid).disks]

    def listed(self) -> list[str]:
        """The uuids of all backups, newest first."""
        return [row.uuid for row in self.engine.backups(BackupQuery()).rows]

    # Jobs.

    def ended(self, job_uuid: str) -> Job:
        job = self.engine.wait_for_job(job_uuid, PATIENCE_S)
        assert job.finished_at, f"{job.kind} has not ended: {job}"
        return job

    def succeed(self, job_uuid: str) -> Job:
        job = self.ended(job_uuid)
        assert job.state == "succeeded", job
        return job

    def occupy(self) -> Callable[[], None]:
        """Keeps the one runner of ONE_JOB busy until what it returns is called (or it is told)."""
        free, runs = threading.Event(), threading.Event()

        def handler(ctx: JobContext) -> tuple[str, ...]:
            runs.set()
            while not free.wait(0.01):
                ctx.check()
            return ()

        self.core.jobs.submit(new_job("verify"), handler)
        assert runs.wait(PATIENCE_S)
        return free.set


def disk_bytes(count: int, seed: int) -> bytes:
    """Content of `count` bytes: random, then as many zeros again."""
    return random_bytes(count, seed) + bytes(count)


def files_below(path: Path) -> list[str]:
    """All files below a directory, without those that only say that a host lives or is viewing."""
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(path)
        for name in names
        if "/views" not in root and "/hosts" not in root
    )


def attach(rig: EngineRig, path: Path, name: str = "shared") -> str:
    """A local point there, which is made if it is not; its uuid."""
    path.mkdir(exist_ok=True)
    return rig.engine.create_point(name, "local", str(path))


def back_up_to(rig: EngineRig, point: str, content: bytes, name: str) -> str:
    """The uuid of the first backup of a new VM, on that point."""
    vm = rig.make_vm(name, content)
    backup, job = rig.engine.create_backup(ANYWHERE, vm.uuid, point, name, "", False)
    rig.succeed(job)
    return backup
