"""What other clusters left on a point, through the engine: listed, and imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from msgspec.structs import replace

from engine.catalogue.labels import UNREADABLE_NAME, encode_label
from engine.config import ClusterConfig, Config
from engine.core import Core
from engine.errors import Conflict, Invalid, NotFound, PointStateError
from engine.ids import new_id
from engine.libvirt.machine import deflated, inflated
from engine.model import FOREIGN_IDENTITY, Backup, Machine
from engine.points import remote
from storage.domain.domain import Domain
from storage.domain.session import NewBackup
from storage.errors import PointNewerFormat, StorageError
from storage.log.log import record_path
from storage.point import ClusterLabel, Point
from storage.view.listing import BackupRow
from tests.engine_rig import (
    ANYWHERE,
    EngineRig,
    attach,
    back_up_to,
    disk_bytes,
    files_below,
)
from tests.forging import small_object

MIB = 1 << 20


def test_another_data_directory_lists_imports_and_restores(tmp_path: Path) -> None:
    contents = [disk_bytes(2 * MIB, 1), disk_bytes(MIB, 2)]
    with EngineRig(tmp_path / "a") as one:
        point = attach(one, tmp_path / "shared")
        backups = [back_up_to(one, point, c, f"vm{n}") for n, c in enumerate(contents)]
        with EngineRig(tmp_path / "b") as two:
            assert attach(two, tmp_path / "shared", "theirs") == point
            assert two.listed() == []
            own = back_up_to(two, point, disk_bytes(MIB, 3), "own")
            found = two.engine.remote_backups(two.cluster_uuid, point).backups
            assert {one.backup.uuid for one in found} == {*backups, own}
            assert {one.cluster.uuid for one in found} == {one.cluster_uuid, two.cluster_uuid}
            wanted = [(uuid.upper(), point) for uuid in backups]
            came = two.engine.import_backups(two.cluster_uuid, wanted)
            assert [row.backup.uuid for row in came] == backups
            again = two.engine.import_backups(two.cluster_uuid, [*wanted, (own, point)])
            assert [row.backup.uuid for row in again] == [*backups, own]
            assert set(two.listed()) == {*backups, own}
            # A namespace that is not known here lands in the default one.
            row = two.engine.backup(ANYWHERE, backups[0])
            assert row.label.namespace == two.engine.namespaces()[0].uuid
            for uuid in backups:
                one.engine.delete_backup(ANYWHERE, uuid)
            assert one.listed() == []
            for number, uuid in enumerate(backups):
                backup = two.engine.backup(ANYWHERE, uuid)
                assert two.restore(backup, f"copy{number}") == [contents[number]]
            two.engine.delete_backup(ANYWHERE, backups[0])
            assert set(two.listed()) == {backups[1], own}


def test_a_cluster_has_its_present_name_wherever_its_backups_are_listed(tmp_path: Path) -> None:
    """On the point it keeps the one that it had first."""
    for name in ("rack1", "rack2"):
        clusters = (ClusterConfig(name, uuid="650ea11b-b7fb-4269-8232-aa53865aab3b"),)
        with EngineRig(tmp_path / "data", Config(clusters=clusters)) as rig:
            if name == "rack1":
                rig.back_up(rig.make_vm("web", disk_bytes(MIB, 1)))
            (found,) = rig.engine.remote_backups(rig.cluster_uuid, rig.point_uuid).backups
            assert found.cluster.name == rig.engine.clusters()[0].name == name


@pytest.mark.parametrize("name", ["DOMAIN", f"log/{record_path(3)}"])
def test_a_domain_of_a_newer_version_is_named_and_hides_no_other(tmp_path: Path, name: str) -> None:
    with EngineRig(tmp_path / "a") as one, EngineRig(tmp_path / "b") as two:
        point = attach(one, tmp_path / "shared")
        attach(two, tmp_path / "shared")
        theirs = back_up_to(one, point, disk_bytes(MIB, 1), "theirs")
        own = back_up_to(two, point, disk_bytes(MIB, 2), "own")
        place = tmp_path / "shared" / "domains" / one.cluster_uuid / name
        place.unlink(missing_ok=True)
        magic = b"VKDO" if name == "DOMAIN" else b"VKRE"
        place.write_bytes(small_object(magic, b"of tomorrow", version=2))
        (tmp_path / "shared" / "domains" / "no cluster").mkdir()
        (tmp_path / "shared" / "domains" / "no cluster" / "DOMAIN").touch()
        before = files_below(tmp_path / "shared")
        with EngineRig(tmp_path / "c") as three:
            attach(three, tmp_path / "shared")
            listing = three.engine.remote_backups(three.cluster_uuid, point)
            assert [found.backup.uuid for found in listing.backups] == [own]
            assert listing.unread == {one.cluster_uuid: "point_newer_format"}
            with pytest.raises(PointNewerFormat, match=one.cluster_uuid):
                three.engine.import_backups(three.cluster_uuid, [(own, point), (theirs, point)])
            assert three.listed() == []
            three.engine.import_backups(three.cluster_uuid, [(own, point)])
            assert three.listed() == [own]
        assert set(before) <= set(files_below(tmp_path / "shared"))


def test_an_import_is_all_or_nothing(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "a") as one, EngineRig(tmp_path / "b") as two:
        first = attach(one, tmp_path / "first", "first")
        second = attach(one, tmp_path / "second", "second")
        for name in ("first", "second"):
            attach(two, tmp_path / name, name)
        good = back_up_to(one, first, disk_bytes(MIB, 1), "web")
        bad = back_up_to(one, second, disk_bytes(2 * MIB, 2), "db")
        with pytest.raises(NotFound) as caught:
            two.engine.import_backups(two.cluster_uuid, [(good, first), (good, second)])
        assert (caught.value.what, caught.value.uuid) == ("backup", good)
        with pytest.raises(NotFound):
            two.engine.import_backups(two.cluster_uuid, [(good, "nowhere")])
        with pytest.raises(NotFound):
            two.engine.import_backups("no cluster", [(good, first)])
        with pytest.raises(Invalid):
            two.engine.import_backups(two.cluster_uuid, [])
        # The second point's part fails after the first one's was committed.
        for path in files_below(tmp_path / "second" / "domains" / one.cluster_uuid / "packs"):
            Path(path).unlink()
        with pytest.raises(StorageError):
            two.engine.import_backups(two.cluster_uuid, [(good, first), (bad, second)])
        assert two.listed() == []
        domain = two.core.points.domain(first, two.cluster_uuid)
        domain.refresh()
        assert domain.backups() == []


def test_a_point_that_is_being_detached_keeps_no_other_from_what_is_given_back() -> None:
    given: list[str] = []

    def domain(point: str, _cluster: str) -> object:
        if point == "closing":
            raise PointStateError("backup point closing is not open")
        return SimpleNamespace(forget=given.extend)

    core = SimpleNamespace(
        catalogue=SimpleNamespace(remove=lambda _row: None),
        points=SimpleNamespace(domain=domain, reclaim=lambda *_: True),
    )
    rows = [
        SimpleNamespace(uuid=uuid, point_uuid=point, cluster_uuid="c")
        for uuid, point in (("a", "closing"), ("b", "open"))
    ]
    remote._give_back(cast(Core, core), cast(list[Backup], rows))
    assert given == ["b"]


def test_an_import_that_fails_gives_back_what_it_has_brought_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what another call has taken over, and acknowledged, meanwhile."""
    with EngineRig(tmp_path / "a") as one, EngineRig(tmp_path / "b") as two:
        first, second = (attach(one, tmp_path / name, name) for name in ("first", "second"))
        for name in ("first", "second"):
            attach(two, tmp_path / name, name)
        good = back_up_to(one, first, disk_bytes(MIB, 1), "web")
        bad = back_up_to(one, second, disk_bytes(2 * MIB, 2), "db")
        for path in files_below(tmp_path / "second" / "domains" / one.cluster_uuid / "packs"):
            Path(path).unlink()
        takes = Domain.import_backups

        def second_of_two(self: Domain, *args: Any) -> list[BackupRow]:
            monkeypatch.undo()
            two.engine.import_backups(two.cluster_uuid, [(good, first)])
            return takes(self, *args)

        monkeypatch.setattr(Domain, "import_backups", second_of_two)
        with pytest.raises(StorageError):
            two.engine.import_backups(two.cluster_uuid, [(good, first), (bad, second)])
        backup = two.engine.backup(ANYWHERE, good)
        assert two.restore(backup, "copy") == [disk_bytes(MIB, 1)]


