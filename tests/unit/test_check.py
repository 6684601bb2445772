"""The checker finds each kind of damage, names it, and says who loses by it."""

from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.check.check import Damage, Finding, NoReads, check_point
from storage.domain.domain import Domain
from storage.domain.session import NewBackup
from storage.errors import Damaged
from storage.files.fs import OsFs
from storage.format.chunks import FRAME_HEADER_BYTES
from storage.log.log import record_path
from storage.point import Point
from tests.failing_fs import HookFs
from tests.forging import small_object
from tests.hostile.mutating import peak_bytes
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
    patches,
    save,
    write_disk,
)

MIB = 1 << 20


@pytest.fixture
def point(tmp_path: Path) -> Point:
    return new_point(tmp_path)


@pytest.fixture
def domain(point: Point) -> Domain:
    return open_domain(point, cluster())


@pytest.fixture
def saved(domain: Domain) -> list[Saved]:
    """A full backup, an incremental on it, and one that shares nothing."""
    first = save(domain, image_of(1, 2) + os.urandom(2 * CHUNK))
    second = save(domain, image_of(1, 3) + os.urandom(CHUNK) + image_of(0), first)
    return [first, second, save(domain, os.urandom(CHUNK))]


def findings(point: Point, *, deep: bool = False) -> list[Finding]:
    return check_point(point.path, deep=deep).findings


def flip(path: str, offset: int) -> None:
    content = bytearray(Path(path).read_bytes())
    content[offset] ^= 0x10
    Path(path).write_bytes(content)


def only_file(root: str, session_of: int) -> str:
    """The file of the session that came as the `session_of`-th."""
    paths = [os.path.join(where, n) for where, _, names in os.walk(root) for n in names]
    return sorted(paths, key=lambda path: os.stat(path).st_mtime_ns)[session_of]


@pytest.mark.usefixtures("saved")
def test_a_whole_point_is_clean(point: Point) -> None:
    for deep in (False, True):
        report = check_point(point.path, deep=deep)
        assert (report.findings, report.backups, report.packs, report.manifests) == ([], 3, 3, 3)


def test_a_flipped_payload_bit_is_found_by_the_deep_check_only(
    point: Point, domain: Domain, saved: list[Saved]
) -> None:
    path = only_file(domain.paths.packs, 2)
    flip(path, 64 + 56 + 100)
    assert findings(point) == []
    (found,) = findings(point, deep=True)
    assert (found.kind, found.path, found.offset) == ("chunk", path, 64)
    assert found.backups == (saved[2].backup,)
    with pytest.raises(Damaged, match=path):
        load(domain, saved[2])
    assert load(domain, saved[0])


def test_damage_is_laid_to_those_who_inherit_it(
    point: Point, domain: Domain, saved: list[Saved]
) -> None:
    flip(only_file(domain.paths.packs, 0), 64 + 60)
    (found,) = findings(point, deep=True)
    assert set(found.backups) == {saved[0].backup, saved[1].backup}


def test_a_pack_that_is_gone_is_found(point: Point, domain: Domain, saved: list[Saved]) -> None:
    path = only_file(domain.paths.packs, 2)
    os.unlink(path)
    by_kind = {found.kind: found for found in findings(point)}
    assert by_kind["pack"].path == path
    assert by_kind["manifest"].backups == (saved[2].backup,)


@pytest.mark.parametrize("cut", [1, 48, 200])
@pytest.mark.usefixtures("saved")
def test_a_pack_cut_short_is_found(point: Point, domain: Domain, cut: int) -> None:
    path = only_file(domain.paths.packs, 0)
    os.truncate(path, os.stat(path).st_size - cut)
    assert {found.path for found in findings(point) if found.kind == "pack"} == {path}


def test_a_manifest_with_a_flipped_bit_is_found(
    point: Point, domain: Domain, saved: list[Saved]
) -> None:
    path = only_file(domain.paths.manifests, 0)
    flip(path, 64 + 10)
    (found,) = findings(point)
    assert (found.kind, found.path) == ("manifest", path)
    assert set(found.backups) == {saved[0].backup, saved[1].backup}


