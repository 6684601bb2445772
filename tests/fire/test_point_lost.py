"""The point is taken away, made read-only, or put back to an older state, in the middle of it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from engine.config import Config, Limits, PointConfig, PoolConfig
from engine.jobs.jobs import JobContext
from engine.model import BACKUP_FAILED
from engine.verb_types import NewDisk, RestoreTarget
from storage.check.check import check_point
from storage.errors import Damaged, PointReadOnly, StorageError
from storage.log.seen import Seen
from storage.point import Point
from tests.conftest import LoopFs
from tests.engine_rig import ANYWHERE, PATIENCE_S, EngineRig, files_below
from tests.fire.hog import filled
from tests.fire.site import Site, changed, noise
from tests.rig import random_bytes, write_at
from tests.store import save

MIB = 1 << 20


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[EngineRig]:
    with EngineRig(tmp_path / "data") as made:
        yield made


def on_first_batch(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Calls `act` once, when the running job has done its first batch."""
    on_first(monkeypatch, "add", act)


def on_first(
    monkeypatch: pytest.MonkeyPatch, name: Literal["add", "set_total"], act: Callable[[], object]
) -> None:
    """Calls `act` once, after the running job's first such call."""
    left = [act]
    call = getattr(JobContext, name)

    def call_then(*args: object, **counts: int) -> None:
        call(*args, **counts)
        while left:
            left.pop()()

    monkeypatch.setattr(JobContext, name, call_then)


def look(rig: EngineRig) -> str:
    """The point's state after another look at it."""
    rig.core.points.look_again(rig.point_uuid, PATIENCE_S)
    return rig.engine.point(rig.point_uuid).state


