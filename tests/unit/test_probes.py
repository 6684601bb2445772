"""engine.probes, engine.restore.reservations: what hangs holds one thread; room is given once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from engine.errors import PoolFull, PoolUnreachable
from engine.inventory.volumes import (
    bounded_volume_size,
    directories_above,
    directory_ids,
    pool_room,
)
from engine.model import Pool
from engine.probes import Probes
from engine.restore.reservations import Reservations

AnswerT = TypeVar("AnswerT")

MEETING_S = 5.0


def test_answers_and_errors_come_through() -> None:
    probes = Probes()
    assert probes.ask("a", lambda: 42, 10.0) == 42
    with pytest.raises(OSError, match="gone"):
        probes.ask("a", lambda: _raise(OSError("gone")), 10.0)
    with pytest.raises(TimeoutError, match="its own"):
        probes.ask("a", lambda: _raise(TimeoutError("its own")), 10.0)


def test_each_is_asked_at_once_and_those_that_hang_are_waited_for_together() -> None:
    probes, together, never = Probes(), threading.Barrier(2), threading.Event()
    began_s = time.monotonic()
    questions: dict[str, Callable[[], int]] = {
        "a": partial(together.wait, MEETING_S),
        "b": partial(together.wait, MEETING_S),
        "gone": lambda: _raise(OSError("gone")),
        **{f"hangs {number}": partial(never.wait, 60.0) for number in range(30)},
    }
    found = probes.ask_each(questions, 1.0)
    assert time.monotonic() - began_s < MEETING_S
    assert {found.pop("a"), found.pop("b")} == {0, 1}
    assert str(found.pop("gone")) == "gone"
    assert len(found) == 30
    assert {str(error) for error in found.values()} == {"no answer in 1 s"}
    never.set()


def test_directories_are_asked_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each one that hangs would make a start wait."""
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path in paths:
        os.mkdir(path)
    monkeypatch.setattr("engine.inventory.volumes.DIRECTORY_TIMEOUT_S", 2 * MEETING_S)
    with monkeypatch.context() as patch:
        patch.setattr("engine.inventory.volumes.os.stat", _met(os.stat, paths))
        ids = directory_ids(Probes(), paths)
    assert list(ids) == paths
    with monkeypatch.context() as patch:
        realpath = _met(os.path.realpath, paths)
        patch.setattr("engine.inventory.volumes.os.path.realpath", realpath)
        above = directories_above(Probes(), paths)
    assert all({path, ids[path], str(tmp_path)} <= above[path] for path in paths)


def _met(look: Callable[[str], AnswerT], paths: Sequence[str]) -> Callable[[str], AnswerT]:
    """The call, in which those for `paths` wait for each other."""
    together = threading.Barrier(len(paths))

    def asked(path: str) -> AnswerT:
        if path in paths:
            together.wait(MEETING_S)
        return look(path)

    return asked


def _raise(error: Exception) -> int:
    raise error


def test_a_question_that_hangs_is_asked_once() -> None:
    probes, free, asked = Probes(), threading.Event(), list[int]()

    def hang() -> str:
        asked.append(1)
        free.wait(20.0)
        return "late"

    for _ in range(5):
        with pytest.raises(TimeoutError, match="no answer"):
            probes.ask("nfs", hang, 0.01)
    assert probes.ask("another", lambda: "well", 10.0) == "well"
    assert len(asked) == 1
    free.set()
    # Whoever waits for it now gets the answer, and the next one asks anew.
    assert probes.ask("nfs", hang, 20.0) == "late"
    assert probes.ask("nfs", lambda: "fresh", 20.0) in ("late", "fresh")


def test_a_question_for_which_there_was_no_thread_is_asked_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else whoever asks it until the service ends would wait in vain."""
    probes = Probes()

    def no_more(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(RuntimeError, match="new thread"):
            probes.ask("nfs", lambda: 1, 10.0)
    assert probes.ask("nfs", lambda: 2, 10.0) == 2


def pool(path: Path, name: str = "p") -> Pool:
    path.mkdir(exist_ok=True)
    return Pool(uuid=name, name=name, path=str(path))


def test_a_pool_that_hangs_holds_one_thread_whatever_is_asked_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a restore into it is asked for again and again."""
    probes, answers, asked = Probes(), threading.Event(), list[str]()
    slow = pool(tmp_path / "slow")

    def hangs(path: str) -> object:
        asked.append(path)
        return answers.wait(20.0)

    for look in ("statvfs", "lstat"):
        monkeypatch.setattr(f"engine.inventory.volumes.os.{look}", hangs)
    for name in ("a", "b", "c"):
        with pytest.raises(PoolUnreachable, match="no answer"):
            bounded_volume_size(probes, slow, name, 0.05)
    assert asked == [slow.path]
    monkeypatch.undo()
    answers.set()


def test_claims_add_up_over_pools_of_one_file_system(tmp_path: Path) -> None:
    reserved, one, two = Reservations(), pool(tmp_path / "1", "1"), pool(tmp_path / "2", "2")
    _, free = pool_room(one)
    most = free * 2 // 3
    with pytest.raises(PoolFull):
        reserved.claim("a", {one: most, two: most})
    reserved.claim("a", {one: most})
    with pytest.raises(PoolFull):
        reserved.claim("b", {two: most})
    reserved.release("a")
    reserved.release("a")
    reserved.claim("b", {two: most}, lambda: 0.1)
    # Nine tenths of b are written, and so no longer reserved on top of what is in use.
    reserved.claim("c", {one: most})


def test_a_pool_that_is_gone(tmp_path: Path) -> None:
    gone = Pool(uuid="p", name="p", path=str(tmp_path / "none"))
    with pytest.raises(PoolUnreachable):
        Reservations().claim("a", {gone: 1})
