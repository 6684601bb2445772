"""The simulated disk loses what a real one may lose, and nothing else."""

from __future__ import annotations

import pytest

from tests.simdisk import Choice, Disk
from tests.simfs import Fault, SimFs


def made(fs: SimFs, path: str, body: bytes, *, synced: bool) -> None:
    fd = fs.open_new(path)
    fs.pwrite(fd, [body], 0)
    if synced:
        fs.fsync(fd)
    fs.close(fd)


def content(disk: Disk, path: str) -> bytes:
    fs = SimFs(disk)
    fd = fs.open_read(path)
    return fs.pread(fd, 1 << 20, 0)


def crashes(fs: SimFs) -> list[Disk]:
    return [fs.disk.crashed(Choice("random", seed)) for seed in range(200)]


def test_what_was_synced_survives_every_crash() -> None:
    fs = SimFs()
    made(fs, "/a", b"safe", synced=True)
    fs.fsync_dir("/")
    for disk in (*crashes(fs), fs.disk.crashed(Choice("none", 0))):
        assert content(disk, "/a") == b"safe"


def test_a_name_or_its_absence_needs_the_directory() -> None:
    fs = SimFs()
    made(fs, "/a", b"", synced=True)
    fs.fsync_dir("/")
    fs.link("/a", "/b")
    fs.unlink("/a")
    names = {tuple(SimFs(disk).listdir("/")) for disk in crashes(fs)}
    assert names == {(), ("a",), ("b",), ("a", "b")}
    fs.fsync_dir("/")
    assert {tuple(SimFs(disk).listdir("/")) for disk in crashes(fs)} == {("b",)}


def test_a_directory_that_is_not_durable_takes_what_is_in_it_along() -> None:
    fs = SimFs()
    fs.mkdir("/d")
    made(fs, "/d/a", b"x", synced=True)
    fs.fsync_dir("/d")
    assert SimFs(fs.disk.crashed(Choice("none", 0))).listdir("/") == []


def test_writes_are_torn_in_sectors() -> None:
    fs = SimFs()
    fd = fs.open_new("/a")
    fs.fsync_dir("/")
    fs.pwrite(fd, [b"x" * 10_000], 0)
    found = {content(disk, "/a") for disk in crashes(fs)}
    assert {b"", b"x" * 10_000} < found
    torn = found - {b"", b"x" * 10_000}
    assert all(len(one) % 512 == 0 or len(one) == 10_000 for one in torn)
    assert any(b"\0" in one.rstrip(b"\0") for one in torn)
    assert any(one.strip(b"x") == b"" for one in torn)


def test_after_a_failed_fsync_the_next_one_lies() -> None:
    fs = SimFs()
    fd = fs.open_new("/a")
    fs.pwrite(fd, [b"gone"], 0)
    fs.fault = Fault(len(fs.calls), "EIO")
    with pytest.raises(OSError, match="Input/output"):
        fs.fsync(fd)
    fs.fsync(fd)
    fs.fsync_dir("/")
    assert fs.pread(fd, 10, 0) == b"gone"
    assert content(fs.disk.crashed(Choice("none", 0)), "/a") == b""


def test_after_a_failed_fsync_of_a_directory_only_a_new_name_helps() -> None:
    fs = SimFs()
    made(fs, "/a", b"x", synced=True)
    fs.fault = Fault(len(fs.calls), "EIO")
    with pytest.raises(OSError, match="Input/output"):
        fs.fsync_dir("/")
    fs.fsync_dir("/")
    assert SimFs(fs.disk.crashed(Choice("none", 0))).listdir("/") == []
    made(fs, "/b", b"x", synced=True)
    fs.rename("/b", "/a")
    fs.fsync_dir("/")
    assert SimFs(fs.disk.crashed(Choice("none", 0))).listdir("/") == ["a"]


def test_a_killed_process_makes_nothing_safer() -> None:
    fs = SimFs()
    made(fs, "/a", b"x", synced=False)
    disk = fs.disk.copied()
    assert content(disk, "/a") == b"x"
    assert SimFs(disk.crashed(Choice("none", 0))).listdir("/") == []
    assert SimFs(fs.disk).listdir("/") == ["a"]


@pytest.mark.parametrize(("kind", "error"), [("lost", "Input/output"), ("exists", "exists")])
def test_a_lost_reply(kind: str, error: str) -> None:
    fs = SimFs()
    made(fs, "/a", b"x", synced=True)
    fs.fault = Fault(len(fs.calls), kind)
    with pytest.raises(OSError, match=error):
        fs.link("/a", "/b")
    assert fs.listdir("/") == ["a", "b"]


def test_a_short_write() -> None:
    fs = SimFs()
    fd = fs.open_new("/a")
    fs.fault = Fault(len(fs.calls), "short")
    with pytest.raises(OSError, match="No space"):
        fs.pwrite(fd, [b"0123456789"], 0)
    assert fs.pread(fd, 20, 0) == b"01234"
