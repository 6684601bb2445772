"""Backups that go badly while the guest writes all the time: it goes on as if there were none.

No pause, no I/O error, and writes in every second, whatever the point or the scratch space does.
After each, nothing of it is left in QEMU or on the host, and the next backup is right. One VM for
all tests; /dev/vda is qcow2 and has a file system, /dev/vdb is raw and is what the guest writes to.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from threading import Timer
from typing import Any

import pytest
from msgspec.structs import replace

from engine.config import Limits
from engine.libvirt import live
from engine.libvirt.binding import LibvirtFault, ask_qemu
from engine.libvirt.half_begun import is_half_begun
from tests.conftest import LoopFs
from tests.engine_rig import ANYWHERE, PATIENCE_S, EngineRig
from tests.fire.hog import filled
from tests.fire.loops import mount, unmount
from tests.fire.slow import stop_and_go
from tests.fire.test_point_lost import on_first_batch
from tests.libvirt.host import MIB, Host
from tests.libvirt.lab import NAME, Lab, paused_reading
from tests.libvirt.site import config_for, contents, wait_for_vm, wait_until
from tests.libvirt.writer import BLOCK_BYTES, Writer, numbers_in
from tests.nfs.kit import find_tool

RAW_BYTES = 8 * MIB
BLOCKS = RAW_BYTES // BLOCK_BYTES
RUNNING = 1
# With the watch gone a guest that has overwritten its disk finds no more room: it stops.
SCRATCH_BYTES, SCRATCH_RESERVE_BYTES = 7 * MIB, 4 * MIB
# Far below what is seen on an idle machine; a guest that waits for the point does nothing at all.
SLOWEST = 1 / 10
SILENT_S = 1.5  # a slow point, again and again: the guest overwrites its disk meanwhile


@pytest.fixture(scope="module")
def lab(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    config = config_for(host.uri, scratch=host.scratch)
    config = replace(config, limits=Limits(point_reserve_bytes=0))
    with EngineRig(tmp_path_factory.mktemp("site") / "data", config) as rig:
        images = [
            host.image("vda", "vda.qcow2", 12 * MIB),
            host.image("vdb", "vdb.raw", RAW_BYTES, "raw"),
        ]
        domain = host.define(NAME, images)
        made = Lab(host, rig, domain, host.boot(domain), images)
        made.guest.run("mke2fs -q /dev/vda")
        wait_for_vm(rig, NAME, lambda vm: vm is not None and vm.state == "running")
        made.write("/mnt/file", 2048)
        made.back_up()
        yield made
        made.guest.close()


@pytest.fixture
def writer(lab: Lab) -> Iterator[Writer]:
    """It has written all of the disk, and goes on."""
    made = Writer(lab.guest, lab.images[1].path)
    made.start()
    made.wait_for(max(BLOCKS - made.count(), 0))
    yield made
    made.stop()


def test_a_command_that_loses_bytes_on_its_way_is_sent_again(lab: Lab) -> None:
    """The guest's wire is no better than that."""
    lab.guest._file.write(b"9 echo\n")
    assert lab.guest.answer("echo well") == "well"


def test_a_slow_point(lab: Lab, writer: Writer, loop_fs: LoopFs, monkeypatch: Any) -> None:
    """Which lets little be written, now and then. The backup is as of its beginning, though the
    guest has overwritten all of the disk before it ends."""
    place, (parent,) = loop_fs("ext4", 128 * MIB), lab.rig.listed()
    with point_at(lab, place) as point, stop_and_go(place, SILENT_S, 0.01) as slow:
        quiet, begun = writer.windows(2), writer.count()
        on_first_batch(monkeypatch, slow)
        made, job = ask(lab, point)
        during = writer.windows_until(lab.rig, job)
        ended = writer.count()
        lab.rig.succeed(job)
        goes_on(lab, quiet, during, writer.windows(2))
        _, disk = contents(lab.rig, lab.rig.engine.backup(ANYWHERE, made), "slow")
        numbers = numbers_in(disk)
        assert begun - 1 <= numbers[-1] < ended - BLOCKS
        assert numbers == list(range(numbers[-1] - BLOCKS + 1, numbers[-1] + 1))
        assert {name[-36:] for name in lab.checkpoints()} == {parent, made}
    the_next_is_right(lab, writer)


