"""What becomes whole again, and by what: full backups, other copies, the view, deleting."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.check.against_rebuild import check_view
from storage.check.check import CheckReport, Damage, check_point
from storage.domain.domain import Domain
from storage.domain.session import Session
from storage.errors import Damaged, StorageError
from storage.files.fs import OsFs
from storage.format.packs import read_footer
from storage.format.record import SessionKind
from storage.log.fold import Garbage
from storage.point import Point
from storage.view import tables
from tests.damage.site import Site, look, readable
from tests.store import Saved, cluster, dump, files, open_domain, save

WAYS_TO_BREAK_A_PACK = ("gone", "table", "header", "cut", "empty")


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x20
    path.chmod(0o600)
    path.write_bytes(content)


def break_file(path: Path, how: str) -> None:
    size = path.stat().st_size
    match how:
        case "gone":
            path.unlink()
        case "table":
            flip(path, size - 60)
        case "header":
            flip(path, 4)
        case "cut":
            path.write_bytes(path.read_bytes()[: size // 2])
        case _:
            path.write_bytes(b"")


def checked(site: Site, domain: Domain | None = None) -> CheckReport:
    """A deep check, whose findings the domain is told."""

    def told(damage: Damage) -> None:
        if domain is not None and damage.pack:
            domain.trust.withdraw(damage.pack, frozenset({damage.chunk}) if damage.chunk else None)

    return check_point(str(site.path), deep=True, on_damage=told)


def heal(site: Site, domain: Domain) -> None:
    """A full backup of everything that there is a backup of."""
    for image in site.images:
        save(domain, image.content)


def whole(site: Site, domain: Domain) -> bool:
    return all(readable(domain, image) == [] for image in site.images)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_chunk_is_stored_anew_by_the_next_full_backup(own: Site, seed: int) -> None:
    chance = random.Random(seed)
    pack = chance.choice(own.files()["packs"])
    _, entries = read_footer(OsFs(), str(pack))
    entry = chance.choice(entries)
    flip(pack, entry.offset + 56 + chance.randrange(entry.stored_len))
    with own.opened() as domain:
        assert not whole(own, domain)
        save(domain, own.images[0].content)
        assert not checked(own, domain).clean
        stored = domain.stats().stored_bytes
        heal(own, domain)
        assert whole(own, domain)
        assert 0 < domain.stats().stored_bytes - stored < 3 * 65536
        assert checked(own).findings == []
        heal(own, domain)
        domain.reclaim(sparse_below=1.0)
        assert domain.trust.withdrawn() == {}
        assert checked(own).findings == []
        assert whole(own, domain)
        assert check_view(domain) == []


@pytest.mark.parametrize("how", WAYS_TO_BREAK_A_PACK)
@pytest.mark.parametrize("anew", [False, True], ids=["view", "rebuilt"])
def test_a_broken_pack_is_stored_anew(own: Site, how: str, anew: bool) -> None:
    pack = own.files()["packs"][0]
    break_file(pack, how)
    if anew:
        shutil.rmtree(own.root / "views")
        shutil.rmtree(own.root / "checkpoints")
    with own.opened() as domain:
        report = checked(own, domain)
        assert str(pack) in {found.path for found in report.findings}
        assert report.disks
        if anew:
            assert not whole(own, domain)
            assert domain.losses().chunks
            assert domain.losses().packs == (f"{pack.parent.name}/{pack.name}",)
            domain.reclaim(sparse_below=1.0)
            assert domain.losses().packs, "gc threw away what may hold the only copy"
        heal(own, domain)
        assert whole(own, domain)
        domain.reclaim()
        assert not pack.exists()
        assert not domain.losses()
        assert checked(own).findings == []
        assert check_view(domain) == []
        domain.rebuild()
        assert whole(own, domain)


def test_a_full_backup_that_trusts_damage_heals_nothing(own: Site) -> None:
    """Why the domain has to be told: without that the same content is a hit."""
    pack = own.files()["packs"][0]
    flip(pack, 64 + 56 + 5)
    with own.opened() as domain:
        heal(own, domain)
        assert not whole(own, domain)


@pytest.mark.parametrize("how", WAYS_TO_BREAK_A_PACK)
@pytest.mark.parametrize("number", range(4))
def test_a_broken_manifest_is_written_anew_from_the_view(own: Site, how: str, number: int) -> None:
    manifest = own.files()["manifests"][number]
    break_file(manifest, how)
    with own.opened() as domain:
        assert whole(own, domain)
        assert not checked(own).clean
        assert domain.rewrite_manifests({f"{manifest.parent.name}/{manifest.name}"}) >= 1
        assert not manifest.exists()
        assert checked(own).findings == []
        domain.rebuild()
        assert whole(own, domain)
        assert check_view(domain) == []


def test_a_map_that_can_not_be_read_for_a_while_is_not_written_anew_as_empty(
    own: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The view is made anew when the session begins and when it ends, and only the first time
    without the manifest."""
    manifest = own.files()["manifests"][0]
    away = own.path / "away"
    begin, retire = Domain.begin, Session.retire

    def begin_without(domain: Domain, kind: SessionKind) -> Session:
        session = begin(domain, kind)
        manifest.rename(away)
        domain.rebuild()
        assert domain.losses().disks
        return session

    def retire_with(session: Session, *plan: Any) -> Garbage:
        away.rename(manifest)
        domain.rebuild()
        return retire(session, *plan)

    with own.opened() as domain, monkeypatch.context() as patched:
        patched.setattr(Domain, "begin", begin_without)
        patched.setattr(Session, "retire", retire_with)
        assert domain.rewrite_manifests({f"{manifest.parent.name}/{manifest.name}"}) == 0
        domain.rebuild()
        assert whole(own, domain)


