"""Backups of a running VM: what its guest feels, how soon reading begins, and how fast it is.

A libvirt of its own (session mode) runs the tests' small Linux guest, under emulation; an engine of
this process backs it up as the service does. The guest's writes are of 4 KiB each, past its page
cache, all over the disk that is being backed up: QEMU first puts aside what a write replaces.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import re
import sys
import time
from collections.abc import Iterator

from bench.lab import Cost, Lab, series, warm
from bench.results import Figure, Note, Result, Series
from bench.runner import alone
from engine.model import Backup, Vm
from tests.engine_rig import ANYWHERE, EngineRig
from tests.libvirt.guest import Guest
from tests.libvirt.host import MIB, Host, Image
from tests.libvirt.site import rig_on, wait_for_vm
from tests.nfs.kit import NoKit, make_kit

QUESTION = "What does a backup of a running VM cost its guest, and how fast is it?"

WRITES = 256  # of 4 KiB, in one batch
QUIET_BATCHES = 20
_FROZEN = re.compile(r"frozen for ([0-9.]+) s")
_TOOK = re.compile(r"real\s+(\d+)m ([0-9.]+)s")  # by hundredths


def run(lab: Lab) -> Iterator[Result]:
    """The disk is raw, of 1 GiB in the full run and 128 MiB in a quick one."""
    if os.geteuid() != 0 or importlib.util.find_spec("libvirt") is None:
        yield Note("no live backups: needs root and libvirt-python")
        return
    try:
        kit = make_kit()
    except NoKit as error:
        yield Note(f"no live backups: {error}")
        return
    with contextlib.ExitStack() as undo:
        root = undo.enter_context(lab.scratch())
        cache = root / "cache"
        cache.mkdir()
        for path in (root, root.parent):
            path.chmod(0o755)  # libvirtd is another user's
        host = undo.enter_context(contextlib.closing(Host(kit, cache)))
        rig = undo.enter_context(rig_on(root / "data", host))
        bench = LiveBench(host, rig, lab.pick(128, 1024) * MIB)
        undo.callback(bench.guest.close)
        yield from _reading(lab, bench)
        yield from _writing(lab, bench)


class LiveBench:
    """A guest that runs, its one disk full of random data, which a first backup has stored."""

    def __init__(self, host: Host, rig: EngineRig, size_bytes: int) -> None:
        self.rig = rig
        self.size_bytes = size_bytes
        self.image: Image = host.image("vda", "a.raw", size_bytes, "raw")
        with self.image.path.open("r+b") as file:
            for _ in range(size_bytes // MIB):
                file.write(os.urandom(MIB))
        self.guest: Guest = host.boot(host.define("bench", [self.image]))
        self.vm: Vm = wait_for_vm(rig, "bench", lambda vm: vm is not None and vm.state == "running")
        rig.back_up(self.vm, full=True)
        self._chance = random.Random(1)

    def backed_up(self) -> tuple[Cost, float, Backup]:
        """The cost of a full backup, and the seconds until it has read something."""
        warm(self.image.path)
        began_s, first_s = time.perf_counter(), 0.0
        backup, job = self.rig.ask_backup(self.vm, full=True)
        while not (row := self.rig.engine.wait_for_job(job, 0.002)).finished_at:
            if not first_s and row.progress.bytes_read:
                first_s = time.perf_counter() - began_s
        cost = Cost(time.perf_counter() - began_s)
        self.rig.succeed(job)
        return cost, first_s or cost.elapsed_s, self.rig.engine.backup(ANYWHERE, backup)

    def write_s(self) -> float:
        """What one write takes the guest, the mean of a batch at a random place."""
        at = self._chance.randrange(self.size_bytes // 4096 - WRITES)
        dd = f"dd if=/dev/zero of=/dev/vda bs=4k count={WRITES} seek={at}"
        said = self.guest.run(f"time {dd} oflag=direct conv=notrunc 2>&1")
        if (found := _TOOK.search(said)) is None:
            raise RuntimeError(f"dd said: {said}")
        return (int(found[1]) * 60 + float(found[2])) / WRITES


def _reading(lab: Lab, bench: LiveBench) -> Iterator[Result]:
    """Nothing of it has to be stored: what is left is reading and hashing."""
    first_bytes: list[float] = []
    frozen: list[float] = []

    def back_up() -> Cost:
        cost, first_s, backup = bench.backed_up()
        first_bytes.append(first_s)
        frozen.extend(float(held) for held in _FROZEN.findall(" ".join(backup.label.notes)))
        return cost

    def cat() -> Cost:
        warm(bench.image.path)
        return lab.measure(["cat", bench.image.path])

    costs = lab.interleave({"vmkeep": back_up, "limit: cat of the file": cat})
    yield from series(f"all {bench.size_bytes // MIB} MiB of a running VM's disk, known", costs)
    yield Series("a live backup, from the call to the first data", "vmkeep", "s", (*first_bytes,))
    yield Figure("live/freeze", (*frozen,))


def _writing(lab: Lab, bench: LiveBench) -> Iterator[Result]:
    quiet: list[float] = []
    busy: list[float] = []
    for _ in range(lab.repeats):
        quiet += [bench.write_s() for _ in range(QUIET_BATCHES)]
        _, job = bench.rig.ask_backup(bench.vm, full=True)
        while not bench.rig.engine.wait_for_job(job, 0).finished_at:
            busy.append(bench.write_s())
        bench.rig.succeed(job)
    yield Series("a guest's write of 4 KiB", "no backup", "s", (*quiet,))
    yield Series("a guest's write of 4 KiB", "while it is backed up", "s", (*busy,))


if __name__ == "__main__":
    sys.exit(alone(__file__))
