"""The LMDB view: transactions, growth under readers, replacement, and whose it is."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path
from typing import Any, cast

import lmdb
import pytest

from storage.errors import Damaged, StorageError
from storage.view import view as view_module
from storage.view.tables import Tables
from storage.view.view import View, destroy


@pytest.fixture
def view(tmp_path: Path) -> View:
    return View(str(tmp_path / "view"), b"mine")


def put(key: bytes, value: bytes, state: Tables) -> None:
    state.table("chunks").put(key, value)


def value_of(view: View, key: bytes) -> bytes | None:
    with view.read() as state:
        return state.table("chunks").get(key)


def test_a_change_that_raises_leaves_no_trace(view: View) -> None:
    def change(state: Tables) -> None:
        put(b"k", b"v", state)
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        view.update(change)
    assert value_of(view, b"k") is None


def test_a_change_lasts(view: View, tmp_path: Path) -> None:
    view.update(lambda state: put(b"k", b"v", state))
    assert view.update(lambda state: state.table("chunks").get(b"k")) == b"v"
    view.close()
    assert value_of(View(str(tmp_path / "view"), b"mine"), b"k") == b"v"


def test_a_view_that_is_being_read_is_closed_after_that(view: View) -> None:
    """LMDB would end the process."""
    view.update(lambda state: put(b"k", b"v", state))
    closer = threading.Thread(target=view.close)
    with view.read() as state:
        closer.start()
        closer.join(0.2)
        assert closer.is_alive()
        assert state.table("chunks").get(b"k") == b"v"
    closer.join(10.0)
    assert not closer.is_alive()
    with pytest.raises(StorageError):
        value_of(view, b"k")


def test_a_closed_view_stays_closed(view: View, tmp_path: Path) -> None:
    """A session that ends late must not open it again: nobody would close it any more."""
    View(str(tmp_path / "other"), b"mine").close()
    view.close()
    for _ in range(2):
        with pytest.raises(StorageError):
            view.update(lambda state: put(b"k", b"v", state))
        with pytest.raises(StorageError):
            value_of(view, b"k")
        with pytest.raises(StorageError):
            view.replace(str(tmp_path / "other"))
    View(str(tmp_path / "view"), b"mine").close()
    View(str(tmp_path / "other"), b"mine").close()


def test_anothers_view_is_refused(view: View, tmp_path: Path) -> None:
    view.close()
    with pytest.raises(Damaged, match="another domain"):
        View(str(tmp_path / "view"), b"yours")


def test_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "view").mkdir()
    (tmp_path / "view" / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(Damaged):
        View(str(tmp_path / "view"), b"mine")


def test_a_scan_keeps_to_its_prefix(view: View) -> None:
    for key in (b"a1", b"b1", b"b2", b"c1"):
        view.update(lambda state, key=key: put(key, key, state))  # type: ignore[misc]
    with view.read() as state:
        assert [key for key, _ in state.table("chunks").scan(b"b")] == [b"b1", b"b2"]
        assert list(state.table("chunks").keys_from(b"b2", b"b")) == [b"b2"]
        assert list(state.table("chunks").scan(b"d")) == []


def test_the_map_grows_while_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "FIRST_MAP_BYTES", 256 << 10)
    view = View(str(tmp_path / "small"), b"mine")
    view.update(lambda state: put(b"first", b"1", state))
    done = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while not done.wait(0.001):
                with view.read() as outer:
                    assert value_of(view, b"first") == b"1"
                    assert outer.table("chunks").get(b"first") == b"1"
        except (AssertionError, StorageError) as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(64):
        key = number.to_bytes(2, "big")
        view.update(lambda state, key=key: put(key, bytes(64 << 10), state))  # type: ignore[misc]
    done.set()
    for reader in readers:
        reader.join(30)
    assert errors == []
    assert value_of(view, b"\x00\x3f") == bytes(64 << 10)


def mapped_bytes(path: Path) -> int:
    """What of a file's mapping is in this process's memory."""
    resident = inside = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(f"{path}/data.mdb")
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1]) << 10
    return resident


def test_what_was_read_is_let_go_unless_somebody_is_reading(view: View, tmp_path: Path) -> None:
    def fill(state: Tables) -> None:
        for number in range(2000):
            put(b"%05d" % number, bytes(1000), state)

    view.update(fill)
    path = tmp_path / "view"
    with view.read() as state:
        assert sum(1 for _ in state.table("chunks").scan()) == 2000
        full = mapped_bytes(path)
        view.release_memory()
        assert mapped_bytes(path) == full > 2 << 20
        assert state.table("chunks").get(b"00001") == bytes(1000)
    view.release_memory()
    assert mapped_bytes(path) < full // 4
    assert value_of(view, b"01999") == bytes(1000)
    view.update(lambda state: put(b"k", b"v", state))
    assert value_of(view, b"k") == b"v"


def test_letting_go_hinders_no_reader_and_no_writer(view: View) -> None:
    over = threading.Event()
    failed: list[BaseException] = []

    def read() -> None:
        try:
            while not over.is_set():
                assert value_of(view, b"k") in (None, b"v")
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(200):
        view.release_memory()
        if number % 20 == 0:
            view.update(lambda state: put(b"k", b"v", state))
    over.set()
    for reader in readers:
        reader.join()
    assert not failed
    assert value_of(view, b"k") == b"v"


def test_a_replaced_view_goes_on_with_the_new_one(view: View, tmp_path: Path) -> None:
    view.update(lambda state: put(b"k", b"old", state))
    other = View(str(tmp_path / "other"), b"mine")
    other.update(lambda state: put(b"k", b"new", state))
    other.close()
    with view.read() as before:
        view.replace(str(tmp_path / "other"))
        assert before.table("chunks").get(b"k") == b"old"
    assert value_of(view, b"k") == b"new"
    view.update(lambda state: put(b"k", b"newer", state))
    view.close()
    assert value_of(View(str(tmp_path / "view"), b"mine"), b"k") == b"newer"


def test_a_destroyed_view_is_gone(view: View, tmp_path: Path) -> None:
    view.close()
    destroy(str(tmp_path / "view"))
    destroy(str(tmp_path / "view"))
    assert not (tmp_path / "view").exists()


class WatchedEnv:
    """A view's environment; `seals` has, for each flush, whether the file had its seal by then."""

    def __init__(self, view: View, error: Exception | None = None) -> None:
        self._env = view._current.env
        self._seal = Path(view.path, "data.mdb.seal")
        self._error = error
        self.seals: list[bool] = []
        view._current.env = cast(lmdb.Environment, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def sync(self, force: bool) -> None:
        self.seals.append(self._seal.exists())
        if self._error is not None:
            raise self._error
        self._env.sync(force)


def test_a_scratch_view_is_flushed_before_it_is_sealed(tmp_path: Path) -> None:
    """A seal vouches for the file whatever happened to the machine since."""
    view = View(str(tmp_path / "view"), b"mine", scratch=True)
    view.update(lambda state: put(b"k", b"v", state))
    env = WatchedEnv(view)
    view.close(seal=True)
    assert env.seals == [False]
    assert (tmp_path / "view" / "data.mdb.seal").exists()
    assert value_of(View(str(tmp_path / "view"), b"mine"), b"k") == b"v"


def test_a_scratch_view_that_can_not_be_flushed_gets_no_seal(tmp_path: Path) -> None:
    view = View(str(tmp_path / "view"), b"mine", scratch=True)
    env = WatchedEnv(view, lmdb.DiskError("on purpose"))
    with pytest.raises(StorageError):
        view.close(seal=True)
    assert env.seals == [False]
    assert not (tmp_path / "view" / "data.mdb.seal").exists()


def test_a_view_that_can_not_be_read_any_more_is_closed_without_a_seal(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is closed after it must not be left open."""
    view.update(lambda state: put(b"k", b"v", state))

    def bad_sector(_fd: int, _size_bytes: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "read", bad_sector)
        view.close(seal=True)
    assert not (tmp_path / "view" / "data.mdb.seal").exists()
    assert value_of(View(str(tmp_path / "view"), b"mine"), b"k") == b"v"


def test_only_a_scratch_view_does_not_wait_for_the_medium(tmp_path: Path) -> None:
    for name, scratch in (("view", False), ("scratch", True)):
        view = View(str(tmp_path / name), b"mine", scratch=scratch)
        assert view._current.env.flags()["sync"] is not scratch
        view.close(seal=True)
        again = View(str(tmp_path / name), b"mine")
        assert again._current.env.flags()["sync"]
        again.close()


def test_a_disk_that_is_full_is_a_storage_error(tmp_path: Path) -> None:
    view = View(str(tmp_path / "view"), b"mine")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
    try:
        with pytest.raises(StorageError):
            view.update(lambda state: state.table("chunks").put(b"k", bytes(1 << 20)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    view.update(lambda state: state.table("chunks").put(b"k", b"v"))
    view.close()