@pytest.mark.parametrize("number", range(4))
def test_a_broken_manifest_without_a_view_hits_who_needs_it_and_nobody_else(
    own: Site, number: int
) -> None:
    manifest = own.files()["manifests"][number]
    break_file(manifest, "table")
    shutil.rmtree(own.root / "views")
    shutil.rmtree(own.root / "checkpoints")
    hit = {backup for found in checked(own).findings for backup in found.backups}
    with own.opened() as domain:
        packs = set(own.files()["packs"])
        for image in own.images:
            if image.saved.backup in hit:
                with pytest.raises(Damaged, match="manifest"):
                    domain.disk_map(image.saved.disk)
            else:
                assert readable(domain, image) == []
        assert hit == {disk.backup for disk in checked(own).disks}
        domain.reclaim(sparse_below=1.0)
        assert set(own.files()["packs"]) == packs, "gc works while it can't know what is needed"
        for image in own.images:
            if image.saved.backup in hit:
                domain.forget([image.saved.backup])
        assert not domain.losses()
        fresh = [(save(domain, image.content), image.content) for image in own.images]
        domain.reclaim(sparse_below=1.0)
        assert checked(own).findings == []
        domain.rebuild()
        for saved, content in fresh:
            assert look_at(domain, saved) == content


def look_at(domain: Domain, saved: Saved) -> bytes:
    content, holes = look(domain, saved)
    assert holes == []
    return content


@pytest.mark.parametrize("how", WAYS_TO_BREAK_A_PACK)
def test_a_broken_pack_keeps_only_what_it_holds_from_being_imported(own: Site, how: str) -> None:
    point = Point.open(str(own.path))
    with own.opened() as domain, domain.view.read() as state:
        newest = max((row.number, pack) for pack, row in tables.packs.scan(state))[1]
    break_file(own.root / "packs" / newest, how)
    mine = open_domain(point, cluster("mine"), "host-9")
    source, (kept, lost) = own.label.cluster_uuid, own.images[2:]
    with pytest.raises(StorageError, match=newest):
        mine.import_backups(source, [lost.saved.backup], lambda row: row.label)
    assert files(mine) == set()
    mine.import_backups(source, [kept.saved.backup], lambda row: row.label)
    assert look_at(mine, kept.saved) == kept.content
    mine.close()


def second_host(site: Site) -> Domain:
    return open_domain(Point.open(str(site.path)), site.label, "host-2")


@pytest.mark.parametrize("act", ["gc", "forget", "backup"])
def test_a_host_whose_view_lacks_something_follows_one_whose_view_does_not(
    own: Site, act: str
) -> None:
    pack, manifest = own.files()["packs"][0], own.files()["manifests"][0]
    with own.opened() as sound:
        break_file(pack, "table")
        break_file(manifest, "table")
        shutil.rmtree(own.root / "checkpoints")
        (own.root / "checkpoints").mkdir()
        lacking = second_host(own)
        assert lacking.losses().disks
        acts: dict[str, Callable[[], object]] = {
            "gc": lambda: sound.reclaim(sparse_below=1.0),
            "forget": lambda: sound.forget([own.images[0].saved.backup]),
            "backup": lambda: save(sound, own.images[1].content),
        }
        acts[act]()
        assert lacking.refresh() == sound.refresh()
        assert lacking.backups() == sound.backups()
        save(lacking, own.images[0].content)
        assert sound.refresh() == lacking.refresh()
        lacking.close()


def test_a_view_without_losses_is_what_it_always_was(own: Site) -> None:
    with own.opened() as domain:
        before = dump(domain)
        domain.rebuild()
        assert dump(domain) == before
