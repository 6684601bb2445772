"""What other hosts, an NFS client's memory and killed processes do to a domain."""

from __future__ import annotations

import errno
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from storage.domain.domain import Domain
from storage.domain.heartbeats import Observer, beat
from storage.domain.new_packs import UNSEALED_PACKS_LIMIT
from storage.domain.reader import MAX_RUN_BYTES, plan_reads
from storage.domain.session import NewBackup
from storage.errors import Damaged, PointFull, StorageError
from storage.files.fs import Buffer, OsFs
from storage.format.chunks import Encoder
from storage.format.record import Op
from storage.log import rebuild
from storage.log.log import Log
from storage.log.rebuild import Update
from storage.point import ClusterLabel, Point
from storage.view.tables import Tables
from tests.failing_fs import FailingFs, HookFs, open_below
from tests.store import (
    CHUNK,
    Saved,
    cluster,
    dump,
    files,
    image_of,
    live_files,
    load,
    mixed,
    new_point,
    new_uuid,
    open_domain,
    save,
    write_disk,
)


def through(point: Point, label: ClusterLabel, host: str, fs: OsFs) -> Domain:
    """The domain as a host sees it whose file system is `fs`."""
    return open_domain(Point.open(point.path, fs=fs), label, host)


class StaleFs(OsFs):
    """As an NFS client: believes that a name is not there until it makes one beside it."""

    def __init__(self) -> None:
        self._absent: set[str] = set()

    def open_read(self, path: str) -> int:
        if path in self._absent:
            raise FileNotFoundError(errno.ENOENT, "not there (cached)", path)
        try:
            return super().open_read(path)
        except FileNotFoundError:
            self._absent.add(path)
            raise

    def open_new(self, path: str) -> int:
        fd = super().open_new(path)
        self._absent = {p for p in self._absent if os.path.dirname(p) != os.path.dirname(path)}
        return fd


class GoneFs(OsFs):
    """As an NFS client whose open files another host has deleted."""

    gone = False

    def open_read(self, path: str) -> int:
        if self.gone and "/packs/" in path and not os.path.exists(path):
            raise OSError(errno.ESTALE, "stale file handle", path)
        return super().open_read(path)

    def preadv(self, fd: int, buffer: Buffer, offset: int) -> int:
        if self.gone and os.fstat(fd).st_nlink == 0:
            raise OSError(errno.ESTALE, "stale file handle")
        return super().preadv(fd, buffer, offset)


def test_packs_that_can_not_be_begun_do_not_use_up_the_session(tmp_path: Path) -> None:
    fs = FailingFs()
    domain = open_domain(new_point(tmp_path, fs), cluster())
    errors: list[StorageError] = []

    def store() -> None:
        for _ in range(UNSEALED_PACKS_LIMIT + 1):
            try:
                session.store([Encoder().encode(domain.hasher.full(b"x"), b"x")])
            except StorageError as error:
                errors.append(error)

    session = domain.begin("backup")
    fs.fail = {"open_new": errno.ENOSPC}
    thread = threading.Thread(target=store, daemon=True)
    thread.start()
    thread.join(10)
    fs.fail = {}
    assert [type(error) for error in errors] == [PointFull] * (UNSEALED_PACKS_LIMIT + 1)
    with session:
        pass