def test_a_point_that_fills_up(lab: Lab, writer: Writer, loop_fs: LoopFs, monkeypatch: Any) -> None:
    """Somebody takes all of its room in the middle of the backup."""
    place, before = loop_fs("ext4", 128 * MIB), lab.checkpoints()
    with point_at(lab, place) as point, contextlib.ExitStack() as undo:
        quiet = writer.windows(2)
        on_first_batch(monkeypatch, lambda: undo.enter_context(filled(place)))
        _, job = ask(lab, point)
        during = writer.windows_until(lab.rig, job)
        assert "No space left" in lab.failed_job(job).error
        goes_on(lab, quiet, during, writer.windows(2))
        assert lab.checkpoints() == before
    the_next_is_right(lab, writer)


def test_scratch_space_that_runs_short(
    lab: Lab, writer: Writer, tmp_path: Path, monkeypatch: Any
) -> None:
    """The point hangs, and the guest overwrites more than there is room for."""
    before = lab.checkpoints()
    with small_scratch(lab.host, tmp_path) as scratch:
        config = config_for(lab.host.uri, scratch=scratch, reserve_bytes=SCRATCH_RESERVE_BYTES)
        with EngineRig(tmp_path / "data", config) as rig:
            vm = wait_for_vm(rig, NAME, lambda vm: vm is not None)
            quiet = writer.windows(2)
            with paused_reading(monkeypatch) as reached:
                _, job = rig.ask_backup(vm)
                assert reached.wait(PATIENCE_S)
                during = writer.windows(2)
                writer.wait_for(BLOCKS)
                assert domain_is_free(lab)
            assert f"{SCRATCH_RESERVE_BYTES} are the reserve" in rig.ended(job).error
            goes_on(lab, quiet, during, writer.windows(2))
            assert lab.checkpoints() == before
            assert [path.name for path in scratch.iterdir()] == ["lost+found"]
    the_next_is_right(lab, writer)


