"""Symlinks, fifos, devices and directories where files should be: not followed, nothing hangs."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from engine.errors import Conflict, EngineError
from engine.snapshot.sources import open_volume
from engine.verb_types import Maintenance
from storage.check.check import check_point
from storage.domain.bundling import Bundling
from storage.domain.domain import Domain
from storage.domain.heartbeats import Observer, read_beat
from storage.errors import Damaged, FileGone, PointUnreachable, StorageError
from storage.format import bundles
from storage.log.log import record_path
from storage.point import ClusterLabel, Point
from storage.view import tables
from tests.engine_rig import ANYWHERE, ONE_JOB, PATIENCE_S, EngineRig, disk_bytes
from tests.store import Saved, cluster, files, image_of, live_files, load, new_point, open_domain
from tests.store import save as save_image

Plant = Callable[[Path], None]
IMAGE = image_of(1, 2, 3)
MIB = 1 << 20


def _device(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root (mknod)")
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero never ends


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(path.parent, os.O_PATH)
        one.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


def _link_to_itself_elsewhere(path: Path) -> None:
    """A symlink to a copy that would do, were it followed."""
    top = next(parent for parent in path.parents if parent.name.startswith("test_"))
    copy = Path(tempfile.mkdtemp(dir=top)) / path.name
    backup = path.parent / f".{path.name}.was"
    os.rename(backup, copy)
    path.symlink_to(copy)


PLANTS: dict[str, Plant] = {
    "fifo": os.mkfifo,
    "directory": os.mkdir,
    "device": _device,
    "socket": _socket,
    "dangling": lambda path: path.symlink_to("/nowhere"),
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "link": _link_to_itself_elsewhere,
}


def plant(path: Path, kind: str) -> None:
    """Puts it in the place of what is there."""
    was = path.parent / f".{path.name}.was"
    if path.exists():
        os.rename(path, was)
    else:
        was.touch()
    PLANTS[kind](path)
    if was.is_dir():
        shutil.rmtree(was)
    else:
        was.unlink(missing_ok=True)


@pytest.fixture(params=PLANTS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def point(tmp_path: Path) -> Point:
    return new_point(tmp_path)


@pytest.fixture
def label() -> ClusterLabel:
    return cluster("theirs")


@pytest.fixture
def domain(point: Point, label: ClusterLabel) -> Domain:
    return open_domain(point, label)


@pytest.fixture
def saved(domain: Domain) -> Saved:
    return save_image(domain, IMAGE)


def first(domain: Domain, root: str) -> Path:
    return Path(domain.paths.root, min(files(domain, root)))


def test_as_point(point: Point, kind: str) -> None:
    plant(Path(point.path, "POINT"), kind)
    with pytest.raises((PointUnreachable, Damaged)):
        Point.open(point.path)
    with pytest.raises(StorageError):
        Point.create(point.path, "again")


@pytest.mark.usefixtures("saved")
def test_as_domain_label(point: Point, label: ClusterLabel, kind: str) -> None:
    mine = open_domain(point, cluster("mine"), "host-9")
    kept = save_image(mine, IMAGE)
    plant(Path(point.path, "domains", label.cluster_uuid, "DOMAIN"), kind)
    assert [found.cluster_name for found in point.clusters()] == ["mine"]
    assert load(mine, kept) == IMAGE
    findings = check_point(point.path, deep=True).findings
    assert {finding.kind for finding in findings} == {"label"}


def test_as_a_whole_domain(point: Point, domain: Domain, label: ClusterLabel, kind: str) -> None:
    mine = open_domain(point, cluster("mine"), "host-9")
    kept = save_image(mine, IMAGE)
    domain.close()
    plant(Path(domain.paths.root), kind)
    names = [found.cluster_name for found in point.clusters()]
    assert names == ["mine"]
    with pytest.raises(StorageError):
        point.foreign_backups(label.cluster_uuid)
    assert load(mine, kept) == IMAGE
    check_point(point.path, deep=True)


@pytest.mark.usefixtures("saved")
def test_as_a_record(point: Point, domain: Domain, kind: str) -> None:
    plant(Path(domain.paths.log, record_path(1)), kind)
    with pytest.raises(StorageError):
        point.foreign_backups(os.path.basename(domain.paths.root))
    findings = check_point(point.path, deep=True).findings
    assert "log" in {finding.kind for finding in findings}


def test_as_a_bundle(
    point: Point, domain: Domain, saved: Saved, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not followed, not waited for, not replaced: its records are read one by one."""
    monkeypatch.setattr(bundles, "RECORDS_PER_BUNDLE", 2)
    path = Path(domain.paths.log, record_path(1) + bundles.SUFFIX)
    assert Bundling().go_on(domain) == 1
    plant(path, kind)
    before = os.lstat(path)
    assert Bundling().go_on(domain) == 0
    found = point.foreign_backups(os.path.basename(domain.paths.root))
    assert [row.backup for row in found] == [saved.backup]
    domain.rebuild()
    assert load(domain, saved) == IMAGE
    assert os.lstat(path) == before
    report = check_point(point.path, deep=True)
    assert (report.clean, {one.kind for one in report.findings}) == (True, {"bundle"})