@pytest.mark.usefixtures("saved")
def test_swapped_packs_are_found(point: Point, domain: Domain) -> None:
    one, other = only_file(domain.paths.packs, 0), only_file(domain.paths.packs, 2)
    os.rename(one, one + ".x")
    os.rename(other, one)
    os.rename(one + ".x", other)
    assert {found.path for found in findings(point) if found.kind == "pack"} == {one, other}


@pytest.mark.usefixtures("saved")
def test_a_missing_record_is_found(point: Point, domain: Domain) -> None:
    os.unlink(os.path.join(domain.paths.log, record_path(2)))
    (found,) = [found for found in findings(point) if found.kind == "log"]
    assert "record 2 is missing" in found.detail


@pytest.mark.usefixtures("saved")
def test_a_file_of_nobody_is_an_orphan(point: Point, domain: Domain) -> None:
    path = os.path.join(domain.paths.packs, "0" * 32)
    os.mkdir(path)
    Path(path, "00000000").write_bytes(b"?")
    report = check_point(point.path, deep=False)
    assert [found.kind for found in report.findings] == ["orphan"]
    assert report.clean
    domain.reclaim()
    assert findings(point) == []


def test_a_check_beside_a_gc_finds_no_damage(point: Point, domain: Domain) -> None:
    chunks = [os.urandom(CHUNK) for _ in range(10)]
    big, small = save(domain, b"".join(chunks)), save(domain, chunks[0])
    save(domain, image_of(1), None)
    domain.forget([big.backup])
    fs = HookFs()
    fs.root = domain.paths.packs

    def collect() -> None:
        assert domain.reclaim(sparse_below=0.9).packs_repacked == 1

    fs.hook = collect
    report = check_point(point.path, deep=True, fs=fs)
    assert report.clean, report.findings
    assert load(domain, small) == chunks[0]


def test_what_a_gc_deletes_beside_a_check_is_no_orphan(
    point: Point, domain: Domain, saved: list[Saved]
) -> None:
    fs = HookFs()
    fs.root = domain.paths.log

    def delete() -> None:
        domain.forget([saved[2].backup])
        assert domain.reclaim().packs_removed == 1

    fs.hook = delete
    assert check_point(point.path, deep=True, fs=fs).findings == []
    assert fs.hook is None


class BusyLog(OsFs):
    """Somebody appends records just before the checker asks a second time for the newest."""

    def __init__(self, directory: str, append: Callable[[], None]) -> None:
        self.looks = 0
        self._directory = directory
        self._append = append

    def listdir(self, path: str) -> list[str]:
        self.looks += path == self._directory
        if path == self._directory and self.looks == 2:
            self._append()
        return super().listdir(path)


@pytest.mark.usefixtures("saved")
def test_records_that_come_beside_a_check_leave_no_gap(point: Point, domain: Domain) -> None:
    fs = BusyLog(domain.paths.log, lambda: _save_two(domain))
    report = check_point(point.path, deep=True, fs=fs)
    assert report.findings == []
    assert (fs.looks >= 2, report.backups) == (True, 5)


def _save_two(domain: Domain) -> None:
    for _ in range(2):
        save(domain, os.urandom(CHUNK))


@pytest.mark.parametrize("damaged", [0, 1])
def test_the_copy_that_readers_use_is_the_one_that_counts(
    point: Point, domain: Domain, damaged: int
) -> None:
    chunk = os.urandom(CHUNK)
    sessions = [domain.begin("backup") for _ in range(2)]
    disks = [new_uuid() for _ in sessions]
    for session, disk in zip(sessions, disks, strict=True):
        write_disk(session, domain, chunk, disk, "")
    saved = []
    for session, disk in zip(sessions, disks, strict=True):
        saved.append(Saved(new_uuid(), disk))
        session.commit([NewBackup(saved[-1].backup, b"", [disk])])
    path = Path(domain.paths.pack(f"{sessions[damaged].id}/00000000"))
    content = bytearray(path.read_bytes())
    content[64 + FRAME_HEADER_BYTES + 5] ^= 1
    path.write_bytes(content)
    kinds = [found.kind for found in check_point(point.path, deep=True).findings]
    if damaged == 1:
        assert set(kinds) == {"chunk"}
        with pytest.raises(Damaged):
            load(domain, saved[0])
    else:
        assert kinds == []
        assert load(domain, saved[0]) == chunk


