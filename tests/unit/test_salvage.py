"""What an interrupted backup had sealed is not stored again, and is never in anybody's way."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from storage.check.check import check_point
from storage.domain import salvage
from storage.domain.domain import Domain
from storage.domain.heartbeats import Observer, beat
from storage.domain.salvage import ChunkPlaces
from storage.domain.session import NewBackup, Session
from storage.errors import PointFull, SessionEnded
from storage.files.fs import FileStat, OsFs, Room
from storage.format.chunks import Encoder
from storage.point import ClusterLabel, Point
from storage.view import tables
from tests.store import (
    CHUNK,
    Saved,
    cluster,
    files,
    image_of,
    live_files,
    load,
    new_point,
    new_uuid,
    open_domain,
    save,
    write_disk,
)

CHUNKS = 60
STORED = 55
PACK_CHUNKS = 16  # in a pack of tests.store
IMAGE = b"".join(random.Random(number).randbytes(CHUNK) for number in range(CHUNKS))


class FillableFs(OsFs):
    """The real one, which is `full` when told so."""

    full = False

    def room(self, path: str) -> Room:
        found = super().room(path)
        return Room(found.capacity_bytes, 0) if self.full else found


@pytest.fixture
def fs() -> FillableFs:
    return FillableFs()


@pytest.fixture
def point(tmp_path: Path, fs: FillableFs) -> Point:
    return new_point(tmp_path, fs)


@pytest.fixture
def label() -> ClusterLabel:
    return cluster()


def interrupt(domain: Domain, chunks: int = STORED) -> Session:
    """A backup up to its first `chunks` chunks; then its process is gone."""
    session = domain.begin("backup")
    write_disk(session, domain, IMAGE[: chunks * CHUNK], new_uuid(), "")
    session.packs.close()
    domain.close()
    return session


def open_sessions(domain: Domain) -> list[str]:
    with domain.view.read() as state:
        return [session for session, _ in tables.sessions.scan(state)]


def stored_bytes(domain: Domain) -> tuple[Saved, int]:
    """A backup of IMAGE, and how many of its bytes were stored for it."""
    encoder, stored = Encoder(), 0
    saved = Saved(new_uuid(), new_uuid())
    with domain.begin("backup") as session:
        builder = session.manifest(saved.disk, len(IMAGE), None)
        entries = {}
        for at in range(len(IMAGE) // CHUNK):
            chunk = IMAGE[at * CHUNK : (at + 1) * CHUNK]
            entries[at] = domain.hasher.full(chunk)
            if not session.known([entries[at]])[0]:
                stored += session.store([encoder.encode(entries[at], chunk)])
        builder.add_page(0, entries)
        session.commit([salvage_backup(saved)])
    return saved, stored


def salvage_backup(saved: Saved) -> NewBackup:
    return NewBackup(saved.backup, b"", [saved.disk])


def test_sealed_packs_are_not_stored_again(point: Point, label: ClusterLabel) -> None:
    dead = interrupt(open_domain(point, label))
    domain = open_domain(point, label)
    assert dead.id not in open_sessions(domain)
    assert len(open_sessions(domain)) == 1
    saved, stored = stored_bytes(domain)
    assert stored < (CHUNKS - 3 * PACK_CHUNKS + 1) * (CHUNK + 100)
    assert open_sessions(domain) == []
    assert files(domain, "packs", "manifests", "tmp") == live_files(domain)
    assert load(domain, saved) == IMAGE
    domain.rebuild()
    assert check_point(point.path, deep=True).findings == []


def test_resumed_again_and_again_it_is_done_in_the_end(point: Point, label: ClusterLabel) -> None:
    for chunks in (20, 40, 59):
        interrupt(open_domain(point, label), chunks=chunks)
    domain = open_domain(point, label)
    saved, stored = stored_bytes(domain)
    assert stored < (CHUNKS - 3 * PACK_CHUNKS + 1) * (CHUNK + 100)
    assert load(domain, saved) == IMAGE


def test_a_backup_finds_out_that_it_was_taken_for_dead(point: Point, label: ClusterLabel) -> None:
    domain, other = open_domain(point, label), open_domain(point, label, "host-2")
    with domain.begin("backup") as session:
        session.require_open()
        other.refresh()
        other.abort(session.id)
        with pytest.raises(SessionEnded, match="another host"):
            session.require_open()


def test_packs_that_another_host_deletes_meanwhile_are_passed_over(
    point: Point, label: ClusterLabel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the starting host for gone, and ends the session that is being saved."""
    dead = interrupt(open_domain(point, label))
    other = open_domain(point, label, "host-2")
    stat = OsFs.stat

    def after_the_abort(fs: OsFs, path: str) -> FileStat:
        if f"{dead.id}/" in path and dead.id in open_sessions(other):
            other.abort(dead.id)
        return stat(fs, path)

    monkeypatch.setattr(OsFs, "stat", after_the_abort)
    domain = open_domain(point, label)
    assert open_sessions(domain) == []
    assert files(domain, "packs", "tmp") == set()


