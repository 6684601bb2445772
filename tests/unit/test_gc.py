"""Garbage collection: what it chooses, what it passes over, and on a full point."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.domain import gc
from storage.domain.domain import Domain
from storage.domain.session import NewBackup, Session
from storage.errors import PointFull, Refused
from storage.files.ballast import reserve_bytes
from storage.files.fs import OsFs, Room
from storage.format.chunks import CODEC_RAW, Encoder, Frame, make_frame
from storage.format.patches import PatchEncoder
from storage.format.record import Retire, file_id
from storage.log.fold import Garbage
from storage.point import ClusterLabel, Point
from storage.view.view import View
from tests.store import (
    CHUNK,
    Saved,
    cluster,
    edited,
    files,
    image_of,
    load,
    mixed,
    new_point,
    new_uuid,
    open_domain,
    save,
)


class RoomFs(OsFs):
    """A file system that says how much is free on it."""

    free_bytes = 1 << 40

    def room(self, path: str) -> Room:  # noqa: ARG002
        return Room(1 << 40, self.free_bytes)


def test_gc_passes_over_a_pack_that_is_gone(domain: Domain) -> None:
    first, second = mixed(10), mixed(10)
    big = [save(domain, b"".join(chunks)) for chunks in (first, second)]
    paths = sorted(files(domain, "packs"))
    save(domain, first[0] + second[0])
    dead = save(domain, os.urandom(CHUNK))
    domain.forget([saved.backup for saved in (*big, dead)])
    os.unlink(os.path.join(domain.paths.root, paths[0]))
    report = domain.reclaim(sparse_below=0.9)
    assert (report.packs_removed, report.packs_repacked) == (2, 1)
    assert [paths[0] in detail for detail in report.damaged] == [True]


def test_gc_passes_over_a_pack_that_another_gc_retired(
    point: Point, label: ClusterLabel, domain: Domain
) -> None:
    chunks = mixed(10)
    big, small = save(domain, b"".join(chunks)), save(domain, chunks[0])
    domain.forget([big.backup])
    with domain.view.read() as state:
        plan = gc.plan_gc(state, 0.9, 1 << 30)
    open_domain(point, label, "host-2").reclaim(sparse_below=0.9)
    domain.refresh()
    report = gc.execute_gc(domain, plan, lambda: False)
    assert (report.packs_removed, report.damaged) == (0, ())
    assert load(domain, small) == chunks[0]


def save_wrong(domain: Domain, frame: Frame, dead: bytes) -> str:
    """A backup of a frame that was made wrong (by a bad bit of memory, say): it is whole, and its
    copy would be too. The pack has a dead chunk beside it; returns the pack's FileId."""
    with domain.begin("backup") as session:
        disk = new_uuid()
        session.store([frame, Encoder().encode(domain.hasher.full(dead), dead)])
        session.manifest(disk, CHUNK, None).add_page(0, {0: frame.chunk_id})
        session.commit([NewBackup(new_uuid(), b"", [disk])])
    return file_id(session.id, 0)


