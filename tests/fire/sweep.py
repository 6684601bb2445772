"""Sweeps: the process dies, or a call fails, at every call of every verb.

    python -m tests.fire.sweep [--verb full]... [--fault kill]... [--stride 1] [--dir /dev/shm]

After each: the offline check is clean, the domain opens by itself, what was acknowledged is there
and restores, what was not is there as a whole or not at all, the next backup succeeds, and one gc
leaves the live files only.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

from storage.check.check import check_point
from storage.domain.domain import Domain
from storage.errors import StorageError
from tests.fire.script import (
    FULL,
    PAST,
    VERBS,
    Facts,
    FailsAt,
    dying_at,
    failing_at,
    image,
    prepare,
    run,
)
from tests.store import Saved, cluster, files, live_files, load, require_rebuilt_alike, save

FAULTS = {
    "kill": 0,
    "EIO": errno.EIO,
    "ENOSPC": errno.ENOSPC,
    "EDQUOT": errno.EDQUOT,
}


class Broken(Exception):
    """A promise was broken."""


class Sweep:
    """A prepared place, and copies of it to be shot at."""

    def __init__(self, root: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._base, self._copy = root / "base", root / "copy"
        self._base.mkdir()
        self._labels = [cluster("a"), cluster("b")]
        prepare(self._base, self._labels)
        for ballast in self._base.glob("point/domains/*/ballast"):
            ballast.unlink()

    def count_calls(self, verb: str) -> int:
        """How many calls it makes when nothing fails."""
        fs = FailsAt(0, lambda: None)
        run(self._fresh(), verb, fs)
        return fs.calls

    def shoot(self, verb: str, fault: str, n: int) -> None:
        """One verb with one fault at call `n`, and what must be true after it. Broken."""
        facts = self._fresh()
        number = FAULTS[fault]
        told = fail(facts, verb, failing_at(n, number)) if number else kill(facts, verb, n)
        try:
            judge(facts, verb, told)
        except (Broken, StorageError, AssertionError) as error:
            raise Broken(f"{verb}, {fault} at call {n}: {error!r}") from error
        self.counts[f"{fault} in {verb}"] += 1

    def _fresh(self) -> Facts:
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._base, self._copy)
        return Facts.load(self._copy)


def kill(facts: Facts, verb: str, n: int) -> list[str]:
    """Does the verb in a child that dies before its n-th call; what it acknowledged till then."""
    heard, out = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            facts.tell = partial(_tell, out)
            run(facts, verb, dying_at(n))
            code = 0
        except BaseException:  # noqa: BLE001 (what the child fails with is its result)
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(out)
    with os.fdopen(heard) as pipe:
        told = pipe.read().split()
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise Broken(f"{verb}: the child that was to die at call {n} ended with {status}")
    return told


def _tell(out: int, what: str) -> None:
    os.write(out, f"{what}\n".encode())


def fail(facts: Facts, verb: str, fs: FailsAt) -> list[str]:
    """Does the verb with a call that fails; what it acknowledged. Only StorageErrors come out, and
    the same open domain goes on working."""
    told: list[str] = []
    facts.tell = told.append
    try:
        domain = facts.open(1 if verb == "take_over" else 0, fs)
    except StorageError:
        return told
    try:
        try:
            VERBS[verb](facts, domain)
        except StorageError:
            if verb != "take_over":
                told.append(save(domain, FULL).backup)
    finally:
        domain.close()
    return told


def judge(facts: Facts, verb: str, told: list[str]) -> None:
    """All promises, on the place as the verb left it."""
    report = check_point(str(facts.place / "point"), deep=True)
    if not report.clean:
        raise Broken(f"the check found {report.findings}")
    domain = facts.open()
    _judge_backups(facts, domain, verb, told)
    _judge_next(domain)
    require_rebuilt_alike(domain)
    domain.close()
    other = facts.open(1)
    if verb == "take_over":
        _judge_import(facts, other, told)
    _judge_next(other)
    require_rebuilt_alike(other)
    other.close()


def _judge_backups(facts: Facts, domain: Domain, verb: str, told: list[str]) -> None:
    rows = {row.backup: row for row in domain.backups()}
    known = {saved.backup: image(number) for number, saved in enumerate(facts.past)}
    going = {facts.past[0].backup} if verb == "delete" else set()
    if known.keys() - going - rows.keys():
        raise Broken("an acknowledged backup is gone")
    if going & set(told) & rows.keys():
        raise Broken("a deleted backup is back")
    if set(told) - known.keys() - rows.keys() - {"imported"}:
        raise Broken("the backup that was acknowledged just now is gone")
    for backup, row in rows.items():
        expected = [known[backup]] if backup in known else [FULL, image(PAST)]
        if load(domain, Saved(backup, row.disks[0].disk)) not in expected:
            raise Broken(f"backup {backup} does not come back as it was")


def _judge_import(facts: Facts, domain: Domain, told: list[str]) -> None:
    rows = {row.backup: row for row in domain.backups()}
    if rows or told:
        for number, saved in enumerate(facts.past[:2]):
            if load(domain, Saved(saved.backup, rows[saved.backup].disks[0].disk)) != image(number):
                raise Broken(f"imported backup {number} is not what it was")


def _judge_next(domain: Domain) -> None:
    newest = save(domain, image(PAST + 1))
    if load(domain, newest) != image(PAST + 1):
        raise Broken("the next backup does not come back")
    domain.reclaim()
    if files(domain) != live_files(domain):
        raise Broken(f"a gc left {files(domain) ^ live_files(domain)}")


def sweep(root: Path, verb: str, fault: str, stride: int = 1, start: int = 1) -> int:
    """Shoots at every `stride`-th call of the verb; how many shots it were. Broken."""
    bench = Sweep(root)
    shots = range(start, bench.count_calls(verb) + 1, stride)
    for n in shots:
        bench.shoot(verb, fault, n)
    return len(shots)


def main() -> int:
    """0 when no promise was broken."""
    parser = argparse.ArgumentParser(prog="tests.fire.sweep")
    parser.add_argument("--verb", choices=list(VERBS), action="append")
    parser.add_argument("--fault", choices=list(FAULTS), action="append")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--dir", default="/dev/shm")
    given = parser.parse_args()
    for fault in given.fault or list(FAULTS):
        for verb in given.verb or list(VERBS):
            began_s = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="vmkeep-sweep-", dir=given.dir) as root:
                try:
                    count = sweep(Path(root), verb, fault, given.stride)
                except Broken as broken:
                    print(f"sweep: BROKEN: {broken}")
                    return 1
            print(
                f"sweep: {fault} in {verb}: {count} calls, nothing lost, "
                f"{time.monotonic() - began_s:.1f} s"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
