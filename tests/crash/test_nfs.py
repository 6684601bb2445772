"""Services on several machines that share a point over NFS, with memories that never expire."""

from __future__ import annotations

import random

import pytest

from storage.check.check import CheckReport, check_point
from storage.domain.domain import Domain
from storage.errors import StorageError
from storage.point import Point
from storage.view import tables
from tests.crash_scripts import noise, random_script
from tests.crash_sweep import crash, faults_of
from tests.crash_world import PACK_BYTES, PATH, Chance, World, repeatable
from tests.simfs import Fault
from tests.simnfs import NfsClient, machines
from tests.store import Saved, dump

SCRIPTS = 30
CRASHES_EVERY = 40
FAULTY_SCRIPTS = 8
FAULTS_OF_ONE = 12


class NfsWorld(World):
    """Each host is a machine of its own."""

    def __init__(self, scratch: str) -> None:
        super().__init__(scratch)
        self.fs = NfsClient(self.fs.disk)
        self.machines: list[NfsClient] = []
        self.faults: dict[tuple[int, str], Fault] = {}  # of a host's first machine

    def domain(self, at: int = 0, host: str = "h1") -> Domain:
        key = (at, host)
        if key not in self.domains:
            self.point()
            machine = NfsClient(self.fs.disk)
            self.machines.append(machine)
            machine.watch = self.fs.watch
            machine.fault = self.faults.pop(key, None)
            point = Point.open(PATH, fs=machine)
            self.hosts += [key] if key not in self.hosts else []
            label, views = self.sides[at].label, self.view_dir(at)
            self.domains[key] = point.domain(label, host, views, pack_size_bytes=PACK_BYTES)
        return self.domains[key]

    def forget(self, *gone: Saved, at: int = 0, host: str = "h1") -> None:
        self.domain(at, host).refresh_to_end()
        super().forget(*gone, at=at, host=host)

    def expect_clean(self) -> CheckReport:
        self.fs = NfsClient(self.fs.disk)  # the checker changes nothing, so it can only look once
        return super().expect_clean()

    def later(self) -> None:
        for machine in self.machines:
            machine.expire()
            machine.fault = None
        for domain in self.domains.values():
            domain.refresh()


@pytest.mark.parametrize("part", range(3))
def test_stale_memories_lose_nothing(part: int) -> None:
    stale = points = 0
    with repeatable() as scratch:
        for number in range(part, SCRIPTS, 3):
            name = f"nfs {number}"
            with Chance.seeded(name):
                world = NfsWorld(scratch)
                source = random.Random(name)

                def watch(_call: str, _path: str) -> None:
                    nonlocal points
                    if not source.randrange(CRASHES_EVERY):  # noqa: B023
                        with Chance.seeded(f"{name} {points}"):  # noqa: B023
                            points += crash(world, "random", f"{name} {points}").points  # noqa: B023

                world.fs.watch = watch
                for step in random_script(number, 12):
                    try:
                        step(world)
                    except StorageError:
                        world.later()
                        step(world)
                stale += sum(machine.stale_answers for machine in world.machines)
                world.later()
                world.fs.watch = lambda _call, _path: None
                for machine in world.machines:
                    machine.watch = world.fs.watch
                world.prove(thorough=True)
                world.discard()
    assert stale
    assert points > 50


@pytest.mark.parametrize("part", range(2))
def test_a_call_that_fails_on_a_machine_with_stale_memories(part: int) -> None:
    """Replies that are lost, names that are there after a success, room that is not: beside them
    the memories of before."""
    met = 0
    with repeatable() as scratch:
        for number in range(part, FAULTY_SCRIPTS, 2):
            name = f"faulty nfs {number}"
            chance = random.Random(name)
            calls = _run(scratch, name, number, {}).machines[0].calls
            for fault in chance.sample(list(faults_of(calls)), FAULTS_OF_ONE):
                world = _run(scratch, name, number, {(0, "h1"): fault})
                met += sum(machine.faults_met for machine in world.machines)
    assert met >= FAULTY_SCRIPTS * FAULTS_OF_ONE // 4


