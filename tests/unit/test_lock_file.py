"""LMDB's lock file is in memory, and an open environment is known as such all the same."""

from __future__ import annotations

import os
from pathlib import Path

import lmdb
import pytest

from storage.lmdb_env.lock_file import is_occupied, lock_in_memory, occupy
from storage.view.view import View


def test_nothing_of_it_is_beside_the_data(tmp_path: Path) -> None:
    """What the medium does can't be met in it; nor is anything left in memory."""
    before = set(os.listdir("/dev/shm"))
    with lock_in_memory(str(tmp_path)) as place:
        assert Path(place).parent == Path("/dev/shm")
        assert os.stat(f"{place}/lock.mdb").st_blocks * 512 >= 64 << 10
        env = lmdb.open(place)
    assert {name for name in set(os.listdir("/dev/shm")) - before if name in place} == set()
    with env.begin(write=True) as txn:
        txn.put(b"key", b"value")
    env.close()
    assert os.listdir(tmp_path) == ["data.mdb"]
    with lock_in_memory(str(tmp_path)) as place:
        env = lmdb.open(place)
    with env.begin() as txn:
        assert txn.get(b"key") == b"value"
    env.close()


def test_who_has_it_open_is_known(tmp_path: Path) -> None:
    path = str(tmp_path / "view")
    assert not is_occupied(path)
    view = View(path, b"mine")
    assert is_occupied(path)
    with pytest.raises(BlockingIOError):
        occupy(path)
    view.close()
    assert not is_occupied(path)


def test_closing_a_view_twice_closes_nobody_elses_file(tmp_path: Path) -> None:
    view = View(str(tmp_path / "view"), b"mine")
    view.close()
    fds = [os.open(tmp_path, os.O_RDONLY) for _ in range(8)]
    view.close()
    for fd in fds:
        os.close(fd)
