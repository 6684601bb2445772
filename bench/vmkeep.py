"""vmkeep as the other programs are measured: a backup or a restore, each in a process of its own.

    python -m bench.vmkeep backup POINT VOLUME NAME [PARENT]
    python -m bench.vmkeep restore POINT NAME TARGET

The clock starts when the point is open, as it is in a service, and stops when what was asked for is
durable. Such a process prints its cost as JSON; its peak memory is what the kernel kept for it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import uuid
from pathlib import Path

import msgspec

from bench.lab import Cost, measured, peak_bytes
from engine.backup.backup import BackupWork, DiskWork, run_backup
from engine.backup.backup_job import MOST_LENDERS
from engine.jobs.jobs import JobContext
from engine.restore.restore import RestoreDisk, run_restore
from engine.snapshot.sources import DiskFile
from storage.domain.domain import Domain
from storage.point import ClusterLabel, Point

CLUSTER = "00000000-0000-4000-8000-000000000001"
HOST = "00000000-0000-4000-8000-000000000002"
WORKERS = len(os.sched_getaffinity(0)) + 1  # as a service has by default


class VmkeepPoint:
    """A new backup point in a directory, and vmkeep's verbs on it."""

    name = "vmkeep"

    def __init__(self, root: Path) -> None:
        self._path = root / "vmkeep-point"
        self._path.mkdir()
        Point.create(str(self._path), "bench").close()

    def backup(self, volume: Path, name: str, parent: str = "", /) -> Cost:
        """A full backup, or one that builds on another."""
        return self._run("backup", self._path, volume, name, *([parent] if parent else []))

    def restore(self, name: str, target: Path) -> Cost:
        """The backup's disk as a new file."""
        return self._run("restore", self._path, name, target)

    def _run(self, *words: str | Path) -> Cost:
        _, said = measured([sys.executable, "-m", "bench.vmkeep", *words])
        return _COSTS.decode(said)


def backup_here(domain: Domain, volume: Path, name: str, parent: str = "") -> Cost:
    """A backup in this process."""
    disk = DiskWork(
        DiskFile("vda", str(volume)),
        _uuid("disk", name),
        parent_disk=_uuid("disk", parent) if parent else "",
        parent_capacity=volume.stat().st_size,
        lenders=tuple(disk.disk for row in domain.backups()[-MOST_LENDERS:] for disk in row.disks),
    )
    work = BackupWork(
        domain=domain,
        backup_uuid=_uuid("backup", name),
        disks=[disk],
        make_label=lambda _: b"",
        parent=_uuid("backup", parent) if parent else "",
        workers=WORKERS,
    )
    context = JobContext()
    with _Stopwatch() as watch:
        run_backup(work, context)
    return watch.cost(context.progress().bytes_stored)


def restore_here(domain: Domain, name: str, target: Path) -> Cost:
    """A restore in this process."""
    disks = [RestoreDisk(_uuid("disk", name), str(target))]
    with _Stopwatch() as watch:
        run_restore(domain, disks, JobContext(), WORKERS, backup=_uuid("backup", name))
    return watch.cost(0)


def opened(point: Path) -> Domain:
    """The bench's domain on a point."""
    label = ClusterLabel(cluster_uuid=CLUSTER, cluster_name="bench")
    return Point.open(str(point)).domain(label, HOST, str(point / "views"))


def _uuid(kind: str, name: str) -> str:
    return str(uuid.UUID(bytes=hashlib.sha256(f"{kind} {name}".encode()).digest()[:16], version=4))


class _Stopwatch:
    def __enter__(self) -> _Stopwatch:
        self._cpu_s, self._began_s = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._elapsed_s = time.perf_counter() - self._began_s
        self._cpu_s = time.process_time() - self._cpu_s

    def cost(self, stored_bytes: int) -> Cost:
        return Cost(self._elapsed_s, self._cpu_s, peak_bytes(os.getpid()), stored_bytes)


def main(verb: str, point: str, *words: str) -> None:
    domain = opened(Path(point))
    if verb == "backup":
        volume, name, parent = (*words, "", "")[:3]
        cost = backup_here(domain, Path(volume), name, parent)
    else:
        name, target = words
        cost = restore_here(domain, name, Path(target))
    domain.close()
    print(msgspec.json.encode(cost).decode())


_COSTS = msgspec.json.Decoder(Cost)

if __name__ == "__main__":
    main(*sys.argv[1:])
