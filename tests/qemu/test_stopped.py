"""engine.qemu.stopped: qcow2 volumes of stopped VMs, read beside whatever else happens to them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import Conflict, DiskServerRefused, EngineError
from engine.qemu.process import image_options
from engine.qemu.stopped import Qcow2Source
from engine.snapshot.freeze import NO_HOOK
from engine.snapshot.snapshot import take_snapshot
from engine.snapshot.sources import BitmapPlan, DiskFile
from tests.nbd.servers import require
from tests.qemu.images import MIB, bitmaps, content, create, qemu_img, qemu_io


def disk(image: Path, parent: str = "", new: str = "", keep: tuple[str, ...] = ()) -> DiskFile:
    plan = BitmapPlan(parent, new, frozenset(keep))
    return DiskFile("vda", str(image), "qcow2", bitmaps=plan)


def read(source: Qcow2Source) -> bytes:
    found = bytearray(source.capacity)
    for offset, length in source.data_ranges():
        source.read_into(memoryview(found)[offset : offset + length], offset)
    return bytes(found)


@contextlib.contextmanager
def running_vm(image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU has the image open for writing, as for a VM; it has answered its monitor once."""
    require("qemu-system-x86_64")
    node = image_options("qcow2", str(image), "node-name=n")
    bare = ["-nodefaults", "-machine", "none", "-display", "none", "-monitor", "none", "-S"]
    process = subprocess.Popen(
        ["qemu-system-x86_64", *bare, "-qmp", "stdio", "-blockdev", node],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert b"QMP" in process.stdout.readline()
        process.stdin.write(b'{"execute":"qmp_capabilities"}\n')
        process.stdin.flush()
        assert b"return" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = create(tmp_path / "v,1.qcow2")
    qemu_io(path, "write -P 7 1M 3M", "write -P 8 9M 100k")
    return path


def test_its_content_and_what_is_data(image: Path) -> None:
    source = Qcow2Source(disk(image))
    try:
        assert source.capacity == 16 * MIB
        assert sum(length for _, length in source.data_ranges()) == 3 * MIB + 128 * 1024
        assert read(source) == content(image)
        assert (source.found_by, source.changed_ranges()) == ("scan", None)
        source.check_unchanged()
    finally:
        source.close()


def test_a_chain_is_flattened(tmp_path: Path, image: Path) -> None:
    top = create(tmp_path / "top.qcow2", "16M", "-b", image.name, "-F", "qcow2")
    qemu_io(top, "write -P 9 2M 64k", "write -z 3M 64k")
    source = Qcow2Source(disk(top, new="vmkeep-1"))
    try:
        assert read(source) == content(top)
        assert content(top)[2 * MIB] == 9
        assert bitmaps(top) == []  # of no use: writes to what is below would not be in it
        qemu_io(image, "write -P 1 1M 64k")
        with pytest.raises(Conflict, match=r"v,1\.qcow2 changed"):
            source.check_unchanged()
    finally:
        source.close()


class TestOthers:
    def test_a_vm_that_runs_is_refused(self, image: Path) -> None:
        with running_vm(image), pytest.raises(Conflict, match="open for writing") as caught:
            Qcow2Source(disk(image))
        assert caught.value.code == "volume_in_use"

    def test_a_vm_can_be_started_meanwhile(self, image: Path) -> None:
        """The reader is not in its way; as long as it does not write, nothing changes."""
        before = content(image)
        source = Qcow2Source(disk(image))
        try:
            with running_vm(image):
                assert read(source) == before
                source.check_unchanged()
        finally:
            source.close()

    def test_a_write_ends_the_backup(self, image: Path) -> None:
        source = Qcow2Source(disk(image, new="vmkeep-1"))
        try:
            qemu_io(image, "write -P 1 10M 64k")
            with pytest.raises(Conflict, match="somebody wrote to it") as caught:
                read(source)
            assert caught.value.code == "volume_changed"
            with pytest.raises(Conflict):
                source.check_unchanged()
        finally:
            source.close()
        assert bitmaps(image) == []

    def test_an_image_that_is_replaced_ends_the_backup(self, tmp_path: Path, image: Path) -> None:
        source = Qcow2Source(disk(image))
        try:
            other = create(tmp_path / "other")
            image.rename(tmp_path / "away")
            other.rename(image)
            with pytest.raises(Conflict) as caught:
                source.check_unchanged()
            assert caught.value.code == "volume_changed"
        finally:
            source.close()

    def test_we_are_killed(self, image: Path) -> None:
        """Nothing of ours stays: nobody reads the image any more."""
        code = (
            "import os, signal, sys\n"
            "from engine.qemu.stopped import Qcow2Source\n"
            "from engine.snapshot.sources import DiskFile\n"
            "source = Qcow2Source(DiskFile('vda', sys.argv[1], 'qcow2'))\n"
            "print(source._server._process.pid, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(image)], stdout=subprocess.PIPE, check=False
        )
        pid, deadline = int(done.stdout), time.monotonic() + 30
        while _state(pid) != "Z":
            assert time.monotonic() < deadline, "qemu-nbd outlives us"
            time.sleep(0.005)


def _state(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


class TestBadImages:
    def refused(self, file: DiskFile, match: str) -> None:
        with pytest.raises(EngineError, match=match):
            Qcow2Source(file)

    def test_a_corrupt_one(self, image: Path) -> None:
        with image.open("r+b") as file:
            file.seek(40)  # where the table of the clusters' places begins
            file.write(b"\xff" * 8)
        self.refused(disk(image), r"v,1\.qcow2: .*L1")

    def test_a_raw_one(self, tmp_path: Path) -> None:
        (tmp_path / "raw").write_bytes(bytes(MIB))
        self.refused(disk(tmp_path / "raw"), "declared as qcow2, and is not")

    def test_an_encrypted_one(self, image: Path) -> None:
        with image.open("r+b") as file:
            file.seek(32)  # the method of encryption
            file.write(b"\0\0\0\x02")
        self.refused(disk(image), "is encrypted")

    def test_no_tools(self, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(image.parent))
        self.refused(disk(image), r"setpriv")

    def test_another_format(self, image: Path) -> None:
        file = DiskFile("vda", str(image), "vmdk")
        with pytest.raises(DiskServerRefused, match="'vmdk' is a format that we can't read"):
            take_snapshot([file], NO_HOOK)


class TestBitmaps:
    def back_up(
        self, image: Path, parent: str, new: str, *keep: str
    ) -> list[tuple[int, int]] | None:
        """What changed since the parent; the backup ends well."""
        source = Qcow2Source(disk(image, parent, new, keep))
        try:
            changed = source.changed_ranges()
            assert read(source) == content(image)
            source.committed()
            return None if changed is None else list(changed)
        finally:
            source.close()

    def test_each_backup_leaves_one_for_the_next(self, image: Path) -> None:
        assert self.back_up(image, "", "vmkeep-1") is None
        assert self.back_up(image, "vmkeep-1", "vmkeep-2") == []
        qemu_io(image, "write -P 1 5M 64k")
        assert bitmaps(image) == ["vmkeep-2"]
        assert self.back_up(image, "vmkeep-2", "vmkeep-3") == [(5 * MIB, 65536)]
        assert bitmaps(image) == ["vmkeep-3"]

    def test_two_points_and_somebody_elses(self, image: Path) -> None:
        qemu_img("bitmap", "--add", "-f", "qcow2", image, "theirs")
        self.back_up(image, "", "vmkeep-a1")
        self.back_up(image, "", "vmkeep-b1", "vmkeep-a1")
        qemu_io(image, "write -P 1 5M 64k")
        assert self.back_up(image, "vmkeep-a1", "vmkeep-a2", "vmkeep-b1") == [(5 * MIB, 65536)]
        assert sorted(bitmaps(image)) == ["theirs", "vmkeep-a2", "vmkeep-b1"]
        assert self.back_up(image, "vmkeep-b1", "vmkeep-b2", "vmkeep-a2") == [(5 * MIB, 65536)]

    def test_a_backup_that_fails_takes_its_own_back(self, image: Path) -> None:
        self.back_up(image, "", "vmkeep-1")
        Qcow2Source(disk(image, "vmkeep-1", "vmkeep-2")).close()
        assert bitmaps(image) == ["vmkeep-1"]
        qemu_io(image, "write -P 1 5M 64k")
        assert self.back_up(image, "vmkeep-1", "vmkeep-3") == [(5 * MIB, 65536)]

    def test_qemu_was_killed(self, image: Path) -> None:
        """Its bitmap is in the image, marked as in use: not to be believed."""
        self.back_up(image, "", "vmkeep-1")
        with running_vm(image):
            pass
        assert bitmaps(image) == ["vmkeep-1"]
        assert self.back_up(image, "vmkeep-1", "vmkeep-2") is None
        assert bitmaps(image) == ["vmkeep-2"]
        assert self.back_up(image, "vmkeep-2", "vmkeep-3") == []

    def test_the_bitmap_was_removed(self, image: Path) -> None:
        self.back_up(image, "", "vmkeep-1")
        qemu_img("bitmap", "--remove", "-f", "qcow2", image, "vmkeep-1")
        assert self.back_up(image, "vmkeep-1", "vmkeep-2") is None

    def test_a_program_that_knows_no_bitmaps_wrote(self, image: Path) -> None:
        self.back_up(image, "", "vmkeep-1")
        with image.open("r+b") as file:  # such a program clears the autoclear features
            file.seek(88)
            file.write(bytes(8))
        assert self.back_up(image, "vmkeep-1", "vmkeep-2") is None

    def test_an_image_that_can_have_none(self, tmp_path: Path) -> None:
        old = create(tmp_path / "old", "16M", "-o", "compat=0.10")
        qemu_io(old, "write -P 1 5M 64k")
        assert self.back_up(old, "", "vmkeep-1") is None
        assert self.back_up(old, "vmkeep-1", "vmkeep-2") is None

    def test_a_copy_has_a_bitmap_of_its_own(self, tmp_path: Path, image: Path) -> None:
        self.back_up(image, "", "vmkeep-1")
        shutil.copy(image, tmp_path / "copy")
        qemu_io(image, "write -P 1 5M 64k")
        qemu_io(tmp_path / "copy", "write -P 1 6M 64k")
        changed = self.back_up(tmp_path / "copy", "vmkeep-1", "vmkeep-2")
        assert changed == [(6 * MIB, 65536)]

    def test_a_snapshot_is_taken_and_committed(self, tmp_path: Path, image: Path) -> None:
        """The bitmap records what the commit writes; on the overlay there is none."""
        self.back_up(image, "", "vmkeep-1")
        top = create(tmp_path / "top.qcow2", "16M", "-b", image.name, "-F", "qcow2")
        qemu_io(top, "write -P 3 5M 64k", "write -z 1M 64k")
        assert self.back_up(top, "vmkeep-1", "vmkeep-2") is None
        qemu_img("commit", "-q", top)
        assert self.back_up(image, "vmkeep-1", "vmkeep-3") == [(MIB, 65536), (5 * MIB, 65536)]

    def test_it_grew_and_shrank(self, image: Path) -> None:
        self.back_up(image, "", "vmkeep-1")
        qemu_img("resize", "-q", "-f", "qcow2", image, "20M")
        qemu_io(image, "write -P 3 18M 64k")
        assert self.back_up(image, "vmkeep-1", "vmkeep-2") == [(18 * MIB, 65536)]
        qemu_img("bitmap", "--remove", "-f", "qcow2", image, "vmkeep-2")  # QEMU wants that
        qemu_img("resize", "-q", "-f", "qcow2", "--shrink", image, "8M")
        assert self.back_up(image, "vmkeep-2", "vmkeep-3") is None

    def test_it_shrank_and_grew_again(self, image: Path) -> None:
        """QEMU's bitmap says nothing of it; engine/backup/sampling.py reads the chunk."""
        qemu_io(image, "write -P 3 5M 64k")
        self.back_up(image, "", "vmkeep-1")
        qemu_img("resize", "-q", "-f", "qcow2", "--shrink", image, str(5 * MIB + 512))
        qemu_img("resize", "-q", "-f", "qcow2", image, "16M")
        assert self.back_up(image, "vmkeep-1", "vmkeep-2") == []

    def test_an_internal_snapshot_can_not_be_gone_back_to(self, image: Path) -> None:
        """It would change all of the disk and no bitmap. QEMU sees to that, which we rely on."""
        qemu_img("snapshot", "-c", "s1", image)
        qemu_io(image, "write -P 3 5M 64k")
        self.back_up(image, "", "vmkeep-1")
        with pytest.raises(subprocess.CalledProcessError) as refused:
            qemu_img("snapshot", "-a", "s1", image)
        assert b"active dirty bitmaps" in refused.value.stderr
