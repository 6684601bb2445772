"""The engine with several points, clusters and data directories."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, PointConfig, parse_config
from engine.errors import ConfigInvalid, Conflict, EngineError, Invalid, NotFound
from engine.model import PointKind
from engine.points import keeper, points
from engine.service import Engine
from engine.verb_types import BackupQuery, Scope
from storage.domain.domain import Domain
from storage.domain.gc import GcReport
from storage.errors import Damaged, PointNotEmpty, PointUnreachable, StorageError
from storage.format import bundles
from tests.engine_rig import (
    ANYWHERE,
    ONE_JOB,
    PATIENCE_S,
    EngineRig,
    attach,
    back_up_to,
    disk_bytes,
    files_below,
)

MIB = 1 << 20


def test_a_point_has_the_name_that_it_is_configured_with(tmp_path: Path) -> None:
    """Also when another one has its old name now."""

    def with_points(**paths: str) -> dict[str, str]:
        points = tuple(PointConfig(name, f"{tmp_path}/{path}") for name, path in paths.items())
        with EngineRig(tmp_path / "data", Config(points=points)) as rig:
            return {row.point.name: Path(row.point.path).name for row in rig.engine.points()}

    for path in ("first", "second"):
        (tmp_path / path).mkdir()
    assert with_points(nas="first") == {"nas": "first"}
    renamed = with_points(nas="second", old="first")
    assert renamed == {"nas": "second", "old": "first"}
    with EngineRig(tmp_path / "data") as rig:
        assert {row.point.name for row in rig.engine.points()} == {"nas", "old"}


def test_a_point_is_not_configured_with_the_name_of_another_that_is_attached(
    tmp_path: Path,
) -> None:
    with EngineRig(tmp_path / "data") as rig:
        attach(rig, tmp_path / "mine", "nas")
        attach(rig, tmp_path / "other", "archive")
        before = {row.point.name for row in rig.engine.points()}
    taken = Config(points=(PointConfig("nas", f"{tmp_path}/other"),))
    with pytest.raises(ConfigInvalid, match=f"'nas' is the name .* {tmp_path}/mine"):
        EngineRig(tmp_path / "data", taken)
    with EngineRig(tmp_path / "data") as rig:
        assert {row.point.name for row in rig.engine.points()} == before


def test_a_host_bundles_the_log_of_its_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "RECORDS_PER_BUNDLE", 4)
    with EngineRig(tmp_path / "a") as one:
        point = attach(one, tmp_path / "shared")
        log = tmp_path / "shared" / "domains" / one.cluster_uuid / "log"
        backups = [back_up_to(one, point, disk_bytes(MIB, n), f"vm{n}") for n in range(3)]
        one.engine.delete_backup(ANYWHERE, backups.pop())
        one.core.points.look_again(point, PATIENCE_S)
        assert sorted(path.name for path in log.rglob("*.bundle")) == [
            f"{first:016x}.bundle" for first in (1, 4)
        ]
        with EngineRig(tmp_path / "b") as two:
            attach(two, tmp_path / "shared", "theirs")
            found = two.engine.remote_backups(two.cluster_uuid, point).backups
            assert {one.backup.uuid for one in found} == set(backups)


def test_a_point_that_a_job_came_to_meanwhile_is_erased_and_not_detached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EngineRig(tmp_path / "data", ONE_JOB) as rig:
        vm = rig.make_vm("web", disk_bytes(MIB, 1))
        free = rig.occupy()
        asked: list[tuple[str, str]] = []
        erase = rig.core.points.erase

        def erase_long(uuid: str) -> None:
            asked.append(rig.ask_backup(vm))
            erase(uuid)

        monkeypatch.setattr(rig.core.points, "erase", erase_long)
        with pytest.raises(Conflict) as caught:
            rig.engine.delete_point(rig.point_uuid, erase=True)
        assert caught.value.code == "point_in_use"
        free()
        [(backup, job)] = asked
        rig.succeed(job)
        assert rig.listed() == [backup]


def test_no_point_is_made_in_a_pool_or_where_no_name_of_it_can_be_kept(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    with EngineRig(tmp_path / "data") as rig:
        for path in (rig.pool_path, tmp_path / "link"):
            with pytest.raises(Invalid, match="path"):
                attach(rig, path, "new")
            assert os.listdir(path) == []


def test_attaching_twice_or_rubbish_is_refused(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "a") as rig:
        above = tmp_path / "nas"  # not tmp_path, which also holds the rig's pool
        above.mkdir()
        shared = above / "shared"
        attach(rig, shared)
        (tmp_path / "link").symlink_to(shared)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").write_bytes(b"x")
        inside = shared / "domains"

        def refused(name: str, kind: str, path: str) -> str:
            try:
                rig.engine.create_point(name, kind, path)
            except (EngineError, StorageError) as error:
                assert len(rig.engine.points()) == 2
                return error.code
            return "not at all"

        assert refused("other", "local", str(shared)) == "point_in_use"
        assert refused("other", "local", str(tmp_path / "link")) == "point_in_use"
        assert refused("other", "local", str(inside)) == "point_in_use"
        assert refused("other", "local", str(above)) == "point_in_use"
        assert refused("shared", "local", str(tmp_path / "new")) == "name_taken"
        assert refused("other", "local", str(tmp_path / "full")) == PointNotEmpty.code
        assert refused("other", "local", str(tmp_path / "none")) == PointUnreachable.code
        assert refused("other", "s3", str(tmp_path / "new")) == "invalid_member"
        assert refused("other", "local", "relative") == "invalid_member"
        assert refused("", "local", str(tmp_path / "new")) == "invalid_member"
        (tmp_path / "new").mkdir()
        assert refused("other", "nfs", str(tmp_path / "new")) == "invalid_member"
        assert list((tmp_path / "new").iterdir()) == []


def test_of_two_points_that_are_attached_at_once_one_gets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EngineRig(tmp_path / "data") as rig:
        made, refused = points._open_or_create, list[str]()

        def meanwhile(path: str, name: str, kind: PointKind) -> str:
            if path.endswith("one"):
                with pytest.raises(Conflict) as caught:
                    attach(rig, tmp_path / "two")
                refused.append(caught.value.code)
            return made(path, name, kind)

        monkeypatch.setattr(points, "_open_or_create", meanwhile)
        attach(rig, tmp_path / "one")
        assert refused == ["name_taken"]
        assert [state.point.name for state in rig.engine.points()] == ["default", "shared"]
        assert attach(rig, tmp_path / "two", "other")


def test_a_gc_that_was_cut_short_is_cancelled_and_says_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EngineRig(tmp_path / "data") as rig:
        reclaim = Domain.reclaim

        def meanwhile(self: Domain, **wishes: Any) -> GcReport:
            rig.engine.cancel_job(rig.engine.jobs()[0].uuid)
            return reclaim(self, **wishes)

        with monkeypatch.context() as patch:
            patch.setattr(Domain, "reclaim", meanwhile)
            ended = rig.ended(rig.engine.start_maintenance("gc", rig.point_uuid, False))
        assert ended.state == "cancelled"
        assert ended.result[0].startswith("0 packs of 0 bytes removed")


def test_a_copy_of_a_point_is_the_same_point(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "a") as rig:
        attach(rig, tmp_path / "shared")
        (tmp_path / "copy").mkdir()
        point = (tmp_path / "shared" / "POINT").read_bytes()
        (tmp_path / "copy" / "POINT").write_bytes(point)
        with pytest.raises(Conflict) as caught:
            rig.engine.create_point("copy", "local", str(tmp_path / "copy"))
        assert caught.value.code == "point_in_use"


def test_detach_keeps_and_erase_deletes_our_own_only(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "a") as one, EngineRig(tmp_path / "b") as two:
        point = attach(one, tmp_path / "shared")
        attach(two, tmp_path / "shared")
        kept = back_up_to(one, point, disk_bytes(MIB, 1), "web")
        erased = back_up_to(two, point, disk_bytes(MIB, 2), "db")
        one.engine.delete_point(point, False)
        assert one.listed() == []
        with pytest.raises(NotFound):
            one.engine.point(point)
        assert attach(one, tmp_path / "shared") == point
        assert one.listed() == [kept]
        two.engine.delete_point(point, True)
        assert two.listed() == []
        domains = tmp_path / "shared" / "domains"
        assert files_below(domains / two.cluster_uuid / "packs") == []
        found = one.engine.remote_backups(one.cluster_uuid, point).backups
        assert [found_one.backup.uuid for found_one in found] == [kept]
        assert erased not in one.listed()
        assert one.restore(one.engine.backup(ANYWHERE, kept), "copy") == [disk_bytes(MIB, 1)]


def test_of_a_detached_point_no_row_for_each_pack_is_left(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "data") as rig:
        home = rig.point_uuid
        other = attach(rig, tmp_path / "other")
        for point in (home, other):
            back_up_to(rig, point, disk_bytes(MIB, 1), point)
            rig.succeed(rig.engine.start_maintenance("verify", point, True))
        assert {row.point_uuid for row in rig.core.state.pack_reads.values()} == {home, other}
        rig.engine.delete_point(other, erase=False)
        assert {row.point_uuid for row in rig.core.state.pack_reads.values()} == {home}


def test_a_point_that_a_job_works_on_stays(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "a", ONE_JOB) as rig:
        vm = rig.make_vm("web", disk_bytes(MIB, 1))
        free = rig.occupy()
        _, job = rig.ask_backup(vm)
        with pytest.raises(Conflict) as caught:
            rig.engine.delete_point(rig.point_uuid, True)
        assert caught.value.code == "point_in_use"
        free()
        rig.succeed(job)


def test_a_missing_point_is_shown_and_hinders_nobody(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "a") as rig:
        point = attach(rig, tmp_path / "shared")
        backup = back_up_to(rig, point, disk_bytes(MIB, 1), "web")
        (tmp_path / "shared").rename(tmp_path / "away")
        rig.restart()
        lost = rig.core.points
        with pytest.raises(PointUnreachable):
            lost.opened(point)
        state = rig.engine.point(point)
        assert state.state == "unreachable"
        assert str(tmp_path / "shared") in state.last_error
        assert rig.listed() == [backup]
        rig.back_up(rig.make_vm("db", disk_bytes(MIB, 2)))
        (tmp_path / "away").rename(tmp_path / "shared")
        rig.core.points.look_again(point, 10.0)
        assert rig.engine.point(point).state == "online"
        assert rig.restore(rig.engine.backup(ANYWHERE, backup), "copy") == [disk_bytes(MIB, 1)]


def test_two_hosts_of_one_cluster_see_each_others_backups(tmp_path: Path) -> None:
    config = parse_config(
        b"""
        [[clusters]]
        name = "both"
        uuid = "AAAAAAAA-0000-4000-8000-000000000000"
        """,
        "test",
    )
    content = disk_bytes(MIB, 1)
    with EngineRig(tmp_path / "a", config) as one, EngineRig(tmp_path / "b", config) as two:
        assert one.cluster_uuid == two.cluster_uuid
        point = attach(one, tmp_path / "shared")
        attach(two, tmp_path / "shared")
        backup = back_up_to(one, point, content, "web")
        two.core.points.look_again(point, 10.0)
        assert two.listed() == [backup]
        assert two.restore(two.engine.backup(ANYWHERE, backup), "copy") == [content]
        two.engine.delete_backup(ANYWHERE, backup)
        one.core.points.look_again(point, 10.0)
        assert one.listed() == []


def test_several_managed_clusters_each_have_their_own(tmp_path: Path) -> None:
    config = parse_config(b'[[clusters]]\nname = "east"\n[[clusters]]\nname = "west"\n', "test")
    with EngineRig(tmp_path / "a", config) as rig:
        east, west = (Scope(cluster_uuid=cluster.uuid) for cluster in rig.engine.clusters())
        vm = rig.engine.vm(rig.engine.create_vm(west, "web", "", "", []))
        assert [row.name for row in rig.engine.vms(west)] == [vm.name]
        backup = rig.back_up(rig.make_vm("db", disk_bytes(MIB, 1)))
        assert [row.uuid for row in rig.engine.backups(BackupQuery(scope=east)).rows] == [
            backup.uuid
        ]
        both = rig.engine.backups(BackupQuery())
        assert [state.total for state in both.ranges] == [1, 0]
        with pytest.raises(NotFound):
            rig.engine.backup(west, backup.uuid)
        # From one of ours to the other: both have it then.
        rig.engine.import_backups(west.cluster_uuid, [(backup.uuid, rig.point_uuid)])
        assert [state.total for state in rig.engine.backups(BackupQuery()).ranges] == [1, 1]
        rig.engine.delete_backup(east, backup.uuid)
        copy = rig.engine.backup(west, backup.uuid)
        assert rig.restore(copy, "copy") == [disk_bytes(MIB, 1)]


def test_a_damaged_domain_is_opened_when_it_is_whole_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a restart, though the others are open all the time."""
    config = parse_config(b'[[clusters]]\nname = "east"\n[[clusters]]\nname = "west"\n', "test")
    content = disk_bytes(MIB, 1)
    with EngineRig(tmp_path / "a", config) as rig:
        east = rig.back_up(rig.make_vm("db", content))
        west = next(c.uuid for c in rig.engine.clusters() if c.uuid != east.cluster_uuid)
        rig.engine.import_backups(west, [(east.uuid, rig.point_uuid)])
        (record,) = (rig.data / "point" / "domains" / west / "log").rglob(f"{1:016x}")
        whole = record.read_bytes()
        rig.engine.stop(PATIENCE_S)
        shutil.rmtree(rig.data / "point" / "domains" / west / "views")
        record.write_bytes(whole[:-1])
        rig.engine = Engine.start(str(rig.data), config)
        look = partial(rig.core.points.look_again, rig.point_uuid, PATIENCE_S)
        look()
        with pytest.raises(Damaged):
            rig.core.points.domain(rig.point_uuid, west)
        assert rig.engine.point(rig.point_uuid).state == "damaged"
        record.write_bytes(whole)
        monkeypatch.setattr(keeper, "REOPEN_AFTER_S", 0.0)
        monkeypatch.setattr(keeper, "REOPEN_REST", 0.0)
        rig.core.points._keeper(rig.point_uuid)._reopens_at_s = 0.0
        look()
        assert rig.engine.point(rig.point_uuid).state == "online"
        assert rig.restore(rig.engine.backup(Scope(cluster_uuid=west), east.uuid), "copy") == [
            content
        ]


