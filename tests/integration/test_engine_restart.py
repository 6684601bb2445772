"""The engine stopped and killed at bad moments: nothing is left in the middle of anything."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from engine.config import Config, DiskConfig, PoolConfig, Tracking, VmConfig
from engine.errors import AlreadyRunning, ConfigInvalid, Conflict
from engine.ids import new_id
from engine.inventory.inventory import EmbeddedInventory
from engine.model import BACKUP_DONE, BACKUP_FAILED, Pool
from engine.service import Engine
from engine.snapshot.snapshot import RESTORES
from storage.check.check import check_point
from tests.engine_rig import ANYWHERE, ONE_JOB, PATIENCE_S, EngineRig, disk_bytes, files_below

MIB = 1 << 20

# argv: the data directory. A restore and a backup are under way, another one waits; then it dies.
KILLED = """
import os, signal, sys
from pathlib import Path
from engine.config import Config, Limits
from tests.engine_rig import ANYWHERE, EngineRig

rig = EngineRig(Path(sys.argv[1]), Config(limits=Limits(max_jobs=2)))
vms = {vm.name: vm for vm in rig.engine.vms(ANYWHERE)}
backup = rig.engine.backup(ANYWHERE, rig.listed()[0])
jobs = [rig.ask_restore(backup, "copy")[1], rig.ask_backup(vms["web"])[1]]
rig.ask_backup(vms["db"])
while True:
    rows = [rig.engine.job(job) for job in jobs]
    assert not any(row.finished_at for row in rows), rows
    if all(row.progress.bytes_scanned + row.progress.bytes_restored for row in rows):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_start_that_is_refused_says_why_and_leaves_nothing_running(tmp_path: Path) -> None:
    """Also where points are attached, which it does not come to open."""
    with EngineRig(tmp_path / "data") as rig:
        vm = rig.make_vm("web", disk_bytes(MIB, 1))
    clash = VmConfig("db", (DiskConfig("sda", vm.disks[0].volume_name),))
    with pytest.raises(ConfigInvalid, match="belongs to VM web"):
        Engine.start(str(tmp_path / "data"), Config(vms=(clash,)))
    with EngineRig(tmp_path / "data") as rig:
        rig.back_up(rig.engine.vm(vm.uuid))


def test_stop_ends_jobs_and_a_start_shows_how(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "data", ONE_JOB) as rig:
        vm = rig.make_vm("web", disk_bytes(MIB, 1))
        kept = rig.back_up(vm)
        rig.occupy()
        backup, job = rig.ask_backup(vm)
        copy, restore = rig.ask_restore(kept, "copy")
        began_s = time.monotonic()
        rig.restart()
        assert time.monotonic() - began_s < PATIENCE_S
        for uuid in (job, restore):
            row = rig.engine.job(uuid)
            assert (row.state, row.error) == ("failed", "interrupted: the service was stopped")
        assert rig.engine.backup(ANYWHERE, backup).status == BACKUP_FAILED
        assert rig.engine.vm(vm.uuid).action == ""
        assert rig.engine.vm(copy).state == "restore_failed"
        assert rig.restore(kept, "second") == [disk_bytes(MIB, 1)]


def test_a_stopped_engine_takes_no_jobs(tmp_path: Path) -> None:
    rig = EngineRig(tmp_path / "data")
    vm = rig.make_vm("web", disk_bytes(MIB, 1))
    rig.core.jobs.stop(1.0)
    with pytest.raises(Conflict) as caught:
        rig.ask_backup(vm)
    assert caught.value.code == "shutting_down"
    assert rig.engine.vm(vm.uuid).action == ""
    assert rig.listed() == []
    rig.engine.stop()
    rig.engine.stop()


def test_uuids_catalogue_and_jobs_outlive_a_restart(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "data") as rig:
        vm = rig.make_vm("web", disk_bytes(MIB, 1))
        backup, job = rig.ask_backup(vm)
        rig.succeed(job)
        rig.engine.log_operation("me", "compute/backup/create", backup, "b", "GCD", 0, "")
        before = (
            rig.engine.clusters(),
            rig.engine.namespaces(),
            rig.pool_uuid,
            rig.point_uuid,
            rig.engine.vm(vm.uuid),
            rig.engine.backup(ANYWHERE, backup),
            rig.engine.job(job),
            rig.engine.operations(1, 10),
        )
        rig.restart()
        after = (
            rig.engine.clusters(),
            rig.engine.namespaces(),
            rig.pool_uuid,
            rig.point_uuid,
            rig.engine.vm(vm.uuid),
            rig.engine.backup(ANYWHERE, backup),
            rig.engine.job(job),
            rig.engine.operations(1, 10),
        )
        assert after == before
        assert not rig.back_up(vm).label.full


def test_a_second_engine_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "data") as rig:
        with pytest.raises(AlreadyRunning):
            Engine.start(str(tmp_path / "data"), rig.config)
        assert len(rig.engine.points()) == 1


