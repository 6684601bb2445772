"""Garbage collection: what it chooses, what it passes over, and on a full point."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storage import gc
from storage.chunks import CODEC_RAW, Encoder, make_frame
from storage.domain import Domain
from storage.errors import PointFull
from storage.fs import OsFs, Room
from storage.point import ClusterLabel, Point
from storage.session import NewBackup
from tests.store import (
    CHUNK,
    Saved,
    cluster,
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


def test_gc_makes_nothing_trusted_that_is_known_to_be_wrong(domain: Domain) -> None:
    """A chunk that was stored wrong (by a bad bit of memory, say): its frame is whole, its copy
    would be too."""
    one, two, other = mixed(3)
    with domain.begin("backup") as session:
        disk = new_uuid()
        wrong = make_frame(domain.hasher.full(one), CHUNK, CODEC_RAW, other)
        session.store([wrong, Encoder().encode(domain.hasher.full(two), two)])
        entries = {0: domain.hasher.full(one)}
        session.manifest(disk, CHUNK, None).add_page(0, entries)
        session.commit([NewBackup(new_uuid(), b"", [disk])])
    domain.trust.withdraw(f"{session.id}/00000000", frozenset({domain.hasher.full(one)}))
    report = domain.reclaim(sparse_below=0.9)
    assert (report.packs_repacked, len(report.damaged)) == (0, 1)
    saved = save(domain, one)
    assert load(domain, saved) == one
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
