"""The view's file, damaged at seeded places: it is noticed, and the view is made anew by itself.

Whatever is damaged, each backup restores right, the state is what the log says, and no file that
somebody needs is unlinked. More places: VMKEEP_DAMAGE=20000 pytest tests/damage.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from storage.check.check import check_point
from storage.domain.domain import Domain
from storage.errors import ViewDamaged
from storage.lmdb_env.pages import require_sound_pages
from storage.view import tables
from storage.view.lmdb_tables import LmdbTables
from storage.view.memory_tables import MemoryTables
from storage.view.view import View
from tests.damage import site as sites
from tests.damage.site import HOST, Site, readable
from tests.store import dump, load, save

PLACES = max(200, int(os.environ.get("VMKEEP_DAMAGE", "2000")) // 8)
PAGE = 4096
SMALL_TABLES = ("sessions", "backups", "disks", "manifests", "packs", "pack_ids")


def data_file(site: Site) -> Path:
    return site.root / "views" / HOST / "data.mdb"


def exchange_pages(chance: random.Random, content: bytes, _other: bytes) -> bytes:
    one, two = sorted(chance.sample(range(len(content) // PAGE), 2))
    pages = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
    pages[one], pages[two] = pages[two], pages[one]
    return b"".join(pages)


def repeat_page(chance: random.Random, content: bytes, _other: bytes) -> bytes:
    one, two = chance.sample(range(len(content) // PAGE), 2)
    at = two * PAGE
    return content[:at] + content[one * PAGE : (one + 1) * PAGE] + content[at + PAGE :]


def older_page(chance: random.Random, content: bytes, other: bytes) -> bytes:
    """A write was lost: the page is what it was in an earlier state of the file."""
    at = chance.randrange(min(len(other), len(content)) // PAGE) * PAGE
    return content[:at] + other[at : at + PAGE] + content[at + PAGE :]


WAYS = (*sites.WAYS[:-2], exchange_pages, repeat_page, older_page, older_page, sites.replaced)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "closed"])
def test_a_damaged_view_is_never_believed(own: Site, killed: bool) -> None:
    """`killed`: without the seal that only closing gives."""
    older = data_file(own).read_bytes()
    with own.opened() as domain:
        domain.forget([own.images[2].saved.backup])
        save(domain, b"something else" * 100_000)
    shutil.rmtree(own.path.parent / "views")
    shutil.copytree(own.root / "views", own.path.parent / "views")
    kept = [own.images[0], own.images[1], own.images[3]]
    chance = random.Random(f"view {killed}")
    with own.opened() as domain:
        sound = dump(domain)
    whole = data_file(own).read_bytes()
    tried = 0
    while tried < PLACES:
        way = chance.choice(WAYS)
        changed = way(chance, whole, older)
        if changed == whole:
            continue
        tried += 1
        assert changed is not None
        data_file(own).write_bytes(changed)
        if killed:
            data_file(own).with_name("data.mdb.seal").unlink()
        try:
            with own.opened() as domain:
                assert dump(domain) == sound, way.__name__
                assert all(not readable(domain, image) for image in kept)
        finally:
            own.restore_view()


def test_a_sound_view_is_not_made_anew(
    site: Site, memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither after a close nor after a kill at any commit."""
    copies = memory / "copies"
    copies.mkdir()
    path = memory / "grown" / "view"
    view = View(str(path), b"kept")
    chance = random.Random(3)
    for number in range(60):

        def change(state: LmdbTables) -> None:
            for _ in range(chance.randrange(200)):
                key = chance.randrange(300).to_bytes(12, "big")
                name = chance.choice(("pages", "chunks"))
                state.table(name).put(key, chance.randbytes(chance.choice((3, 300, 9000))))
                state.table(name).delete(chance.randrange(300).to_bytes(12, "big"))

        view.update(change)
        shutil.copyfile(path / "data.mdb", copies / str(number))
    view.close()
    for copy in copies.iterdir():
        require_sound_pages(str(copy))
    View(str(path), b"kept").close(seal=True)
    View(str(path), b"kept").close()
    shutil.rmtree(copies)
    with caplog.at_level(logging.WARNING), site.opened():
        pass
    assert "view" not in caplog.text


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "closed"])
@pytest.mark.parametrize("name", ["data.mdb", "data.mdb.seal"])
def test_a_view_that_cant_be_read_is_made_anew(
    own: Site, monkeypatch: pytest.MonkeyPatch, name: str, killed: bool
) -> None:
    """A bad sector below it is no reason for the point to be called unreachable."""
    if killed and name != "data.mdb.seal":
        data_file(own).with_name("data.mdb.seal").unlink()
    before = sites.cant_read(monkeypatch, data_file(own).with_name(name))
    with own.opened() as domain:
        assert all(readable(domain, image) == [] for image in own.images)
    assert data_file(own).with_name(name).stat().st_ino != before


def test_an_older_copy_of_the_view_is_brought_up_to_date(own: Site) -> None:
    """Also when files that it names are gone since."""
    before = {path.name: path.read_bytes() for path in data_file(own).parent.glob("data.mdb*")}
    with own.opened() as domain:
        domain.forget([own.images[2].saved.backup])
        saved = save(domain, b"newer" * 100_000)
        domain.reclaim(sparse_below=1.0)
        state = dump(domain)
    for name, content in before.items():
        data_file(own).with_name(name).write_bytes(content)
    with own.opened() as domain:
        assert dump(domain) == state
        assert load(domain, saved) == b"newer" * 100_000


# Damage that comes while the service runs. What LMDB itself may trip over ends the process, and the
# next start proves the file; these are rows that LMDB gives as if nothing had happened.