def test_killed_amid_a_backup_and_a_restore(tmp_path: Path) -> None:
    content = disk_bytes(150 * MIB, 1)
    with EngineRig(tmp_path / "data") as rig:
        web = rig.make_vm("web", content)
        rig.make_vm("db", disk_bytes(MIB, 2))
        kept = rig.back_up(web)
        # Else the next one would find everything on the point and be over too soon.
        rig.volume(web.disks[0]).write_bytes(disk_bytes(150 * MIB, 3))
        pool_path = rig.pool_path
    assert _ended(KILLED, tmp_path / "data") == -signal.SIGKILL
    with EngineRig(tmp_path / "data") as rig:
        jobs = [job for job in rig.engine.jobs() if job.state != "succeeded"]
        assert [(job.state, job.error) for job in jobs] == [
            ("failed", "interrupted by a restart")
        ] * 3
        vms = {vm.name: vm for vm in rig.engine.vms(ANYWHERE)}
        assert [vm.action for vm in vms.values()] == ["", "", ""]
        assert vms["copy"].state == "restore_failed"
        assert vms["copy"].disks == ()
        assert files_below(pool_path) == [
            str(pool_path / "db-0.raw"),
            str(pool_path / "web-0.raw"),
        ]
        rows = [rig.engine.backup(ANYWHERE, uuid) for uuid in rig.listed()]
        broken = [row for row in rows if row.uuid != kept.uuid]
        assert [row.status for row in broken] == [BACKUP_FAILED] * 2
        assert rig.restore(kept, "again") == [content]
        assert rig.back_up(vms["web"]).parent == kept.uuid
        point_path = rig.engine.points()[0].point.path
    report = check_point(point_path, deep=True)
    assert report.findings == []


def test_what_is_left_in_a_pool_that_is_known_later_goes_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the service was started before libvirt."""
    left = tmp_path / "late" / RESTORES / "half a volume"
    with EngineRig(tmp_path / "data", Config(tracking=Tracking(look_every_s=0.1))) as rig:
        places = rig.core.inventory.places
        late = Pool(uuid=new_id(), name="late", path=str(tmp_path / "late"))
        more = dataclasses.replace(places, pools=(*places.pools, late))
        left.parent.mkdir(parents=True)
        left.touch()
        monkeypatch.setattr(EmbeddedInventory, "places", property(lambda _: more))
        deadline_s = time.monotonic() + PATIENCE_S
        while left.exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_a_commit_that_we_did_not_live_to_note_counts(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "data") as rig:
        vm = rig.make_vm("web", disk_bytes(MIB, 1))
        backup = rig.back_up(vm)
        # The state of somebody who was killed between the commit and the note of it.
        rig.core.catalogue.put(replace(backup, status=1))
        rig.core.inventory.begin_action(vm.uuid, "backing_up")
        rig.restart()
        rig.core.points.opened(rig.point_uuid)
        assert rig.engine.backup(ANYWHERE, backup.uuid) == backup
        assert backup.status == BACKUP_DONE
        assert rig.engine.vm(vm.uuid).action == ""


# argv: the data directory, the inventory's call that it dies in.
KILLED_LATE = """
import os, signal, sys
from pathlib import Path
from tests.engine_rig import ANYWHERE, EngineRig