def test_memory_does_not_grow_with_the_point(point: Point, domain: Domain) -> None:
    """Thirty times as much is looked at, byte for byte; what is found is kept on a disk."""
    seeds = iter(range(1_000_000))

    def more(chunks: int) -> None:
        parts = [random.Random(next(seeds)).randbytes(3000) for _ in range(chunks)]
        save(domain, b"".join(part.ljust(CHUNK, b"\1") for part in parts))

    def peak() -> int:
        return peak_bytes(lambda: check_point(point.path, deep=True))

    more(40)
    peak()  # what is made once, is made now
    before = peak()
    for _ in range(30):
        more(40)
    assert check_point(point.path, deep=True).chunks == 31 * 40
    assert peak() < before + MIB // 4


def test_a_chain_of_more_manifests_than_files_may_be_open(point: Point, domain: Domain) -> None:
    saved = [save(domain, image_of(1, 2))]
    for number in range(3, 63):
        saved.append(save(domain, image_of(1, number), saved[-1]))
    domain.forget([one.backup for one in saved[:-1]])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 30, limits[1]))
    try:
        assert findings(point) == []
        domain.rebuild()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert load(domain, saved[-1]) == image_of(1, 62)


def test_a_base_that_goes_bad_after_it_was_read_is_a_finding(point: Point, domain: Domain) -> None:
    """Or that a verify which went on where it was interrupted did not read again."""
    (base,) = mixed(1)
    first = save(domain, base)
    (pack,) = (f"{domain.paths.root}/{name}" for name in files(domain, "packs"))
    second = save(domain, edited(base, 3), first)
    assert patches(domain)

    class Reads(NoReads):
        def skip(self, _pack: str) -> bool:
            return True

    flip(pack, 200)
    damaged: list[Damage] = []
    report = check_point(point.path, deep=True, reads=Reads(), on_damage=damaged.append)
    assert {(found.kind, found.path) for found in report.findings} == {("chunk", pack)}
    assert {backup for found in report.findings for backup in found.backups} == {
        first.backup,
        second.backup,
    }
    assert [domain.paths.pack(found.pack) for found in damaged] == [pack]


def newer_record(domain: Domain) -> Path:
    path = Path(domain.paths.log, record_path(domain.refresh() + 1))
    path.write_bytes(small_object(b"VKRE", b"of tomorrow", version=2))
    return path


def newer_label(domain: Domain) -> Path:
    path = Path(domain.paths.label)
    path.unlink()
    path.write_bytes(small_object(b"VKDO", b"of tomorrow", version=2))
    return path


def newer_sealed(domain: Domain, directory: str) -> Path:
    path = Path(domain.paths.root, min(files(domain, directory)))
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:4] + b"\2\0" + bytes(200))
    return path


def newer_pack(domain: Domain) -> Path:
    return newer_sealed(domain, "packs")


def newer_manifest(domain: Domain) -> Path:
    return newer_sealed(domain, "manifests")


@pytest.mark.parametrize("upgrade", [newer_record, newer_label, newer_pack, newer_manifest])
@pytest.mark.parametrize("deep", [False, True])
def test_a_domain_with_newer_files_is_named_and_the_others_are_checked(
    point: Point, upgrade: Callable[[Domain], Path], deep: bool
) -> None:
    newer, *others = (open_domain(point, cluster()) for _ in range(3))
    for domain in (newer, *others):
        save(domain, os.urandom(CHUNK))
    path = upgrade(newer)
    report = check_point(point.path, deep=deep)
    (finding,) = report.findings
    assert (finding.kind, finding.path) == ("newer", newer.paths.root)
    assert finding.detail.startswith(f"{path}: format 2")
    assert report.unread == report.findings
    assert report.clean
    assert report.manifests >= len(others)
    Path(others[1].paths.root, min(files(others[1], "packs"))).unlink()
    assert not check_point(point.path, deep=deep).clean
