"""Chunks that are stored as patches of others, from the encoder to the domain."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from storage.check.against_rebuild import check_view
from storage.check.check import check_point
from storage.domain.domain import Domain
from storage.domain.session import NewBackup
from storage.errors import ChunkMissing, Damaged, PointFull, Refused
from storage.format.chunks import Decoder, Encoder
from storage.format.patches import BLOCK_BYTES, PatchEncoder, changed_blocks, parse_patch, patched
from storage.point import Point
from storage.view import sorted_runs
from tests.store import (
    CHUNK,
    Saved,
    cluster,
    dump,
    edited,
    files,
    live_files,
    load,
    new_point,
    new_uuid,
    open_domain,
    patches,
    read_chunk,
    save,
)

ONE, TWO = b"1" * 32, b"2" * 32
BLOCKS = CHUNK // BLOCK_BYTES


@pytest.fixture
def point(tmp_path: Path) -> Point:
    return new_point(tmp_path)


@pytest.fixture
def domain(point: Point) -> Domain:
    return open_domain(point, cluster())


def frame_of(content: bytes, base: bytes, stored_len: int = CHUNK) -> bytes | None:
    frame = PatchEncoder().encode(TWO, memoryview(content), ONE, base, stored_len)
    return None if frame is None else bytes(frame.payload)


# One patch.


@pytest.mark.parametrize("size", [CHUNK, CHUNK - 100, 5 * BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
@pytest.mark.parametrize("noise", [True, False])
def test_what_was_changed_comes_back(size: int, noise: bool) -> None:
    base = os.urandom(size - 1) + b"\x01"
    changed = bytearray(base)
    last = (size - 1) // BLOCK_BYTES * BLOCK_BYTES
    other = bytes(byte ^ 0xFF for byte in base[last:])
    changed[last:] = other if noise else bytes(size - last)
    payload = frame_of(bytes(changed), base)
    assert payload is not None
    assert len(payload) < 32 + 2 + (size - last if noise else 100) + 1
    assert patched(payload, size, base, Decoder()) == changed


def test_which_blocks_differ() -> None:
    base = bytes(CHUNK)
    changed = edited(base, 0, 3, BLOCKS - 1)
    assert changed_blocks(base, memoryview(changed)) == [0, 3, BLOCKS - 1]


def test_what_does_not_pay_is_no_patch() -> None:
    base = os.urandom(CHUNK)
    half = edited(base, *range(BLOCKS // 2))
    more = edited(base, *range(BLOCKS // 2 + 1))
    assert frame_of(half, base, 1 << 30) is not None
    assert frame_of(more, base, 1 << 30) is None
    one = edited(base, 4)
    size = len(frame_of(one, base) or b"")
    assert frame_of(one, base, 4 * size) is not None
    assert frame_of(one, base, 4 * size - 1) is None
    assert frame_of(base, base) is None
    assert frame_of(base[:-1], base) is None


def test_payloads_that_lie() -> None:
    base, changed = os.urandom(CHUNK), b""
    changed = edited(base, 2, 5)
    good = frame_of(changed, base) or b""
    head = 32 + BLOCKS // 8
    for bad in (
        good[:head],
        good[:32] + bytes(BLOCKS // 8) + good[head:],
        good[:32] + b"\xff" * (BLOCKS // 8) + good[head:],
        good[:32] + b"\x24\x01" + good[head:],
        good + b"x",
        good[:-1],
        good[:head] + os.urandom(2 * BLOCK_BYTES + 1),
        good[:head] + os.urandom(200),
    ):
        with pytest.raises(Damaged):
            patched(bad, CHUNK, base, Decoder())
    with pytest.raises(Damaged):
        patched(good, CHUNK, base[:-1], Decoder())
    with pytest.raises(Damaged):  # a bit for a block behind the end
        parse_patch(good[:32] + b"\x24\x80" + good[head:], CHUNK - BLOCK_BYTES)


# A domain with patches.


def three(domain: Domain) -> tuple[list[bytes], list[Saved]]:
    """A full backup and two incrementals with small changes, the second on top of the first."""
    first = os.urandom(4 * CHUNK + 5000)
    second = edited(first, 1, 20, 64)
    images = [first, second, edited(second, 2, 40)]
    made: list[Saved] = []
    for image in images:
        made.append(save(domain, image, made[-1] if made else None))
    return images, made


def require_sound(point: Point, domain: Domain) -> None:
    """Everything that can be said of a point: it is clean, and the view is what a rebuild gives."""
    assert check_point(point.path, deep=True).findings == []
    assert check_view(domain) == []
    before = dump(domain)
    domain.rebuild()
    assert dump(domain) == before


def test_a_small_change_is_stored_small(point: Point, domain: Domain) -> None:
    images, made = three(domain)
    stored = [sum(os.path.getsize(p) for p in pack_paths(domain, one)) for one in (1, 2)]
    assert max(stored) < 15_000
    for image, saved in zip(images, made, strict=True):
        assert load(domain, saved) == image
    first = {domain.hasher.full(images[0][at : at + CHUNK]) for at in range(0, 4 * CHUNK, CHUNK)}
    found = patches(domain)
    assert set(found.values()) <= first | {domain.hasher.full(images[0][4 * CHUNK :])}
    assert len(found) == 4  # chunks 0 and 1; then 0 again, against what 0 stands on, and 2
    require_sound(point, domain)


def pack_paths(domain: Domain, number: int) -> list[str]:
    with domain.view.read() as state:
        name = (state.table("pack_ids").get(number.to_bytes(4, "big")) or b"").decode()
    return [domain.paths.pack(name)]


def test_a_base_lives_as_long_as_its_patches(point: Point, domain: Domain) -> None:
    images, made = three(domain)
    domain.forget([made[0].backup])
    domain.reclaim(sparse_below=0.95)
    assert load(domain, made[1]) == images[1]
    domain.forget([made[1].backup])
    domain.reclaim(sparse_below=0.95)
    assert load(domain, made[2]) == images[2]
    require_sound(point, domain)
    domain.forget([made[2].backup])
    assert dump(domain)["chunks"] == {}
    domain.reclaim()
    assert files(domain) == live_files(domain) == set()


def test_a_patch_is_stored_whole_when_its_base_has_gone(point: Point, domain: Domain) -> None:
    """The base goes between the session's look-up and its commit."""
    images, made = three(domain)
    chunk = edited(images[0], 3)[:CHUNK]
    chunk_id = domain.hasher.full(chunk)
    base_id = domain.hasher.full(images[0][:CHUNK])
    saved = Saved(new_uuid(), new_uuid())
    with domain.begin("backup") as session:
        base = session.bases({chunk_id: base_id})[chunk_id]
        content = read_chunk(domain, base.chunk_id)
        frame = PatchEncoder().encode(
            chunk_id, memoryview(chunk), base.chunk_id, content, base.stored_len
        )
        assert frame is not None
        session.store([frame])
        session.manifest(saved.disk, CHUNK, None).add_page(0, {0: chunk_id})
        domain.forget([one.backup for one in made])
        with pytest.raises(ChunkMissing) as missing:
            session.commit([NewBackup(saved.backup, b"", [saved.disk])])
        assert missing.value.ids == {chunk_id}
        session.store([Encoder().encode(chunk_id, chunk)], again=True)
        session.commit([NewBackup(saved.backup, b"", [saved.disk])])
    assert load(domain, saved) == chunk
    assert patches(domain) == {}
    require_sound(point, domain)


