"""A failed fsync of a directory, and a view that can't be written: what is said then is true."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import TypeVar
from unittest import mock

import pytest

from storage.errors import PointFull, PointUnreachable
from storage.log.log import record_path
from storage.view.tables import Tables
from tests.crash_scripts import CHANGED, FULL
from tests.crash_world import Chance, World, repeatable
from tests.simdisk import Choice, Disk
from tests.simfs import SimFs
from tests.store import dump

ResultT = TypeVar("ResultT")


@pytest.fixture
def world() -> Iterator[World]:
    with repeatable() as scratch, Chance.seeded("doubt"):
        yield World(scratch)


class Refusing:
    """Lets every fsync of one directory fail, `times` times."""

    def __init__(self, fs: SimFs, directory: str, times: int) -> None:
        self.left = times
        self._real = fs.fsync_dir
        self._fs = fs
        self._directory = directory
        fs.fsync_dir = self.fsync_dir  # type: ignore[method-assign]

    def fsync_dir(self, path: str) -> None:
        if path == self._directory and self.left:
            self.left -= 1
            self._fs.directory(path).fail_sync()
            raise OSError(errno.EIO, "on purpose", path)
        self._real(path)


def epoch(world: World) -> str:
    return f"{world.domain().paths.log}/{record_path(1).split('/')[0]}"


def proved(world: World, disk: Disk) -> None:
    after = world.after(disk, world.views())
    after.prove(thorough=True)
    after.discard()


def test_a_name_whose_fsync_failed_is_made_anew_before_it_is_acknowledged(world: World) -> None:
    world.domain()
    refusing = Refusing(world.fs, epoch(world), 1)
    world.save(FULL)
    assert not refusing.left
    proved(world, world.fs.disk.crashed(Choice("none", 1)))


@pytest.mark.parametrize("anew", [False, True], ids=["folded", "read by a view made anew"])
def test_nothing_follows_a_record_whose_name_is_in_doubt(world: World, anew: bool) -> None:
    world.save(FULL)
    refusing = Refusing(world.fs, epoch(world), 2)
    with pytest.raises(PointUnreachable):
        world.domain().begin("read")
    assert not refusing.left
    if anew:
        world.domain().rebuild()
    world.save(CHANGED)
    proved(world, world.fs.disk.crashed(Choice("none", 1)))


def test_a_session_whose_begin_failed_is_ended_if_it_began(world: World) -> None:
    kept = world.save(FULL)
    domain = world.domain()
    refusing = Refusing(world.fs, epoch(world), 2)
    with pytest.raises(PointUnreachable):
        domain.begin("read", [kept.backup])
    assert not refusing.left
    domain.refresh()
    assert dump(domain)["sessions"]
    assert domain.end_left_open() == 1
    assert not dump(domain)["sessions"]


def test_a_record_that_may_be_there_is_not_said_to_have_found_no_room(world: World) -> None:
    """A delete that is then tried in the ballast's room would not find its own backup."""
    kept = world.save(FULL)
    domain = world.domain()
    refusing = Refusing(world.fs, epoch(world), 1)
    tried = list[object]()

    def full(*arguments: object) -> None:
        patched.stop()
        tried.append(arguments)
        raise OSError(errno.ENOSPC, "on purpose")

    patched = mock.patch("storage.log.log.replace_same", full)
    patched.start()
    with pytest.raises(PointUnreachable):
        domain.forget([kept.backup])
    assert tried
    assert not refusing.left
    domain.refresh()
    assert domain.backups() == []


def test_other_bytes_than_the_records_do_not_take_its_place(world: World) -> None:
    """What a failing medium gives when it is asked once more."""
    world.save(FULL)
    domain, fs, real = world.domain(), world.fs, world.fs.pread
    refusing = Refusing(fs, epoch(world), 1)
    reads: list[int] = []

    def second_one_wrong(fd: int, size_bytes: int, offset: int) -> bytes:
        found = real(fd, size_bytes, offset)
        if refusing.left or not found:
            return found
        reads.append(fd)
        return found[:-1] + bytes([found[-1] ^ 1]) if len(reads) == 2 else found

    with (
        mock.patch.object(fs, "pread", second_one_wrong),
        pytest.raises(PointUnreachable, match="otherwise"),
    ):
        domain.begin("read")
    assert len(reads) == 2
    world.save(CHANGED)
    proved(world, fs.disk.crashed(Choice("none", 1)))


def test_a_record_stands_though_the_view_could_not_take_it(world: World) -> None:
    world.save(FULL)
    domain = world.domain()
    view = domain.view
    real = view.update
    failed: list[bool] = []

    def failing(change: Callable[[Tables], ResultT]) -> ResultT:
        def all_but_the_commit(state: Tables) -> ResultT:
            before = len(world.fs.calls)
            found = change(state)
            if "link" in world.fs.calls[before:] and not failed:
                failed.append(True)
                raise PointFull("view: on purpose")
            return found

        return real(all_but_the_commit)

    with mock.patch.object(view, "update", failing):
        world.save(CHANGED)
    assert failed
    before = dump(domain)
    domain.rebuild()
    assert dump(domain) == before
    proved(world, world.fs.disk.crashed(Choice("none", 1)))
