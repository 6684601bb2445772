"""Baselines in a whole engine: they live as long as they are of use, over restarts too."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from api.calls import Call
from api.metrics import Metrics
from api.routes import CALLS
from api.schemas_companion import ComputeInspectQuery
from engine.config import Clone, Config, Freeze, PoolConfig, Tracking
from engine.model import Baseline, Vm
from engine.probes import Probes
from engine.snapshot.baseline_tending import tend_baselines
from engine.snapshot.pinned import Pinned
from engine.snapshot.snapshot import SNAPSHOTS
from engine.verb_types import Scope
from tests.conftest import LoopFs
from tests.engine_rig import ANYWHERE, EngineRig
from tests.rig import random_bytes, write_at
from tests.unit.test_snapshot import lines, recorder

pytestmark = pytest.mark.root

SIZE = 8 << 20


@pytest.fixture(params=["xfs", "btrfs"])
def rig(request: pytest.FixtureRequest, loop_fs: LoopFs, tmp_path: Path) -> Iterator[EngineRig]:
    pool = loop_fs(request.param, 400 << 20)
    config = Config(
        pools=(PoolConfig(name="fast", path=str(pool)),),
        tracking=Tracking(pool_reserve_share=0.0),
    )
    with EngineRig(tmp_path / "data", config) as made:
        yield made


def kept(rig: EngineRig) -> list[str]:
    place = rig.pool_path / SNAPSHOTS
    return sorted(os.listdir(place)) if place.exists() else []


def change(rig: EngineRig, vm: Vm) -> bytes:
    path = rig.volume(vm.disks[0])
    write_at(path, 3 << 20, os.urandom(4096))
    return path.read_bytes()


def test_an_incremental_reads_what_changed_also_after_a_restart(rig: EngineRig) -> None:
    vm = rig.make_vm("web", random_bytes(SIZE))
    rig.back_up(vm)
    rig.restart()
    content = change(rig, vm)
    backup = rig.back_up(vm)
    assert "changes found by: sda reflink" in backup.label.notes
    assert any(note.startswith("cloned in ") for note in backup.label.notes)
    assert rig.core.stuns.state.clone.count == 1  # in this process
    assert rig.restore(backup, "copy") == [content]


@pytest.mark.parametrize(("most", "frozen"), [(1, False), (Clone().most_frozen_extents, True)])
def test_a_guest_is_not_frozen_for_a_long_clone_and_the_job_says_so(
    loop_fs: LoopFs, tmp_path: Path, most: int, frozen: bool
) -> None:
    command, journal = recorder(tmp_path)
    config = Config(
        pools=(PoolConfig(name="fast", path=str(loop_fs("xfs", 400 << 20))),),
        clone=Clone(most_frozen_extents=most),
        freeze=Freeze(command=(command,)),
    )
    with EngineRig(tmp_path / "data", config) as rig:
        vm = rig.make_vm("web", random_bytes(1 << 20), random_bytes(1 << 20))  # an extent each
        backup, job = rig.ask_backup(vm)
        said = " ".join(rig.succeed(job).result)
        assert said == " ".join(rig.engine.backup(ANYWHERE, backup).label.notes)
    note = "not frozen: 2 extents, 1 are the limit: the snapshot is crash-consistent"
    assert (note in said) is not frozen
    assert ("frozen for" in said) is frozen
    assert bool(lines(journal)) is frozen


def test_what_the_vm_overwrites_is_pinned_and_shown(rig: EngineRig) -> None:
    rig.core.pinned._clock = lambda: 0.0  # no look takes any time, so none is too early
    vm = rig.make_vm("web", random_bytes(SIZE))
    rig.back_up(vm)
    assert pinned_shown(rig, vm) == 0
    overwrite_all(rig, vm)
    assert pinned_shown(rig, vm) == SIZE
    rig.back_up(vm)
    assert pinned_shown(rig, vm) == 0
    overwrite_all(rig, vm)
    assert pinned_shown(rig, vm) == SIZE
    rig.engine.delete_vm(vm.uuid, False)
    assert rig.engine.pools()[0].pinned_bytes == 0


def pinned_shown(rig: EngineRig, vm: Vm) -> int:
    """After a look; the API, the metrics and the pool must say the same."""
    rig.core.pinned.look(rig.core.baselines.rows(), rig.core.probes)
    (call,) = [call for call in CALLS if call.path == "/v1/compute/inspect"]
    assert isinstance(call, Call)
    (disk,) = call.run(rig.engine, ComputeInspectQuery(compute_uuid=vm.uuid)).data.disks
    assert rig.engine.pools()[0].pinned_bytes == disk.pinned
    metric = f'vmkeep_tracking_pinned_bytes{{compute="{vm.uuid}",pool="{rig.pool_path}",'
    (line,) = [
        line for line in Metrics(rig.engine).render().decode().splitlines() if metric in line
    ]
    assert float(line.split()[-1]) == disk.pinned
    assert isinstance(disk.pinned, int)
    return disk.pinned


def overwrite_all(rig: EngineRig, vm: Vm) -> None:
    write_at(rig.volume(vm.disks[0]), 0, os.urandom(SIZE))  # btrfs frees whole extents
    os.sync()


def test_a_look_that_takes_long_is_not_taken_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter([0.0, 2.0, 100.0, 201.9, 202.1, 203.0])
    looked: list[Baseline] = []

    def look(row: Baseline) -> int:
        looked.append(row)
        return 7

    monkeypatch.setattr("engine.snapshot.pinned.pinned_bytes", look)
    pinned, row = Pinned(lambda: next(now_s)), Baseline("v", "sda", "", file="/baseline")
    for count in (1, 1, 1, 2):
        pinned.look([row], Probes())
        assert len(looked) == count
        assert pinned.bytes_of(row) == 7
    pinned.look([], Probes())
    assert pinned.bytes_of(row) == 0


def test_of_a_pool_that_hangs_one_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, looked = threading.Event(), list[str]()

    def look(row: Baseline) -> int:
        looked.append(row.file)
        if row.file.startswith("/hung/"):
            answer.wait()
        return 7

    monkeypatch.setattr("engine.snapshot.pinned.pinned_bytes", look)
    monkeypatch.setattr("engine.snapshot.pinned.LOOK_TIMEOUT_S", 0.5)
    files = ("/hung/1", "/hung/2", "/well/1")
    rows = [Baseline("v", "sda", "", file=file) for file in files]
    pinned = Pinned()
    try:
        pinned.look(rows, Probes())
    finally:
        answer.set()
    assert looked == ["/hung/1", "/well/1"]
    assert [pinned.bytes_of(row) for row in rows] == [0, 0, 7]


def test_without_room_they_go(rig: EngineRig) -> None:
    vm = rig.make_vm("web", random_bytes(SIZE))
    rig.back_up(vm)
    tend_baselines(rig.core)
    assert len(kept(rig)) == 1
    rig.core.baselines._reserve_share = 1.0
    tend_baselines(rig.core)
    assert kept(rig) == []
    backup = rig.back_up(vm)
    assert any("the pool is short of room" in note for note in backup.label.notes)


def test_they_go_with_their_backup(rig: EngineRig) -> None:
    vm = rig.make_vm("web", random_bytes(SIZE))
    rig.back_up(vm)
    newest = rig.back_up(vm)
    rig.engine.delete_backup(Scope(), newest.uuid)
    assert kept(rig) == []
    content = change(rig, vm)
    backup = rig.back_up(vm)
    assert "sda scanned: the baseline's backup was deleted" in backup.label.notes
    assert rig.restore(backup, "copy") == [content]


@pytest.mark.parametrize("with_volumes", [False, True])
def test_they_go_with_their_vm(rig: EngineRig, with_volumes: bool) -> None:
    vm = rig.make_vm("web", random_bytes(SIZE))
    rig.back_up(vm)
    rig.engine.delete_vm(vm.uuid, with_volumes)
    assert kept(rig) == []
    assert rig.core.baselines.rows() == []


def test_they_stay_while_the_vms_hypervisor_is_away(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since the start, so its pools are not known. What is off must be so afterwards."""
    vm = rig.make_vm("web", random_bytes(SIZE))
    rig.back_up(vm)
    away = replace(vm, state="unreachable", disks=(replace(vm.disks[0], pool_uuid="theirs"),))
    with monkeypatch.context() as patch:
        patch.setattr(type(rig.core.inventory), "vms", lambda _: [away])
        tend_baselines(rig.core)
        assert len(kept(rig)) == 1
        rig.core.baselines.turn_off(rig.core.baselines.rows()[0], "proved wrong")
        tend_baselines(rig.core)
    assert any("tracking is off since" in note for note in rig.back_up(vm).label.notes)