def test_as_the_next_record(domain: Domain, saved: Saved, kind: str) -> None:
    """Nobody can go on, and nobody hangs or overwrites it."""
    with domain.view.read() as state:
        seq = tables.applied(state)[0] + 1
    path = Path(domain.paths.log, record_path(seq))
    plant(path, kind)
    before = os.lstat(path)
    with pytest.raises(StorageError):
        domain.forget([saved.backup])
    assert os.lstat(path) == before


@pytest.mark.parametrize("root", ["packs", "manifests"])
def test_as_a_pack_or_manifest(
    point: Point, domain: Domain, saved: Saved, kind: str, root: str
) -> None:
    mine = open_domain(point, cluster("mine"), "host-9")
    plant(first(domain, root), kind)
    if root == "packs":
        with pytest.raises((Damaged, FileGone, PointUnreachable)):
            load(domain, saved)
    with pytest.raises(StorageError):
        mine.import_backups(os.path.basename(domain.paths.root), [saved.backup], lambda _: b"")
    assert (mine.backups(), files(mine)) == ([], set())
    findings = check_point(point.path, deep=True).findings
    assert {finding.kind for finding in findings} & {"pack", "manifest", "chunk"}


@pytest.mark.parametrize("root", ["packs", "manifests", "log"])
def test_a_foreign_directory_that_leads_elsewhere(
    point: Point, domain: Domain, saved: Saved, root: str, tmp_path: Path
) -> None:
    mine = open_domain(point, cluster("mine"), "host-9")
    source = os.path.basename(domain.paths.root)
    inner = Path(domain.paths.root, root)
    if root != "log":
        inner = first(domain, root).parent
    os.rename(inner, tmp_path / "elsewhere")
    inner.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        mine.import_backups(source, [saved.backup], lambda _: b"")
    assert (mine.backups(), files(mine)) == ([], set())


@pytest.mark.parametrize("root", ["packs", "manifests", "tmp"])
def test_where_sessions_keep_their_files(
    point: Point,
    domain: Domain,
    label: ClusterLabel,
    saved: Saved,
    kind: str,
    root: str,
    tmp_path: Path,
) -> None:
    """What a sweep meets there is unlinked itself; what it leads to stays."""
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "00000000").write_text("mine")
    planted = Path(domain.paths.root, root, "ab" * 16)
    plant(planted, kind)
    other = planted.with_name("cd" * 16)
    other.symlink_to(treasure)
    check_point(point.path, deep=True)
    domain.reclaim()
    assert (treasure / "00000000").read_text() == "mine"
    assert not os.path.lexists(planted)
    assert not os.path.lexists(other)
    assert files(domain) == live_files(domain)
    domain.close()
    assert load(open_domain(point, label), saved) == IMAGE


def test_a_file_whose_name_is_no_unicode(point: Point, domain: Domain, saved: Saved) -> None:
    session = os.path.dirname(os.path.join(domain.paths.root, min(files(domain, "packs"))))
    Path(os.fsdecode(os.fsencode(session) + b"/\xff")).touch()
    Path(os.fsdecode(os.fsencode(point.path) + b"/domains/\xfe")).touch()
    report = check_point(point.path, deep=True)
    assert sorted(os.path.basename(found.path) for found in report.findings) == [
        "\\udcfe",
        "\\udcff",
    ]
    assert msgspec.json.encode(report)
    domain.reclaim(copy_budget_bytes=1)
    assert load(domain, saved) == IMAGE
    assert sorted(os.listdir(session)) == ["00000000"]


@pytest.mark.parametrize("root", ["packs", "manifests", "tmp"])
def test_a_domain_is_opened_though_a_file_has_no_unicode_name(
    point: Point, domain: Domain, label: ClusterLabel, saved: Saved, root: str
) -> None:
    directory = Path(domain.paths.root, root, "ab" * 16)
    directory.mkdir()
    Path(os.fsdecode(os.fsencode(directory) + b"/\xff")).touch()
    domain.close()
    again = open_domain(point, label)
    assert load(again, saved) == IMAGE
    assert not directory.exists()