rig = EngineRig(Path(sys.argv[1]))
backup = rig.engine.backup(ANYWHERE, rig.listed()[0])
setattr(rig.core.inventory, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
rig.succeed(rig.ask_restore(backup, "copy", volumes=["copy.raw"])[1])
"""


@pytest.mark.parametrize("last", ["realize", "note"])
@pytest.mark.parametrize("theirs", [False, True])
def test_a_restored_vm_that_we_did_not_live_to_note_is_undone(
    tmp_path: Path, last: str, theirs: bool
) -> None:
    """But for what somebody has put in a volume's place meanwhile."""
    with EngineRig(tmp_path / "data") as rig:
        web = rig.make_vm("web", disk_bytes(MIB, 1))
        rig.back_up(web)
        pool = rig.pool_path
    assert _ended(KILLED_LATE, tmp_path / "data", last) == -signal.SIGKILL
    copy = pool / "copy.raw"
    assert copy.read_bytes() == disk_bytes(MIB, 1)
    if theirs:
        copy.unlink()
        copy.write_bytes(disk_bytes(MIB, 1))
    with EngineRig(tmp_path / "data") as rig:
        (vm,) = (vm for vm in rig.engine.vms(ANYWHERE) if vm.name == "copy")
        assert (vm.state, vm.disks) == ("restore_failed", ())
        assert files_below(pool) == [str(copy)] * theirs + [str(pool / "web-0.raw")]


def test_a_pool_that_hangs_is_waited_for_once_however_much_is_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a start takes too long for who waits for it, and then so do all that follow."""
    with EngineRig(tmp_path / "data") as rig:
        web = rig.make_vm("web", disk_bytes(MIB, 1))
        for name in ("a", "b", "c"):
            disk = replace(web.disks[0], volume_name=name)
            rig.core.inventory.add_vm(
                replace(
                    web,
                    uuid=name,
                    name=name,
                    disks=(disk,),
                    state="restoring",
                    action="restoring",
                )
            )
        asked, answers = list[str](), threading.Event()

        def hangs(path: str) -> bool:
            asked.append(path)
            return answers.wait(PATIENCE_S)

        monkeypatch.setattr("engine.recovery.POOL_TIMEOUT_S", 0.2)
        monkeypatch.setattr("engine.recovery.unname_left", hangs)
        rig.restart()
        assert len(asked) == 1
        assert [vm.state for vm in rig.engine.vms(ANYWHERE)] == [*["restore_failed"] * 3, "stopped"]
        answers.set()


def test_pools_are_looked_at_together_however_many_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by itself would make a start wait, and the service manager may not wait so long. It is
    told that we are ready when the pools have been shown."""
    names = ("a", "b", "c")
    for name in names:
        (tmp_path / name).mkdir()
    config = Config(
        pools=tuple(PoolConfig(name, str(tmp_path / name)) for name in names),
        vms=tuple(VmConfig(name, (DiskConfig("sda", "v", pool=name),)) for name in names),
    )
    met = list[str]()
    for what in ("recovery.clear_leftovers", "service.pool_room"):
        together = threading.Barrier(len(names))

        def look(*_: object, what: str = what, together: threading.Barrier = together) -> Any:
            together.wait(5.0)
            met.append(what)
            return 0, 0

        monkeypatch.setattr(f"engine.{what}", look)
    monkeypatch.setattr("engine.service.POOL_LOOK_TIMEOUT_S", 10.0)
    with EngineRig(tmp_path / "data", config) as rig:
        assert Counter(met) == {"recovery.clear_leftovers": 3, "service.pool_room": 3}
        assert [state.error for state in rig.engine.pools()] == ["", "", ""]
        assert Counter(met)["service.pool_room"] == 6


# argv: the data directory. The machine is never defined, and the service is stopped meanwhile.
STOPPED_LATE = """
import os, sys, threading
from pathlib import Path
from tests.engine_rig import ANYWHERE, EngineRig

rig = EngineRig(Path(sys.argv[1]))
backup = rig.engine.backup(ANYWHERE, rig.listed()[0])
named, never = threading.Event(), threading.Event()
rig.core.inventory.realize = lambda *_: named.set() or never.wait()
rig.ask_restore(backup, "copy", volumes=["copy.raw"])
assert named.wait(60)
rig.engine.stop(0.5)
os._exit(0)
"""


def test_volumes_of_a_restore_that_a_stop_did_not_wait_for_are_removed(tmp_path: Path) -> None:
    """Nobody would know whose they are."""
    data = tmp_path / "data"
    with EngineRig(data) as rig:
        rig.back_up(rig.make_vm("web", disk_bytes(MIB, 1)))
        pool = rig.pool_path
    assert _ended(STOPPED_LATE, data) == 0
    assert (pool / "copy.raw").read_bytes() == disk_bytes(MIB, 1)
    with EngineRig(data) as rig:
        (vm,) = (vm for vm in rig.engine.vms(ANYWHERE) if vm.name == "copy")
        assert (vm.state, vm.action, vm.disks) == ("restore_failed", "", ())
        assert files_below(pool) == [str(pool / "web-0.raw")]
        newest = rig.engine.jobs()[0]
        assert (newest.state, newest.error) == ("failed", "interrupted: the service was stopped")


def test_a_restored_vm_that_was_noted_is_kept_by_a_kill(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "data") as rig:
        rig.back_up(rig.make_vm("web", disk_bytes(MIB, 1)))
        pool = rig.pool_path
    assert _ended(KILLED_LATE, tmp_path / "data", "end_action") == -signal.SIGKILL
    with EngineRig(tmp_path / "data") as rig:
        (vm,) = (vm for vm in rig.engine.vms(ANYWHERE) if vm.name == "copy")
        assert (vm.state, vm.action, vm.last_error) == ("stopped", "", "")
        assert rig.volume(vm.disks[0]).read_bytes() == disk_bytes(MIB, 1)
        assert files_below(pool) == [str(pool / "copy.raw"), str(pool / "web-0.raw")]


def _ended(script: str, data: Path, *more: str) -> int:
    """The exit code."""
    ended = subprocess.run(
        [sys.executable, "-c", script, str(data), *more],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=PATIENCE_S,
        check=False,
    )
    return ended.returncode


def test_a_lost_state_brings_the_backups_back_as_another_clusters(tmp_path: Path) -> None:
    content = disk_bytes(MIB, 1)
    with EngineRig(tmp_path / "data") as rig:
        backup = rig.back_up(rig.make_vm("web", content))
    for path in files_below(tmp_path / "data" / "state"):
        os.unlink(path)
    with EngineRig(tmp_path / "data") as rig:
        assert rig.listed() == []
        found = rig.engine.remote_backups(rig.cluster_uuid, rig.point_uuid).backups
        assert [one.backup.uuid for one in found] == [backup.uuid]
        rig.engine.import_backups(rig.cluster_uuid, [(backup.uuid, rig.point_uuid)])
        assert rig.restore(rig.engine.backup(ANYWHERE, backup.uuid), "copy") == [content]
