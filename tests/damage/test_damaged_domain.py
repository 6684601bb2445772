"""One of a point's domains is damaged, or a newer vmkeep has written to it: what is asked of all of
them is done to the others."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.config import parse_config
from engine.points.points import Points
from engine.service import Engine
from engine.verb_types import BackupQuery, Maintenance, Scope
from storage.errors import Damaged, PointNewerFormat
from storage.log.log import record_path
from storage.point import Point
from tests.engine_rig import PATIENCE_S, EngineRig, files_below
from tests.forging import small_object
from tests.rig import random_bytes
from tests.store import cluster, open_domain

MIB = 1 << 20
CONFIG = parse_config(b'[[clusters]]\nname = "east"\n[[clusters]]\nname = "west"\n', "test")


@dataclass(frozen=True)
class Pair:
    """Two domains on a point: east's, the first, has one backup, west's a pack that is dead."""

    rig: EngineRig
    east: str
    west: str

    def path(self, cluster: str) -> Path:
        return self.rig.data / "point" / "domains" / cluster

    def records(self, cluster: str) -> list[Path]:
        return sorted((self.path(cluster) / "log").rglob("0" * 15 + "?"))

    def packs(self, cluster: str) -> list[str]:
        return files_below(self.path(cluster) / "packs")


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(Points, "reclaim", lambda *_: True)  # so that a gc has something to do
    with EngineRig(tmp_path / "data", CONFIG) as rig:
        clusters = {cluster.name: cluster.uuid for cluster in rig.engine.clusters()}
        backup = rig.back_up(rig.make_vm("vm", random_bytes(MIB, 1)))
        assert backup.cluster_uuid == clusters["east"]
        rig.engine.import_backups(clusters["west"], [(backup.uuid, rig.point_uuid)])
        domain = rig.core.points.domain(rig.point_uuid, clusters["west"])
        domain.forget([backup.uuid])
        yield Pair(rig, clusters["east"], clusters["west"])


def put_next_record(pair: Pair, content: bytes) -> None:
    last = pair.records(pair.east)[-1]
    (last.parent / f"{int(last.name, 16) + 1:016x}").write_bytes(content)


def spoil_next_record(pair: Pair) -> None:
    """Found by the job itself."""
    put_next_record(pair, b"no record")


def upgraded(pair: Pair) -> None:
    """A host of the cluster has a newer vmkeep. Found by a look."""
    put_next_record(pair, small_object(b"VKRE", b"of tomorrow", version=2))
    pair.rig.core.points.look_again(pair.rig.point_uuid, PATIENCE_S)


def upgraded_at_start(pair: Pair) -> None:
    """So that the view has to be made anew, too."""
    pair.rig.engine.stop(PATIENCE_S)
    shutil.rmtree(pair.path(pair.east) / "views")
    put_next_record(pair, small_object(b"VKRE", b"of tomorrow", version=2))
    start(pair.rig)


def put_back(pair: Pair) -> None:
    """Found by a look: the log lacks what this host has seen."""
    pair.records(pair.east)[-1].unlink()
    pair.rig.core.points.look_again(pair.rig.point_uuid, PATIENCE_S)


def spoil_at_start(pair: Pair) -> None:
    """Found at the opening, which does not succeed."""
    rig = pair.rig
    rig.engine.stop(PATIENCE_S)
    shutil.rmtree(pair.path(pair.east) / "views")
    pair.records(pair.east)[0].write_bytes(b"no record")
    start(rig)


def start(rig: EngineRig) -> None:
    rig.engine = Engine.start(str(rig.data), CONFIG)
    rig.core.points.look_again(rig.point_uuid, PATIENCE_S)


UPGRADES = [upgraded, upgraded_at_start]
SPOILERS = [spoil_next_record, put_back, spoil_at_start, *UPGRADES]


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize(
    ("kind", "line"), [("gc", "1 packs of "), ("rebuild", "view made anew: 0 backups")]
)
def test_the_others_have_it_done_and_the_job_names_the_damaged(
    pair: Pair, spoil: Callable[[Pair], None], kind: Maintenance, line: str
) -> None:
    spoil(pair)
    before = files_below(pair.path(pair.east))
    job = pair.rig.ended(pair.rig.engine.start_maintenance(kind, pair.rig.point_uuid, False))
    assert job.state == "failed"
    assert str(pair.path(pair.east) / "log") in job.error
    assert job.result[0] == f"failed: cluster east: {job.error}"
    assert job.result[1].startswith(line)
    assert (pair.packs(pair.west) == []) == (kind == "gc")
    assert files_below(pair.path(pair.east)) == before


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_what_a_newer_version_wrote_is_said_as_such_and_stays_untouched(
    pair: Pair, upgrade: Callable[[Pair], None]
) -> None:
    rig, west = pair.rig, Scope(cluster_uuid=pair.west)
    (backup,) = rig.engine.backups(BackupQuery(scope=Scope(cluster_uuid=pair.east))).rows
    rig.engine.import_backups(pair.west, [(backup.uuid, rig.point_uuid)])
    upgrade(pair)
    before = files_below(pair.path(pair.east))
    state = rig.engine.point(rig.point_uuid)
    assert state.state == "newer_format"
    assert str(pair.path(pair.east) / "log") in state.last_error
    assert "format 2" in state.last_error
    assert "upgrade this host" in state.last_error
    with pytest.raises(PointNewerFormat, match=pair.east):
        rig.ask_backup(rig.engine.vm(backup.label.vm_uuid))
    with pytest.raises(PointNewerFormat, match=pair.east):
        rig.engine.delete_backup(Scope(cluster_uuid=pair.east), backup.uuid)
    rig.engine.delete_backup(west, backup.uuid)
    assert [row.cluster_uuid for row in rig.engine.backups(BackupQuery()).rows] == [pair.east]
    assert files_below(pair.path(pair.east)) == before


@pytest.mark.parametrize("deep", [False, True])
def test_a_verify_fails_for_a_newer_domain_of_ours_and_only_names_a_strangers(
    pair: Pair, deep: bool
) -> None:
    rig = pair.rig
    stranger = open_domain(Point.open(str(rig.data / "point")), cluster("stranger"))
    stranger.close()
    name = Path(stranger.paths.root).name
    first = pair.path(name) / "log" / record_path(1)
    first.parent.mkdir(exist_ok=True)
    first.write_bytes(small_object(b"VKRE", b"of tomorrow", version=2))
    job = rig.succeed(rig.engine.start_maintenance("verify", rig.point_uuid, deep))
    assert job.result[0].startswith("1 finding in 1 backups, ")
    assert job.result[1].startswith(f"newer: {pair.path(name)}: {first}: format 2")
    upgraded(pair)
    job = rig.ended(rig.engine.start_maintenance("verify", rig.point_uuid, deep))
    assert (job.state, len(job.result)) == ("failed", 3)
    assert job.error.startswith(f"{pair.path(pair.east) / 'log'}/")
    assert "format 2" in job.error


@pytest.mark.parametrize("spoil", [put_back, spoil_at_start, *UPGRADES])
def test_a_point_with_a_damaged_domain_is_not_erased_in_part(
    pair: Pair, spoil: Callable[[Pair], None]
) -> None:
    """Nor is anything written to a log that was put back: its numbers would recur."""
    spoil(pair)
    before = files_below(pair.rig.data / "point")
    with pytest.raises((Damaged, PointNewerFormat), match=pair.east):
        pair.rig.engine.delete_point(pair.rig.point_uuid, erase=True)
    assert files_below(pair.rig.data / "point") == before
    assert [state.point.uuid for state in pair.rig.engine.points()] == [pair.rig.point_uuid]


def test_a_point_of_a_newer_format_is_said_to_be_one(pair: Pair) -> None:
    rig = pair.rig
    rig.engine.stop(PATIENCE_S)
    place = rig.data / "point" / "POINT"
    place.unlink()
    place.write_bytes(small_object(b"VKPO", b"of tomorrow", version=2))
    before = files_below(rig.data / "point")
    start(rig)
    state = rig.engine.point(rig.point_uuid)
    assert state.state == "newer_format"
    assert state.last_error.startswith(f"{place}: format 2")
    assert files_below(rig.data / "point") == before
