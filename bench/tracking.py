"""Incremental backups of a 1 TiB sparse raw volume on XFS, whose changes are told by its clones.

A real service, its pool on an XFS of its own (a loop device, so as root). The first backup scans;
the next ones compare the extents of two clones. Nothing is changed before one, a part of the data
is written anew before the other. What the second costs beyond reading what changed is judged, and,
as what changed must be compressed and made durable too, beside the first backup of a small volume
with as much new data.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.lab import Cost, Lab, drop_from_cache, series, times
from bench.results import Figure, Note, Result
from bench.runner import alone
from bench.service import Service
from bench.witness import Machine, Witness

QUESTION = "How long does an incremental of a 1 TiB sparse disk on XFS take?"

MIB, TIB = 1 << 20, 1 << 40
PIECE_BYTES = 16 * MIB
SPREAD_BYTES = 4 << 30  # from piece to piece: all over the disk
NOTHING, CHANGED = "nothing changed", "changed data"
READING, ALONE = "limit: reading it", "the same, first backup of a small volume"


def run(lab: Lab) -> Iterator[Result]:
    """1 GiB is changed in the full run, 64 MiB in a quick one."""
    if os.geteuid() != 0 or shutil.which("mkfs.xfs", path=os.defpath + ":/usr/sbin:/sbin") is None:
        yield Note("no tracking by reflink clones: needs root and mkfs.xfs")
        return
    changed_bytes = lab.pick(64, 1024) * MIB
    with contextlib.ExitStack() as undo:
        root = undo.enter_context(lab.scratch())
        data = root / "data"
        room_bytes = 2 * (lab.repeats + 2) * changed_bytes + 512 * MIB
        undo.enter_context(_xfs(root / "xfs", data / "pool", room_bytes))
        service = undo.enter_context(Service(data, log=root / "log"))
        witness = undo.enter_context(contextlib.closing(Witness(service.url, data, "tracking")))
        vm = witness.new_vm("volume", b"", TIB)
        _write(vm, changed_bytes)
        yield from series("first backup", {"vmkeep": [_backed_up(witness, vm)]})
        costs = _rounds(lab, witness, vm, changed_bytes)
    yield from series(f"incremental of 1 TiB, {changed_bytes // MIB} MiB of it written anew", costs)
    yield Figure("tracking/nothing", times(costs[NOTHING]))
    for key, base in (("tracking/changed", READING), ("tracking/alone", ALONE)):
        pairs = zip(costs[CHANGED], costs[base], strict=True)
        extra = tuple(one.elapsed_s - other.elapsed_s for one, other in pairs)
        yield Figure(key, extra, "" if lab.full else f"{changed_bytes // MIB} MiB")


def _rounds(lab: Lab, witness: Witness, vm: Machine, changed_bytes: int) -> dict[str, list[Cost]]:
    small = iter(
        witness.new_vm(f"small-{number}", os.urandom(changed_bytes))
        for number in range(lab.repeats)
    )

    def change() -> Cost:
        _write(vm, changed_bytes)
        return _backed_up(witness, vm)

    return lab.interleave(
        {
            NOTHING: lambda: _backed_up(witness, vm),
            CHANGED: change,
            READING: lambda: _read(vm, changed_bytes),
            ALONE: lambda: _backed_up(witness, next(small)),
        }
    )


@contextlib.contextmanager
def _xfs(image: Path, at: Path, size_bytes: int) -> Iterator[None]:
    """A new XFS of that size, mounted."""
    with image.open("xb") as file:
        file.truncate(size_bytes)
    at.mkdir(parents=True)
    tools = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True, env=tools)
    subprocess.run(["mount", "-o", "loop", image, at], check=True, env=tools)
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True, env=tools)


def _pieces(changed_bytes: int) -> Iterator[int]:
    return iter(range(0, changed_bytes // PIECE_BYTES * SPREAD_BYTES, SPREAD_BYTES))


def _write(vm: Machine, changed_bytes: int) -> None:
    """New data, that nothing can compress, in pieces all over the disk."""
    with vm.volume.open("r+b") as file:
        for at in _pieces(changed_bytes):
            file.seek(at)
            file.write(os.urandom(PIECE_BYTES))
    drop_from_cache(vm.volume)


def _read(vm: Machine, changed_bytes: int) -> Cost:
    """The pieces read, as they lie on the disk."""
    drop_from_cache(vm.volume)
    began_s = time.perf_counter()
    with vm.volume.open("rb", buffering=0) as file:
        for at in _pieces(changed_bytes):
            file.seek(at)
            file.read(PIECE_BYTES)
    return Cost(time.perf_counter() - began_s)


def _backed_up(witness: Witness, vm: Machine) -> Cost:
    """From the call until the job is seen to have succeeded."""
    began_s = time.perf_counter()
    _, job = witness.start_backup(vm, full=False)
    witness.succeed(job)
    return Cost(time.perf_counter() - began_s)


if __name__ == "__main__":
    sys.exit(alone(__file__))
