"""Sessions that nobody works in any more: of killed processes, of silent hosts, and those whose end
did not get to the point."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from storage.domain.domain import Domain
from storage.domain.heartbeats import Observer, beat
from storage.domain.leftovers import Leftovers
from storage.domain.salvage import Salvage
from storage.errors import PointUnreachable, SessionEnded
from storage.format.chunks import Encoder
from storage.point import ClusterLabel, Point
from storage.view import tables
from tests.failing_fs import FailingFs
from tests.forging import small_object
from tests.store import (
    CHUNK,
    dump,
    files,
    image_of,
    live_files,
    load,
    new_uuid,
    open_domain,
    save,
    write_disk,
)


def test_a_dead_process_session_is_cleared_at_the_next_start(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    kept = save(domain, image_of(9))
    session = domain.begin("backup", [kept.backup])
    for _ in range(40):
        image = os.urandom(CHUNK)
        session.store([Encoder().encode(domain.hasher.full(image), image)])
    assert files(domain, "packs", "tmp") - live_files(domain)
    session.packs.close()  # what a killed process leaves: its files, and no thread
    domain.close()
    again = open_domain(point, label)
    with again.view.read() as state:
        rows = list(tables.sessions.scan(state))
    assert session.id not in dict(rows)
    # What it had sealed waits for the next backup, under a session of ours that holds nothing.
    assert [(row.incarnation, row.holds) for _, row in rows] == [(again.incarnation, ())]
    assert not [name for name in files(again, "packs", "manifests", "tmp") if session.id in name]
    again.reclaim()
    assert dump(again)["sessions"] == {}
    assert files(again, "packs", "manifests", "tmp") == live_files(again)
    assert load(again, kept) == image_of(9)


def test_a_dead_session_that_another_host_ends_meanwhile_is_ended(
    point: Point, label: ClusterLabel, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_domain(point, label, "host-2")
    sessions = [domain.begin("backup").id for _ in range(2)]
    domain.close()

    def overtaken(_: Salvage, dead: list[str]) -> int:
        assert sorted(dead) == sorted(sessions)
        other.abort(dead[0])
        return 0

    monkeypatch.setattr(Salvage, "rescue", overtaken)
    again = open_domain(point, label)
    assert dump(again)["sessions"] == {}


def test_sessions_of_a_silent_host_are_ended(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    other = open_domain(point, label, "host-2")
    beat(other, 1)
    session = other.begin("backup")
    observer = Observer(patience_s=600)
    assert observer.end_dead_sessions(domain, 0.0) == 0
    beat(other, 2)
    assert observer.end_dead_sessions(domain, 599.0) == 0
    assert observer.end_dead_sessions(domain, 1198.0) == 0
    assert observer.end_dead_sessions(domain, 1199.0) == 1
    with domain.view.read() as state:
        assert tables.sessions.get(state, session.id) is None
    with pytest.raises(SessionEnded):
        session.commit([])


def test_a_host_whose_heartbeat_only_a_newer_version_can_read_is_not_silent(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    """A host that was upgraded first would lose each backup that takes longer than the patience."""
    other, old = (open_domain(point, label, host) for host in ("host-2", "host-3"))
    session, ended = other.begin("backup"), old.begin("backup")
    heartbeat = Path(other.paths.hosts, other.host)
    heartbeat.write_bytes(small_object(b"VKHB", b"of tomorrow", version=2))
    observer, leftovers = Observer(patience_s=600), Leftovers(patience_s=600)
    for now_s in (0.0, 1200.0):
        observer.end_dead_sessions(domain, now_s)
        leftovers.clear(domain, now_s)
    with pytest.raises(SessionEnded):
        ended.commit([])
    session.commit([])
    for one in (old, other):
        one.close()  # or its view would keep what is left of it
    for now_s in (2400.0, 3600.0):
        leftovers.clear(domain, now_s)
    assert heartbeat.exists()
    assert Path(other.paths.host_tmp(other.host)).exists()
    assert not Path(old.paths.host_tmp(old.host)).exists()


def test_a_session_that_ends_while_the_point_is_away_is_ended_when_it_is_back(
    point: Point, label: ClusterLabel
) -> None:
    fs = FailingFs()
    domain = open_domain(Point.open(point.path, fs=fs), label)
    parent = save(domain, image_of(1))
    session = domain.begin("backup", [parent.backup])
    write_disk(session, domain, image_of(2), new_uuid(), parent.disk)
    session.packs.seal_all()

    def fail() -> None:
        with session:
            fs.fail = {"link": errno.EIO}
            session.commit([])

    with pytest.raises(PointUnreachable):
        fail()
    fs.fail = {}
    domain.forget([parent.backup])
    assert [key.decode() for key in dump(domain)["sessions"]] == [session.id]
    assert files(domain, "packs", "manifests") - live_files(domain)
    assert domain.end_left_open() == 1
    assert dump(domain)["sessions"] == dump(domain)["backups"] == {}
    assert files(domain, "packs", "manifests") == live_files(domain)
    assert domain.end_left_open() == 0
