"""Another cluster's domain is untrusted input: its log is well formed, its digests are right, and
what it says is a lie. Nothing of it may end, fill or hang a listing or an import of others."""

from __future__ import annotations

import os
import random
import tracemalloc
from pathlib import Path

import msgspec
import pytest

from engine.catalogue.labels import UNREADABLE_NAME
from storage.domain.domain import Domain
from storage.errors import Damaged, NotOnPoint, StorageError
from storage.format.bundles import RECORDS_PER_BUNDLE
from storage.format.manifests import encode_page
from storage.format.record import (
    LABEL_LIMIT_BYTES,
    Abort,
    BackupSeal,
    Commit,
    DiskSeal,
    FileSeal,
    Forget,
    Record,
)
from storage.log.log import Log, record_path
from storage.point import ClusterLabel, Point
from storage.view import memory_tables
from storage.view.listing import BackupRow
from tests import forging
from tests.engine_rig import EngineRig, disk_bytes
from tests.hostile.forger import HUGE, Forger, S, opened
from tests.hostile.mutating import ROUNDS, mutants, peak_bytes
from tests.store import (
    files,
    image_of,
    load,
    new_uuid,
    open_domain,
    save,
)

MIB = 1 << 20


def assert_not_imported(mine: Domain, evil: Forger, backup: str) -> None:
    with pytest.raises(StorageError):
        mine.import_backups(evil.uuid, [backup], lambda row: row.label)
    assert (mine.backups(), files(mine, "packs", "manifests", "tmp")) == ([], set())
    kept = save(mine, image_of(1, 2))
    assert load(mine, kept) == image_of(1, 2)


def test_the_forger_can_also_tell_the_truth(point: Point, mine: Domain, evil: Forger) -> None:
    chunk = image_of(7)
    chunk_id = mine.hasher.full(chunk)
    frame, row = (
        forging.frame(chunk_id, 0, len(chunk), chunk),
        forging.pack_row(64, chunk_id, 0, len(chunk), chunk),
    )
    manifest = evil.manifest([(0, encode_page({0: chunk_id}))], len(chunk))
    backup = evil.commit(manifest, (evil.pack(frame, [row]),), capacity=len(chunk))
    assert [found.backup for found in point.foreign_backups(evil.uuid)] == [backup]
    (found,) = mine.import_backups(evil.uuid, [backup], lambda row: row.label)
    assert mine.disk_map(found.disks[0].disk).page(0) == {0: chunk_id}


def test_a_manifest_that_is_its_own_base(point: Point, mine: Domain, evil: Forger) -> None:
    """A session that commits twice, its second manifest under the name of the first."""
    manifest = evil.manifest([], 100)
    first, disk = new_uuid(), new_uuid()
    base = DiskSeal(disk=disk, capacity=100, manifest=0)
    child = DiskSeal(disk=new_uuid(), capacity=100, manifest=0, parent=disk)
    backup = new_uuid()
    evil.append(opened(S))
    evil.append(
        Commit(
            session=S,
            manifests=(manifest,),
            backups=(BackupSeal(backup=first, label=b"", disks=(base,)),),
        )
    )
    evil.append(opened(S))
    evil.append(
        Commit(
            session=S,
            manifests=(manifest,),
            backups=(BackupSeal(backup=backup, label=b"", disks=(child,), parent=first),),
        )
    )
    assert_not_imported(mine, evil, backup)
    with pytest.raises(StorageError):
        point.foreign_backups(evil.uuid)


@pytest.mark.parametrize("capacity", [1, HUGE, (1 << 62) - 1])
def test_capacities_that_are_not_the_manifests(mine: Domain, evil: Forger, capacity: int) -> None:
    page = encode_page({0: random.Random(3).randbytes(32)})
    manifest = evil.manifest([(0, page), (1 << 20, page)], (1 << 64) - 1)
    backup = evil.commit(manifest, capacity=capacity)
    assert peak_bytes(lambda: assert_not_imported(mine, evil, backup)) < 16 * MIB


@pytest.mark.parametrize("kind", [0, 1])
def test_zero_marks_in_a_full_disk(mine: Domain, evil: Forger, kind: int) -> None:
    manifest = evil.manifest([(0, encode_page({0: bytes(32)}))], 100, kind)
    assert_not_imported(mine, evil, evil.commit(manifest, capacity=100))