def test_a_base_can_not_become_a_patch(point: Point, domain: Domain) -> None:
    """Two sessions at once: one stores as a patch what the other has made a base."""
    first = os.urandom(CHUNK)
    old = save(domain, first)
    middle, last = edited(first, 1), edited(edited(first, 1), 2)
    saved = Saved(new_uuid(), new_uuid())
    with domain.begin("backup", [old.backup]) as session:
        middle_id = domain.hasher.full(middle)
        frame = PatchEncoder().encode(
            middle_id, memoryview(middle), domain.hasher.full(first), first, CHUNK
        )
        assert frame is not None
        session.store([frame])
        session.manifest(saved.disk, CHUNK, None).add_page(0, {0: middle_id})
        top = save(domain, last, save(domain, middle))
        assert set(patches(domain).values()) == {middle_id}
        with pytest.raises(ChunkMissing) as missing:
            session.commit([NewBackup(saved.backup, b"", [saved.disk])])
        assert missing.value.ids == {middle_id}
        session.store([Encoder().encode(middle_id, middle)], again=True)
        session.commit([NewBackup(saved.backup, b"", [saved.disk])])
    assert load(domain, saved) == middle
    assert load(domain, top) == last
    require_sound(point, domain)


def test_a_stored_again_chunk_lets_its_base_go(point: Point, domain: Domain) -> None:
    """A chunk whose newest copy is whole refers to nothing any more."""
    first = os.urandom(2 * CHUNK)
    second = edited(first, 1, 17)
    full = save(domain, first)
    save(domain, second, full)
    domain.forget([full.backup])
    (chunk, base), *_ = patches(domain).items()
    pack = next(iter(live_files(domain) - {""} & files(domain, "packs"))).removeprefix("packs/")
    for name in sorted(files(domain, "packs")):
        domain.trust.withdraw(name.removeprefix("packs/"))
    assert pack
    anew = save(domain, second)
    assert patches(domain) == {}
    assert base not in dump(domain)["chunks"]
    assert chunk in dump(domain)["chunks"]
    assert load(domain, anew) == second
    require_sound(point, domain)


