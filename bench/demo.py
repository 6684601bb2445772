"""`make demo`: a real disk through the whole life of a backup, by the HTTP API of a real service.

Everything happens in ./demo-data, which is made anew. Every restored volume is compared, by its
SHA-256, with what the volume was when it was backed up. Exit code 1 when anything differs.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from api.cli import units
from api.cli.follow import ENDED, done_bytes
from api.cli.names import clusters, groups, pick_or_only, points, pools, zones
from api.cli.screen import table
from api.client import CallFailed, Client, ServerUnreachable
from api.schemas import Empty, RowList
from api.schemas_backup import (
    BackupCreate,
    BackupCreated,
    BackupDelete,
    BackupRestore,
    ComputeBackupRestoreDisk,
    ImportedBackups,
    RemoteBackupList,
    RemoteBackupRef,
    RemoteImport,
    RemoteListQuery,
)
from api.schemas_companion import (
    ComputeCreate,
    ComputeCreated,
    JobQuery,
    JobRow,
    JobStarted,
    NewDiskMembers,
    PointCreate,
    PointCreated,
    PointInspectQuery,
    PointMaintenance,
    PointRow,
    PoolRow,
)
from bench.disks import (
    change_inside,
    check_ext4,
    make_ext4,
    missing_tools,
    sha256,
    stage_files,
)
from bench.lab import say
from bench.service import Service

DATA = Path(__file__).parent.parent / "demo-data"
FILES_BYTES = 1150 << 20
SYSTEM_BYTES = 2 << 30
DATA_DISK_BYTES = 256 << 20
DISKS = ("sda", "sdb")

CLOSING = """
rate: bytes a second: of volumes, scanned by a backup or made by a restore; of packs, by verify.
ratio: bytes of volumes, empty ones included, that the point holds for each stored byte.
memory: the service's peak so far, mapped files included.

Every restored volume has the SHA-256 of its original. To look at them:
  ls -lsh demo-data/one/pool demo-data/two/pool            (mount -o loop,ro, or boot with qemu)
  less demo-data/service-one.log
  .venv/bin/vmkeep point check demo-data/one/point --deep
  .venv/bin/vmkeep serve --data demo-data/one              then: .venv/bin/vmkeep backup list"""

Truth = dict[str, str]  # target device → SHA-256


class Differs(Exception):
    """A restored volume is not what was backed up."""


@dataclass(frozen=True, slots=True)
class Step:
    """A line of the table at the end."""

    what: str
    seconds: float
    job: JobRow | None = None
    point: PointRow | None = None
    memory_bytes: int = 0


@dataclass(slots=True)
class Site:
    """A running service with one pool and one backup point, as one cluster sees them."""

    service: Service
    client: Client
    cluster: str
    pool: str
    pool_path: Path
    point: str
    steps: list[Step] = field(default_factory=list)

    def wait(self, what: str, job_uuid: str) -> JobRow:
        """Notes the job's end as a step."""
        while True:
            job = self.client.get("job/inspect", JobRow, JobQuery(job_uuid=job_uuid)).data
            if job.state in ENDED:
                break
            time.sleep(0.05)
        if job.state != "succeeded":
            raise RuntimeError(f"{what}: {job.state}: {job.error}")
        query = PointInspectQuery(backup_point_uuid=self.point)
        point = self.client.get("backup_point/inspect", PointRow, query).data
        seconds = job.finished_at - job.started_at
        self.note(Step(what, seconds, job, point, self.service.peak_memory_bytes()))
        return job

    def note(self, step: Step) -> None:
        """Prints a step as it ends, and keeps it for the table."""
        self.steps.append(step)
        say(f"  {step.what}: {units.duration(step.seconds)}")


def main() -> int:
    """Runs it all; the exit code."""
    if lacking := missing_tools():
        print(f"demo: needs {' and '.join(lacking)} (Debian: e2fsprogs)", file=sys.stderr)
        return 1
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    steps: list[Step] = []
    try:
        with Service(DATA / "one", log=DATA / "service-one.log") as service:
            with Client(service.url) as client:
                kept, truth = first_site(_site(service, client, steps), DATA / "one")
            with (
                Service(DATA / "two", log=DATA / "service-two.log") as other,
                Client(other.url) as client,
            ):
                second_site(_site(other, client, steps), DATA / "one" / "point", kept, truth)
    except (Differs, RuntimeError, CallFailed, ServerUnreachable) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(DATA / "files", ignore_errors=True)
    _report(steps)
    return 0


def first_site(site: Site, data: Path) -> tuple[str, Truth]:
    """Backs up, changes, restores, deletes. Returns the last backup and what it must give."""
    say("A VM with two disks, one with an ext4 of this machine's own files:")
    vm, volumes = _make_vm(site)
    say("Backups:")
    full, truth_full = _backup(site, vm, volumes, "full backup", full=True)
    say(f"  {change_inside(volumes['sda'], data.parent)}")
    changed, truth_changed = _backup(site, vm, volumes, "incremental, changed")
    same, truth_same = _backup(site, vm, volumes, "incremental, unchanged")
    if truth_same != truth_changed or truth_same == truth_full:
        raise RuntimeError("the volume changed when it should not have, or did not when it should")
    say("Restores, each as a new VM, each compared by SHA-256:")
    _restore(site, full, "restored-full", truth_full)
    _restore(site, changed, "restored-changed", truth_changed)
    _restore(site, same, "restored-same", truth_same)
    check_ext4(site.pool_path / "restored-changed-sda")
    say("  e2fsck -fn finds nothing in the restored file system")
    began = time.monotonic()
    site.client.post("compute/backup/delete", Empty, BackupDelete(backup_uuid=full))
    site.note(Step("delete the full one", time.monotonic() - began))
    upkeep = PointMaintenance(backup_point_uuid=site.point, deep=True)
    for verb in ("gc", "verify"):
        job = site.client.post(f"backup_point/{verb}", JobStarted, upkeep).data.job_uuid
        site.wait({"gc": "collect garbage", "verify": "verify every byte"}[verb], job)
    _restore(site, changed, "restored-after-delete", truth_changed)
    return same, truth_same