def test_a_pack_that_lies_about_a_chunk_of_ours(mine: Domain, evil: Forger) -> None:
    """It says that it has our chunk, and holds another: it must not take ours's place."""
    chunk = image_of(1)
    kept = save(mine, chunk)
    ours, other = mine.hasher.full(chunk), mine.hasher.full(image_of(2))
    items, rows = b"", []
    for chunk_id in (ours, other):
        rows.append(forging.pack_row(64 + len(items), chunk_id, 0, len(chunk), image_of(3)))
        items += forging.frame(chunk_id, 0, len(chunk), image_of(3))
    manifest = evil.manifest([(0, encode_page({0: ours, 1: other}))], 2 * len(chunk))
    backup = evil.commit(manifest, (evil.pack(items, rows),), capacity=2 * len(chunk))
    with pytest.raises(StorageError):
        mine.import_backups(evil.uuid, [backup], lambda row: row.label)
    assert load(mine, kept) == chunk


@pytest.mark.parametrize("seed", range(4))
def test_any_record_may_follow(point: Point, mine: Domain, seed: int) -> None:
    """Mutated records with right digests: a listing fails by name, or goes on."""
    kept = save(mine, image_of(1))
    commit = Commit(
        session=S,
        manifests=(FileSeal(n=0, size_bytes=9, count=0, digest=bytes(16)),),
        backups=(
            BackupSeal(
                backup=new_uuid(),
                label=b"x",
                disks=(DiskSeal(disk=new_uuid(), capacity=5, manifest=0),),
            ),
        ),
    )
    evil = Forger(Path(point.path))
    evil.append(opened(S))
    body = msgspec.msgpack.encode(
        Record(seq=2, previous=evil._previous, nonce=bytes(16), host="h", ops=(commit,))
    )
    path = evil.root / "log" / record_path(2)
    refused = 0
    for mutant in mutants(body, seed, ROUNDS // 2):
        path.write_bytes(forging.small_object(b"VKRE", mutant))
        point.close()
        try:
            point.foreign_backups(evil.uuid)
        except StorageError:
            refused += 1
    assert refused > ROUNDS // 4
    assert load(mine, kept) == image_of(1)


def test_sessions_without_end(point: Point, evil: Forger) -> None:
    for start in range(0, 10_000, 2_000):
        evil.append(*(opened(f"{number:032x}") for number in range(start, start + 2_000)))
    with pytest.raises(Damaged, match="sessions"):
        point.foreign_backups(evil.uuid)


def test_a_state_without_end(
    point: Point, mine: Domain, evil: Forger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_tables, "FOREIGN_BYTES_LIMIT", 8 * MIB)
    for number in range(12):
        session = f"{number:032x}"
        seal = BackupSeal(backup=new_uuid(), label=bytes(LABEL_LIMIT_BYTES), disks=())
        evil.append(opened(session))
        evil.append(Commit(session=session, backups=(seal,)))

    def listing() -> None:
        with pytest.raises(Damaged, match="bytes"):
            point.foreign_backups(evil.uuid)

    assert peak_bytes(listing) < 90 * MIB  # one record larger than 64 KiB, as a whole
    with pytest.raises(Damaged):
        mine.import_backups(evil.uuid, [new_uuid()], lambda row: row.label)


def test_domains_without_end(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is within its bounds; what is remembered of all of them is, too."""
    monkeypatch.setattr(memory_tables, "FOREIGN_BYTES_LIMIT", 4 * MIB)
    many = [Forger(Path(point.path), f"evil{number}") for number in range(20)]
    for one in many:
        seal = BackupSeal(backup=new_uuid(), label=os.urandom(LABEL_LIMIT_BYTES), disks=())
        one.append(opened(S))
        one.append(Commit(session=S, backups=(seal,)))

    tracemalloc.start()
    try:
        for one in many:
            assert len(point.foreign_backups(one.uuid)) == 1
        assert tracemalloc.get_traced_memory()[0] < 8 * MIB
    finally:
        tracemalloc.stop()
    read, asked = Log.read, list[int]()

    def noted(self: Log, seq: int) -> tuple[Record, bytes] | None:
        asked.append(seq)
        return read(self, seq)

    monkeypatch.setattr(Log, "read", noted)
    point.foreign_backups(many[-1].uuid)
    assert asked == [3], "the last one is remembered"


def test_a_bundle_without_end(point: Point, evil: Forger) -> None:
    """However long it is, and whatever it says of its length: read in part, and left alone."""
    for number in range(RECORDS_PER_BUNDLE):
        evil.append(Abort(session=S) if number % 2 else opened(S))
    path = evil.root / "log" / f"{record_path(1)}.bundle"
    claims = msgspec.msgpack.encode([b"x"])[:-2] + b"\xc6\xff\xff\xff\xff"
    for body in (claims, b"\xdd\xff\xff\xff\xff" + claims[1:], b"\xdd" + bytes(1 << 20)):
        path.write_bytes(forging.small_object(b"VKBU", body))
        point.close()
        assert peak_bytes(lambda: point.foreign_backups(evil.uuid)) < 40 * MIB
    os.truncate(path, 1 << 40)
    point.close()
    assert peak_bytes(lambda: point.foreign_backups(evil.uuid)) < 40 * MIB


def test_what_goes_is_not_counted(
    point: Point, mine: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_tables, "FOREIGN_BYTES_LIMIT", 40_000)
    for number in range(30):
        saved = save(mine, image_of(number + 1), label=bytes(4_000))
        if number % 5:
            mine.forget([saved.backup])
            mine.reclaim(copy_budget_bytes=0)
    assert len(point.foreign_backups(os.path.basename(mine.paths.root))) == 6


def test_a_label_that_just_fits_does_not_brick_the_domain_that_takes_it(
    point: Point, mine: Domain, evil: Forger
) -> None:
    backup = evil.commit(evil.manifest([], 100), capacity=100, label=bytes(LABEL_LIMIT_BYTES))

    def longer(row: BackupRow) -> bytes:
        return row.label + b"!"

    with pytest.raises(StorageError):
        mine.import_backups(evil.uuid, [backup], longer)
    label = ClusterLabel(cluster_uuid=os.path.basename(mine.paths.root), cluster_name="mine")
    mine.close()
    again = open_domain(point, label, "another")
    assert again.backups() == []
    assert load(again, save(again, image_of(1))) == image_of(1)


def test_a_backup_that_is_not_there(mine: Domain, evil: Forger) -> None:
    evil.append(Forget(backups=()))
    with pytest.raises(NotOnPoint):
        mine.import_backups(evil.uuid, [new_uuid()], lambda row: row.label)


@pytest.mark.parametrize("source", ["..", "../..", "", "/etc", "no such", "a\nb"])
def test_a_source_is_no_path(point: Point, mine: Domain, source: str) -> None:
    with pytest.raises(StorageError):
        point.foreign_backups(source)
    with pytest.raises(StorageError):
        mine.import_backups(source, [new_uuid()], lambda row: row.label)


def test_one_evil_domain_hides_no_other(tmp_path: Path) -> None:
    """Through the engine: a listing shows what can be read, and others can be imported."""
    content = disk_bytes(MIB, 1)
    with EngineRig(tmp_path / "data") as rig:
        kept = rig.back_up(rig.make_vm("web", content))
        root = rig.data / "point"
        Forger(root, "wordless").append_body(b"\xc1")
        Forger(root, "newer").append_body(b"\x80")
        Forger(root, "refused").append(Forget(backups=(new_uuid(),)))
        strange = Forger(root, "strange")
        strange.commit(strange.manifest([], 100), capacity=100, label=b"\x91" * 100_000)
        bare = Forger(root, "bare")
        os.rename(bare.root / "log", bare.root / "gol")
        (root / "domains" / "junk").write_text("x")
        (root / "domains" / new_uuid()).symlink_to("/")
        found = rig.engine.remote_backups(rig.cluster_uuid, rig.point_uuid).backups
        names = {one.backup.label.name for one in found}
        assert names == {kept.label.name, UNREADABLE_NAME}
        there = next(one for one in found if one.backup.label.name == UNREADABLE_NAME)
        rig.engine.import_backups(rig.cluster_uuid, [(there.backup.uuid, rig.point_uuid)])
        assert rig.restore(kept, "copy") == [content]