def test_they_stay_while_their_pool_is_left_out_of_the_configuration(
    rig: EngineRig, tmp_path: Path
) -> None:
    """It may be a mistake. What is off must be so afterwards."""
    vm = rig.make_vm("web", random_bytes(SIZE))
    rig.back_up(vm)
    right = rig.config
    for off in ("", "proved wrong"):
        if off:
            rig.core.baselines.turn_off(rig.core.baselines.rows()[0], off)
        rig.config = Config(pools=(PoolConfig(name="other", path=str(tmp_path / "other")),))
        rig.restart()
        tend_baselines(rig.core)
        rig.config = right
        rig.restart()
        assert [row.off for row in rig.core.baselines.rows()] == [off]
        assert len(kept(rig)) == (0 if off else 1)


def test_what_has_too_many_extents_is_not_cloned(rig: EngineRig) -> None:
    rig.config = Config(pools=rig.config.pools, clone=Clone(most_extents=1))
    rig.restart()
    vm = rig.make_vm("web", random_bytes(SIZE))
    write_at(rig.volume(vm.disks[0]), 2 * SIZE, b"apart")
    backup = rig.back_up(vm)
    assert "snapshot: direct" in backup.label.notes
    assert any("extents, 1 are the limit" in note for note in backup.label.notes)
    assert kept(rig) == []