def test_too_much_is_overwritten_while_libvirtd_is_away(
    lab: Lab, writer: Writer, tmp_path: Path, monkeypatch: Any
) -> None:
    """Nobody else can end QEMU's job: that happens as soon as libvirtd is back."""
    before = lab.checkpoints()
    config = config_for(lab.host.uri, scratch=lab.host.scratch, limit_bytes=2 * MIB)
    with EngineRig(tmp_path / "data", config) as rig:
        vm = wait_for_vm(rig, NAME, lambda vm: vm is not None)
        quiet = writer.windows(1)
        with paused_reading(monkeypatch) as reached:
            _, job = rig.ask_backup(vm)
            assert reached.wait(PATIENCE_S)
            lab.host.stop()
            during = writer.windows(1)
            writer.wait_for(BLOCKS // 2)
            lab.host.start()
            look_up(lab)
            wait_until(lambda: domain_is_free(lab))
        assert "overwrote more than" in rig.ended(job).error
    goes_on(lab, quiet, during, writer.windows(1))
    assert lab.checkpoints() == before


def test_libvirtd_dies_when_it_begins_a_backup(lab: Lab, writer: Writer, monkeypatch: Any) -> None:
    """Or right after, with the guest's file systems frozen. It is away for a while."""
    newest, begin = lab.checkpoints()[0][-36:], live._begin_with_less
    for moment_s in (0.0, 0.05, 0.3):
        dies, comes_back = Timer(moment_s, lab.host.kill), Timer(1.5, lab.host.start)

        def begin_and_die(*given: Any, dies: Timer = dies, comes_back: Timer = comes_back) -> Any:
            dies.start()
            try:
                return begin(*given)
            finally:
                dies.join()
                comes_back.start()

        quiet = writer.windows(1)
        monkeypatch.setattr(live, "_begin_with_less", begin_and_die)
        made, job = ask(lab)
        during = writer.windows_until(lab.rig, job)
        ended = lab.rig.ended(job)
        assert ended.state == "succeeded" or "libvirt" in ended.error
        newest = made if ended.state == "succeeded" else newest
        monkeypatch.setattr(live, "_begin_with_less", begin)
        comes_back.join()
        look_up(lab)
        lab.write("/mnt/thawed", 1)
        if holds_on(lab):
            let_go(lab)
        goes_on(lab, quiet, during, writer.windows(1))
        assert [name[-36:] for name in lab.checkpoints()] == [newest]
    the_next_is_right(lab, writer)


def test_a_backup_that_libvirtd_forgot(lab: Lab, writer: Writer) -> None:
    """It died right after QEMU had begun: QEMU would put aside what the guest writes for ever."""
    before = lab.checkpoints()
    lab.host.restart_with_job(NAME, "<job type='none' async='backup' flags='0x0'/>")
    look_up(lab)
    assert holds_on(lab)
    begin_in_qemu(lab)
    wait_until(lambda: not lab.rig.core.inventory.hypervisors()[0].problem)
    quiet = writer.windows(1)
    assert "see docs/operations.md" in lab.failed().error
    let_go(lab)
    goes_on(lab, quiet, writer.windows(1))
    assert lab.checkpoints() == before
    the_next_is_right(lab, writer)


def begin_in_qemu(lab: Lab) -> None:
    """What libvirt makes of a backup of vdb, with no word to libvirt."""
    scratch = Path(f"{lab.ours}left.0")
    create = [find_tool("qemu-img"), "create", "-q", "-f", "qcow2", str(scratch), str(RAW_BYTES)]
    subprocess.run(create, check=True)
    lab.host.own(scratch)
    drives: Any = ask_qemu(lab.domain, "query-block")
    (disk,) = {
        str(found["inserted"]["node-name"])
        for found in drives
        if found.get("inserted", {}).get("file") == str(lab.images[1].path)
    }
    file = {"driver": "file", "node-name": "left-storage", "filename": str(scratch)}
    ask_qemu(lab.domain, "blockdev-add", **file)
    node = {"driver": "qcow2", "node-name": "left-format", "file": "left-storage"}
    ask_qemu(lab.domain, "blockdev-add", **node, backing=disk)
    job = {"job-id": "backup-vdb", "device": disk, "target": "left-format", "sync": "none"}
    ask_qemu(lab.domain, "blockdev-backup", **job, **{"auto-dismiss": False})
    scratch.unlink()


def look_up(lab: Lab) -> None:
    """The domain, by the libvirtd that runs now."""
    lab.domain = lab.host.connection.lookupByUUIDString(lab.domain.UUIDString())


def holds_on(lab: Lab) -> bool:
    """Whether libvirt takes a backup for one that is beginning still."""
    try:
        lab.domain.jobInfo()
    except LibvirtFault as error:
        return is_half_begun(error)
    return False


def let_go(lab: Lab) -> None:
    """What docs/operations.md tells to do. QEMU has no job and no file of ours any more."""
    assert ask_qemu(lab.domain, "query-jobs") == []
    nodes: Any = ask_qemu(lab.domain, "query-named-block-nodes", flat=True)
    assert not [node for node in nodes if str(lab.host.scratch) in str(node.get("file"))]
    lab.host.restart_with_job(NAME, "")
    look_up(lab)


def ask(lab: Lab, point: str = "") -> tuple[str, str]:
    """Asks for a full backup: (backup, job)."""
    point = point or lab.rig.point_uuid
    return lab.rig.engine.create_backup(ANYWHERE, lab.vm.uuid, point, "b", "", True)


@contextlib.contextmanager
def point_at(lab: Lab, place: Path) -> Iterator[str]:
    point = lab.rig.engine.create_point("other", "local", str(place))
    try:
        yield point
    finally:
        lab.rig.engine.delete_point(point, False)


@contextlib.contextmanager
def small_scratch(host: Host, tmp_path: Path) -> Iterator[Path]:
    """A small file system where QEMU's user may write, with a short name as sockets lie there."""
    image, place = tmp_path / "scratch.img", host.root / "small"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(SCRATCH_BYTES)
    subprocess.run([find_tool("mke2fs"), "-q", "-O", "^has_journal", str(image)], check=True)
    mount(image, place)
    try:
        host.own(place)
        yield place
    finally:
        unmount(image, place)


def goes_on(lab: Lab, *windows: Sequence[int]) -> None:
    """The guest wrote in each window, before, during and after, and never much slower."""
    before, *_ = windows
    assert all(all(window) for window in windows), windows
    assert all(mean(each) > SLOWEST * mean(before) for each in windows if each), windows
    domain: Any = lab.domain
    assert domain.state()[0] == RUNNING
    assert domain.diskErrors() == {}
    assert domain_is_free(lab)
    assert list(lab.host.scratch.iterdir()) == []


def domain_is_free(lab: Lab) -> bool:
    """Whether no job is on."""
    return lab.domain.jobInfo()[0] == 0


def the_next_is_right(lab: Lab, writer: Writer) -> None:
    """A backup that builds on the last good one is what the guest's disks then hold."""
    writer.stop()
    lab.write("/mnt/more", 128)
    truth = lab.quiet()
    backup = lab.back_up()
    assert "changes found by: vda bitmap, vdb scan" in backup.label.notes
    assert lab.restored_sums(backup) == truth
    assert [name[-36:] for name in lab.checkpoints()] == [backup.uuid]