def test_without_sealed_packs_nothing_is_kept(point: Point, label: ClusterLabel) -> None:
    interrupt(open_domain(point, label), chunks=3)
    domain = open_domain(point, label)
    assert open_sessions(domain) == []
    assert files(domain, "packs", "manifests", "tmp") == set()


def test_only_backups_are_kept(point: Point, label: ClusterLabel) -> None:
    domain = open_domain(point, label)
    session = domain.begin("gc")
    write_disk(session, domain, IMAGE, new_uuid(), "")
    session.packs.close()
    domain.close()
    domain = open_domain(point, label)
    assert open_sessions(domain) == []
    assert files(domain, "packs", "manifests", "tmp") == set()


def test_a_gc_gives_it_up(point: Point, label: ClusterLabel) -> None:
    interrupt(open_domain(point, label))
    domain = open_domain(point, label)
    domain.reclaim(copy_budget_bytes=0)
    assert files(domain)
    domain.reclaim()
    assert (open_sessions(domain), files(domain)) == ([], set())
    saved, stored = stored_bytes(domain)
    assert stored > CHUNKS * CHUNK
    assert load(domain, saved) == IMAGE


def test_a_gc_amid_the_resumed_backup_harms_nothing(point: Point, label: ClusterLabel) -> None:
    interrupt(open_domain(point, label))
    domain = open_domain(point, label)
    disk = new_uuid()
    with domain.begin("backup") as session:
        assert session.known([domain.hasher.full(IMAGE[:CHUNK])]) == [True]
        domain.reclaim()
        write_disk(session, domain, IMAGE, disk, "")
        saved = Saved(new_uuid(), disk)
        session.commit([salvage_backup(saved)])
    assert load(domain, saved) == IMAGE
    domain.reclaim()
    assert files(domain) == live_files(domain)


def test_a_full_point_gives_it_up_before_it_says_so(
    point: Point, label: ClusterLabel, fs: FillableFs
) -> None:
    interrupt(open_domain(point, label))
    domain = open_domain(point, label)
    fs.full = True
    with pytest.raises(PointFull), domain.begin("backup") as session:
        write_disk(session, domain, image_of(1), new_uuid(), "")
    assert (open_sessions(domain), files(domain)) == ([], set())


