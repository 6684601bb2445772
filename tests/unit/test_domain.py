"""Domains on real files: races, holds, dead sessions, an older copy of the point."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path

import pytest
from blake3 import blake3
from msgspec.structs import replace

from storage.domain.domain import Domain
from storage.domain.session import NewBackup
from storage.errors import (
    AlreadyOnPoint,
    ChunkMissing,
    Damaged,
    NotOnPoint,
    PointNewerFormat,
    PointNotEmpty,
    PointUnreachable,
    SessionEnded,
)
from storage.files.fs import OsFs
from storage.format.chunks import Encoder
from storage.log.log import record_path
from storage.log.rebuild import checkpoint_name, manifest_chain
from storage.point import ClusterLabel, Point, is_point
from storage.view import tables
from tests.forging import small_object
from tests.store import (
    CHUNK,
    cluster,
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
from tests.vectors import colliding_chunks


def test_what_was_saved_is_there_after_a_restart(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    image = image_of(1, 0, 2, 1) + b"tail"
    saved = save(domain, image, label=b"words")
    domain.close()
    again = open_domain(point, label)
    (row,) = again.backups()
    assert (row.backup, row.label, row.disks[0].capacity) == (saved.backup, b"words", len(image))
    assert load(again, saved) == image


def test_an_equal_chunk_is_stored_once(domain: Domain) -> None:
    save(domain, image_of(1, 1, 2))
    save(domain, image_of(2, 1))
    assert domain.stats().chunks == 2


def test_colliding_chunks_live_side_by_side(domain: Domain) -> None:
    one, other = colliding_chunks(CHUNK)
    first, second = save(domain, one + image_of(0)), save(domain, other + one)
    assert load(domain, first) == one + image_of(0)
    assert load(domain, second) == other + one


def test_a_zeroed_image_stores_nothing(domain: Domain) -> None:
    saved = save(domain, bytes(5 * CHUNK))
    assert load(domain, saved) == bytes(5 * CHUNK)
    assert (domain.stats().packs, domain.stats().chunks) == (0, 0)


def test_zeros_over_data_hide_the_parents_data(domain: Domain) -> None:
    first = save(domain, image_of(1, 2, 3))
    second = save(domain, image_of(1, 0, 3), first)
    third = save(domain, image_of(1, 4, 0), second)
    domain.forget([second.backup])
    assert load(domain, first) == image_of(1, 2, 3)
    assert load(domain, third) == image_of(1, 4, 0)


def test_a_session_without_commit_leaves_nothing(domain: Domain) -> None:
    def interrupted() -> None:
        with domain.begin("backup") as session:
            write_disk(session, domain, image_of(1, 2), new_uuid(), "")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        interrupted()
    assert files(domain, "packs", "manifests", "tmp") == set()
    assert dump(domain)["sessions"] == {}


def test_two_hosts_follow_each_other(point: Point, label: ClusterLabel, domain: Domain) -> None:
    other = open_domain(point, label, "host-2")
    first = save(domain, image_of(1, 2))
    second = save(other, image_of(1, 3))
    domain.refresh()
    other.refresh()
    assert dump(domain) == dump(other)
    assert load(other, first) == image_of(1, 2)
    assert load(domain, second) == image_of(1, 3)
    assert domain.stats().chunks == 3


def test_a_host_that_lags_behind_a_delete_catches_up(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    other = open_domain(point, label, "host-2")
    gone, kept = save(domain, image_of(1, 2)), save(domain, image_of(3))
    domain.forget([gone.backup])
    domain.reclaim(copy_budget_bytes=0)
    other.refresh()
    domain.refresh()
    assert dump(other) == dump(domain)
    assert load(other, kept) == image_of(3)


def test_hosts_that_append_at_once_all_succeed(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    domains = [domain, open_domain(point, label, "host-2"), open_domain(point, label, "host-3")]
    images = [[os.urandom(CHUNK) for _ in range(5)] for _ in domains]
    saved: list[list[str]] = [[] for _ in domains]

    def work(at: int) -> None:
        for image in images[at]:
            saved[at].append(save(domains[at], image).backup)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for one in domains:
        one.refresh()
        assert {row.backup for row in one.backups()} == {name for names in saved for name in names}
    assert dump(domains[0]) == dump(domains[1]) == dump(domains[2])


def test_a_chunk_deleted_between_lookup_and_commit_is_asked_for_again(domain: Domain) -> None:
    old = save(domain, image_of(7))
    chunk = image_of(7)
    chunk_id = domain.hasher.full(chunk)
    disk = new_uuid()
    backup = NewBackup(new_uuid(), b"", [disk])
    with domain.begin("backup") as session:
        assert session.known([chunk_id]) == [True]
        session.manifest(disk, CHUNK, None).add_page(0, {0: chunk_id})
        domain.forget([old.backup])
        domain.reclaim(copy_budget_bytes=0)
        with pytest.raises(ChunkMissing) as missing:
            session.commit([backup])
        assert missing.value.ids == {chunk_id}
        session.store([Encoder().encode(chunk_id, chunk)])
        session.commit([backup])
    domain.reclaim()
    assert files(domain) == live_files(domain)
    image_map = domain.disk_map(disk)
    assert image_map.page(0) == {0: chunk_id}


def test_a_backup_that_is_read_outlives_its_forget(domain: Domain) -> None:
    saved = save(domain, image_of(1, 2, 3))
    with domain.begin("read", [saved.backup]) as reader:
        domain.forget([saved.backup])
        domain.reclaim()
        with pytest.raises(NotOnPoint):
            domain.backup(saved.backup)
        assert load(domain, saved, hold=False) == image_of(1, 2, 3)
        reader.end()
    domain.reclaim()
    assert files(domain) == set()


def test_a_parent_forgotten_during_its_childs_backup_is_folded_into_it(domain: Domain) -> None:
    first = save(domain, image_of(1, 2, 3))
    disk = new_uuid()
    child = new_uuid()
    with domain.begin("backup", [first.backup]) as session:
        write_disk(session, domain, image_of(1, 5, 0), disk, first.disk)
        domain.forget([first.backup])
        session.commit([NewBackup(child, b"", [disk], first.backup)])
    assert domain.backup(child).parent == ""
    before = dump(domain)
    domain.rebuild()
    assert dump(domain) == before


def test_a_session_that_somebody_aborted_can_not_commit(domain: Domain) -> None:
    disk = new_uuid()
    with domain.begin("backup") as session:
        write_disk(session, domain, image_of(1), disk, "")
        domain.abort(session.id)
        with pytest.raises((SessionEnded, PointUnreachable)):
            session.commit([NewBackup(new_uuid(), b"", [disk])])
    assert domain.backups() == []


def test_the_same_backup_is_not_committed_twice(domain: Domain) -> None:
    saved = save(domain, image_of(1))
    disk = new_uuid()
    with domain.begin("backup") as session:
        write_disk(session, domain, image_of(2), disk, "")
        with pytest.raises(AlreadyOnPoint):
            session.commit([NewBackup(saved.backup, b"", [disk])])
    assert load(domain, saved) == image_of(1)


def test_gc_moves_what_lives_and_readers_follow(domain: Domain) -> None:
    chunks = [os.urandom(CHUNK) for _ in range(10)]
    big = save(domain, b"".join(chunks))
    small = save(domain, chunks[0] + chunks[9])
    domain.forget([big.backup])
    report = domain.reclaim(sparse_below=0.9)
    assert (report.packs_repacked, report.bytes_copied > 0) == (1, True)
    assert files(domain) == live_files(domain)
    assert load(domain, small) == chunks[0] + chunks[9]


def test_a_long_manifest_chain_is_folded(domain: Domain) -> None:
    image = bytearray(image_of(*([1] * 30)))
    saved = [save(domain, bytes(image))]
    for at in range(20):
        image[at * CHUNK : (at + 1) * CHUNK] = os.urandom(CHUNK)
        saved.append(save(domain, bytes(image), saved[-1]))
    domain.forget([one.backup for one in saved[:-1]])
    assert len(files(domain, "manifests")) == 21
    assert domain.reclaim().chains_folded == 1
    assert len(files(domain, "manifests")) == 1
    before = dump(domain)
    domain.rebuild()
    assert dump(domain) == before
    assert load(domain, saved[-1]) == bytes(image)


def test_a_view_comes_back_from_a_checkpoint_and_the_tail(
    point: Point, label: ClusterLabel, domain: Domain, caplog: pytest.LogCaptureFixture
) -> None:
    first = save(domain, image_of(1, 2))
    domain.checkpoint()
    second = save(domain, image_of(1, 3), first)
    before = dump(domain)
    domain.close()
    shutil.rmtree(domain.view.path)
    with caplog.at_level("INFO", logger="storage.log.rebuild"):
        again = open_domain(point, label)
    assert "view_from_checkpoint" in caplog.messages
    assert dump(again) == before
    assert load(again, second) == image_of(1, 3)


def test_a_checkpoint_that_is_not_whole_is_passed_over(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    save(domain, image_of(1, 2))
    domain.checkpoint()
    before = dump(domain)
    domain.close()
    shutil.rmtree(domain.view.path)
    (name,) = os.listdir(domain.paths.checkpoints)
    path = Path(domain.paths.checkpoints, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert dump(open_domain(point, label)) == before


def test_a_checkpoint_that_no_record_announces_is_not_opened(
    point: Point, label: ClusterLabel, domain: Domain, caplog: pytest.LogCaptureFixture
) -> None:
    """LMDB follows the numbers in its pages: a forged file, well named, would end the process."""
    save(domain, image_of(1, 2))
    domain.checkpoint()
    before = dump(domain)
    domain.close()
    shutil.rmtree(domain.view.path)
    (name,) = os.listdir(domain.paths.checkpoints)
    path = Path(domain.paths.checkpoints, name)
    forged = bytearray(path.read_bytes())
    forged[2 * 4096 :] = random.Random(1).randbytes(len(forged) - 2 * 4096)
    path.unlink()
    path.with_name(checkpoint_name(int(name[:16], 16), blake3(forged).digest())).write_bytes(forged)
    with caplog.at_level("INFO", logger="storage.log.rebuild"):
        again = open_domain(point, label)
    assert "checkpoint_unannounced" in caplog.messages
    assert dump(again) == before


@pytest.mark.parametrize("what", ["copy", "unfinished", "old"])
def test_what_the_disk_of_the_views_says_has_a_name(
    point: Point, label: ClusterLabel, domain: Domain, what: str
) -> None:
    save(domain, image_of(1, 2))
    before = dump(domain)
    in_the_way = Path(f"{domain.view.path}.{what}")
    in_the_way.write_text("")
    if what == "copy":
        with pytest.raises(PointUnreachable, match="copy"):
            domain.checkpoint()
    else:
        domain.view.suspect = "a test says so"
        with pytest.raises(PointUnreachable, match=what):
            domain.refresh()
    domain.close()
    in_the_way.unlink()
    assert dump(open_domain(point, label)) == before


def test_planted_checkpoints_cost_one_pass_over_the_log(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    save(domain, image_of(1, 2))
    domain.checkpoint()
    before = dump(domain)
    domain.close()
    shutil.rmtree(domain.view.path)
    (real,) = os.listdir(domain.paths.checkpoints)
    for seq in [*range(1, 5), 1 << 40, (1 << 64) - 1]:
        for number in range(20):
            digest = blake3(b"%d" % number).digest()
            Path(domain.paths.checkpoints, checkpoint_name(seq, digest)).touch()

    class Counting(OsFs):
        def __init__(self) -> None:
            self.opened: list[str] = []

        def open_read(self, path: str) -> int:
            self.opened.append(path)
            return super().open_read(path)

    fs = Counting()
    again = open_domain(Point.open(point.path, fs=fs), label)
    assert dump(again) == before
    looked_at = [path for path in fs.opened if "/checkpoints/" in path]
    assert [os.path.basename(path) for path in looked_at] == [real]
    records = [path for path in fs.opened if "/log/" in path]
    assert len(records) < 20, "each record once for the names, and once for the tail"


def test_a_chain_of_manifests_that_goes_in_a_circle_is_damage(domain: Domain) -> None:
    first = save(domain, image_of(1))
    save(domain, image_of(2), first)

    def bend(state: tables.Tables) -> None:
        rows = dict(tables.manifests.scan(state))
        for name, row in rows.items():
            other = next(one for one in rows if one != name)
            tables.manifests.put(state, name, replace(row, base=other))

    domain.view.update(bend)
    with domain.view.read() as state:
        (name, _), *_ = tables.manifests.scan(state)
        with pytest.raises(Damaged, match="builds on itself"):
            manifest_chain(state, name)


def test_an_older_copy_of_the_point_is_refused(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    save(domain, image_of(1))
    domain.close()
    Path(domain.paths.log, record_path(2)).unlink()
    with pytest.raises(Damaged, match="older state"):
        open_domain(point, label)


@pytest.mark.parametrize("older", [True, False], ids=["an older state", "another point"])
def test_what_takes_the_points_place_while_it_is_open_loses_nothing_to_a_gc(
    point: Point, label: ClusterLabel, domain: Domain, older: bool, tmp_path: Path
) -> None:
    """Whose files are those of nobody, by the state that was read before."""
    there = tmp_path / "there"
    doomed = save(domain, image_of(1))
    if older:
        shutil.copytree(point.path, there)
    else:
        there.mkdir()
        other = open_domain(Point.create(str(there), "q", chunk_size=CHUNK), label)
        save(other, image_of(2))
        other.close()
    save(domain, image_of(3))
    domain.forget([doomed.backup])
    domain.reclaim()
    os.rename(point.path, tmp_path / "away")
    os.rename(there, point.path)
    before = files(domain)
    assert before
    with pytest.raises(Damaged, match="older state"):
        domain.reclaim()
    assert files(domain) == before


def test_no_view_is_made_anew_from_an_older_copy_of_the_point(
    point: Point, domain: Domain, tmp_path: Path
) -> None:
    """By that view what comes next would be appended to it."""
    save(domain, image_of(1))
    shutil.copytree(point.path, tmp_path / "there")
    save(domain, image_of(2))
    before = dump(domain)
    os.rename(point.path, tmp_path / "away")
    os.rename(tmp_path / "there", point.path)
    with pytest.raises(Damaged, match="older state"):
        domain.rebuild()
    assert dump(domain) == before
    with pytest.raises(Damaged, match="older state"):
        domain.begin("backup")


def test_a_changed_record_breaks_the_chain(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    save(domain, image_of(1))
    domain.close()
    shutil.rmtree(domain.view.path)
    path = Path(domain.paths.log, record_path(1))
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged):
        open_domain(point, label)


def test_a_log_that_vanished_is_not_an_empty_one(domain: Domain) -> None:
    save(domain, image_of(1))
    os.rename(domain.paths.log, domain.paths.log + ".away")
    with pytest.raises(PointUnreachable):
        domain.refresh()


def test_importing_survives_the_owners_delete(point: Point, domain: Domain) -> None:
    image = image_of(1, 0, 2) + os.urandom(CHUNK)
    first = save(domain, image)
    second = save(domain, image[:-CHUNK] + image_of(0), first)
    mine = open_domain(point, cluster("mine"), "host-9")
    source = os.path.basename(domain.paths.root)
    rows = mine.import_backups(source, [second.backup], lambda row: row.label + b"!")
    assert [row.backup for row in rows] == [second.backup]
    domain.forget([first.backup, second.backup])
    domain.reclaim()
    assert load(mine, second) == image[:-CHUNK] + image_of(0)
    assert mine.import_backups(source, [second.backup], lambda _: b"") == mine.backups()


def test_importing_is_all_or_nothing(point: Point, domain: Domain) -> None:
    there = save(domain, image_of(1))
    mine = open_domain(point, cluster("mine"), "host-9")
    source = os.path.basename(domain.paths.root)
    with pytest.raises(NotOnPoint):
        mine.import_backups(source, [there.backup, new_uuid()], lambda _: b"")
    assert (mine.backups(), files(mine)) == ([], set())


def test_a_foreign_listing_follows_the_other_log(point: Point, domain: Domain) -> None:
    source = os.path.basename(domain.paths.root)
    first = save(domain, image_of(1))
    assert [row.backup for row in point.foreign_backups(source)] == [first.backup]
    second = save(domain, image_of(2), first)
    domain.forget([first.backup])
    assert [row.backup for row in point.foreign_backups(source)] == [second.backup]


def test_a_directory_with_content_is_no_point(tmp_path: Path) -> None:
    (tmp_path / "diary").write_text("mine")
    with pytest.raises(PointNotEmpty, match="diary"):
        Point.create(str(tmp_path), "p")
    assert os.listdir(tmp_path) == ["diary"]
    assert not is_point(str(tmp_path))


def test_no_directory_is_no_point(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(PointUnreachable):
            Point.open(str(path))


def test_another_point_at_the_path_is_noticed(point: Point) -> None:
    with pytest.raises(PointUnreachable, match="expected"):
        Point.open(point.path, expect_uuid=new_uuid())


def test_a_newer_point_is_refused_and_not_touched(point: Point) -> None:
    path = Path(point.path, "POINT")
    content = small_object(b"VKPO", b"whatever", version=2)
    path.write_bytes(content)
    with pytest.raises(PointNewerFormat):
        Point.open(point.path)
    with pytest.raises(PointNotEmpty):
        Point.create(point.path, "again")
    assert path.read_bytes() == content