def before_retire(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Does something when gc has copied, and has not said so yet."""
    retires = Session.retire

    def retire(self: Session, *args: Any, **kwargs: Any) -> Garbage:
        monkeypatch.undo()
        act()
        return retires(self, *args, **kwargs)

    monkeypatch.setattr(Session, "retire", retire)


def test_gc_copies_no_chunk_that_is_wrong(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds it while gc is at work, and heals it, must not find gc's copy in its place."""
    one, two, other = mixed(3)
    pack = save_wrong(domain, make_frame(domain.hasher.full(one), CHUNK, CODEC_RAW, other), two)
    healed: list[Saved] = []

    def heal() -> None:
        domain.trust.withdraw(pack, frozenset({domain.hasher.full(one)}))
        healed.append(save(domain, one))

    before_retire(monkeypatch, heal)
    report = domain.reclaim(sparse_below=0.9)
    assert (report.packs_repacked, len(report.damaged)) == (0, 1)
    assert load(domain, healed[0]) == one
    assert domain.reclaim(sparse_below=0.9).packs_removed == 1


def test_what_gc_finds_wrong_is_stored_anew_by_the_next_backup(domain: Domain) -> None:
    one, two, other = mixed(3)
    save_wrong(domain, make_frame(domain.hasher.full(one), CHUNK, CODEC_RAW, other), two)
    assert len(domain.reclaim(sparse_below=0.9).damaged) == 1
    assert load(domain, save(domain, one)) == one


@pytest.mark.parametrize("heals", [False, True])
def test_gc_puts_no_patch_that_is_wrong_in_its_new_place(
    domain: Domain, monkeypatch: pytest.MonkeyPatch, heals: bool
) -> None:
    """Patches are not proved when they are copied, as that would be to read all of their bases."""
    base, two = mixed(2)
    save(domain, base)
    wanted, wrong = edited(base, 3), edited(base, 5)
    chunk, base_id = domain.hasher.full(wanted), domain.hasher.full(base)
    frame = PatchEncoder().encode(chunk, memoryview(wrong), base_id, base, CHUNK)
    assert frame is not None
    pack, healed = save_wrong(domain, frame, two), list[Saved]()

    def find() -> None:
        domain.trust.withdraw(pack, frozenset({chunk}))
        if heals:
            healed.append(save(domain, wanted))

    before_retire(monkeypatch, find)
    with pytest.raises(Refused, match="while they were copied"):
        domain.reclaim(sparse_below=0.9)
    for saved in healed or [save(domain, wanted)]:
        assert load(domain, saved) == wanted
    assert domain.reclaim(sparse_below=0.9).packs_removed == 1


def test_gc_leaves_packs_alone_that_nothing_in_them_is_dead(domain: Domain) -> None:
    saved = save(domain, image_of(1))  # compresses to less than its row in the table
    assert domain.reclaim().packs_repacked == 0
    assert load(domain, saved) == image_of(1)


def full_of_sparse_and_dead(tmp_path: Path) -> tuple[RoomFs, Domain, Saved, bytes]:
    fs = RoomFs()
    domain = open_domain(new_point(tmp_path, fs), cluster())
    chunks = mixed(10)
    big, small = save(domain, b"".join(chunks)), save(domain, chunks[0])
    dead = save(domain, os.urandom(CHUNK))
    domain.forget([big.backup, dead.backup])
    return fs, domain, small, chunks[0]


def test_more_dead_packs_than_a_record_takes_go_with_several(
    domain: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "PACKS_PER_RETIRE", 2)
    doomed = [save(domain, os.urandom(CHUNK)) for _ in range(5)]
    first = domain.refresh() + 1
    domain.forget([saved.backup for saved in doomed])
    report = domain.reclaim(copy_budget_bytes=0)
    assert (report.packs_removed, files(domain, "packs")) == (5, set())
    records = [domain.records.read(seq) for seq in range(first, domain.refresh() + 1)]
    ops = [op for found in records if found for op in found[0].ops if isinstance(op, Retire)]
    assert [len(op.retired) for op in ops] == [2, 2, 1]


def test_gc_gets_by_with_a_view_that_was_deleted(domain: Domain) -> None:
    """It may be, at any time: the ballast is as large as the view, whose file is gone."""
    kept, gone = save(domain, image_of(1)), save(domain, image_of(2))
    shutil.rmtree(domain.view.path)
    domain.forget([gone.backup])
    assert domain.reclaim().packs_removed == 1
    domain.rebuild()
    assert load(domain, kept) == image_of(1)


def test_gc_on_a_full_point_may_copy_into_the_reserve(tmp_path: Path) -> None:
    fs, domain, small, image = full_of_sparse_and_dead(tmp_path)
    fs.free_bytes = 4 << 20
    with domain.begin("backup") as session, pytest.raises(PointFull):
        session.store([Encoder().encode(domain.hasher.full(b"x"), b"x")])
    report = domain.reclaim(sparse_below=0.9)
    assert (report.packs_removed, report.packs_repacked) == (2, 1)
    assert load(domain, small) == image


def test_gc_without_room_for_a_checkpoint_is_still_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "CHECKPOINT_EVERY_RECORDS", 1)
    fs, domain, _, _ = full_of_sparse_and_dead(tmp_path)
    fs.free_bytes = 4 << 20
    assert domain.reclaim(sparse_below=0.9).packs_removed == 2
    assert os.listdir(domain.paths.checkpoints) == []
    fs.free_bytes = 1 << 40
    domain.reclaim()
    assert len(os.listdir(domain.paths.checkpoints)) == 1


def test_a_checkpoint_takes_no_room_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first copy would be made on the point, too: backups that run meanwhile would fail."""
    fs, domain, _, _ = full_of_sparse_and_dead(tmp_path)
    domain.checkpoint()
    (name,) = os.listdir(domain.paths.checkpoints)
    size_bytes = domain.view.ask(lambda state: state.copy_bytes())
    file_bytes = os.path.getsize(os.path.join(domain.paths.checkpoints, name))
    assert size_bytes <= file_bytes <= size_bytes + (16 << 10)
    fs.free_bytes = reserve_bytes(fs.room("")) + 2 * size_bytes - 1
    with monkeypatch.context() as patched:
        patched.setattr(View, "copy_to", lambda *_: pytest.fail("was copied"))
        with pytest.raises(PointFull):
            domain.checkpoint()
    fs.free_bytes += size_bytes
    domain.checkpoint()
    assert len(os.listdir(domain.paths.checkpoints)) == 2
