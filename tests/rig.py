"""A backup point, a domain and a pool in one directory: what data path tests work on."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.backup.backup import BackupResult, BackupWork, DiskWork
from engine.backup.backup import run_backup as run
from engine.jobs.jobs import JobContext
from engine.restore.restore import RestoreDisk, run_restore
from engine.snapshot.freeze import NO_HOOK, FreezeHook
from engine.snapshot.sources import DiskFile
from engine.snapshot.tracking import Tracker
from storage.point import ClusterLabel, Point

DEFAULT_CHUNK_BYTES = 1 << 20
_PIECE = 64 << 20


class Made:
    """A backup that was made: its uuid, its disks by target device, and what run_backup said."""

    def __init__(self, backup: str, disks: Sequence[DiskWork], parent: str) -> None:
        self.backup = backup
        self.parent = parent
        self.disks = {disk.file.target_device: disk.disk_uuid for disk in disks}
        self.capacities: dict[str, int] = {}
        self.context = JobContext()
        self.result: BackupResult | None = None


class Rig:
    """A context manager. `pool` is a directory on the file system that `root` is on, or another."""

    def __init__(
        self, root: Path, pool: Path | None = None, chunk_size: int = DEFAULT_CHUNK_BYTES
    ) -> None:
        self.pool = pool or root / "pool"
        self.point_path = root / "point"
        for path in (self.pool, self.point_path, root / "views"):
            path.mkdir(exist_ok=True)
        self.point = Point.create(str(self.point_path), "rig", chunk_size=chunk_size)
        label = ClusterLabel(cluster_uuid=str(uuid.uuid4()), cluster_name="rig")
        self.domain = self.point.domain(label, str(uuid.uuid4()), str(root / "views"))
        self.tracker_of: Callable[[str], Tracker | None] = lambda _: None
        self._restored = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.domain.close()
        self.point.close()

    def plan(
        self,
        *paths: Path,
        parent: Made | None = None,
        workers: int = 3,
        freeze: FreezeHook = NO_HOOK,
    ) -> tuple[BackupWork, Made]:
        """The work for a backup of volumes, named vda, vdb, …, against `parent`'s disks."""
        disks = []
        for number, path in enumerate(paths):
            target = f"vd{chr(ord('a') + number)}"
            old = parent.disks.get(target, "") if parent else ""
            size = parent.capacities.get(target, 0) if parent else 0
            disks.append(DiskWork(DiskFile(target, str(path)), str(uuid.uuid4()), old, size))
        new = Made(str(uuid.uuid4()), disks, parent.backup if parent else "")
        work = BackupWork(
            domain=self.domain,
            backup_uuid=new.backup,
            disks=disks,
            make_label=lambda _: b"label",
            parent=new.parent,
            workers=workers,
            freeze=freeze,
            tracker=self.tracker_of(new.backup),
        )
        return work, new

    def back_up(self, *paths: Path, parent: Made | None = None, workers: int = 3) -> Made:
        """A finished backup."""
        work, made = self.plan(*paths, parent=parent, workers=workers)
        made.result = run(work, made.context)
        made.capacities = dict(made.result.facts.snapshot.capacities)
        return made

    def restore(self, made: Made, target: str = "vda", workers: int = 3) -> Path:
        """The path of a new volume made from one disk of a backup."""
        self._restored += 1
        path = self.pool / f"restored-{self._restored}"
        disks = [RestoreDisk(made.disks[target], str(path))]
        run_restore(self.domain, disks, JobContext(), workers, backup=made.backup)
        return path


def counts(made: Made) -> tuple[int, int, int]:
    """(scanned, read, changed) bytes."""
    progress = made.context.progress()
    return progress.bytes_scanned, progress.bytes_read, progress.bytes_changed


def found_by(made: Made) -> str:
    """How the changes of the disk vda were found."""
    assert made.result is not None
    return made.result.facts.found_by["vda"]


def write_at(path: Path, offset: int, content: bytes) -> None:
    """Writes into a file and leaves the rest of it as it is."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def sparse(path: Path, size_bytes: int) -> Path:
    """A file that is one hole."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def random_bytes(count: int, seed: int = 0) -> bytes:
    """Bytes that do not compress, the same for a seed each time."""
    source = random.Random(seed)
    return b"".join(source.randbytes(min(_PIECE, count - at)) for at in range(0, count, _PIECE))


def allocated_bytes(path: Path) -> int:
    """What a file takes up on disk."""
    return os.stat(path).st_blocks * 512