def test_a_point_that_is_detached_during_an_import_leaves_no_backups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EngineRig(tmp_path / "a") as one, EngineRig(tmp_path / "b") as two:
        shared = attach(one, tmp_path / "shared")
        attach(two, tmp_path / "shared")
        backup = back_up_to(one, shared, disk_bytes(MIB, 1), "web")
        put_all = two.core.catalogue.put_all

        def put_late(rows: Sequence[Backup]) -> None:
            two.engine.delete_point(shared, erase=False)
            put_all(rows)

        monkeypatch.setattr(two.core.catalogue, "put_all", put_late)
        with pytest.raises(NotFound) as caught:
            two.engine.import_backups(two.cluster_uuid, [(backup, shared)])
        assert caught.value.code == "backup_point_not_found"
        assert two.listed() == []
        monkeypatch.undo()
        assert attach(two, tmp_path / "shared") == shared
        assert two.listed() == [backup]


def test_junk_labels_are_shown_and_crash_nothing(tmp_path: Path) -> None:
    with EngineRig(tmp_path / "a") as rig:
        path = Path(rig.engine.points()[0].point.path)
        foreign = Point.open(str(path))
        cluster = ClusterLabel(
            cluster_uuid="0" * 8 + "-0000-4000-8000-" + "0" * 12, cluster_name="x"
        )
        domain = foreign.domain(cluster, "11111111-0000-4000-8000-000000000000", "")
        uuids = [f"22222222-0000-4000-8000-00000000000{n}" for n in range(3)]
        labels = [b"\xff\x00junk", msgspec.msgpack.encode({"vm_uuid": 3}), b""]
        for uuid, label in zip(uuids, labels, strict=True):
            disk = uuid.replace("2222", "3333")
            with domain.begin("backup") as session:
                session.manifest(disk, MIB, None)
                session.commit([NewBackup(backup=uuid, label=label, disks=[disk])])
        domain.close()
        found = rig.engine.remote_backups(rig.cluster_uuid, rig.point_uuid).backups
        assert {one.backup.uuid for one in found} == set(uuids)
        assert {one.backup.label.name for one in found} == {UNREADABLE_NAME}
        assert [disk.capacity for disk in found[0].backup.label.disks] == [MIB]
        rig.engine.import_backups(rig.cluster_uuid, [(uuids[0], rig.point_uuid)])
        rig.engine.delete_backup(ANYWHERE, uuids[0])


