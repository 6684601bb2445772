"""engine.snapshot.sources: allocation, reading, and finding out that somebody wrote."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import Conflict, PoolFull, PoolUnreachable
from engine.snapshot.sources import (
    VolumeSource,
    allocated_ranges,
    from_pool_error,
    open_volume,
    pool_errors,
    settled_mark,
)
from tests.rig import sparse, write_at

MIB = 1 << 20
TIB = 1 << 40


def direct(path: Path) -> VolumeSource:
    fd = open_volume(str(path))
    return VolumeSource(fd, str(path), settled_mark(fd))


def ranges_of(path: Path) -> list[tuple[int, int]]:
    fd = open_volume(str(path))
    try:
        return list(allocated_ranges(fd, os.fstat(fd).st_size))
    finally:
        os.close(fd)


class TestAllocation:
    def test_a_hole_is_left_out_and_data_is_not(self, tmp_path: Path) -> None:
        path = sparse(tmp_path / "v", 100 * MIB)
        write_at(path, 10 * MIB, b"x" * MIB)
        write_at(path, 99 * MIB + 5, b"y")
        found = ranges_of(path)
        assert sum(length for _, length in found) < 3 * MIB
        for place in (10 * MIB, 11 * MIB - 1, 99 * MIB + 5):
            assert any(offset <= place < offset + length for offset, length in found)

    def test_ranges_end_with_an_odd_sized_file(self, tmp_path: Path) -> None:
        path = tmp_path / "v"
        path.write_bytes(b"a" * (MIB + 13))
        assert ranges_of(path) == [(0, MIB + 13)]

    def test_what_a_file_grew_by_since_is_left_out(self, tmp_path: Path) -> None:
        (tmp_path / "v").write_bytes(b"a" * MIB)
        fd = open_volume(str(tmp_path / "v"))
        assert list(allocated_ranges(fd, 5000)) == [(0, 5000)]
        os.close(fd)

    @pytest.mark.parametrize("size_bytes", [0, 1, 5 * TIB])
    def test_all_hole(self, tmp_path: Path, size_bytes: int) -> None:
        assert ranges_of(sparse(tmp_path / "v", size_bytes)) == []

    def test_ten_tib_with_data_at_its_end(self, tmp_path: Path) -> None:
        path = sparse(tmp_path / "v", 10 * TIB)
        write_at(path, 10 * TIB - 3, b"end")
        calls = ranges_of(path)
        assert len(calls) == 1
        assert sum(calls[0]) == 10 * TIB

    def test_file_system_without_seek_data_is_all_data(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = sparse(tmp_path / "v", 3 * MIB)
        assert ranges_of(path) == []
        monkeypatch.setattr(os, "lseek", refuse(errno.EINVAL))
        assert ranges_of(path) == [(0, 3 * MIB)]

    def test_a_seek_that_goes_backwards_is_not_believed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = sparse(tmp_path / "v", 3 * MIB)
        monkeypatch.setattr(os, "lseek", lambda _fd, _at, _how: 0)
        assert ranges_of(path) == [(0, 3 * MIB)]

    def test_a_failing_seek_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = sparse(tmp_path / "v", 3 * MIB)
        monkeypatch.setattr(os, "lseek", refuse(errno.EIO))
        source = direct(path)
        with pytest.raises(PoolUnreachable, match=str(path)):
            list(source.data_ranges())
        source.close()


def refuse(number: int) -> Callable[..., int]:
    def call(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return call


class TestOpening:
    def test_a_symbolic_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"x")
        (tmp_path / "v").symlink_to("secret")
        with pytest.raises(OSError, match="symbolic links"):
            open_volume(str(tmp_path / "v"))

    def test_a_fifo_is_refused_and_does_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "v")
        with pytest.raises(OSError, match="not a regular file"):
            open_volume(str(tmp_path / "v"))

    def test_a_directory_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="not a regular file"):
            open_volume(str(tmp_path))


class TestReading:
    def test_reads_what_is_there(self, tmp_path: Path) -> None:
        content = os.urandom(MIB + 13)
        (tmp_path / "v").write_bytes(content)
        source = direct(tmp_path / "v")
        buffer = bytearray(1000)
        assert source.read_into(memoryview(buffer), MIB + 13 - 1000) == 1000
        assert buffer == content[-1000:]
        assert source.capacity == MIB + 13
        source.prefetch(0, MIB)
        source.close()
        source.close()

    def test_shrunk_volume_is_a_conflict_not_a_short_read(self, tmp_path: Path) -> None:
        path = sparse(tmp_path / "v", MIB)
        fd = open_volume(str(path))
        source = VolumeSource(fd, str(path))
        os.truncate(path, 10)
        with pytest.raises(Conflict, match="became shorter") as caught:
            source.read_into(memoryview(bytearray(100)), 0)
        assert caught.value.code == "volume_changed"
        source.close()


def overwrite(path: Path) -> None:
    write_at(path, 0, b"z")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"z")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.rename(path)


def put_times_back(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class TestGuard:
    @pytest.mark.parametrize("change", [overwrite, append, replace, Path.unlink, put_times_back])
    def test_a_change_is_found(self, tmp_path: Path, change: Callable[[Path], None]) -> None:
        path = tmp_path / "v"
        path.write_bytes(b"a" * 100)
        source = direct(path)
        source.check_unchanged()
        change(path)
        with pytest.raises(Conflict) as caught:
            source.check_unchanged()
        assert caught.value.code == "volume_changed"
        assert caught.value.retryable
        source.close()

    def test_another_pool_under_the_same_path_is_found(self, tmp_path: Path) -> None:
        """The open file itself does not change by this."""
        pool = tmp_path / "pool"
        pool.mkdir()
        (pool / "v").write_bytes(b"a")
        source = direct(pool / "v")
        pool.rename(tmp_path / "old")
        pool.mkdir()
        (pool / "v").write_bytes(b"a")
        with pytest.raises(Conflict, match="replaced"):
            source.check_unchanged()
        source.close()

    def test_a_read_finds_it_at_once(self, tmp_path: Path) -> None:
        path = tmp_path / "v"
        path.write_bytes(b"a" * 100)
        source = direct(path)
        overwrite(path)
        with pytest.raises(Conflict, match="somebody wrote"):
            source.read_into(memoryview(bytearray(10)), 0)
        source.close()

    def test_a_write_that_an_nfs_client_was_not_told_of_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By another host. A client tells what it remembers, and asks when a file is opened."""
        path = tmp_path / "v"
        path.write_bytes(b"a" * 100)
        memory: dict[int, os.stat_result] = {}
        fstat, open_file = os.fstat, os.open

        def asked(*given: Any) -> int:
            fd = open_file(*given)
            found = fstat(fd)
            memory[found.st_ino] = found
            return fd

        def remembered(fd: int) -> os.stat_result:
            found = fstat(fd)
            return memory.get(found.st_ino, found)

        monkeypatch.setattr(os, "open", asked)
        monkeypatch.setattr(os, "fstat", remembered)
        source = direct(path)
        append(path)
        source.read_into(memoryview(bytearray(10)), 0)
        with pytest.raises(Conflict, match="somebody wrote"):
            source.check_unchanged()
        source.close()

    def test_no_write_of_a_burst_is_missed(self, tmp_path: Path) -> None:
        """Writes just before and just after the mark fall into one tick of the file's clock."""
        path = tmp_path / "v"
        path.write_bytes(b"a" * 100)
        for _ in range(20):
            overwrite(path)
            source = direct(path)
            overwrite(path)
            with pytest.raises(Conflict):
                source.check_unchanged()
            source.close()

    @pytest.mark.parametrize("skew_s", [0, 5, -5])
    def test_no_write_is_missed_where_times_are_whole_seconds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew_s: int
    ) -> None:
        """As on ext4 with inodes of 128 bytes. Both writes are in one second, unless waited for.
        `skew_s`: how far our clock is before that of the server that gives the times."""
        path = tmp_path / "v"
        path.write_bytes(b"a" * 100)
        fstat, second_ns = os.fstat, 10**9

        def coarse(fd: int) -> os.stat_result:
            found = fstat(fd)
            times = {
                name: getattr(found, name) // second_ns * second_ns
                for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")
            }
            return os.stat_result(tuple(found), times)

        monkeypatch.setattr(os, "fstat", coarse)
        time_ns = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: time_ns() + skew_s * second_ns)
        time.sleep(1.05 - time.time() % 1)
        overwrite(path)
        time.sleep(0.05)
        source = direct(path)
        overwrite(path)
        with pytest.raises(Conflict, match="somebody wrote"):
            source.check_unchanged()
        source.close()

    def test_reading_is_no_change(self, tmp_path: Path) -> None:
        path = tmp_path / "v"
        path.write_bytes(b"a" * 100)
        source = direct(path)
        path.read_bytes()
        source.read_into(memoryview(bytearray(10)), 0)
        source.check_unchanged()
        source.close()

    def test_a_file_from_the_future_is_not_waited_for(self, tmp_path: Path) -> None:
        path = tmp_path / "v"
        path.write_bytes(b"a")
        future_ns = time.time_ns() + 10**12
        os.utime(path, ns=(future_ns, future_ns))
        source = direct(path)
        source.check_unchanged()
        source.close()


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, PoolFull),
        (errno.EDQUOT, PoolFull),
        (errno.EIO, PoolUnreachable),
        (errno.ENOENT, PoolUnreachable),
    ],
)
def test_pool_errors_are_translated(number: int, kind: type[Exception]) -> None:
    assert isinstance(from_pool_error(OSError(number, "x"), "disk"), kind)
    with pytest.raises(kind, match="disk: x"), pool_errors("disk"):
        raise OSError(number, "x")
