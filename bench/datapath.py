"""Is a backup as fast as the machine? A full and an unchanged backup beside qemu-img convert.

    PYTHONPATH=. python -m bench.datapath [--size-gib 4] [--dir DIR] [--workers 1,2,3]

The volume is an ext4 image of this machine's own files: real data, of which some compresses and
some does not, and some is holes. All runs read it from the page cache (warm), or after it was
dropped (--cold). Every vmkeep run is a process of its own, so that its peak
memory is its own; qemu-img writes zstd-compressed qcow2 as `qemu-img convert -c` does.

Bars: the full backup is not slower than qemu-img, the unchanged one takes less than a tenth of
qemu-img's time, and the peak is under 200 MiB. Exit status 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.disks import make_ext4, stage_files
from engine.backup import BackupWork, DiskWork, run_backup
from engine.jobs import JobContext
from engine.restore import RestoreDisk, run_restore
from engine.sources import DiskFile
from storage.point import ClusterLabel, Point

GIB = 1 << 30
MIB = 1 << 20
CLUSTER = "00000000-0000-4000-8000-000000000001"
HOST = "00000000-0000-4000-8000-000000000002"
PEAK_LIMIT_BYTES = 200 * MIB


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run. `read_bytes`: what was read of the volume, or restored."""

    name: str
    elapsed_s: float
    cpu_s: float
    peak_bytes: int
    read_bytes: int
    stored_bytes: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-gib", type=float, default=4)
    parser.add_argument("--dir", default=tempfile.gettempdir())
    parser.add_argument("--workers", default=str((os.cpu_count() or 1) + 1))
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        verb, root, parent, workers = given.child
        print(json.dumps(asdict(measure_here(verb, Path(root), parent, int(workers)))))
        return 0
    with tempfile.TemporaryDirectory(prefix="vmkeep-bench-", dir=given.dir) as name:
        root = Path(name)
        volume = make_volume(root, int(given.size_gib * GIB))
        runs = []
        for _ in range(given.repeat):
            runs.append(run_qemu(root, volume, given.cold))
            for workers in given.workers.split(","):
                runs += run_vmkeep(root, workers, given.cold)
    return report(runs)


def make_volume(root: Path, size_bytes: int) -> Path:
    """An ext4 file system with as much of this machine's files as fits."""
    files, volume = root / "files", root / "v.raw"
    stage_files(files, size_bytes * 85 // 100)
    make_ext4(volume, size_bytes, files)
    shutil.rmtree(files)
    data_bytes = volume.stat().st_blocks * 512
    print(f"volume: {size_bytes / GIB:.1f} GiB, {data_bytes / GIB:.2f} GiB of it allocated")
    return volume


def prepare(volume: Path, cold: bool) -> None:
    """All of the volume in the page cache, or nothing of it; and no old writes under way."""
    os.sync()
    fd = os.open(volume, os.O_RDONLY)
    try:
        if cold:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(fd, 8 * MIB):
                pass
    finally:
        os.close(fd)


def run_qemu(root: Path, volume: Path, cold: bool) -> Run:
    target = root / "v.qcow2"
    prepare(volume, cold)
    argv = ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started_s = time.perf_counter()
    subprocess.run([*argv, str(volume), str(target)], check=True)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    elapsed_s = time.perf_counter() - started_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    stored_bytes = target.stat().st_blocks * 512
    target.unlink()
    return Run("qemu-img convert zstd", elapsed_s, cpu_s, 0, volume.stat().st_size, stored_bytes)


def run_vmkeep(root: Path, workers: str, cold: bool) -> list[Run]:
    """Full, unchanged, restore; each in a new process."""
    volume = root / "v.raw"
    for name in ("point", "views"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir()
    Point.create(str(root / "point"), "bench").close()
    runs = []
    for verb, parent in (("full", ""), ("unchanged", "full"), ("restore", "full")):
        prepare(volume, cold)
        argv = [sys.executable, "-m", "bench.datapath", "--child", verb, str(root), parent, workers]
        done = subprocess.run(argv, check=True, stdout=subprocess.PIPE)
        runs.append(Run(**json.loads(done.stdout)))
    same = subprocess.run(["cmp", str(volume), str(root / "restored")], check=False).returncode == 0
    (root / "restored").unlink()
    if not same:
        raise SystemExit("the restored volume differs")
    return runs


def uuid_of(verb: str, what: int) -> str:
    number = ("full", "unchanged", "restore").index(verb)
    return f"00000000-0000-4000-8000-0000000{what:02}{number:03}"


def measure_here(verb: str, root: Path, parent: str, workers: int) -> Run:
    """One run in this process, with the domain opened before the clock starts."""
    point = Point.open(str(root / "point"))
    label = ClusterLabel(cluster_uuid=CLUSTER, cluster_name="bench")
    domain = point.domain(label, HOST, str(root / "views"))
    context = JobContext()
    volume = root / "v.raw"
    before = time.process_time()
    started_s = time.perf_counter()
    if verb == "restore":
        disks = [RestoreDisk(uuid_of(parent, 1), str(root / "restored"))]
        run_restore(domain, disks, context, workers, backup=uuid_of(parent, 2))
    else:
        disk = DiskWork(
            DiskFile("vda", str(volume)),
            uuid_of(verb, 1),
            uuid_of(parent, 1) if parent else "",
            volume.stat().st_size,
        )
        work = BackupWork(
            domain=domain,
            backup_uuid=uuid_of(verb, 2),
            disks=[disk],
            make_label=lambda _: b"",
            parent=uuid_of(parent, 2) if parent else "",
            workers=workers,
        )
        run_backup(work, context)
    elapsed_s = time.perf_counter() - started_s
    cpu_s = time.process_time() - before
    domain.close()
    point.close()
    progress = context.progress()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    read_bytes = progress.bytes_read or progress.bytes_restored
    name = f"vmkeep {verb}, {workers} workers"
    return Run(name, elapsed_s, cpu_s, peak_bytes, read_bytes, progress.bytes_stored)


def report(runs: list[Run]) -> int:
    """Prints the table; 1 when a bar was missed, else 0."""
    qemu_s = min(run.elapsed_s for run in runs if run.name.startswith("qemu"))
    full_s = min(run.elapsed_s for run in runs if " full" in run.name)
    print(f"\n{'run':34}{'s':>8}{'cpu s':>8}{'GiB/s':>8}{'GiB stored':>12}{'peak MiB':>10}")
    for run in runs:
        rate = run.read_bytes / GIB / run.elapsed_s
        peak = f"{run.peak_bytes / MIB:.0f}" if run.peak_bytes else "-"
        stored = run.stored_bytes / GIB
        print(
            f"{run.name:34}{run.elapsed_s:8.2f}{run.cpu_s:8.2f}{rate:8.2f}{stored:12.2f}{peak:>10}"
        )
    unchanged_s = min(run.elapsed_s for run in runs if " unchanged" in run.name)
    peak_bytes = max(run.peak_bytes for run in runs)
    bars = [
        (f"full ÷ qemu-img = {full_s / qemu_s:.2f} (at most 1)", full_s <= qemu_s),
        (
            f"unchanged ÷ qemu-img = {unchanged_s / qemu_s:.3f} (below 0.1)",
            unchanged_s < qemu_s / 10,
        ),
        (f"peak {peak_bytes / MIB:.0f} MiB (below 200)", peak_bytes < PEAK_LIMIT_BYTES),
    ]
    print()
    for text, met in bars:
        print(f"{'met   ' if met else 'MISSED'}  {text}")
    return 0 if all(met for _, met in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
