"""Faults from outside and below Python: strace ends the process, or fails a call, in LMDB too.

    python -m tests.fire.below [--verb full]... [--stride 1] [--dir /dev/shm]

Each call by which LMDB writes its view, in each verb: the process dies before it, or it fails with
EIO, ENOSPC or EDQUOT, once or from then on. After each the promises of sweep.py hold.

strace counts per thread, and LMDB's writes are made by the thread that appends: the main one here.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from storage.errors import StorageError
from tests.fire.script import Facts, prepare
from tests.fire.sweep import Broken, judge
from tests.store import cluster

DATA = "views/host-1/data.mdb"
CALLS = ("pwrite64", "writev", "fdatasync")  # how LMDB commits: head, pages, sync
VERBS = ("full", "incremental", "delete", "restore", "take_over")
KILL = "signal=SIGKILL"
FAULTS = (KILL, *(f"error={name}" for name in ("EIO", "ENOSPC", "EDQUOT")))


class Ended(NamedTuple):
    """`told`: what the verb acknowledged."""

    status: int
    told: list[str]
    errors: str


def under_strace(facts: Facts, verb: str, below: str, *options: str) -> Ended:
    """Does the verb; `below`: only calls on this file of its domain count, or "" for all."""
    label = facts.labels[verb == "take_over"]
    paths = ["-P", f"{facts.place}/point/domains/{label.cluster_uuid}/{below}"] if below else []
    command = ["strace", "-f", *paths, *options]
    command += [sys.executable, "-m", "tests.fire.script", verb, str(facts.place)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return Ended(ended.returncode, ended.stdout.split(), ended.stderr)


def injected(facts: Facts, verb: str, below: str, fault: str) -> Ended:
    """`fault`: as strace's inject= has it."""
    calls = fault.partition(":")[0]
    options = ["-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={fault}"]
    return under_strace(facts, verb, below, *options)


class Below:
    """A prepared place, and copies of it to be shot at."""

    def __init__(self, root: Path) -> None:
        self._base, self._copy = root / "base", root / "copy"
        self._base.mkdir()
        prepare(self._base, [cluster("a"), cluster("b")])

    def count(self, verb: str, call: str) -> int:
        """How many such calls the verb makes on its view when nothing fails."""
        traced = self._base.parent / "trace"
        options = ("-o", str(traced), "-e", f"trace={call}")
        assert under_strace(self._fresh(), verb, DATA, *options).status == 0
        return traced.read_text().count(f"{call}(")

    def shoot(self, verb: str, call: str, fault: str, when: str) -> None:
        """Broken."""
        facts = self._fresh()
        what = f"{verb}: {call}:{fault}:when={when}"
        ended = injected(facts, verb, DATA, f"{call}:{fault}:when={when}")
        # It may do without the call, or be told by it; anything else is a defect.
        refused = ended.status == 1 and "\nstorage.errors." in ended.errors
        if not (refused or ended.status == (-9 if fault == KILL else 0)):
            raise Broken(f"{what}: ended with {ended.status}: {ended.errors[-2000:]}")
        try:
            judge(facts, verb, ended.told)
        except (Broken, StorageError, AssertionError) as error:
            raise Broken(f"{what}: {error!r}") from error

    def _fresh(self) -> Facts:
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._base, self._copy)
        return Facts.load(self._copy)


def shots(below: Below, verb: str) -> Iterator[tuple[str, str, str]]:
    """(call, fault, when) of all that can be done to a verb."""
    for call in CALLS:
        for n in range(1, below.count(verb, call) + 1):
            for fault in FAULTS:
                yield call, fault, str(n)
                if fault != KILL:
                    yield call, fault, f"{n}+"


def main() -> int:
    """0 when no promise was broken."""
    parser = argparse.ArgumentParser(prog="tests.fire.below")
    parser.add_argument("--verb", choices=VERBS, action="append")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--dir", default="/dev/shm")
    given = parser.parse_args()
    for verb in given.verb or VERBS:
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="vmkeep-below-", dir=given.dir) as root:
            below = Below(Path(root))
            chosen = list(shots(below, verb))[:: given.stride]
            try:
                for shot in chosen:
                    below.shoot(verb, *shot)
            except Broken as broken:
                print(f"below: BROKEN: {broken}")
                return 1
        took_s = time.monotonic() - began_s
        print(f"below: {verb}: {len(chosen)} faults, nothing lost, {took_s:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
