"""What storage/ relies on, for every implementation of Fs."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from pathlib import Path

import pytest

from storage.files.fs import Fs, OsFs
from tests.failing_fs import open_below
from tests.simfs import SimFs
from tests.simnfs import NfsClient, machines


class FsContract:
    """Inherit, and give `fs` and `root` (an existing, empty directory of it)."""

    @pytest.fixture
    def fs(self) -> Fs:
        raise NotImplementedError

    @pytest.fixture
    def root(self) -> str:
        raise NotImplementedError

    def make(self, fs: Fs, path: str, body: bytes = b"") -> str:
        fd = fs.open_new(path)
        fs.pwrite(fd, [body], 0)
        fs.close(fd)
        return path

    def content(self, fs: Fs, path: str) -> bytes:
        fd = fs.open_read(path)
        try:
            return fs.pread(fd, 1 << 20, 0)
        finally:
            fs.close(fd)

    def test_a_new_file_can_be_written_and_read_back(self, fs: Fs, root: str) -> None:
        fd = fs.open_new(f"{root}/a")
        assert fs.pwrite(fd, [b"abc", bytearray(b"de"), memoryview(b"xfx")[1:2]], 0) == 6
        assert fs.pread(fd, 6, 0) == b"abcdef"
        fs.close(fd)
        assert self.content(fs, f"{root}/a") == b"abcdef"

    def test_room_that_is_set_aside_reads_as_zeros(self, fs: Fs, root: str) -> None:
        fd = fs.open_new(f"{root}/a")
        fs.allocate(fd, 3 << 20)
        fs.close(fd)
        assert fs.stat(f"{root}/a").size_bytes == 3 << 20
        assert not any(self.content(fs, f"{root}/a"))

    def test_a_new_file_never_replaces(self, fs: Fs, root: str) -> None:
        self.make(fs, f"{root}/a", b"old")
        with pytest.raises(FileExistsError):
            fs.open_new(f"{root}/a")
        assert self.content(fs, f"{root}/a") == b"old"

    def test_names_that_are_not_there(self, fs: Fs, root: str) -> None:
        for call in (fs.open_read, fs.unlink, fs.stat, fs.listdir, fs.rmdir, fs.fsync_dir):
            with pytest.raises(FileNotFoundError):
                call(f"{root}/none")
        with pytest.raises(FileNotFoundError):
            fs.open_new(f"{root}/none/a")
        with pytest.raises(FileNotFoundError):
            fs.link(f"{root}/none", f"{root}/b")
        with pytest.raises(FileNotFoundError):
            fs.rename(f"{root}/none", f"{root}/b")

    def test_reads_are_short_only_at_the_end(self, fs: Fs, root: str) -> None:
        fd = fs.open_read(self.make(fs, f"{root}/a", b"0123456789"))
        assert fs.pread(fd, 4, 3) == b"3456"
        assert fs.pread(fd, 100, 8) == b"89"
        assert fs.pread(fd, 1, 10) == b""
        fs.close(fd)

    def test_preadv_fills_any_buffer(self, fs: Fs, root: str) -> None:
        fd = fs.open_read(self.make(fs, f"{root}/a", b"0123456789"))
        buffer = bytearray(4)
        assert fs.preadv(fd, buffer, 2) == 4
        assert buffer == b"2345"
        with mmap.mmap(-1, 4096) as page:
            assert fs.preadv(fd, page, 1) == 9
            assert page[:10] == b"123456789\0"
        assert fs.preadv(fd, memoryview(buffer)[1:3], 10) == 0
        assert buffer == b"2345"
        fs.close(fd)

    def test_more_pieces_than_one_system_call_takes(self, fs: Fs, root: str) -> None:
        pieces = [b"%06d" % number for number in range(3000)]
        fd = fs.open_new(f"{root}/a")
        assert fs.pwrite(fd, pieces, 0) == 18_000
        assert fs.pread(fd, 20_000, 0) == b"".join(pieces)
        assert fs.pwrite(fd, [], 0) == 0
        assert fs.pwrite(fd, [b"", b"ab", b""], 18_000) == 2
        assert fs.stat(f"{root}/a").size_bytes == 18_002
        fs.close(fd)

    def test_writing_behind_the_end_leaves_zeros(self, fs: Fs, root: str) -> None:
        fd = fs.open_new(f"{root}/a")
        fs.pwrite(fd, [b"x"], 5)
        assert fs.pread(fd, 10, 0) == bytes(5) + b"x"
        fs.close(fd)

    def test_durable_steps_and_the_hint_succeed(self, fs: Fs, root: str) -> None:
        fd = fs.open_new(f"{root}/a")
        fs.pwrite(fd, [bytes(8192)], 0)
        fs.start_writeback(fd, 0, 8192)
        fs.fsync(fd)
        fs.close(fd)
        fs.fsync_dir(root)
        assert self.content(fs, f"{root}/a") == bytes(8192)

    def test_a_closed_descriptor_is_refused(self, fs: Fs, root: str) -> None:
        fd = fs.open_new(f"{root}/a")
        fs.close(fd)
        with pytest.raises(OSError, match="Bad file descriptor") as raised:
            fs.close(fd)
        assert raised.value.errno == errno.EBADF

    def test_link_gives_a_second_name(self, fs: Fs, root: str) -> None:
        self.make(fs, f"{root}/a", b"one")
        fs.link(f"{root}/a", f"{root}/b")
        first, second = fs.stat(f"{root}/a"), fs.stat(f"{root}/b")
        assert first == second
        assert (first.kind, first.size_bytes) == ("file", 3)
        fs.unlink(f"{root}/a")
        assert self.content(fs, f"{root}/b") == b"one"

    def test_link_never_overwrites(self, fs: Fs, root: str) -> None:
        self.make(fs, f"{root}/a", b"new")
        self.make(fs, f"{root}/b", b"old")
        with pytest.raises(FileExistsError):
            fs.link(f"{root}/a", f"{root}/b")
        assert self.content(fs, f"{root}/b") == b"old"

    def test_rename_replaces(self, fs: Fs, root: str) -> None:
        self.make(fs, f"{root}/a", b"new")
        self.make(fs, f"{root}/b", b"old")
        fs.rename(f"{root}/a", f"{root}/b")
        assert self.content(fs, f"{root}/b") == b"new"
        assert fs.listdir(root) == ["b"]

    def test_an_open_file_outlives_its_name(self, fs: Fs, root: str) -> None:
        fd = fs.open_read(self.make(fs, f"{root}/a", b"still here"))
        fs.unlink(f"{root}/a")
        assert fs.pread(fd, 100, 0) == b"still here"
        fs.close(fd)

    def test_directories(self, fs: Fs, root: str) -> None:
        fs.mkdir(f"{root}/d")
        assert fs.stat(f"{root}/d").kind == "directory"
        with pytest.raises(FileExistsError):
            fs.mkdir(f"{root}/d")
        self.make(fs, f"{root}/d/a")
        with pytest.raises(OSError, match="not empty"):
            fs.rmdir(f"{root}/d")
        fs.unlink(f"{root}/d/a")
        fs.rmdir(f"{root}/d")
        assert fs.listdir(root) == []

    def test_a_directory_is_not_read_as_a_file(self, fs: Fs, root: str) -> None:
        fs.mkdir(f"{root}/d")
        with pytest.raises(OSError, match="not a regular file"):
            fs.open_read(f"{root}/d")

    def test_names_are_sorted_without_deleted_open_files(self, fs: Fs, root: str) -> None:
        for name in ("b", "a", ".nfs000000012345", ".hidden", "00000001"):
            self.make(fs, f"{root}/{name}")
        assert fs.listdir(root) == [".hidden", "00000001", "a", "b"]

    def test_room(self, fs: Fs, root: str) -> None:
        room = fs.room(root)
        assert 0 < room.free_bytes <= room.capacity_bytes


class TestOsFs(FsContract):
    @pytest.fixture
    def fs(self) -> Fs:
        return OsFs()

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        path = tmp_path / "root"
        path.mkdir()
        return str(path)

    def test_only_the_owner_may_read(self, fs: Fs, root: str) -> None:
        self.make(fs, f"{root}/a")
        fs.mkdir(f"{root}/d")
        assert os.stat(f"{root}/a").st_mode & 0o777 == 0o600
        assert os.stat(f"{root}/d").st_mode & 0o777 == 0o700

    def test_symbolic_links_are_reported_and_not_followed(self, fs: Fs, root: str) -> None:
        self.make(fs, f"{root}/a")
        os.symlink(f"{root}/a", f"{root}/s")
        os.symlink(f"{root}/none", f"{root}/dangling")
        assert fs.stat(f"{root}/s").kind == "other"
        with pytest.raises(OSError, match="symbolic") as raised:
            fs.open_read(f"{root}/s")
        assert raised.value.errno == errno.ELOOP
        with pytest.raises(FileExistsError):
            fs.open_new(f"{root}/dangling")
        assert not os.path.exists(f"{root}/none")

    def test_a_fifo_neither_blocks_nor_opens(self, fs: Fs, root: str) -> None:
        os.mkfifo(f"{root}/f")
        with pytest.raises(OSError, match="not a regular file"):
            fs.open_read(f"{root}/f")
        assert open_below(root) == []

    def test_a_file_that_goes_stale_as_it_is_opened_does_not_stay_open(
        self, fs: Fs, root: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another NFS client deletes it between the two calls."""

        def stale(_: int) -> os.stat_result:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        self.make(fs, f"{root}/a")
        with monkeypatch.context() as patched:
            patched.setattr(os, "fstat", stale)
            with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
                fs.open_read(f"{root}/a")
        assert open_below(root) == []

    def test_room_is_set_aside(self, root: str) -> None:
        fs = OsFs()
        fd = fs.open_new(f"{root}/a")
        fs.set_aside(fd, 4096, 1 << 20)
        assert os.fstat(fd).st_size == 4096 + (1 << 20)
        assert os.fstat(fd).st_blocks * 512 >= 1 << 20
        fs.close(fd)

    def test_a_lack_of_room_to_set_aside_is_an_error(self) -> None:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            assert os.fstatvfs(file.fileno()).f_blocks  # it knows its limit
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                OsFs().set_aside(file.fileno(), 0, 1 << 60)
            assert os.fstat(file.fileno()).st_blocks == 0

    def test_what_can_not_set_room_aside_is_none(self) -> None:
        fd = os.memfd_create("fixed", os.MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        OsFs().set_aside(fd, 0, 1 << 20)  # which says EPERM
        assert os.fstat(fd).st_size == 0
        os.close(fd)

    def test_descriptors_are_not_inherited(self, fs: Fs, root: str) -> None:
        fd = fs.open_new(f"{root}/a")
        assert not os.get_inheritable(fd)
        fs.close(fd)


class TestSimFs(FsContract):
    @pytest.fixture
    def fs(self) -> Fs:
        fs = SimFs()
        fs.mkdir("/root")
        return fs

    @pytest.fixture
    def root(self) -> str:
        return "/root"


class TestNfsClient(FsContract):
    @pytest.fixture
    def fs(self) -> NfsClient:
        return machines(1)[0]

    @pytest.fixture
    def root(self) -> str:
        return "/point"
