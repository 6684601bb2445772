"""A medium that can't read some places is damaged there; one that can read none is gone."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.model import Backup, Vm
from storage.check.check import check_point
from storage.domain.domain import Domain
from storage.domain.heartbeats import read_beat
from storage.domain.leftovers import Leftovers
from storage.domain.reader import MAX_RUN_BYTES, plan_reads
from storage.errors import ChunkDamaged, Damaged, PointUnreachable
from storage.files.fs import Buffer, OsFs
from storage.format.packs import read_footer
from storage.point import Point
from tests.damage.site import Image, Site, readable
from tests.engine_rig import PATIENCE_S, EngineRig
from tests.rig import random_bytes
from tests.store import CHUNK, dump, open_domain

MIB = 1 << 20


class Medium:
    """What every OsFs reads from now on. `bad`: (path, from, to) that fail; `gone`: all do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bad: list[tuple[str, int, int]] = []
        self.gone = ""
        pread, preadv = OsFs.pread, OsFs.preadv

        def failing_pread(fs: OsFs, fd: int, size_bytes: int, offset: int) -> bytes:
            self._meet(fd, offset, size_bytes)
            return pread(fs, fd, size_bytes, offset)

        def failing_preadv(fs: OsFs, fd: int, buffer: Buffer, offset: int) -> int:
            self._meet(fd, offset, len(buffer))
            return preadv(fs, fd, buffer, offset)

        monkeypatch.setattr(OsFs, "pread", failing_pread)
        monkeypatch.setattr(OsFs, "preadv", failing_preadv)

    def _meet(self, fd: int, offset: int, size_bytes: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        size_bytes = min(size_bytes, os.fstat(fd).st_size - offset)
        hit = any(
            path == bad and offset < end and offset + size_bytes > start
            for bad, start, end in self.bad
        )
        if hit or (self.gone and path.startswith(self.gone)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def spoil(self, path: Path, start: int, size_bytes: int = 512) -> None:
        self.bad.append((str(path), start, start + size_bytes))


@pytest.fixture
def medium(monkeypatch: pytest.MonkeyPatch) -> Medium:
    return Medium(monkeypatch)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[EngineRig]:
    with EngineRig(tmp_path / "data") as made:
        yield made


@pytest.fixture
def backed_up(rig: EngineRig) -> tuple[Vm, Backup]:
    vm = rig.make_vm("vm", random_bytes(6 * MIB, 1))
    return vm, rig.back_up(vm)


def only_pack(rig: EngineRig) -> Path:
    (pack,) = (rig.data / "point").rglob("packs/*/*")
    return pack


def test_a_chunk_that_cant_be_read_is_damaged_and_healed(
    rig: EngineRig, medium: Medium, backed_up: tuple[Vm, Backup]
) -> None:
    """Named, restored around, and stored anew by the next full backup, like one that is wrong."""
    vm, backup = backed_up
    pack = only_pack(rig)
    entry = read_footer(OsFs(), str(pack))[1][3]
    medium.spoil(pack, entry.offset + 1000)
    failed = rig.ended(rig.ask_restore(backup, "not")[1])
    assert failed.state == "failed"
    assert f"{pack} at {entry.offset}" in failed.error
    made, job = rig.ask_restore(backup, "left", allow_damaged=True)
    whole = rig.volume(vm.disks[0]).read_bytes()
    assert rig.succeed(job).result[1].startswith("sda: missing offset=")
    left = rig.volume(rig.engine.vm(made).disks[0]).read_bytes()
    assert sum(left[at : at + MIB] != whole[at : at + MIB] for at in range(0, 6 * MIB, MIB)) == 1
    found = rig.ended(rig.engine.start_maintenance("verify", rig.point_uuid, True))
    assert found.state == "failed"
    assert any(f"{pack} at {entry.offset}" in line for line in found.result)
    assert any(backup.uuid in line for line in found.result)
    rig.back_up(vm, full=True)
    assert rig.restore(backup, "again") == [whole]


def test_a_medium_that_reads_nothing_is_unreachable(
    rig: EngineRig, medium: Medium, backed_up: tuple[Vm, Backup]
) -> None:
    """And nothing is called damaged, or distrusted, for that."""
    _, backup = backed_up
    medium.gone = str(rig.data / "point")
    _, job = rig.ask_restore(backup, "not", allow_damaged=True)
    assert rig.ended(job).state == "failed"
    assert "Input/output error" in rig.ended(job).error
    assert "can't be read" not in rig.ended(job).error
    medium.gone = ""
    rig.core.points.look_again(rig.point_uuid, PATIENCE_S)
    assert rig.core.state.distrusts.values() == []
    assert rig.restore(backup, "again") == [random_bytes(6 * MIB, 1)]


def tail(path: Path) -> tuple[int, int]:
    return path.stat().st_size - 40, 16


def start(_path: Path) -> tuple[int, int]:
    return 0, 16


@pytest.mark.parametrize("kind", ["packs", "manifests", "checkpoints", "bundles", "hosts"])
@pytest.mark.parametrize("where", [start, tail])
def test_it_is_named_and_all_else_is_checked_and_read(
    own: Site, medium: Medium, kind: str, where: Callable[[Path], tuple[int, int]]
) -> None:
    own.forget_view()
    for path in own.files()[kind]:
        medium.bad = []
        medium.spoil(path, *where(path))
        report = check_point(str(own.path), deep=True)
        named = [finding for finding in report.findings if finding.path == str(path)]
        assert named, (path, report.findings)
        assert "can't be read" in named[0].detail
        with own.opened() as domain:
            holes = [readable(domain, image) for image in own.images]
        assert kind in ("packs", "manifests") or holes == [[]] * len(holes)
        own.restore_view()


def test_the_heartbeat_of_a_host_that_is_gone_is_not_needed(own: Site, medium: Medium) -> None:
    (beaten,) = own.files()["hosts"]
    medium.spoil(beaten, 0)
    other = open_domain(Point.open(str(own.path)), own.label, "host-2")
    assert read_beat(other, beaten.name) is None
    leftovers = Leftovers(patience_s=0.0)
    assert [leftovers.clear(other, float(now_s)) for now_s in range(2)] == [0, 1]
    assert not beaten.exists()
    other.close()


def test_who_reads_it_names_the_frame(own: Site, medium: Medium) -> None:
    """Of a base as well, that only patches need: it is what has to be stored anew."""
    with own.opened() as domain:
        for path in own.files()["packs"]:
            pack = f"{path.parent.name}/{path.name}"
            for entry in read_footer(OsFs(), str(path))[1]:
                medium.bad = [(str(path), entry.offset, entry.offset + 8)]
                named = {name for image in own.images for name in damage_in(domain, image)}
                assert named == {(pack, entry.chunk_id)}
                medium.bad = []


def damage_in(domain: Domain, image: Image) -> set[tuple[str, bytes]]:
    """(pack, chunk) of all that can't be read of an image."""
    buffer = memoryview(bytearray(MAX_RUN_BYTES + CHUNK + 4096))
    found = set()
    with contextlib.closing(domain.reader()) as reader:
        for run in plan_reads(domain, domain.disk_map(image.saved.disk)):
            for _, raw in reader.read_each(run, buffer):
                if isinstance(raw, ChunkDamaged):
                    found.add((raw.pack, raw.chunk))
    return found


def test_a_record_that_cant_be_read_is_damage(own: Site, medium: Medium) -> None:
    medium.spoil(own.last_record, 0)
    own.forget_view()
    with pytest.raises(Damaged, match=f"{own.last_record} at 0: can't be read"), own.opened():
        pass
    medium.bad, medium.gone = [], str(own.path / "domains")
    medium.spoil(own.path / "POINT", 0)
    with pytest.raises(PointUnreachable):
        own.opened().__enter__()


def test_a_read_that_fails_once_is_repeated(own: Site, medium: Medium) -> None:
    """Only what fails again is damaged: an index made beside a hiccup would lack something."""

    class Once(list[tuple[str, int, int]]):
        def __iter__(self) -> Iterator[tuple[str, int, int]]:
            found = [self.pop()] if self else []
            return iter(found)

    for path in own.files()["packs"]:
        medium.bad = Once([(str(path), 0, path.stat().st_size)])
        assert check_point(str(own.path), deep=True).findings == []


def lose_directory(bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listdir = OsFs.listdir

    def failing(fs: OsFs, path: str) -> list[str]:
        if path == str(bad):
            raise OSError(errno.EUCLEAN, os.strerror(errno.EUCLEAN), path)
        return listdir(fs, path)

    monkeypatch.setattr(OsFs, "listdir", failing)


def test_checkpoints_that_cant_be_listed_are_not_needed(
    own: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.forget_view()
    lose_directory(own.root / "checkpoints", monkeypatch)
    with own.opened() as domain:
        assert all(readable(domain, image) == [] for image in own.images)


@pytest.mark.parametrize("root", ["packs", "manifests", "tmp"])
def test_a_directory_of_nobody_that_cant_be_listed_is_in_nobodys_way(
    own: Site, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a crash may leave one that was being written: its session is dead."""
    with own.opened() as domain:
        session = domain.begin("backup")
    bad = own.root / root / session.id
    bad.mkdir(exist_ok=True)
    lose_directory(bad, monkeypatch)
    with own.opened() as domain:
        assert dump(domain)["sessions"] == {}
        assert all(readable(domain, image) == [] for image in own.images)
        domain.forget([own.images[3].saved.backup])
        assert domain.reclaim(sparse_below=1.0).packs_removed
    report = check_point(str(own.path), deep=True)
    assert {found.path for found in report.findings} <= {str(bad)}
    assert report.clean
    assert bool(report.findings) == (root != "tmp")
