"""Packs that another cluster made, and that name chunks which they don't hold: nothing of ours may
be worse for having taken them over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytest

from storage.domain.adopted import AdoptedPacks
from storage.domain.domain import Domain
from storage.domain.imports import ATTEMPTS
from storage.domain.reader import ChunkReader
from storage.domain.session import Session
from storage.errors import Damaged, Refused
from storage.files.fs import Fs
from storage.format.manifests import encode_page
from storage.format.packs import read_maker
from storage.point import Point
from tests import forging
from tests.hostile.forger import Forger
from tests.store import (
    Saved,
    cluster,
    edited,
    files,
    image_of,
    load,
    mixed,
    open_domain,
    patches,
    save,
)


def lie(evil: Forger, mine: Domain, *claimed: bytes, told: bytes, maker: str = "") -> str:
    """A backup whose pack says that it holds the `claimed` contents, and holds `told` instead.
    `maker`: the FileId under which it says that it was made."""
    items, rows, page = b"", [], {}
    for at, content in enumerate(claimed):
        chunk_id = mine.hasher.full(content)
        rows.append(forging.pack_row(64 + len(items), chunk_id, 0, len(told), told))
        items += forging.frame(chunk_id, 0, len(told), told)
        page[at] = chunk_id
    capacity = len(claimed) * len(told)
    manifest = evil.manifest([(0, encode_page(page))], capacity)
    return evil.commit(manifest, (evil.pack(items, rows, maker),), capacity=capacity)


def theirs_uuid(domain: Domain) -> str:
    return os.path.basename(domain.paths.root)


def imported(mine: Domain, source: str, backup: str) -> Saved:
    (row,) = mine.import_backups(source, [backup], lambda row: row.label)
    return Saved(row.backup, row.disks[0].disk, "")


def test_what_only_a_stranger_says_is_not_relied_on(mine: Domain, evil: Forger) -> None:
    """A chunk that we get to have after the import: the import's copy is looked at first."""
    chunk = image_of(5)
    taken = imported(mine, evil.uuid, lie(evil, mine, chunk, told=image_of(6)))
    with pytest.raises(Damaged):
        load(mine, taken)
    kept = save(mine, chunk)
    assert load(mine, kept) == chunk
    assert load(mine, taken) == chunk  # healed


def test_packs_of_an_import_that_died_are_not_gone_on_from(point: Point, evil: Forger) -> None:
    """As packs of a backup they would be ours, and nobody would look into them."""
    label, chunk = cluster("mine"), image_of(5)
    mine = open_domain(point, label, "host-9")
    lie(evil, mine, chunk, told=image_of(6))
    session = mine.begin("import")
    for pack in evil.root.glob("packs/*/*"):
        session.adopt_pack(str(pack))
    session.packs.close()
    mine.close()
    again = open_domain(point, label, "host-9")
    assert load(again, save(again, chunk)) == chunk