def flipped(chance: random.Random, name: str, key: bytes, state: LmdbTables) -> None:
    """A bit of the row has changed."""
    table = state.table(name)
    row = bytearray(table._txn.get(key, db=table._db) or b"")
    row[chance.randrange(len(row))] ^= 1 << chance.randrange(8)
    table._txn.put(key, bytes(row), db=table._db)


def lost(_chance: random.Random, name: str, key: bytes, state: LmdbTables) -> None:
    """LMDB does not come upon the row any more."""
    table = state.table(name)
    table._txn.delete(key, db=table._db)


@pytest.mark.parametrize("name", [*SMALL_TABLES, "chunks", "pages"])
@pytest.mark.parametrize("how", [flipped, lost])
def test_rows_that_go_wrong_beside_us(
    own: Site, name: str, how: Callable[[random.Random, str, bytes, LmdbTables], None]
) -> None:
    """A restore, a new backup, a delete with gc: right, or refused, and right the next time."""
    chance = random.Random(f"{name} {how.__name__}")
    first, second, third, last = own.images
    kept = [first, second, last]
    with own.opened() as domain:
        domain.begin("read", [first.saved.backup])  # so that there is a session
        for work in (_restore_all, _forget_and_gc, _back_up, _restore_all):
            keys = domain.view.ask(lambda state: [key for key, _ in state.table(name).scan()])
            if not keys:
                continue
            domain.view.update(partial(how, chance, name, chance.choice(keys)))
            images = [*kept, third] if domain_has(domain, third.saved.backup) else kept
            with contextlib.suppress(ViewDamaged):
                work(domain, images, third)
            images = kept if work is _forget_and_gc else images
            domain.prove_view()
            state = dump(domain)
            domain.rebuild()
            assert dump(domain) == state
            assert all(readable(domain, image) == [] for image in images)
    assert not check_point(str(own.path), deep=True).disks


def domain_has(domain: Domain, backup: str) -> bool:
    return backup in {row.backup for row in domain.backups()}


def _restore_all(domain: Domain, images: list[sites.Image], _gone: sites.Image) -> None:
    for image in images:
        assert load(domain, image.saved) == image.content


def _forget_and_gc(domain: Domain, _images: list[sites.Image], gone: sites.Image) -> None:
    domain.forget([gone.saved.backup])
    domain.reclaim(sparse_below=1.0)


def _back_up(domain: Domain, images: list[sites.Image], _gone: sites.Image) -> None:
    base = images[1]
    content = base.content[:-7] + b"changed"
    assert load(domain, save(domain, content, base.saved)) == content


def test_gc_believes_no_count_alone(own: Site) -> None:
    """A pack that a row calls dead, and one that no row knows: neither is unlinked."""
    packs = set(own.files()["packs"])

    with own.opened() as domain:
        domain.view.update(_call_packs_dead)
        domain.reclaim(sparse_below=0.0)
        keys = domain.view.ask(lambda state: [key for key, _ in state.table("packs").scan()])
        domain.view.update(partial(lost, random.Random(1), "packs", keys[0]))
        domain.reclaim()
        assert all(readable(domain, image) == [] for image in own.images)
    assert packs <= set(own.files()["packs"])


def _call_packs_dead(state: LmdbTables) -> None:
    """As an older version of each row, whose check is right, would."""
    rows = list(tables.packs.scan(state))
    before = MemoryTables()
    for pack, row in rows:
        number, size, count, digest = row.number, row.size_bytes, row.count, row.digest
        tables.packs.put(before, pack, tables.PackState(number, size, count, digest))
    table = state.table("packs")
    for key, value in before.table("packs").scan():
        table._txn.put(key, table.with_check(key, value), db=table._db)


def test_a_view_that_its_proof_makes_anew_is_no_checkpoint_if_it_lacks_something(own: Site) -> None:
    """A pack that was damaged after it had been folded: only a view made anew lacks it."""
    with own.opened() as domain:
        pack = own.files()["packs"][0]
        pack.write_bytes(pack.read_bytes()[:-1])
        before = own.files()["checkpoints"]
        key = domain.view.ask(lambda state: next(key for key, _ in state.table("chunks").scan()))
        domain.view.update(partial(lost, random.Random(1), "chunks", key))
        assert not domain.losses()
        domain.checkpoint()
        assert domain.losses()
        assert own.files()["checkpoints"] == before


@pytest.mark.parametrize("ask", [Domain.refresh_to_end, Domain.require_own_past])
def test_whether_the_log_is_ours_is_asked_of_a_view_that_is_whole(
    own: Site, ask: Callable[[Domain], None]
) -> None:
    """Each look at a point begins with that: nothing else would mend the view."""
    with own.opened() as domain:
        before = dump(domain)
        domain.view.update(partial(flipped, random.Random(1), "meta", b"applied"))
        ask(domain)
        assert dump(domain) == before


def test_a_manifest_that_somebody_needs_stays(own: Site) -> None:
    """Though the count of its users is an older one."""
    first, second, _, last = own.images

    def one_user(state: LmdbTables) -> None:
        table, before = state.table("manifests"), MemoryTables()
        for name, row in list(tables.manifests.scan(state)):
            fewer = tables.ManifestState(row.size_bytes, row.count, row.digest, row.base, 1)
            tables.manifests.put(before, name, fewer)
        for key, value in before.table("manifests").scan():
            table._txn.put(key, table.with_check(key, value), db=table._db)

    with own.opened() as domain:
        domain.view.update(one_user)
        with contextlib.suppress(ViewDamaged):
            domain.forget([first.saved.backup])
        domain.rebuild()
        assert domain.losses().disks == ()
        assert load(domain, second.saved) == second.content
        assert load(domain, last.saved) == last.content