def test_they_go_when_a_later_backup_was_not_made_of_a_clone(rig: EngineRig) -> None:
    """None builds on their backup any more, so they would hold room for nothing."""
    vm = rig.make_vm("web", random_bytes(SIZE))
    write_at(rig.volume(vm.disks[0]), 2 * SIZE, b"apart")
    rig.back_up(vm)
    tracked = rig.config
    rig.config = Config(pools=tracked.pools, clone=Clone(most_extents=1))
    rig.restart()
    assert "snapshot: direct" in rig.back_up(vm).label.notes
    tend_baselines(rig.core)
    assert kept(rig) == []
    rig.config = tracked
    rig.restart()
    content = change(rig, vm)
    backup = rig.back_up(vm)
    tend_baselines(rig.core)
    assert len(kept(rig)) == 1
    assert "sda scanned: the baseline is not of the newest backup" in backup.label.notes
    assert rig.restore(backup, "copy") == [content]


def test_without_tracking_there_are_none(rig: EngineRig) -> None:
    vm = rig.make_vm("web", random_bytes(SIZE))
    rig.back_up(vm)
    rig.config = Config(pools=rig.config.pools, tracking=Tracking(enabled=False))
    rig.restart()
    assert kept(rig) == []
    content = change(rig, vm)
    backup = rig.back_up(vm)
    assert "changes found by: sda scan" in backup.label.notes
    assert rig.restore(backup, "copy") == [content]


def test_an_alert_stands_until_an_operator_turns_tracking_on(
    rig: EngineRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = rig.make_vm("web", random_bytes(SIZE))
    rig.back_up(vm)
    change(rig, vm)
    with monkeypatch.context() as patch:
        patch.setattr("engine.snapshot.tracking.differences", lambda *_: [])
        patch.setattr("engine.backup.sampling.FEWEST_CHUNKS", 1000)
        rig.back_up(vm)
    (state,) = rig.engine.tracking()
    assert "was not seen" in state.off
    rig.engine.turn_tracking_on(vm.uuid)
    (state,) = rig.engine.tracking()
    assert state.off == ""