def test_a_sweep_does_not_trust_what_an_nfs_client_remembers(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    other = through(point, label, "host-2", StaleFs())
    other.refresh()
    image = os.urandom(CHUNK)
    saved = save(domain, image)
    other.reclaim()
    assert load(domain, saved) == image
    assert files(domain) == live_files(domain)


def test_a_sweep_deletes_nothing_when_it_can_not_be_sure(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    class FullFs(StaleFs):
        full = False

        def open_new(self, path: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "no room", path)
            return super().open_new(path)

    fs = FullFs()
    other = through(point, label, "host-2", fs)
    other.refresh()
    fs.full = True
    saved = save(domain, image_of(2))
    other.reclaim()
    assert load(domain, saved) == image_of(2)


def test_a_reader_follows_a_pack_that_another_nfs_client_deleted(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    chunks = mixed(10)
    big, small = save(domain, b"".join(chunks)), save(domain, chunks[0] + chunks[1])
    fs = GoneFs()
    other = through(point, label, "host-2", fs)
    runs = list(plan_reads(other, other.disk_map(small.disk)))
    reader, buffer = other.reader(), memoryview(bytearray(MAX_RUN_BYTES))
    for run in runs:
        assert len(list(reader.read(run, buffer))) == 2
    domain.forget([big.backup])
    assert domain.reclaim(sparse_below=0.9).packs_repacked == 1
    fs.gone = True
    found = {}
    for run in runs:
        for place, raw in reader.read(run, buffer):
            found.update(dict.fromkeys(place.targets, bytes(raw)))
    assert found == {0: chunks[0], 1: chunks[1]}
    reader.close()


def test_a_rebuild_beside_a_gc_begins_again(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    gone, kept = save(domain, image_of(1, 2)), save(domain, image_of(3))
    fs = HookFs()
    other = through(point, label, "host-2", fs)

    def delete() -> None:
        domain.forget([gone.backup])
        domain.reclaim(copy_budget_bytes=0)

    fs.root, fs.hook = other.paths.packs, delete
    other.rebuild()
    other.refresh()
    assert dump(other) == dump(domain)
    assert load(other, kept) == image_of(3)


def test_a_rebuild_beside_damage_and_others_who_append_comes_to_an_end(
    point: Point, label: ClusterLabel, domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(domain, image_of(1, 2))
    (damaged,) = files(domain, "packs")
    other = through(point, label, "host-2", OsFs())
    os.unlink(os.path.join(domain.paths.root, damaged))
    fill, kept = rebuild.fill, [save(domain, image_of(3))]

    def filled(*args: Any) -> frozenset[str]:
        found = fill(*args)
        kept.append(save(domain, image_of(3)))
        assert len(kept) < 10, "it begins again and again"
        return found

    monkeypatch.setattr(rebuild, "fill", filled)
    other.rebuild()
    monkeypatch.undo()
    other.refresh()
    assert other.losses().packs == (damaged.removeprefix("packs/"),)
    assert all(load(other, saved) == image_of(3) for saved in kept)


def test_importing_does_not_put_damage_in_the_place_of_ones_own_chunks(
    point: Point, domain: Domain
) -> None:
    shared, other = os.urandom(CHUNK), os.urandom(CHUNK)
    theirs = save(domain, shared + other)
    mine = open_domain(point, cluster("mine"), "host-9")
    own = save(mine, shared)
    (pack,) = files(domain, "packs")
    path = Path(domain.paths.root, pack)
    content = bytearray(path.read_bytes())
    content[content.index(shared)] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged):
        mine.import_backups(os.path.basename(domain.paths.root), [theirs.backup], lambda _: b"")
    mine.reclaim()
    assert load(mine, own) == shared
    assert files(mine) == live_files(mine)


def test_importing_beside_a_gc_takes_no_older_copy_for_the_one_that_moved(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    """The older one may be the damaged one, which the newer one has healed."""
    wanted, gone, *kept = mixed(6)
    save(domain, wanted + b"".join(kept))
    (pack,) = files(domain, "packs")
    path = Path(domain.paths.root, pack)
    content = bytearray(path.read_bytes())
    content[content.index(wanted)] ^= 1
    path.write_bytes(content)
    domain.trust.withdraw(pack.removeprefix("packs/"), frozenset({domain.hasher.full(wanted)}))
    large, there = save(domain, wanted + gone), save(domain, wanted)
    domain.forget([large.backup])
    fs = HookFs()
    mine = through(point, cluster("mine"), "host-9", fs)

    def repack() -> None:
        assert domain.reclaim(sparse_below=0.6).packs_repacked == 1

    fs.root, fs.hook = domain.paths.packs, repack
    mine.import_backups(label.cluster_uuid, [there.backup], lambda _: b"")
    assert fs.hook is None
    assert load(mine, there) == wanted


def test_two_hosts_that_import_the_same_both_succeed(point: Point, domain: Domain) -> None:
    there = save(domain, image_of(1, 2))
    label = cluster("mine")
    one, other = open_domain(point, label, "host-8"), open_domain(point, label, "host-9")
    source = os.path.basename(domain.paths.root)

    def relabel(_: object) -> bytes:
        if not other.backups():
            other.import_backups(source, [there.backup], lambda _: b"other")
        return b"one"

    (row,) = one.import_backups(source, [there.backup], relabel)
    assert (row.backup, row.label) == (there.backup, b"other")


def test_a_domain_that_is_written_to_is_closed_after_that(domain: Domain) -> None:
    begun, free = threading.Event(), threading.Event()

    def build(_: Tables) -> list[Op]:
        begun.set()
        assert free.wait(10.0)
        return []

    writer = threading.Thread(target=domain.append, args=(build,))
    closer = threading.Thread(target=domain.close)
    writer.start()
    assert begun.wait(10.0)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    free.set()
    for thread in (writer, closer):
        thread.join(10.0)
        assert not thread.is_alive()
    with pytest.raises(StorageError):
        domain.begin("read")


def test_a_rebuild_without_room_for_it_gives_back_what_it_took(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(domain, image_of(1, 2))
    before = dump(domain)

    def fill_half(update: Update, records: Log, *_: object) -> None:
        update(partial(rebuild.fold_records, records=records))
        raise PointFull("on purpose")

    monkeypatch.setattr(rebuild, "fill", fill_half)
    with pytest.raises(PointFull):
        domain.rebuild()
    assert os.listdir(domain.paths.views) == ["host-1"]
    assert dump(domain) == before


def test_rebuilds_leave_nothing_open(domain: Domain, tmp_path: Path) -> None:
    save(domain, image_of(1))
    domain.rebuild()
    before = open_below(tmp_path)
    for _ in range(3):
        domain.rebuild()
    assert open_below(tmp_path) == before


def test_what_a_killed_replacement_left_is_cleared(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    domain.close()
    os.rename(domain.view.path, domain.view.path + ".old")
    again = open_domain(point, label)
    assert sorted(os.listdir(point.path + "/domains/" + label.cluster_uuid + "/views")) == [
        "host-1"
    ]
    again.close()


def test_a_view_that_can_not_be_made_is_a_storage_error(point: Point, label: ClusterLabel) -> None:
    open_domain(point, label).close()
    views = os.path.join(point.path, "domains", label.cluster_uuid, "views")
    os.rename(views, views + ".away")
    Path(views).touch()
    with pytest.raises(StorageError):
        open_domain(point, label)


def test_a_backup_without_a_disk_on_its_grandparent_has_no_parent(domain: Domain) -> None:
    def save_two(parent: Saved | None, below: list[str]) -> tuple[Saved, list[str]]:
        saved, disks = Saved(new_uuid(), new_uuid()), [new_uuid() for _ in below]
        with domain.begin("backup", [parent.backup] if parent else []) as session:
            for disk, parent_disk in zip(disks, below, strict=True):
                write_disk(session, domain, image_of(1, 2), disk, parent_disk)
            new = NewBackup(saved.backup, b"", disks, parent.backup if parent else "")
            session.commit([new])
        return saved, disks

    first, first_disks = save_two(None, ["", ""])
    second, second_disks = save_two(first, ["", first_disks[1]])
    third, _ = save_two(second, [second_disks[0]])
    fourth, _ = save_two(second, second_disks)
    domain.forget([second.backup])
    assert domain.backup(third.backup).parent == ""
    assert domain.backup(fourth.backup).parent == first.backup
    domain.forget([first.backup])
    assert domain.backup(fourth.backup).parent == ""


def test_a_host_that_has_just_restarted_keeps_its_sessions(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    other = open_domain(point, label, "host-2")
    beat(other, 1)
    left = other.begin("backup")
    observer = Observer(patience_s=600)
    observer.end_dead_sessions(domain, 0.0)
    left.packs.close()
    other.close()
    again = open_domain(point, label, "host-2")  # has not shown yet that it lives
    with again.begin("backup") as session:
        assert observer.end_dead_sessions(domain, 700.0) == 0
        beat(again, 1)
        assert observer.end_dead_sessions(domain, 1299.0) == 0
        session.commit([])


def test_heartbeats_that_fail_leave_no_files(tmp_path: Path) -> None:
    fs = FailingFs()
    domain = open_domain(new_point(tmp_path, fs), cluster())
    beat(domain, 1)
    fs.fail = {"close": errno.ENOSPC}
    with pytest.raises(PointFull):
        beat(domain, 2)
    assert os.listdir(domain.paths.host_tmp(domain.host)) == []