@pytest.mark.root
@pytest.mark.parametrize(
    ("kind", "mishap", "reason"),
    [
        ("ext4", ["umount", "--lazy"], "No such file"),
        ("xfs", ["umount", "--lazy"], "No such file"),
        ("ext4", ["mount", "-o", "remount,abort"], "Read-only file system"),
    ],
)
def test_a_mount_that_goes_away_during_a_backup(
    tmp_path: Path,
    loop_fs: LoopFs,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    mishap: list[str],
    reason: str,
) -> None:
    """The job fails, nothing is written to the bare mount point, and all comes back with it."""
    place = loop_fs(kind, 320 * MIB)
    image = place.parent / f"{place.name}.img"
    config = Config(limits=Limits(point_reserve_bytes=0), points=(PointConfig("p", str(place)),))
    with EngineRig(tmp_path / "data", config) as rig:
        content = random_bytes(24 * MIB, 1)
        vm = rig.make_vm("web", content)
        kept = rig.back_up(vm)
        write_at(rig.volume(vm.disks[0]), 0, random_bytes(20 * MIB, 2))
        with monkeypatch.context() as patch:
            command = [*mishap, str(place)]
            on_first_batch(patch, partial(subprocess.run, command, check=True))
            backup, job = rig.ask_backup(vm)
            assert rig.ended(job).state == "failed"
        assert reason in rig.ended(job).error
        assert rig.engine.backup(ANYWHERE, backup).status == BACKUP_FAILED
        if "umount" in mishap:
            assert look(rig) == "unreachable"
            with pytest.raises(StorageError):
                rig.ask_backup(vm)
            assert list(place.iterdir()) == []
        rig.engine.stop(PATIENCE_S)
        if "umount" not in mishap:
            subprocess.run(["umount", str(place)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
        rig.restart()
        assert look(rig) == "online"
        again = rig.back_up(rig.engine.vm(vm.uuid))
        assert rig.restore(again, "copy") == [rig.volume(vm.disks[0]).read_bytes()]
        assert rig.restore(kept, "old") == [content]
    assert check_point(str(place), deep=True).findings == []


@pytest.mark.root
def test_a_mount_that_is_read_only_at_the_start(tmp_path: Path, loop_fs: LoopFs) -> None:
    place = loop_fs("ext4", 64 * MIB)
    limits = Limits(point_reserve_bytes=0, point_refresh_s=0.05)
    config = Config(limits=limits, points=(PointConfig("p", str(place)),))
    with EngineRig(tmp_path / "data", config) as rig:
        vm = rig.make_vm("web", random_bytes(2 * MIB, 1))
        kept = rig.back_up(vm)
        rig.engine.stop(PATIENCE_S)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        rig.restart()
        assert look(rig) == "read_only"
        with pytest.raises(StorageError):
            rig.ask_backup(vm)
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        assert look(rig) == "online"
        rig.back_up(rig.engine.vm(vm.uuid))
        assert rig.restore(kept, "old") == [random_bytes(2 * MIB, 1)]


@pytest.mark.root
def test_a_read_only_point_is_restored_from_by_way_of_a_copy(
    tmp_path: Path, loop_fs: LoopFs
) -> None:
    """As docs/operations.md says."""
    place, content = loop_fs("ext4", 64 * MIB), random_bytes(2 * MIB, 1)
    with EngineRig(tmp_path / "data", Config(limits=Limits(point_reserve_bytes=0))) as rig:
        first = rig.point_uuid
        rig.engine.create_point("p", "local", str(place))
        rig.engine.delete_point(first, erase=False)
        kept = rig.back_up(rig.make_vm("web", content))
        rig.engine.stop(PATIENCE_S)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        rig.restart()
        assert look(rig) == "read_only"
        with pytest.raises(PointReadOnly):
            rig.ask_restore(kept, "not")
        shutil.copytree(place, tmp_path / "copy")
        rig.engine.delete_point(rig.point_uuid, erase=False)
        rig.engine.create_point("p", "local", str(tmp_path / "copy"))
        assert rig.restore(rig.engine.backup(ANYWHERE, kept.uuid), "copy") == [content]


@pytest.mark.root
@pytest.mark.parametrize("place", ["ext4", "xfs"])
@pytest.mark.parametrize(
    ("moment", "expected"),
    [("set_total", ("failed", "succeeded")), ("add", ("succeeded", "succeeded"))],
    ids=["before its room is set aside", "after that"],
)
def test_a_pool_that_fills_during_a_restore(
    tmp_path: Path,
    loop_fs: LoopFs,
    monkeypatch: pytest.MonkeyPatch,
    moment: Literal["add", "set_total"],
    expected: tuple[str, str],
    place: str,
) -> None:
    """At each fill level it comes back whole, or fails by name and leaves nothing. Once it writes,
    its room is its own."""
    pool = loop_fs(place, 320 * MIB)
    pools = (PoolConfig("big", str(tmp_path)), PoolConfig("small", str(pool)))
    content = random_bytes(24 * MIB, 1)
    (tmp_path / "source.raw").write_bytes(content)
    with EngineRig(tmp_path / "data", Config(limits=Limits(workers=1), pools=pools)) as rig:
        uuids = {state.pool.name: state.pool.uuid for state in rig.engine.pools()}
        disks = [NewDisk("sda", uuids["big"], "source.raw")]
        vm = rig.engine.vm(rig.engine.create_vm(ANYWHERE, "source", "", "", disks))
        backup = rig.back_up(vm)
        before = files_below(pool)
        states = []
        for leave_bytes in (0, 4096, MIB, 5 * MIB, 12 * MIB, 40 * MIB):
            name = f"copy-{leave_bytes}"
            with contextlib.ExitStack() as room, monkeypatch.context() as patch:
                fill = partial(room.enter_context, filled(pool, leave_bytes))
                on_first(patch, moment, fill)
                target = RestoreTarget("sda", uuids["small"], name, "SSD")
                group, zone = rig.engine.object_groups()[0].uuid, rig.engine.zones()[0].uuid
                made, job = rig.engine.restore_backup(
                    ANYWHERE, backup.uuid, name, [target], group, zone
                )
                states.append(rig.ended(job).state)
            if states[-1] == "failed":
                assert rig.engine.vm(made).state == "restore_failed"
                assert files_below(pool) == before
            else:
                assert (pool / name).read_bytes() == content
                (pool / name).unlink()
    assert (states[0], states[-1]) == expected


class Swap:
    """An older copy of a point, taken when this is made, and the two taking each other's place."""

    def __init__(self, point: Path) -> None:
        self.point = point
        self.copy = point.with_name("older")
        self.away = point.with_name("newest")
        subprocess.run(["cp", "-a", str(point), str(self.copy)], check=True)

    def put_older(self) -> None:
        self.point.rename(self.away)
        subprocess.run(["cp", "-a", str(self.copy), str(self.point)], check=True)

    def put_newest(self) -> None:
        shutil.rmtree(self.point)
        self.away.rename(self.point)


@pytest.mark.parametrize("restarted", [False, True])
def test_an_older_copy_of_the_point_is_refused(rig: EngineRig, restarted: bool) -> None:
    """Also when the service opens it anew: then the view on it is as old as all the rest."""
    vm = rig.make_vm("web", random_bytes(3 * MIB, 1))
    first = rig.back_up(vm)
    point = Path(rig.engine.points()[0].point.path)
    swap = Swap(point)
    write_at(rig.volume(vm.disks[0]), 0, random_bytes(MIB, 2))
    second = rig.back_up(vm)
    before = (point / "domains").stat().st_ino
    if restarted:
        rig.engine.stop(PATIENCE_S)
    swap.put_older()
    assert (point / "domains").stat().st_ino != before
    if restarted:
        rig.restart()
    records = _records(point)
    assert look(rig) == "damaged"
    assert "older state" in rig.engine.points()[0].last_error
    with pytest.raises(Damaged, match="older state"):
        rig.ask_backup(vm)
    with pytest.raises(Damaged, match="older state"):
        rig.engine.delete_backup(ANYWHERE, second.uuid)
    assert set(rig.listed()) == {second.uuid, first.uuid}
    assert _records(point) == records
    rig.engine.stop(PATIENCE_S)
    swap.put_newest()
    rig.restart()
    assert look(rig) == "online"
    rig.back_up(rig.engine.vm(vm.uuid))
    assert rig.restore(first, "one") == [random_bytes(3 * MIB, 1)]
    assert check_point(str(point), deep=True).findings == []


def _records(point: Path) -> list[str]:
    return sorted(str(path) for path in point.glob("domains/*/log/*/*"))


def test_who_means_it_attaches_the_older_copy_anew(rig: EngineRig) -> None:
    vm = rig.make_vm("web", random_bytes(3 * MIB, 1))
    first = rig.back_up(vm)
    point = Path(rig.engine.points()[0].point.path)
    swap = Swap(point)
    rig.back_up(vm)
    rig.engine.stop(PATIENCE_S)
    swap.put_older()
    rig.restart()
    assert look(rig) == "damaged"
    rig.engine.delete_point(rig.point_uuid, erase=False)
    rig.engine.create_point("p", "local", str(point))
    assert look(rig) == "online"
    assert rig.listed() == [first.uuid]
    rig.back_up(rig.engine.vm(vm.uuid))
    assert rig.restore(first, "one") == [random_bytes(3 * MIB, 1)]


@pytest.mark.parametrize("verb", ["backup", "delete", "read", "commit"])
def test_an_older_copy_comes_between_two_looks(tmp_path: Path, verb: str) -> None:
    """The very next record is not written: it would leave a gap in the older log."""
    site = Site(tmp_path, tmp_path)
    kept = site.save(noise(8, 1))
    swap = Swap(site.path)
    doomed = site.save(changed(noise(8, 1), 2, 2), kept)
    session = site.domain.begin("backup") if verb == "commit" else None
    swap.put_older()
    records = _records(site.path)

    def commit() -> None:
        assert session is not None
        session.commit([])

    acts: dict[str, Callable[[], object]] = {
        "backup": lambda: save(site.domain, noise(2, 3)),
        "delete": lambda: site.domain.forget([doomed.backup]),
        "read": lambda: site.domain.begin("read", [kept.backup]),
        "commit": commit,
    }
    with pytest.raises(Damaged, match="older state"):
        acts[verb]()
    assert _records(site.path) == records
    site.domain.close()


def test_another_future_of_an_older_copy_is_refused(tmp_path: Path) -> None:
    """Its log has a record of the number that was last seen, but another one."""
    site = Site(tmp_path, tmp_path)
    kept = site.save(noise(8, 1))
    swap = Swap(site.path)
    site.save(changed(noise(8, 1), 2, 2), kept)
    site.domain.close()
    swap.put_older()
    other = Point.open(str(site.path)).domain(site.label, "host-2", "", pack_size_bytes=MIB)
    for seed in range(3):
        save(other, noise(2, seed))
    other.close()
    with pytest.raises(Damaged, match="older state"):
        site.opened()


def test_what_was_seen(tmp_path: Path) -> None:
    """It survives the process, goes only forward, and what is torn counts as nothing."""
    path = tmp_path / "seen" / "one"
    seen = Seen(str(path))
    assert seen.last is None
    seen.note(300, b"c" * 32)
    seen.note(7, b"b" * 32)
    assert Seen(str(path)).last == (300, b"c" * 32)
    seen.note(1 << 40, b"d" * 32)
    assert Seen(str(path)).last == (1 << 40, b"d" * 32)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert Seen(str(path)).last is None
    assert Seen("").last is None