def test_its_room_is_enough_for_the_backup_that_needs_it(
    point: Point, label: ClusterLabel, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(open_domain(point, label))
    domain = open_domain(point, label)
    room = OsFs.room

    def while_it_is_there(self: OsFs, path: str) -> Room:
        found = room(self, path)
        return Room(found.capacity_bytes, 0 if files(domain, "packs") else found.free_bytes)

    monkeypatch.setattr(FillableFs, "room", while_it_is_there)
    assert load(domain, save(domain, image_of(1))) == image_of(1)


def test_another_hosts_abort_is_noticed(point: Point, label: ClusterLabel) -> None:
    interrupt(open_domain(point, label))
    domain, other = open_domain(point, label), open_domain(point, label, "host-2")
    for session in open_sessions(other):
        other.abort(session)
    saved, stored = stored_bytes(domain)
    assert stored > CHUNKS * CHUNK
    assert load(domain, saved) == IMAGE
    other.refresh()
    assert files(domain) == live_files(other)


def test_another_host_leaves_it_to_the_living_one(point: Point, label: ClusterLabel) -> None:
    first = open_domain(point, label)
    beat(first, 1)
    interrupt(first)
    domain, other = open_domain(point, label), open_domain(point, label, "host-2")
    beat(domain, 1)
    assert Observer(patience_s=600).end_dead_sessions(other, 0.0) == 0
    assert stored_bytes(domain)[1] < CHUNKS * CHUNK // 2


def test_a_backup_with_little_in_common_leaves_it_to_the_next(
    point: Point, label: ClusterLabel
) -> None:
    interrupt(open_domain(point, label))
    domain = open_domain(point, label)
    other = save(domain, IMAGE[:CHUNK] + image_of(1, 2))
    assert len(open_sessions(domain)) == 1
    saved, stored = stored_bytes(domain)
    assert stored < CHUNKS * CHUNK // 2
    assert open_sessions(domain) == []
    assert load(domain, saved) == IMAGE
    assert load(domain, other) == IMAGE[:CHUNK] + image_of(1, 2)
    assert check_point(point.path, deep=True).clean


def test_a_pack_with_a_damaged_footer_is_stored_again(point: Point, label: ClusterLabel) -> None:
    interrupt(open_domain(point, label))
    domain = open_domain(point, label)
    for name in sorted(files(domain, "packs")):
        path = Path(domain.paths.root, name)
        path.write_bytes(path.read_bytes()[:-1])
    saved, stored = stored_bytes(domain)
    assert stored > CHUNKS * CHUNK
    assert load(domain, saved) == IMAGE


def test_a_pack_that_vanishes_after_it_was_found_is_stored_again(
    point: Point, label: ClusterLabel
) -> None:
    interrupt(open_domain(point, label))
    domain = open_domain(point, label)
    assert domain.salvage.find([domain.hasher.full(IMAGE[:CHUNK])])
    shutil.rmtree(domain.paths.packs)
    os.mkdir(domain.paths.packs)
    saved, stored = stored_bytes(domain)
    assert stored > CHUNKS * CHUNK
    assert load(domain, saved) == IMAGE


def test_set_aside_keeps_what_was_not_sealed_too(point: Point, label: ClusterLabel) -> None:
    domain = open_domain(point, label)
    with domain.begin("backup") as session:
        write_disk(session, domain, IMAGE, new_uuid(), "")
        session.set_aside()
    domain.close()
    domain = open_domain(point, label)
    saved, stored = stored_bytes(domain)
    assert stored == 0
    assert load(domain, saved) == IMAGE


def test_the_index_is_bounded(
    point: Point, label: ClusterLabel, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(open_domain(point, label))
    monkeypatch.setattr(salvage, "CHUNKS_LIMIT", PACK_CHUNKS)
    domain = open_domain(point, label)
    saved, stored = stored_bytes(domain)
    assert stored > (CHUNKS - 2 * PACK_CHUNKS) * CHUNK
    assert load(domain, saved) == IMAGE
    domain.reclaim()
    assert files(domain) == live_files(domain)


def test_chunk_places_find_what_was_put_and_nothing_else() -> None:
    places, source = ChunkPlaces(), random.Random(7)
    ids = [source.randbytes(28) + bytes([number % 3, 0, 0, 0]) for number in range(3000)]
    for number, chunk in enumerate(ids):
        places.add(chunk, number)
        places.add(chunk, number + 1)
    assert [places.get(chunk) for chunk in ids] == list(range(3000))
    assert places.count == 3000
    # A match across two rows is none.
    assert places.get(ids[0][4:] + (0).to_bytes(4, "little")) is None
    assert places.get(source.randbytes(32)) is None


def test_a_pack_that_was_adopted_is_salvaged_once(point: Point, label: ClusterLabel) -> None:
    interrupt(open_domain(point, label), chunks=20)
    interrupt(open_domain(point, label), chunks=40)
    domain = open_domain(point, label)
    packs = [Path(domain.paths.root, name) for name in files(domain, "packs")]
    assert len(packs) == len({path.stat().st_ino for path in packs}) == 2