def test_a_patch_on_a_distrusted_base_is_not_trusted(domain: Domain) -> None:
    images, made = three(domain)
    with domain.begin("backup") as session:
        found = patches(domain)
        assert all(session.known(list(found)))
        domain.trust.withdraw(
            Path(pack_paths(domain, 0)[0]).relative_to(domain.paths.packs).as_posix()
        )
        assert not any(session.known(list(found)))
        new, old = domain.hasher.full(edited(images[0], 9)[:CHUNK]), next(iter(found))
        assert session.bases({new: old}) == {}
    anew = save(domain, images[2], made[2])
    assert load(domain, anew) == images[2]


def test_a_gc_does_not_move_a_patch_away_from_its_base(point: Point, domain: Domain) -> None:
    """What the gc copied as a patch has come to be a base meanwhile: its RETIRE is refused."""
    first = os.urandom(CHUNK)
    second = edited(first, 1)
    full = save(domain, first)
    small = save(domain, second, full)
    (patch_pack,) = [Path(path).parent.name for path in pack_paths(domain, 1)]
    frame = PatchEncoder().encode(
        domain.hasher.full(second), memoryview(second), domain.hasher.full(first), first, CHUNK
    )
    assert frame is not None
    with domain.begin("gc") as session:
        session.store([frame])
        domain.trust.withdraw(f"{patch_pack}/00000000")
        whole = save(domain, second)  # heals it, whole
        top = save(domain, edited(second, 2), whole)
        assert list(patches(domain).values()) == [domain.hasher.full(second)]
        with pytest.raises(Refused):
            session.retire([f"{patch_pack}/00000000"], [])
    assert load(domain, top) == edited(second, 2)
    assert load(domain, small) == second
    require_sound(point, domain)


@pytest.fixture(params=[1, 1 << 20])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large import looks at its chunks in parts: here at one after another, or at all."""
    monkeypatch.setattr(sorted_runs, "IDS_AT_ONCE", request.param)


@pytest.mark.usefixtures("at_once")
def test_an_import_takes_the_bases_along(point: Point) -> None:
    one, two = cluster("one"), cluster("two")
    source, target = open_domain(point, one), open_domain(point, two, "host-2")
    images, made = three(source)
    (row,) = target.import_backups(one.cluster_uuid, [made[2].backup], lambda row: row.label)
    assert load(target, Saved(row.backup, row.disks[0].disk)) == images[2]
    source.forget([saved.backup for saved in made])
    source.reclaim()
    assert load(target, Saved(row.backup, row.disks[0].disk)) == images[2]
    require_sound(point, target)


def test_an_import_without_room_for_what_it_must_remember_changes_nothing(
    point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    one = cluster("one")
    source, target = open_domain(point, one), open_domain(point, cluster("two"), "host-2")
    _, made = three(source)
    monkeypatch.setattr(sorted_runs, "IDS_AT_ONCE", 1)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    drop = Mock()
    monkeypatch.setattr(target.salvage, "drop", drop)
    with pytest.raises(PointFull, match=r"views?"):
        target.import_backups(one.cluster_uuid, [made[2].backup], lambda row: row.label)
    drop.assert_called_once_with()  # a point is never full because of salvage
    assert (target.backups(), files(target, "packs", "manifests", "tmp")) == ([], set())


@pytest.mark.usefixtures("at_once")
def test_an_import_of_patches_of_what_we_have_as_bases(point: Point) -> None:
    """What is a patch there is a base here, and what is a patch here is a base there."""
    one, two = cluster("one"), cluster("two")
    source, target = open_domain(point, one), open_domain(point, two, "host-2")
    a = os.urandom(CHUNK)
    b = edited(a, 1)
    c = edited(b, 2)
    extra = os.urandom(CHUNK)
    theirs = [save(source, a + a), None]
    theirs[1] = save(source, b + extra, theirs[0])
    ours = [save(target, b), None]
    ours[1] = save(target, c, ours[0])
    assert (len(patches(source)), len(patches(target))) == (1, 1)
    rows = target.import_backups(
        one.cluster_uuid, [t.backup for t in theirs if t], lambda row: row.label
    )
    read = [load(target, Saved(row.backup, row.disks[0].disk)) for row in rows]
    assert read == [a + a, b + extra]
    assert [load(target, saved) for saved in ours if saved] == [b, c]
    assert set(patches(target).values()) == {target.hasher.full(b)}
    require_sound(point, target)