def test_an_abort_follows_no_link(domain: Domain, tmp_path: Path) -> None:
    (tmp_path / "treasure").mkdir()
    (tmp_path / "treasure" / "00000000").write_text("mine")
    session = domain.begin("backup")
    Path(domain.paths.packs, session.id).symlink_to(tmp_path / "treasure")
    domain.abort(session.id)
    assert (tmp_path / "treasure" / "00000000").read_text() == "mine"
    session.packs.close()


def test_as_a_heartbeat(point: Point, domain: Domain, label: ClusterLabel, kind: str) -> None:
    other = open_domain(point, label, "host-2")
    session = other.begin("backup")
    plant(Path(domain.paths.hosts, "host-2"), kind)
    assert read_beat(domain, "host-2") is None
    assert Observer(patience_s=600).end_dead_sessions(domain, 0.0) == 0
    found = check_point(point.path, deep=False).findings
    assert [(one.kind, Path(one.path).name) for one in found] == [("heartbeat", "host-2")]
    other.abort(session.id)
    session.packs.close()


@pytest.mark.parametrize("host", ["../../../../etc/passwd", "/dev/zero", "..", "", "a\0b"])
def test_a_host_is_no_path(domain: Domain, host: str) -> None:
    assert read_beat(domain, host) is None


def test_as_a_checkpoint(point: Point, label: ClusterLabel, domain: Domain, kind: str) -> None:
    saved = save_image(domain, IMAGE)
    domain.checkpoint()
    domain.close()
    shutil.rmtree(domain.view.path)
    (name,) = os.listdir(domain.paths.checkpoints)
    plant(Path(domain.paths.checkpoints, name), kind)
    for odd in ("odd.mdb", "zz.mdb", ".mdb", f"{'f' * 16}-{'0' * 64}.mdb"):
        plant(Path(domain.paths.checkpoints, odd), "fifo")
    again = open_domain(point, label)
    assert load(again, saved) == IMAGE
    again.checkpoint()


def test_as_a_volume(tmp_path: Path, kind: str) -> None:
    with EngineRig(tmp_path / "data") as rig:
        content = disk_bytes(1 << 20, 1)
        vm = rig.make_vm("web", content)
        volume = rig.volume(vm.disks[0])
        plant(volume, kind)
        with pytest.raises(OSError, match=r".*"):
            open_volume(str(volume))
        try:
            _, job = rig.ask_backup(vm)
        except EngineError:
            return
        ended = rig.ended(job)
        assert ended.state == "failed"
        assert ended.error


def test_a_volume_name_that_is_taken_by_something_else(tmp_path: Path, kind: str) -> None:
    with EngineRig(tmp_path / "data") as rig:
        content = disk_bytes(1 << 20, 1)
        backup = rig.back_up(rig.make_vm("web", content))
        path = rig.pool_path / "planted"
        plant(path, kind)
        before = os.lstat(path)
        with pytest.raises(Conflict, match="planted"):
            rig.ask_restore(backup, "copy", volumes=["planted"])
        assert os.lstat(path) == before
        assert [vm.name for vm in rig.engine.vms(ANYWHERE)] == ["web"]


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    """A job that had to tell of one never ended, and its thread was gone."""
    with EngineRig(tmp_path / "data", ONE_JOB) as rig:
        rig.back_up(rig.make_vm("vm", disk_bytes(MIB, 1)))
        domains = rig.data / "point" / "domains"
        shutil.copytree(domains / rig.cluster_uuid, os.fsdecode(bytes(domains) + b"/\xfe-copy"))
        for directory, _, _ in list(os.walk(domains)):
            Path(os.fsdecode(os.fsencode(directory) + b"/\xff-file")).touch()
            Path(os.fsdecode(os.fsencode(directory) + b"/\xff-directory")).mkdir()
        jobs: list[Maintenance] = ["verify", "gc", "verify"]
        found = [
            rig.ended(rig.engine.start_maintenance(kind, rig.point_uuid, True)) for kind in jobs
        ]
        assert [job.state for job in found] == ["failed", "succeeded", "failed"]
        assert any("label: " in line and r"\udcfe-copy" in line for line in found[0].result)
        assert any("heartbeat: " in line and r"\udcff-file" in line for line in found[0].result)
        assert any("orphan: " in line for line in found[0].result)
        msgspec.json.encode(found)
        msgspec.json.encode(check_point(str(domains.parent), deep=True))
        assert len(rig.engine.remote_backups(rig.cluster_uuid, rig.point_uuid).backups) >= 1
        rig.restart()
        assert {job.uuid for job in rig.engine.jobs()} >= {job.uuid for job in found}
        rig.core.points.look_again(rig.point_uuid, PATIENCE_S)
        assert rig.engine.point(rig.point_uuid).state == "online"