def _run(scratch: str, name: str, number: int, faults: dict[tuple[int, str], Fault]) -> NfsWorld:
    """One script to its end, and the proof; what fails is done again, later."""
    with Chance.seeded(name):
        world = NfsWorld(scratch)
        world.faults = faults
        for step in random_script(number, 10):
            try:
                step(world)
            except StorageError:
                world.later()
                step(world)
        world.later()
        world.prove(thorough=True)
        world.discard()
    return world


def test_what_is_promised_to_a_client_and_what_is_not() -> None:
    one, other = machines(2)
    assert other.listdir("/point") == []
    with pytest.raises(FileNotFoundError):
        other.open_read("/point/a")
    fd = one.open_new("/point/a")
    one.pwrite(fd, [b"x"], 0)
    with pytest.raises(FileNotFoundError):
        other.open_read("/point/a")  # a stale absence
    assert other.listdir("/point") == []
    with pytest.raises(FileExistsError):
        other.open_new("/point/a")  # the server decides
    other.close(other.open_new("/point/b"))
    assert other.listdir("/point") == ["a", "b"]
    read = other.open_read("/point/a")
    assert other.pread(read, 9, 0) == b""  # not flushed yet
    one.close(fd)
    assert other.pread(read, 9, 0) == b"x"
    one.unlink("/point/a")
    assert other.stat("/point/a").size_bytes == 1  # a stale presence
    with pytest.raises(FileNotFoundError):
        other.open_read("/point/a")
    with pytest.raises(OSError, match="Stale"):
        other.pread(read, 9, 0)


def test_a_view_made_anew_from_a_stale_log_takes_nothing_for_lost() -> None:
    with repeatable() as scratch, Chance.seeded("stale rebuild"):
        world = NfsWorld(scratch)
        one, other = world.domain(0, "h1"), world.domain(0, "h2")
        gone, kept = world.save(noise(1, 3)), world.save(noise(2, 3))
        other.refresh_to_end()
        other.refresh()  # and believes from here on that there is no next record
        world.forget(gone)
        one.reclaim(sparse_below=0.9)
        other.rebuild()
        with other.view.read() as state:
            assert not tables.losses(state)
        one.refresh_to_end()
        other.refresh_to_end()
        assert dump(other) == dump(one)
        world.restore(kept, 0, "h2")
        world.discard()


def test_a_record_that_is_remembered_as_absent_is_no_gap_at_a_start() -> None:
    with repeatable() as scratch, Chance.seeded("stale start"):
        world = NfsWorld(scratch)
        other = world.domain(0, "h2")
        world.save(noise(1, 3))
        other.refresh_to_end()
        other.refresh()  # and believes from here on that there is no next record
        other.close()
        kept = [world.save(noise(number, 3)) for number in (2, 3)]
        machine = world.machines[0]
        point, label = Point.open(PATH, fs=machine), world.sides[0].label
        before = machine.stale_answers
        again = point.domain(label, "h2", world.view_dir(0), pack_size_bytes=PACK_BYTES)
        assert machine.stale_answers > before
        world.domains[0, "h2"] = again
        for saved in kept:
            world.restore(saved, 0, "h2")
        world.discard()


def test_a_check_does_not_miss_what_others_delete_meanwhile() -> None:
    with repeatable() as scratch, Chance.seeded("stale check"):
        world = NfsWorld(scratch)
        one = world.domain(0, "h1")
        gone, kept = world.save(noise(1, 3)), world.save(noise(2, 3))
        checker = NfsClient(world.fs.disk)

        def delete_beside(done: int, _total: int) -> None:
            checker.listdir(f"{one.paths.log}/00000000")  # and believes that there is no more
            if done == 1:
                world.forget(gone)
                world.forget(kept)
                one.reclaim(sparse_below=0.9)

        report = check_point(PATH, deep=False, on_progress=delete_beside, fs=checker)
        assert checker.stale_answers
        assert not report.findings
        world.discard()