def test_an_import_keeps_no_more_of_a_machine_than_may_be_made_here(tmp_path: Path) -> None:
    xml = "<domain><devices><emulator>/evil</emulator><hostdev/></devices></domain>"
    with EngineRig(tmp_path / "a") as one:
        point = attach(one, tmp_path / "shared")
        backup = back_up_to(one, point, disk_bytes(MIB, 1), "vm")
        label = one.core.catalogue.whole(one.engine.backup(ANYWHERE, backup)).label
        evil = new_id()
        with one.core.points.domain(point, one.cluster_uuid).begin("backup") as session:
            session.manifest(disk := new_id(), MIB, None)
            label = replace(label, machine=Machine(deflated(xml.encode()), checkpoint=b"any"))
            label = replace(label, disks=(replace(label.disks[0], disk_uuid=disk, identity="any"),))
            session.commit([NewBackup(evil, encode_label(label), [disk])])
        with EngineRig(tmp_path / "b") as two:
            attach(two, tmp_path / "shared", "theirs")
            two.engine.import_backups(two.cluster_uuid, [(evil, point)])
            found = two.core.catalogue.whole(two.engine.backup(ANYWHERE, evil)).label
            assert found.machine is not None
            assert inflated(found.machine.xml) == "<domain><devices /></domain>"
            assert found.machine.checkpoint == b""
            assert [one.identity for one in found.disks] == [FOREIGN_IDENTITY]
            left_out = "the domain is another cluster's; left out of its XML: hostdev"
            assert found.notes == (*label.notes, left_out)


def test_an_import_takes_no_backups_place_on_another_point(tmp_path: Path) -> None:
    content = disk_bytes(MIB, 1)
    with EngineRig(tmp_path / "a") as one, EngineRig(tmp_path / "b") as two:
        vm = two.make_vm("vm", content)
        ours = two.back_up(vm)
        point = attach(one, tmp_path / "shared")
        with one.core.points.domain(point, one.cluster_uuid).begin("backup") as session:
            session.manifest(disk := new_id(), MIB, None)
            session.commit([NewBackup(ours.uuid, encode_label(ours.label), [disk])])
        attach(two, tmp_path / "shared")
        with pytest.raises(Conflict, match="one of ours"):
            two.engine.import_backups(two.cluster_uuid, [(ours.uuid, point)])
        assert two.engine.backup(ANYWHERE, ours.uuid) == ours
        assert two.restore(ours, "copy") == [content]
