"""An interrupted backup goes on where it was: what it had sealed is not stored a second time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.model import BACKUP_FAILED, Job
from engine.points.pack_reads import BATCH_PACKS
from storage.check.check import check_point
from storage.point import ClusterLabel, Point
from storage.view import tables
from tests.api_site import Gate
from tests.engine_rig import ANYWHERE, ONE_JOB, PATIENCE_S, EngineRig
from tests.rig import random_bytes

MIB = 1 << 20
SIZE = 224 * MIB
PACK = 64 * MIB  # a pack of the service

# argv: the data directory, sealed packs to wait for. Kills itself in the middle of a backup.
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.engine_rig import ANYWHERE, EngineRig

data = Path(sys.argv[1])
rig = EngineRig(data)
(vm,) = rig.engine.vms(ANYWHERE)
_, job = rig.ask_backup(vm)
while len(list(data.glob("point/domains/*/packs/*/*"))) < int(sys.argv[2]):
    row = rig.engine.job(job)
    assert not row.finished_at, row
os.kill(os.getpid(), signal.SIGKILL)
"""


# argv: the data directory, packs to wait for. Kills itself in the middle of a verify.
KILLED_VERIFY = """
import os, signal, sys
from pathlib import Path
from engine.config import Config, Limits
from tests.engine_rig import EngineRig

rig = EngineRig(Path(sys.argv[1]), Config(limits=Limits(verify_bytes_per_s=1 << 20)))
job = rig.engine.start_maintenance("verify", rig.point_uuid, deep=True)
while len([row for row in rig.core.state.pack_reads.values() if row.pack]) < int(sys.argv[2]):
    row = rig.engine.job(job)
    assert not row.finished_at, row
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_amid_a_backup(data: Path, sealed_packs: int) -> None:
    kills_itself(KILLED, data, sealed_packs)


def kills_itself(program: str, data: Path, after: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", program, str(data), str(after)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=PATIENCE_S,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL


def assert_one_clean_backup(rig: EngineRig, content: bytes) -> None:
    """All but the last backup failed, that one restores, and nothing else is on the point."""
    rows = [rig.engine.backup(ANYWHERE, uuid) for uuid in rig.listed()]
    (made,) = [row for row in rows if row.status != BACKUP_FAILED]
    assert rig.restore(made, "copy") == [content]
    domain = rig.core.points.domain(rig.point_uuid, rig.cluster_uuid)
    with domain.view.read() as state:
        assert list(tables.sessions.scan(state)) == []
        live = {pack for pack, _ in tables.packs.scan(state)}
    on_disk = {str(path.relative_to(domain.paths.packs)) for path in _packs(rig)}
    assert on_disk == live
    assert check_point(domain.paths.root.split("/domains/")[0], deep=True).findings == []


def _packs(rig: EngineRig) -> list[Path]:
    return list((rig.data / "point").glob("domains/*/packs/*/*"))


def test_killed_twice_it_stores_each_chunk_once(fast_path: Path) -> None:
    content = random_bytes(SIZE, 1)
    with EngineRig(fast_path / "data") as rig:
        rig.make_vm("web", content)
    killed_amid_a_backup(fast_path / "data", 1)
    # The next one has the first pack by a link, and seals another.
    killed_amid_a_backup(fast_path / "data", 3)
    with EngineRig(fast_path / "data") as rig:
        errors = [job.error for job in rig.engine.jobs()]
        assert errors == ["interrupted by a restart"] * 2
        (vm,) = rig.engine.vms(ANYWHERE)
        _, job = rig.ask_backup(vm)
        stored = rig.succeed(job).progress.bytes_stored
        assert stored < SIZE - 2 * PACK + MIB
        assert_one_clean_backup(rig, content)


def test_a_restart_keeps_all_that_was_stored(fast_path: Path) -> None:
    content = random_bytes(SIZE, 2)
    with EngineRig(fast_path / "data") as rig:
        vm = rig.make_vm("web", content)
        _, job = rig.ask_backup(vm)
        deadline = time.monotonic() + PATIENCE_S
        while rig.engine.job(job).progress.bytes_stored < 8 * MIB:
            assert time.monotonic() < deadline
        rig.restart()
        first = rig.engine.job(job)
        assert (first.state, first.error) == ("failed", "interrupted: the service was stopped")
        _, job = rig.ask_backup(vm)
        stored = rig.succeed(job).progress.bytes_stored
        assert 0 < stored <= SIZE + MIB - first.progress.bytes_stored
        assert_one_clean_backup(rig, content)


def test_a_cancelled_backup_leaves_nothing(fast_path: Path) -> None:
    with EngineRig(fast_path / "data") as rig:
        vm = rig.make_vm("web", random_bytes(SIZE, 3))
        _, job = rig.ask_backup(vm)
        deadline = time.monotonic() + PATIENCE_S
        while not _packs(rig):
            assert time.monotonic() < deadline
        rig.engine.cancel_job(job)
        assert rig.ended(job).state == "cancelled"
        assert _packs(rig) == []


def test_a_host_that_was_taken_for_dead_is_told_so(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "data", ONE_JOB) as rig, Gate() as gate:
        vm = rig.make_vm("web", random_bytes(4 * MIB, 4))
        _, job = rig.ask_backup(vm)
        domain = rig.core.points.domain(rig.point_uuid, rig.cluster_uuid)
        session = _opened_session(rig)
        point = Point.open(str(rig.data / "point"))
        label = ClusterLabel(cluster_uuid=rig.cluster_uuid, cluster_name="same")
        other = point.domain(label, "another-host", str(tmp_path / "views"))
        other.abort(session)
        other.close()
        gate.open()
        ended = rig.ended(job)
        assert ended.state == "failed"
        assert "was ended by another host, which took this one for dead" in ended.error
        assert domain.backups() == []
        gate.open()
        rig.back_up(vm)


def _opened_session(rig: EngineRig) -> str:
    domain = rig.core.points.domain(rig.point_uuid, rig.cluster_uuid)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with domain.view.read() as state:
            sessions = [session for session, _ in tables.sessions.scan(state)]
        if sessions:
            return sessions[0]
        assert time.monotonic() < deadline


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is some: how durable it is is not the point here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="vmkeep-resume-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def test_a_killed_verify_goes_on_where_it_was(tmp_path: Path) -> None:
    packs = 2 * BATCH_PACKS + 1
    with EngineRig(tmp_path / "data") as rig:
        vm = rig.make_vm("web", bytes(packs * MIB))
        for at in range(packs):
            with rig.volume(vm.disks[0]).open("r+b") as volume:
                volume.seek(at * MIB)
                volume.write(random_bytes(128 << 10, at + 1))
            rig.back_up(vm)
        assert len(_packs(rig)) == packs
    kills_itself(KILLED_VERIFY, tmp_path / "data", BATCH_PACKS)
    with EngineRig(tmp_path / "data") as rig:
        (killed,) = [job for job in rig.engine.jobs() if job.kind == "verify"]
        assert (killed.state, killed.error) == ("failed", "interrupted by a restart")
        read = [_verify(rig) for _ in range(2)]
        assert f"; {BATCH_PACKS} packs had been read before it was interrupted" in read[0].result[0]
        rest, whole = (job.progress.bytes_read for job in read)
        assert rest == pytest.approx(whole * (packs - BATCH_PACKS) / packs, rel=0.01)
        assert whole == sum(pack.stat().st_size for pack in _packs(rig))


def _verify(rig: EngineRig) -> Job:
    return rig.succeed(rig.engine.start_maintenance("verify", rig.point_uuid, deep=True))
