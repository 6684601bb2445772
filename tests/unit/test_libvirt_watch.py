"""What watches libvirt: the hosts, and the scratch directory. Without libvirt."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.errors import HypervisorRefused, ScratchFull
from engine.libvirt import watch
from engine.libvirt.binding import LibvirtFault
from engine.libvirt.ending import abort_job
from engine.libvirt.scratch import ScratchWatch, make_anew

PATIENCE_S = 20.0


class Connection:
    def close(self) -> None:
        pass


def test_a_host_that_is_lost_again_is_looked_for_at_once_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pauses grow while it is away, and begin anew when it was in sight."""
    connects, often = list[str](), threading.Event()
    looks = [True, False] * 100

    def connect(name: str) -> Any:
        connects.append(name)
        if len(connects) == 15:
            often.set()
        return Connection()

    def look(_connection: object) -> watch.Sight:
        if looks.pop(0):
            return watch.Sight((), ())
        raise LibvirtFault("gone")

    monkeypatch.setattr(watch, "connect", connect)
    monkeypatch.setattr(watch, "listen", lambda *_: None)
    monkeypatch.setattr(watch, "look", look)
    monkeypatch.setattr(watch, "LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr(watch, "SETTLE_S", 0.0)
    monkeypatch.setattr(watch, "FIRST_PAUSE_S", 0.01)  # doubled 14 times: 163 s
    monkeypatch.setattr(watch, "LONGEST_PAUSE_S", 1000.0)
    host = watch.Watch("test", lambda *_: None)
    host.start()
    try:
        assert often.wait(PATIENCE_S)
    finally:
        host.stop()


def test_a_watch_that_was_never_started_can_be_stopped() -> None:
    """A start that failed before it came to that."""
    watch.Watch("test", lambda *_: None).stop()


def test_the_watch_goes_on_until_the_job_could_be_ended(tmp_path: Path) -> None:
    answers, done = [False, False, True], threading.Event()

    def give_up() -> bool:
        ended = answers.pop(0)
        if ended:
            done.set()
        return ended

    scratch = ScratchWatch(str(tmp_path), [], 1 << 60, 0, give_up)
    scratch.start()
    assert done.wait(PATIENCE_S)
    scratch.stop()
    assert answers == []
    assert "are the reserve" in scratch.problem


class Busy:
    """A domain with a backup job that serves at `socket`."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self.aborted = False

    def jobInfo(self) -> list[int]:
        return [1]

    def backupGetXMLDesc(self) -> str:
        return f"<domainbackup><server transport='unix' socket='{self._socket}'/></domainbackup>"

    def abortJob(self) -> int:
        self.aborted = True
        return 0


@pytest.mark.parametrize(("socket", "ours"), [("/s/host-1.sock", True), ("/s/other.sock", False)])
def test_a_full_scratch_directory_ends_our_own_job_only(socket: str, ours: bool) -> None:
    """The VM may have been stopped and started since, and is being migrated now."""
    domain: Any = Busy(socket)
    assert abort_job(lambda: domain, "/s/host-", "/s/host-1.sock")
    assert domain.aborted == ours


def test_a_scratch_file_is_a_new_one_whatever_was_there(tmp_path: Path) -> None:
    """The directory is QEMU's user's, who could plant a link."""
    kept, path = tmp_path / "kept", tmp_path / "scratch"
    kept.write_bytes(b"kept")
    path.symlink_to(kept)
    make_anew(str(path), b"empty")
    assert not path.is_symlink()
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"empty", 0o600)
    make_anew(str(path), b"again")
    assert (path.read_bytes(), kept.read_bytes()) == (b"again", b"kept")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root (the directory is another user's)")
def test_a_scratch_file_belongs_to_whom_its_directory_does(tmp_path: Path) -> None:
    os.chown(tmp_path, 1234, 4321)
    make_anew(str(tmp_path / "scratch"), b"empty")
    found = (tmp_path / "scratch").stat()
    assert (found.st_uid, found.st_gid) == (1234, 4321)


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, ScratchFull), (errno.EIO, HypervisorRefused)]
)
def test_a_scratch_file_that_can_not_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def fail(_path: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(error, match=os.strerror(number)):
        make_anew(str(tmp_path / "scratch"), b"empty")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