def test_packs_of_our_own_are_not_asked_who_made_them(
    mine: Domain, evil: Forger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point has very many, and a header is a file that has to be opened."""
    asked: list[str] = []

    def noting(fs: Fs, path: str) -> str:
        asked.append(path)
        return read_maker(fs, path)

    monkeypatch.setattr("storage.domain.adopted.read_maker", noting)
    save(mine, image_of(1, 2))
    assert load(mine, save(mine, image_of(2, 1))) == image_of(2, 1)
    assert asked == []
    imported(mine, evil.uuid, lie(evil, mine, image_of(3), told=image_of(3)))
    save(mine, image_of(3))
    assert len(asked) == 1


def test_what_a_stranger_says_and_is_true_is_not_stored_again(point: Point, mine: Domain) -> None:
    theirs = open_domain(point, cluster("theirs"), "host-8")
    image = image_of(1, 2, 3)
    taken = imported(mine, theirs_uuid(theirs), save(theirs, image).backup)
    packs = files(mine, "packs")
    kept = save(mine, image)
    assert files(mine, "packs") == packs
    assert load(mine, kept) == load(mine, taken) == image


def test_an_import_does_not_rely_on_another_stranger(
    point: Point, mine: Domain, evil: Forger
) -> None:
    chunk = image_of(5)
    imported(mine, evil.uuid, lie(evil, mine, chunk, told=image_of(6)))
    theirs = open_domain(point, cluster("theirs"), "host-8")
    taken = imported(mine, theirs_uuid(theirs), save(theirs, chunk).backup)
    assert load(mine, taken) == chunk


def test_a_lie_about_a_chunk_keeps_no_pack_that_has_it_as_a_patch_from_being_imported(
    point: Point, mine: Domain, evil: Forger
) -> None:
    """What we have whole, and an adopted pack as a patch, is stored whole again: as far as it is
    true that we have it."""
    bases = mixed(2)
    changed = [edited(base, 3) for base in bases]
    theirs = open_domain(point, cluster("theirs"), "host-8")
    first = save(theirs, b"".join(bases))
    second = save(theirs, b"".join(changed), first)
    third = save(theirs, changed[0] + bases[1], second)
    assert len(patches(theirs)) == 2
    imported(mine, evil.uuid, lie(evil, mine, changed[1], told=bases[1]))
    taken = imported(mine, theirs_uuid(theirs), third.backup)
    assert load(mine, taken) == changed[0] + bases[1]


def test_a_header_that_names_the_source_s_own_pack_vouches_for_nothing(
    point: Point, mine: Domain, evil: Forger
) -> None:
    chunk = image_of(5)
    theirs = open_domain(point, cluster("theirs"), "host-8")
    saved = save(theirs, chunk)
    (pack,) = (path.removeprefix("packs/") for path in files(theirs, "packs"))
    imported(mine, evil.uuid, lie(evil, mine, chunk, told=image_of(6), maker=pack))
    taken = imported(mine, theirs_uuid(theirs), saved.backup)
    assert load(mine, taken) == chunk


def test_a_second_import_of_a_domain_reads_none_of_its_chunks(
    point: Point, mine: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = open_domain(point, cluster("theirs"), "host-8")
    image = image_of(1, 2, 3)
    first, second = save(theirs, image), save(theirs, image[:-1] + b"x")
    imported(mine, theirs_uuid(theirs), first.backup)

    def refused(*_: object) -> None:
        raise AssertionError("reads chunks")

    monkeypatch.setattr(ChunkReader, "read_each", refused)
    taken = imported(mine, theirs_uuid(theirs), second.backup)
    monkeypatch.undo()
    assert load(mine, taken) == image[:-1] + b"x"


def test_gc_makes_no_stranger_s_word_ours(mine: Domain, evil: Forger) -> None:
    """Nothing is copied out of a pack that lies: the copy would look like ours."""
    one, other = image_of(5), image_of(6)
    evil_backup = lie(evil, mine, one, other, told=image_of(7))
    taken = imported(mine, evil.uuid, evil_backup)
    kept = save(mine, other)  # so that half of the pack is dead
    report = mine.reclaim(sparse_below=1.0, copy_budget_bytes=1 << 30)
    assert (report.packs_repacked, len(report.damaged)) == (0, 1)
    assert "another cluster" in report.damaged[0]
    later = save(mine, one)
    assert load(mine, later) == one
    assert load(mine, kept) == other
    assert load(mine, taken) == one + other


def test_what_was_proved_in_one_pack_is_not_so_in_the_next(
    point: Point, mine: Domain, evil: Forger
) -> None:
    """A true import is relied on and deleted; then one comes that lies about the same chunk."""
    chunk = image_of(5)
    theirs = open_domain(point, cluster("theirs"), "host-8")
    taken = imported(mine, theirs_uuid(theirs), save(theirs, chunk).backup)
    first = save(mine, chunk)
    mine.forget([taken.backup, first.backup])
    imported(mine, evil.uuid, lie(evil, mine, chunk, told=image_of(6)))
    assert load(mine, save(mine, chunk)) == chunk


def test_gc_copies_no_lie_of_a_chunk_that_is_healed_meanwhile(
    mine: Domain, evil: Forger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gc has looked up what to copy; before it proves that, a backup stores it anew."""
    one, other = image_of(5), image_of(6)
    imported(mine, evil.uuid, lie(evil, mine, one, other, told=image_of(7)))
    save(mine, other)  # so that half of the pack is dead
    proves, healed = AdoptedPacks.reliable, list[Saved]()

    def reliable(self: AdoptedPacks, placed: Mapping[bytes, str]) -> set[bytes]:
        monkeypatch.undo()
        healed.append(save(mine, one))
        return proves(self, placed)

    monkeypatch.setattr(AdoptedPacks, "reliable", reliable)
    report = mine.reclaim(sparse_below=1.0, copy_budget_bytes=1 << 30)
    assert (len(healed), report.packs_repacked) == (1, 0)
    assert load(mine, healed[0]) == one


def test_a_chunk_that_becomes_ours_during_an_import_is_proved(
    mine: Domain, evil: Forger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the import adopts would take its place, and a backup of ours would be lost."""
    chunk = image_of(5)
    backup = lie(evil, mine, chunk, told=image_of(6))
    commits, stored = Session.commit, list[Saved]()

    def commit(self: Session, *args: Any) -> None:
        monkeypatch.undo()
        stored.append(save(mine, chunk))
        commits(self, *args)

    monkeypatch.setattr(Session, "commit", commit)
    taken = imported(mine, evil.uuid, backup)
    assert load(mine, stored[0]) == chunk == load(mine, taken)


def test_an_import_that_is_overtaken_each_time_says_so(
    point: Point, mine: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = [image_of(number) for number in range(1, 6)]
    theirs = open_domain(point, cluster("theirs"), "host-8")
    source, backup = theirs_uuid(theirs), save(theirs, b"".join(chunks)).backup
    commits, left = Session.commit, chunks[:ATTEMPTS]

    def commit(self: Session, backups: Any, *require: Any) -> None:
        if require and left:
            save(mine, left.pop())
        commits(self, backups, *require)

    monkeypatch.setattr(Session, "commit", commit)
    with pytest.raises(Refused, match="meanwhile"):
        imported(mine, source, backup)
    assert load(mine, imported(mine, source, backup)) == b"".join(chunks)
