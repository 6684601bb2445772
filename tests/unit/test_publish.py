from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.files.fs import OsFs
from storage.files.publish import link_or_copy, make_dirs, publish, put_if_absent
from tests.failing_fs import FailingFs, is_closed, open_below


@pytest.fixture
def tmp(tmp_path: Path) -> str:
    (tmp_path / "tmp").mkdir()
    return str(tmp_path / "tmp" / "x")


@pytest.fixture
def final(tmp_path: Path) -> str:
    (tmp_path / "final").mkdir()
    return str(tmp_path / "final" / "x")


def test_each_step_is_durable_before_the_next(tmp: str, final: str) -> None:
    fs = FailingFs()
    put_if_absent(fs, tmp, final, b"body")
    assert fs.calls == ["open_new", "pwrite", "fsync", "close", "link", "fsync_dir", "unlink"]
    assert Path(final).read_bytes() == b"body"
    assert not os.path.lexists(tmp)


def test_a_taken_name_keeps_its_file(tmp: str, final: str) -> None:
    put_if_absent(OsFs(), tmp, final, b"first")
    with pytest.raises(FileExistsError):
        put_if_absent(OsFs(), tmp, final, b"second")
    assert Path(final).read_bytes() == b"first"
    assert not os.path.lexists(tmp)
    assert open_below(os.path.dirname(final)) == open_below(os.path.dirname(tmp)) == []


def test_a_lost_reply_to_our_own_link_is_no_conflict(tmp: str, final: str) -> None:
    put_if_absent(FailingFs({"link": errno.EEXIST}, after=True), tmp, final, b"ours")
    assert Path(final).read_bytes() == b"ours"
    assert not os.path.lexists(tmp)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_failed_fsync_is_final(tmp: str, final: str, error: int) -> None:
    fs = FailingFs({"fsync": error})
    fd = fs.open_new(tmp)
    with pytest.raises(OSError, match=os.strerror(error)):
        publish(fs, fd, tmp, final)
    assert fs.calls == ["open_new", "fsync", "close", "unlink"]
    assert is_closed(fd)
    assert not os.path.lexists(final)
    assert not os.path.lexists(tmp)


def test_what_close_reports_counts(tmp: str, final: str) -> None:
    fs = FailingFs({"close": errno.EDQUOT})
    with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)):
        put_if_absent(fs, tmp, final, b"body")
    assert "link" not in fs.calls
    assert not os.path.lexists(tmp)


@pytest.mark.parametrize("step", ["link", "fsync_dir"])
def test_a_failure_to_name_it_is_raised(tmp: str, final: str, step: str) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        put_if_absent(FailingFs({step: errno.EIO}), tmp, final, b"body")
    assert not os.path.lexists(tmp)
    assert os.path.exists(final) == (step == "fsync_dir")


def test_a_failed_write_leaves_nothing(tmp: str, final: str) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        put_if_absent(FailingFs({"pwrite": errno.ENOSPC}), tmp, final, b"body")
    assert not os.path.lexists(tmp)
    assert not os.path.lexists(final)
    assert open_below(os.path.dirname(final)) == open_below(os.path.dirname(tmp)) == []


def test_a_temporary_name_that_stays_is_not_an_error(tmp: str, final: str) -> None:
    put_if_absent(FailingFs({"unlink": errno.EIO}), tmp, final, b"body")
    assert Path(final).read_bytes() == b"body"


def test_one_of_many_wins(tmp: str, final: str) -> None:
    def attempt(number: int) -> bool:
        try:
            put_if_absent(OsFs(), f"{tmp}{number}", final, b"%d" % number)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(attempt, range(16)))
    assert won.count(True) == 1
    assert Path(final).read_bytes() == b"%d" % won.index(True)
    assert os.listdir(os.path.dirname(tmp)) == []


def test_each_new_directory_is_durable_in_its_parent(tmp_path: Path) -> None:
    fs = FailingFs()
    make_dirs(fs, f"{tmp_path}/a/b", str(tmp_path))
    assert (tmp_path / "a" / "b").is_dir()
    assert fs.calls == ["mkdir", "fsync_dir"] * 2


def test_existing_directories_are_made_durable_too(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    fs = FailingFs()
    make_dirs(fs, f"{tmp_path}/a", str(tmp_path))
    assert fs.calls == ["mkdir", "fsync_dir"]
    make_dirs(fs, str(tmp_path), str(tmp_path))
    assert fs.calls == ["mkdir", "fsync_dir"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        make_dirs(OsFs(), f"{tmp_path}/a", str(tmp_path))


@pytest.mark.parametrize("outside", ["..", "../x", "a/../../x"])
def test_nothing_is_made_outside(tmp_path: Path, outside: str) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(ValueError, match="not under"):
        make_dirs(OsFs(), f"{tmp_path}/root/{outside}", f"{tmp_path}/root")
    assert os.listdir(tmp_path) == ["root"]


def test_a_second_name_is_a_link_where_links_work(tmp: str, final: str) -> None:
    put_if_absent(OsFs(), tmp, final, b"body")
    link_or_copy(fs := FailingFs(), final, tmp, f"{final}2")
    assert fs.calls == ["link", "fsync_dir"]
    assert os.path.samefile(final, f"{final}2")
    with pytest.raises(FileExistsError):
        link_or_copy(OsFs(), final, tmp, f"{final}2")
    with pytest.raises(FileNotFoundError):
        link_or_copy(OsFs(), f"{final}none", tmp, f"{final}3")


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP])
def test_a_second_name_is_a_copy_where_links_do_not(tmp: str, final: str, error: int) -> None:
    class FirstLinkFails(FailingFs):
        def link(self, source: str, target: str) -> None:
            self.fail = {"link": error} if source == final else {}
            super().link(source, target)

    body = os.urandom((4 << 20) + 5)
    put_if_absent(OsFs(), tmp, final, body)
    link_or_copy(FirstLinkFails(), final, tmp, f"{final}2")
    assert Path(f"{final}2").read_bytes() == body
    assert not os.path.samefile(final, f"{final}2")
    assert not os.path.lexists(tmp)
    assert open_below(os.path.dirname(final)) == open_below(os.path.dirname(tmp)) == []
