"""What watches libvirt: the hosts, and the scratch directory. Without libvirt."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from engine.libvirt import watch
from engine.libvirt.binding import LibvirtFault
from engine.libvirt.ending import abort_job
from engine.libvirt.scratch import ScratchWatch

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
