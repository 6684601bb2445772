"""What a point's thread does at each of its heartbeats."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from engine.points import keeper
from storage.domain.domain import Domain
from storage.domain.heartbeats import read_beat
from storage.domain.leftovers import Leftovers
from storage.errors import PointFull
from storage.view import tables
from tests.engine_rig import PATIENCE_S, EngineRig


def test_the_leftovers_of_another_host_are_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the point's own thread, at its heartbeats."""
    monkeypatch.setattr(keeper, "BEAT_EVERY_S", 0.0)
    monkeypatch.setattr(keeper, "Leftovers", partial(Leftovers, patience_s=0.0))
    with EngineRig(tmp_path / "data") as rig:
        (domain,) = (rig.data / "point" / "domains").iterdir()
        left = domain / "tmp" / "host-gone"
        left.mkdir()
        (left / "checkpoint-1").write_bytes(b"large")
        for _ in range(2):
            rig.core.points.look_again(rig.point_uuid, PATIENCE_S)
        assert not left.exists()
        assert rig.engine.point(rig.point_uuid).state == "online"


def test_a_session_that_nobody_works_in_is_ended_at_a_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "BEAT_EVERY_S", 0.0)
    with EngineRig(tmp_path / "data") as rig:
        domain = rig.core.points.domain(rig.point_uuid, rig.cluster_uuid)
        at_work, left = domain.begin("read"), domain.begin("read")
        domain.leave_open(left.id)
        rig.core.points.look_again(rig.point_uuid, PATIENCE_S)
        with domain.view.read() as state:
            assert [session for session, _ in tables.sessions.scan(state)] == [at_work.id]


def test_who_has_no_room_to_end_a_session_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data directory, where the view is, may be full while the point is not."""

    def full(_: Domain) -> int:
        raise PointFull("view: no space left")

    monkeypatch.setattr(keeper, "BEAT_EVERY_S", 0.0)
    monkeypatch.setattr(Domain, "end_left_open", full)
    with EngineRig(tmp_path / "data") as rig:
        domain = rig.core.points.domain(rig.point_uuid, rig.cluster_uuid)
        rig.core.points.look_again(rig.point_uuid, PATIENCE_S)
        before = read_beat(domain, domain.host)
        rig.core.points.look_again(rig.point_uuid, PATIENCE_S)
        after = read_beat(domain, domain.host)
        assert before is not None
        assert after is not None
        assert after.counter > before.counter
        assert rig.engine.point(rig.point_uuid).state == "online"
