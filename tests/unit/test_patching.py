"""engine.backup.patching: what a backup stores as patches, and what it does when it can't."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.backup.backup import BackupFacts, run_backup
from engine.backup.patching import TRIED_THEN, TRIES_IN_VAIN, Bases
from engine.backup.pipeline import ITEM_BYTES
from storage.files.fs import Buffer
from storage.format.chunks import FRAME_HEADER_BYTES
from storage.view.tables import pack_id, unpack_chunk_row
from tests.rig import Made, Rig, random_bytes, write_at
from tests.store import patches

CHUNK = 64 << 10
BLOCK = 4096


@pytest.fixture
def path(rig: Rig) -> Path:
    found = rig.pool / "v"
    found.write_bytes(random_bytes(40 * CHUNK + 5 * BLOCK))
    return found


def stored(made: Made) -> int:
    return made.context.progress().bytes_stored


def same(rig: Rig, made: Made, path: Path) -> bool:
    return rig.restore(made).read_bytes() == path.read_bytes()


def scatter(path: Path, count: int, seed: int) -> None:
    """Writes a block into as many chunks."""
    for at in range(count):
        write_at(path, at * CHUNK + 3 * BLOCK, random_bytes(BLOCK, seed + at))


def damage(rig: Rig, content: bytes) -> tuple[str, bytes]:
    """Spoils the frame of the chunk of this content; its pack, and its id."""
    chunk = rig.domain.hasher.full(content)
    with rig.domain.view.read() as state:
        row = unpack_chunk_row(state.table("chunks").get_many([chunk])[chunk])
        pack = pack_id(state, row.pack)
    file = Path(rig.domain.paths.pack(pack))
    os.chmod(file, 0o600)
    write_at(file, row.offset + FRAME_HEADER_BYTES + 5, b"damage")
    return pack, chunk


def test_scattered_writes_are_stored_as_what_they_are(rig: Rig, path: Path) -> None:
    full = rig.back_up(path)
    scatter(path, 30, 100)
    made = rig.back_up(path, parent=full)
    assert 30 * BLOCK < stored(made) < 30 * (BLOCK + 200)
    assert same(rig, made, path)
    before = path.read_bytes()
    scatter(path, 10, 200)  # the same blocks: not more than one differs from the base
    again = rig.back_up(path, parent=made)
    assert stored(again) < 10 * (BLOCK + 200)
    assert same(rig, again, path)
    assert rig.restore(made).read_bytes() == before
    assert len(patches(rig.domain)) == 40


def test_what_has_changed_for_the_most_part_is_stored_whole(rig: Rig, path: Path) -> None:
    full = rig.back_up(path)
    write_at(path, 0, random_bytes(CHUNK // 2, 5))
    made = rig.back_up(path, parent=full)
    assert stored(made) == CHUNK + FRAME_HEADER_BYTES
    assert patches(rig.domain) == {}


def test_of_a_disk_that_was_written_anew_few_chunks_are_compared(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = rig.pool / "v"
    path.write_bytes(random_bytes(512 * CHUNK, 1))
    full = rig.back_up(path)
    compared: list[bytes] = []
    read = Bases.read

    def noted(self: Bases, ids: list[bytes], buffer: memoryview) -> Iterator[tuple[bytes, Buffer]]:
        compared.extend(ids)
        return read(self, ids, buffer)

    monkeypatch.setattr(Bases, "read", noted)
    path.write_bytes(random_bytes(512 * CHUNK, 2))
    made = rig.back_up(path, parent=full, workers=1)
    assert len(compared) == TRIES_IN_VAIN + (512 - TRIES_IN_VAIN) // TRIED_THEN
    assert same(rig, made, path)


def test_what_has_changed_a_little_is_a_patch_also_behind_much_that_is_new(rig: Rig) -> None:
    path = rig.pool / "v"
    path.write_bytes(random_bytes(512 * CHUNK, 1))
    full = rig.back_up(path)
    write_at(path, 0, random_bytes(256 * CHUNK, 2))
    for at in range(256, 512):
        write_at(path, at * CHUNK, random_bytes(BLOCK, at))
    made = rig.back_up(path, parent=full, workers=1)
    item_chunks = ITEM_BYTES // CHUNK  # what is planned before the first of it is compared
    assert len(patches(rig.domain)) >= 256 - item_chunks
    assert same(rig, made, path)


def test_a_full_backup_makes_no_patches(rig: Rig, path: Path) -> None:
    rig.back_up(path)
    scatter(path, 1, 1)
    rig.back_up(path)
    assert patches(rig.domain) == {}


def test_a_damaged_base_is_no_base(rig: Rig, path: Path) -> None:
    """The chunks are stored whole, the backup says so, and it restores."""
    full = rig.back_up(path)
    pack, chunk = damage(rig, path.read_bytes()[:CHUNK])
    scatter(path, 40, 1)  # all whole chunks of the disk: nothing else is needed of the damaged one
    made = rig.back_up(path, parent=full)
    assert made.result is not None
    notes = " ".join(made.result.facts.notes)
    assert "1 of the parent's are damaged" in notes
    assert 39 * BLOCK + CHUNK < stored(made) < 39 * (BLOCK + 200) + CHUNK + 200
    assert same(rig, made, path)
    assert rig.domain.trust.withdrawn() == {pack: frozenset({chunk})}


def test_what_stands_on_a_damaged_base_elsewhere_on_the_disk_is_stored_anew(
    rig: Rig, path: Path
) -> None:
    """Else it would be acknowledged as unchanged, though known to be damaged."""
    twice = path.read_bytes()[:CHUNK]
    for at in (20, 30):
        write_at(path, at * CHUNK, twice)
    write_at(path, 10 * CHUNK, bytes(CHUNK))
    full = rig.back_up(path)
    write_at(path, 10 * CHUNK, twice)
    write_at(path, 30 * CHUNK, random_bytes(BLOCK, 1))
    middle = rig.back_up(path, parent=full)
    assert len(patches(rig.domain)) == 1
    damage(rig, twice)
    scatter(path, 1, 2)  # so that the base is read
    made = rig.back_up(path, parent=middle)
    assert made.result is not None
    assert made.result.facts.incremental
    assert same(rig, made, path)
    assert stored(made) < 4 * CHUNK
    assert rig.domain.trust.withdrawn() == {}


def test_a_chunk_that_was_known_and_is_then_found_damaged_is_stored_anew(
    rig: Rig, path: Path
) -> None:
    content = path.read_bytes()[30 * CHUNK : 31 * CHUNK]
    full = rig.back_up(path)
    damage(rig, content)
    write_at(path, 0, content)  # on the point already, as far as anybody knows
    write_at(path, 30 * CHUNK, random_bytes(BLOCK, 1))  # of which it is read as the base
    made = rig.back_up(path, parent=full, workers=1)
    assert same(rig, made, path)
    assert stored(made) < 3 * CHUNK
    assert rig.domain.trust.withdrawn() == {}


def test_a_base_that_goes_before_the_commit(rig: Rig, path: Path) -> None:
    """Its patch is stored whole, from the snapshot, and the backup is made."""
    full = rig.back_up(path)
    scatter(path, 1, 1)
    middle = rig.back_up(path, parent=full)
    copy = rig.pool / "w"
    copy.write_bytes(path.read_bytes())
    scatter(path, 1, 2)
    work, made = rig.plan(path, parent=middle)

    def meanwhile(facts: BackupFacts) -> bytes:
        """Another backup stores the middle one's chunks whole, and what they stood on goes."""
        assert len(patches(rig.domain)) == 1
        rig.domain.forget([full.backup])
        with rig.domain.view.read() as state:
            packs = [key.decode() for key, _ in state.table("packs").scan()]
        for pack in packs:
            rig.domain.trust.withdraw(pack)
        rig.back_up(copy)
        return work.make_label(facts)

    run_backup(replace(work, make_label=meanwhile), made.context)
    assert patches(rig.domain) == {}
    assert same(rig, made, path)