def test_a_domain_that_can_not_be_told_what_to_distrust_is_closed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And opened by a later look: one that is left open would be in its way."""
    config = parse_config(b'[[clusters]]\nname = "east"\n[[clusters]]\nname = "west"\n', "test")
    told = list[Domain]()

    def fail(_rows: object, _point: str, _cluster: str, domain: Domain) -> None:
        told.append(domain)
        raise StorageError("the state can't be read")

    with EngineRig(tmp_path / "a", config) as rig:
        west = rig.engine.clusters()[1].uuid
        kept = rig.core.points._keeper(rig.point_uuid)
        look = partial(rig.core.points.look_again, rig.point_uuid, PATIENCE_S)
        kept.opened().domains.pop(west).close()
        monkeypatch.setattr(keeper, "REOPEN_AFTER_S", 0.0)
        monkeypatch.setattr(keeper, "REOPEN_REST", 0.0)
        kept._reopens_at_s = 0.0
        with monkeypatch.context() as patch:
            patch.setattr(keeper, "recall_distrusted", fail)
            look()
        assert len(told) == 1
        look()
        assert rig.engine.point(rig.point_uuid).state == "online"
        assert rig.core.points.domain(rig.point_uuid, west) is not told[0]


def test_a_configured_installation(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "mail.raw").write_bytes(disk_bytes(MIB, 1))
    (tmp_path / "backups").mkdir()
    config = parse_config(
        f"""
        [[pools]]
        name = "fast"
        path = "{tmp_path}/pool"
        usd_types = ["SSD"]
        [[points]]
        name = "nas"
        path = "{tmp_path}/backups"
        [[vms]]
        name = "mail"
        disks = [{{ target_device = "vda", volume_name = "mail.raw" }}]
        """.encode(),
        "test",
    )
    with EngineRig(tmp_path / "data", config) as rig:
        (vm,) = rig.engine.vms(ANYWHERE)
        assert [(disk.capacity, disk.usd_type) for disk in vm.disks] == [(2 * MIB, "SSD")]
        assert [state.point.name for state in rig.engine.points()] == ["nas"]
        assert not (tmp_path / "data" / "point").exists()
        backup = rig.back_up(vm)
        rig.restart()
        assert [row.uuid for row in rig.engine.vms(ANYWHERE)] == [vm.uuid]
        assert rig.restore(backup, "copy") == [disk_bytes(MIB, 1)]


def test_no_configuration_is_the_embedded_default(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "data", Config()) as rig:
        engine = rig.engine
        assert [row.name for row in engine.tenants()] == ["default"]
        assert [row.name for row in engine.namespaces()] == ["default"]
        assert [row.name for row in engine.zones()] == ["default"]
        assert [row.name for row in engine.object_groups()] == ["default"]
        assert len(engine.clusters()) == 1
        assert engine.pools()[0].pool.usd_types == ("HDD", "SSD")
        assert engine.points()[0].state == "online"
        assert engine.points()[0].capacity > engine.points()[0].free > 0


def test_a_point_that_hangs_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.points.keeper.HUNG_AFTER_S", 0.0)
    with EngineRig(tmp_path / "a") as rig:
        point = attach(rig, tmp_path / "shared")
        backup = back_up_to(rig, point, disk_bytes(MIB, 1), "web")
        domain = rig.core.points.domain(point, rig.cluster_uuid)
        held, free = threading.Event(), threading.Event()

        def hold() -> None:
            with domain._lock:
                held.set()
                free.wait(60.0)

        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(60.0)
        # The keeper hangs in its refresh now, as it would on a dead NFS server.
        rig.core.points.look_again(point, 0.2)
        assert rig.engine.point(point).state == "unreachable"
        assert "has not answered" in rig.engine.point(point).last_error
        with pytest.raises(PointUnreachable):
            back_up_to(rig, point, disk_bytes(MIB, 2), "refused")
        with pytest.raises(PointUnreachable):
            rig.engine.delete_backup(ANYWHERE, backup)
        assert rig.listed() == [backup]
        others = [state.point.uuid for state in rig.engine.points() if state.point.uuid != point]
        assert back_up_to(rig, others[0], disk_bytes(MIB, 3), "db") in rig.listed()
        free.set()
        holder.join(60.0)
        monkeypatch.undo()
        rig.core.points.look_again(point, 60.0)
        assert rig.engine.point(point).state == "online"


def test_deletes_on_a_point_that_hangs_leave_threads_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else some that were on their way when it began to hang would be all that the API has."""
    with EngineRig(tmp_path / "a") as rig, ThreadPoolExecutor(8) as threads:
        vm = rig.make_vm("web", disk_bytes(MIB, 1))
        backups = [rig.back_up(vm).uuid for _ in range(8)]
        domain = rig.core.points.domain(rig.point_uuid, rig.cluster_uuid)
        monkeypatch.setattr(points, "TURN_TIMEOUT_S", 0.5)
        with domain._lock:  # as when a file of the point is waited for in there
            asked = [threads.submit(rig.engine.delete_backup, ANYWHERE, one) for one in backups]
            ended, hanging = wait(asked, 5.0)
            errors = [one.exception() for one in ended]
        assert len(hanging) == points.AT_ONCE
        assert {(type(error), "ask again" in str(error)) for error in errors} == {
            (PointUnreachable, True)
        }
        for one in hanging:
            one.result(PATIENCE_S)
        assert len(rig.listed()) == len(ended)
        for backup in rig.listed():
            rig.engine.delete_backup(ANYWHERE, backup)
        assert rig.listed() == []
