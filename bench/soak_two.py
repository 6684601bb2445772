"""Two of everything, with clocks three days apart: does anybody get in anybody's way?

    python -m bench.soak_two [--rounds 1000] [--hosts-rounds 200] [--dir DIR]

`two_clusters`: two services in different clusters on one backup point. Each round one makes a
backup, then deletes it (and collects garbage, now and then) while the other imports it. Either the
import came first, and then the backup restores there bit for bit, or it is told that there is none.

`two_hosts`: two services of one cluster, so in one domain. Both back up, delete and collect garbage
at the same time, and restore what the other one made.

The second service's clock is three days off (libfaketime, if it is installed). In the end every
backup restores and every byte of the point is verified.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import uuid as uuids
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

from api.cli.names import clusters
from api.client import CallFailed
from api.schemas_backup import (
    BackupList,
    BackupListQuery,
    ImportedBackups,
    RemoteBackupRef,
    RemoteImport,
)
from bench.service import Service
from bench.witness import Witness, Wrong, at_once
from storage.check.check import check_point

MIB = 1 << 20
VOLUME_BYTES = 3 * MIB
PATIENCE_S = 60.0
GONE = frozenset({40408, 40411})  # backup_not_found, backup_not_on_point
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


def shifted_clock(shift: str) -> dict[str, str]:
    """The environment of a process whose wall clock is off by `shift` ("+3d"); none without
    libfaketime."""
    found = [FAKETIME, *Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")]
    for path in found:
        if path.exists():
            return {"LD_PRELOAD": str(path), "FAKETIME": shift, "DONT_FAKE_MONOTONIC": "1"}
    return {}


class Side:
    """One service on the shared point, with one VM. Used by one thread at a time."""

    def __init__(
        self, root: Path, name: str, point: Path, cluster: str, env: Mapping[str, str]
    ) -> None:
        self._chance = random.Random(name)
        config = root / f"{name}.toml"
        config.write_text(
            f'[limits]\npoint_refresh_s = 0.2\n[[clusters]]\nname = "{cluster[:8]}"\n'
            f'uuid = "{cluster}"\n[[points]]\nname = "shared"\npath = "{point}"\n'
        )
        data = root / name
        self._service = Service(data, "--config", str(config), log=root / f"{name}.log", env=env)
        self.witness = Witness(self._service.url, data, name)
        self._cluster = cluster
        assert [row.uuid for row in clusters(self.witness.client)] == [cluster]
        self._vm = self.witness.new_vm("volume", self._chance.randbytes(VOLUME_BYTES))
        self.truth = self._vm.truth  # also what was imported

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.witness.close()
        self._service.stop()

    def backup(self) -> str:
        with self._vm.volume.open("r+b") as file:
            file.seek(self._chance.randrange(VOLUME_BYTES - MIB))
            file.write(self._chance.randbytes(MIB // 2))
        return self.witness.backup(self._vm, full=self._chance.random() < 0.2)

    def delete(self, backup: str) -> None:
        self.witness.delete(self._vm, backup)

    def delete_all_but(self, count: int) -> None:
        for backup in list(self.truth)[: max(len(self.truth) - count, 0)]:
            self.delete(backup)

    def take(self, backup: str, expected: str) -> bool:
        """Imports it; False when it is there no more."""
        ref = RemoteBackupRef(uuid=backup, point_uuid=self.witness.point)
        body = RemoteImport(cluster_uuid=self._cluster, backup=[ref])
        try:
            self.witness.client.post("compute/backup/remote/import", ImportedBackups, body)
        except CallFailed as error:
            if error.output.scode in GONE:
                return False
            raise
        self.truth[backup] = expected
        return True

    def collect(self) -> None:
        self.witness.maintain("gc")

    def compare(self, backup: str, expected: str) -> None:
        self.witness.compare(backup, expected)

    def await_listed(self, backup: str) -> None:
        """Until this host has seen a backup that another host of its cluster made."""
        deadline_s = time.monotonic() + PATIENCE_S
        query = BackupListQuery(page_size=1000)
        while True:
            rows = self.witness.client.get("compute/backup/list", BackupList, query).data
            if any(row.uuid == backup and row.status == 0 for row in rows.rows):
                return
            if time.monotonic() > deadline_s:
                raise Wrong(f"backup {backup} is not seen")

    def rebuild(self) -> None:
        self.witness.maintain("rebuild")

    def verify(self) -> None:
        self.witness.maintain("verify", deep=True)


def two_clusters(root: Path, rounds: int) -> Counter[str]:
    """See the module; what was done, counted."""
    point = root / "point"
    point.mkdir()
    done: Counter[str] = Counter(clock_off=bool(shifted_clock("+3d")))
    ours, theirs = str(uuids.uuid4()), str(uuids.uuid4())
    with (
        Side(root, "maker", point, ours, {}) as maker,
        Side(root, "taker", point, theirs, shifted_clock("+3d")) as taker,
    ):
        for number in range(rounds):
            backup = maker.backup()
            expected = maker.truth[backup]

            def remove(backup: str = backup, number: int = number) -> None:
                # A verb or a gc before it, or none: so that now one and now the other is first.
                if number % 4 == 1:
                    maker.backup()
                if number % 4 >= 2:
                    maker.collect()
                maker.delete(backup)
                maker.delete_all_but(3)

            def take(backup: str = backup, expected: str = expected) -> None:
                done["imported" if taker.take(backup, expected) else "too late"] += 1

            at_once((remove, take) if number % 2 else (take, remove))
            if backup in taker.truth and done["imported"] % 3 == 1:
                taker.compare(backup, expected)
                done["compared"] += 1
            taker.delete_all_but(4)
            if number % 5 == 0:
                taker.collect()
        finish(point, maker, taker)
    return done


def two_hosts(root: Path, rounds: int) -> Counter[str]:
    """See the module; what was done, counted."""
    point = root / "point"
    point.mkdir()
    done: Counter[str] = Counter(clock_off=bool(shifted_clock("-3d")))
    cluster = str(uuids.uuid4())
    with (
        Side(root, "one", point, cluster, {}) as one,
        Side(root, "other", point, cluster, shifted_clock("-3d")) as other,
    ):
        for number in range(rounds):

            def work(side: Side, gc: bool) -> None:
                side.backup()
                side.delete_all_but(3)
                if gc:
                    side.collect()

            at_once((partial(work, one, number % 4 == 0), partial(work, other, number % 4 == 2)))
            done["backups"] += 2
            if number % 5 == 0:
                for here, there in ((one, other), (other, one)):
                    backup, expected = list(there.truth.items())[-1]
                    here.await_listed(backup)
                    here.compare(backup, expected)
                    done["compared"] += 1
        finish(point, one, other)
    return done


def finish(point: Path, *sides: Side) -> None:
    """Every backup comes back where it is, and the point is clean."""
    for side in sides:
        for backup, expected in side.truth.items():
            side.compare(backup, expected)
        side.verify()
        side.rebuild()
        side.collect()
    report = check_point(str(point), deep=True)
    if report.findings:
        raise Wrong(f"the point is not clean: {report.findings[0]}")


def main() -> int:
    """Runs both; 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(prog="bench.soak_two")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--hosts-rounds", type=int, default=200)
    parser.add_argument("--dir", default=tempfile.gettempdir())
    given = parser.parse_args()
    for act, rounds in ((two_clusters, given.rounds), (two_hosts, given.hosts_rounds)):
        root = Path(tempfile.mkdtemp(prefix="vmkeep-two-", dir=given.dir))
        began = time.monotonic()
        try:
            done = act(root, rounds)
        except (Wrong, CallFailed) as wrong:
            print(f"{act.__name__}: {wrong}; see {root}", file=sys.stderr)
            return 1
        shutil.rmtree(root)
        told = ", ".join(f"{count} {what}" for what, count in done.most_common())
        print(f"{act.__name__}: {rounds} rounds in {time.monotonic() - began:.0f} s: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