def second_site(site: Site, point_path: Path, backup: str, truth: Truth) -> None:
    """Another cluster, with a service of its own, finds the backup on the point and restores it."""
    say("Another cluster attaches the same point:")
    body = PointCreate(name="shared", kind="local", path=str(point_path))
    site.point = site.client.post("backup_point/create", PointCreated, body).data.backup_point_uuid
    query = RemoteListQuery(cluster_uuid=site.cluster, backup_point_uuid=site.point)
    began = time.monotonic()
    found = site.client.get("compute/backup/remote/list", RemoteBackupList, query).data
    site.note(Step(f"list: {found.total_count} backups of the other", time.monotonic() - began))
    wanted = RemoteBackupRef(uuid=backup, point_uuid=site.point)
    began = time.monotonic()
    imported = RemoteImport(cluster_uuid=site.cluster, backup=[wanted])
    site.client.post("compute/backup/remote/import", ImportedBackups, imported)
    site.note(Step("import one of them", time.monotonic() - began))
    _restore(site, backup, "restored-elsewhere", truth)


def _site(service: Service, client: Client, steps: list[Step]) -> Site:
    rows = client.get("pool/list", RowList[PoolRow]).data.rows
    return Site(
        service,
        client,
        cluster=pick_or_only(client, "cluster", "", clusters),
        pool=pick_or_only(client, "pool", "", pools),
        pool_path=Path(rows[0].path),
        point=pick_or_only(client, "backup point", "", points),
        steps=steps,
    )


def _make_vm(site: Site) -> tuple[str, dict[str, Path]]:
    volumes = {disk: site.pool_path / f"demo-{disk}.img" for disk in DISKS}
    staged = stage_files(DATA / "files", FILES_BYTES)
    make_ext4(volumes["sda"], SYSTEM_BYTES, DATA / "files")
    empty = DATA / "empty"
    empty.mkdir()
    make_ext4(volumes["sdb"], DATA_DISK_BYTES, empty)
    disks = [
        NewDiskMembers(target_device=disk, pool_uuid=site.pool, volume_name=path.name)
        for disk, path in volumes.items()
    ]
    body = ComputeCreate(compute_name="demo", disks=disks)
    vm = site.client.post("compute/create", ComputeCreated, body).data.compute_uuid
    say(f"  {units.size(staged)} of files in {units.size(SYSTEM_BYTES + DATA_DISK_BYTES)} of disks")
    return vm, volumes


def _backup(
    site: Site, vm: str, volumes: dict[str, Path], what: str, *, full: bool = False
) -> tuple[str, Truth]:
    truth = {disk: sha256(path) for disk, path in volumes.items()}
    body = BackupCreate(
        backup_point_uuid=site.point, compute_uuid=vm, backup_name=what, full_backup=full
    )
    reply = site.client.post("compute/backup/create", BackupCreated, body)
    site.wait(what, reply.headers["X-Job-Uuid"])
    return reply.data.backup_uuid, truth


def _restore(site: Site, backup: str, vm_name: str, truth: Truth) -> None:
    body = BackupRestore(
        backup_uuid=backup,
        new_vm_name=vm_name,
        restore_disks=[
            ComputeBackupRestoreDisk(
                target_device=disk,
                pool_uuid=site.pool,
                volume_name=f"{vm_name}-{disk}",
                usd_type="SSD",
            )
            for disk in truth
        ],
        object_group=pick_or_only(site.client, "object group", "", groups),
        zone_uuid=pick_or_only(site.client, "zone", "", zones),
    )
    reply = site.client.post("compute/backup/restore", Empty, body)
    site.wait(vm_name.replace("-", " "), reply.headers["X-Job-Uuid"])
    for disk, expected in truth.items():
        if sha256(site.pool_path / f"{vm_name}-{disk}") != expected:
            raise Differs(f"{vm_name}: {disk} is not what was backed up")


def _report(steps: Sequence[Step]) -> None:
    columns = ("step", ">time", ">rate", ">read", ">changed", ">stored", ">ratio", ">memory")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print()
    console.print(table(columns, (_row(step) for step in steps)))
    say(CLOSING)


def _row(step: Step) -> tuple[str, ...]:
    took = units.duration(step.seconds) if step.seconds >= 0.1 else f"{step.seconds * 1000:.0f} ms"
    if step.job is None or step.point is None:
        return (step.what, took)
    progress = step.job.progress
    backup = step.job.kind == "backup"
    rate = done_bytes(step.job) / max(step.seconds, 1e-3)
    return (
        step.what,
        took,
        f"{units.size(rate)}/s" if rate else "",
        units.size(progress.bytes_read) if backup else "",
        units.size(progress.bytes_changed) if backup else "",
        units.size(progress.bytes_stored) if backup else "",
        f"{step.point.logical_bytes / max(step.point.stored_bytes, 1):.1f}",
        units.size(step.memory_bytes),
    )


if __name__ == "__main__":
    sys.exit(main())
