"""What is remembered of directories that libvirt has no pool for: no libvirt is needed."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from engine.libvirt import directories
from engine.libvirt.directories import Directories
from engine.state import State

HOST = "qemu:///system"


def paths(place: Path, *names: str) -> list[str]:
    for name in names:
        (place / name).mkdir(exist_ok=True)
    return [str(place / name) for name in names]


def test_what_was_seen_stays_as_long_as_it_exists(tmp_path: Path, state: State) -> None:
    one, two = paths(tmp_path, "one", "two")
    assert Directories(state.directories).seen(HOST, [one, two]) == [one, two]
    again = Directories(state.directories)  # another process
    assert again.seen(HOST, [two]) == [two, one]
    assert again.seen("qemu:///session", []) == []  # another host's are another's
    os.rmdir(one)
    assert again.seen(HOST, [two]) == [two]
    Path(one).touch()  # no directory
    assert again.seen(HOST, [two]) == [two]
    os.unlink(one)
    os.mkdir(one)  # a mount that was late
    assert again.seen(HOST, [two]) == [two, one]


def test_their_number_has_a_limit(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "MOST_DIRECTORIES", 2)
    one, two, three, four = paths(tmp_path, "one", "two", "three", "four")
    known = Directories(state.directories)
    known.seen(HOST, [one, two])
    assert known.seen(HOST, [three]) == [three, one, two]  # it counts while a domain has it
    assert known.seen(HOST, []) == [one, two]
    os.rmdir(two)
    assert known.seen(HOST, [four]) == [four, one]
    os.mkdir(two)  # what was gone made room
    assert known.seen(HOST, []) == [four, one]


def test_one_that_does_not_answer_holds_nobody_up(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "LOOK_TIMEOUT_S", 0.05)
    one, two = paths(tmp_path, "one", "two")
    known = Directories(state.directories)
    known.seen(HOST, [one, two])
    assert known.seen(HOST, [two]) == [two, one]
    answered = threading.Event()
    monkeypatch.setattr(os.path, "isdir", lambda _path: answered.wait(10))
    try:
        assert known.seen(HOST, [two]) == [two, one]  # as it was
    finally:
        answered.set()
