"""Power failures at every call, failing calls at every call: `python -m tests.crash_sweep`.

Each script of tests.crash_scripts (and, when more points are wanted than they have, random ones)
runs on the simulated file system. Before each call that changes something the power fails, in
several ways: nothing of what was not synced survives, all of it, random parts with torn writes; the
process is killed and the power fails while the next one recovers; the power fails twice. Each image
is proved (tests.crash_world). Then each call is made to fail in each way that it can: the step is
done again, and must succeed; and the power fails after that.

All is derived from the seed; a failure is printed with the arguments that repeat it alone.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from storage.errors import StorageError
from tests.crash_scripts import SCRIPTS, Step, random_script
from tests.crash_world import Chance, World, repeatable
from tests.simdisk import Choice
from tests.simfs import FAULTS, Fault

WORDS = ("none", "random", "kill", "all", "random", "random")
FAILURES_KEPT = 5
THOROUGH_EVERY = 8
FEW_POINTS = 10_000


@dataclass
class Tally:
    """What was tried; `failures` say how to repeat them."""

    points: int = 0
    faults: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.points} crash points, {self.faults} failing calls, "
            f"{len(self.failures)} failures"
        )

    def add(self, other: Tally) -> None:
        self.points += other.points
        self.faults += other.faults
        self.failures += other.failures

    def failed(self, repeat: str) -> None:
        if len(self.failures) < FAILURES_KEPT:
            self.failures.append(f"python -m tests.crash_sweep {repeat}\n{traceback.format_exc()}")


def steps_of(script: str) -> list[Step]:
    """A named script, or "random-<seed>"."""
    return SCRIPTS[script] if script in SCRIPTS else random_script(int(script.split("-")[1]))


@dataclass(frozen=True)
class Share:
    """One's own part of the work: those of `count` that leave `mine`; `only`: one point."""

    mine: int = 0
    count: int = 1
    only: tuple[int, int] | None = None

    def has(self, at: int, way: int) -> bool:
        if self.only is not None:
            return (at, way) == self.only
        return (at + way) % self.count == self.mine


class Sweep:
    """Crashes one run of a script at every call."""

    def __init__(self, scratch: str, seed: int, script: str, ways: range, share: Share) -> None:
        self.tally = Tally()
        self._scratch = scratch
        self._seed = seed
        self._script = script
        self._ways = ways
        self._share = share
        self._at = 0

    def run(self, fault: Fault | None = None) -> Tally:
        with Chance.seeded(f"{self._seed} {self._script}"):
            world = World(self._scratch)
            world.fs.fault = fault
            world.fs.watch = lambda _call, _path: self._watch(world)
            for step in steps_of(self._script):
                step(world)
            self._watch(world)
            world.discard()
        return self.tally

    def _watch(self, world: World) -> None:
        self._at += 1
        # Every call, in some of the ways, or all when there are as many as that.
        ways = [(self._at + way) % len(WORDS) for way in self._ways]
        for way in ways if self._share.only is None else range(len(WORDS)):
            if self._share.has(self._at, way) and len(self.tally.failures) < FAILURES_KEPT:
                self._crash(world, self._at, way)

    def _crash(self, world: World, at: int, way: int) -> None:
        name = f"{self._seed} {self._script} {at} {way}"
        with Chance.seeded(name):
            try:
                self.tally.points += crash(world, WORDS[way % len(WORDS)], name)
            except Exception:  # noqa: BLE001
                self.tally.failed(f"--seed {self._seed} --script {self._script} --at {at}/{way}")


def crash(world: World, word: str, name: str) -> int:
    """The power fails, or the process dies, now; returns how many images were proved."""
    source = random.Random(name)
    disk = world.fs.disk
    image = disk.copied() if word == "kill" else disk.crashed(Choice(word, source.getrandbits(32)))
    keeps = word == "kill" or source.random() < 0.6
    after = world.after(image, lambda: keeps)
    deeper = word == "kill" or source.random() < 0.15
    left = source.randrange(1, 80)
    proved = 0

    def watch(_call: str, _path: str) -> None:
        nonlocal left, proved
        left -= 1
        if not left:
            choice = Choice(source.choice(("none", "random", "random")), source.getrandbits(32))
            second = after.after(after.fs.disk.crashed(choice), lambda: keeps)
            with Chance.seeded(name + " again"):
                second.prove(thorough=False)
            second.discard()
            proved += 1

    if deeper:
        after.fs.watch = watch
    after.prove(thorough=source.random() * THOROUGH_EVERY < 1)
    after.discard()
    return proved + 1


# Failing calls.


def calls_of(scratch: str, seed: int, script: str) -> list[str]:
    """The names of the calls that a script makes when nothing fails."""
    with Chance.seeded(f"{seed} {script}"):
        world = World(scratch)
        for step in steps_of(script):
            step(world)
        calls = list(world.fs.calls)
        world.discard()
    return calls


def faults_of(calls: Sequence[str]) -> Iterator[Fault]:
    for at, call in enumerate(calls):
        for kind in FAULTS[call]:
            yield Fault(at, kind)
            if kind in ("ENOSPC", "EDQUOT"):
                yield Fault(at, kind, lasting=True)


def fail(scratch: str, seed: int, script: str, fault: Fault, tally: Tally) -> None:
    name = f"{seed} {script} {fault}"
    with Chance.seeded(f"{seed} {script}"):
        world = World(scratch)
        world.fs.fault = fault
        try:
            _run_with_fault(world, steps_of(script))
            tally.faults += 1
            with Chance.seeded(name):
                word = random.Random(name).choice(("none", "random", "all"))
                tally.points += crash(world, word, name)
                world.fs.watch = lambda _call, _path: None
                world.prove(thorough=True)
        except Exception:  # noqa: BLE001
            lasting = "+" if fault.lasting else ""
            tally.failed(
                f"--seed {seed} --script {script} --fault {fault.at}/{fault.kind}{lasting}"
            )
        world.discard()


def _run_with_fault(world: World, steps: Sequence[Step]) -> None:
    for step in steps:
        try:
            step(world)
        except StorageError:
            if not world.fs.faults_met:
                raise
            world.fs.fault = None
            step(world)
    world.fs.fault = None  # what lasted until here, and hurt nobody, ends


# Both, for a number of points.


@dataclass(frozen=True)
class Work:
    """A part of a sweep. `every`: of the faults, each so-manieth one."""

    seed: int
    script: str
    ways: range
    share: Share
    faults_every: int = 0


def work(part: Work) -> Tally:
    with repeatable() as scratch:
        tally = Sweep(scratch, part.seed, part.script, part.ways, part.share).run()
        if part.faults_every:
            calls = calls_of(scratch, part.seed, part.script)
            chosen = random.Random(part.script).randrange(part.faults_every)
            for number, fault in enumerate(faults_of(calls)):
                if number % part.faults_every == chosen and part.share.has(number, 0):
                    fail(scratch, part.seed, part.script, fault, tally)
    return tally


def plan(seed: int, points: int, faults_every: int, processes: int) -> Iterator[Work]:
    """The named scripts first, then random ones without end. The caller stops."""
    ways = range(2 if points <= FEW_POINTS else len(WORDS))
    for script in SCRIPTS:
        for mine in range(processes):
            yield Work(seed, script, ways, Share(mine, processes), faults_every)
    for number in range(points):
        yield Work(seed, f"random-{seed}{number:06d}", range(3), Share())


def sweep(
    seed: int,
    points: int,
    faults_every: int,
    processes: int = 2,
    time_s: float = math.inf,
    tell: Callable[[Tally], None] = lambda _total: None,
) -> Tally:
    """At least so many points, and every so-manieth fault of the named scripts; fewer when the
    time is over before. `tell` sees the tally grow."""
    total = Tally()
    end_s = time.monotonic() + time_s
    with ProcessPoolExecutor(processes) as pool:
        parts = plan(seed, points, faults_every, processes)
        named = len(SCRIPTS) * processes
        while (named > 0 or total.points < points) and time.monotonic() < end_s:
            for tally in pool.map(work, islice(parts, processes)):
                total.add(tally)
                print(*tally.failures, sep="\n", end="", file=sys.stderr, flush=True)
            if len(total.failures) >= FAILURES_KEPT:
                break
            named -= processes
            tell(total)
    return total


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.crash_sweep")
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults-every", type=int, default=1, help="0: none")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--script", default="", help="only this one")
    parser.add_argument("--at", default="", help="only this point of it: call/way")
    parser.add_argument("--fault", default="", help="only this fault of it: call/kind")
    return parser.parse_args()


def repeat(arguments: argparse.Namespace) -> Tally:
    """One script, point or fault again."""
    with repeatable() as scratch:
        if arguments.fault:
            at, kind = arguments.fault.split("/")
            fault = Fault(int(at), kind.rstrip("+"), kind.endswith("+"))
            tally = Tally()
            fail(scratch, arguments.seed, arguments.script, fault, tally)
            return tally
        only = None
        if arguments.at:
            at, way = arguments.at.split("/")
            only = (int(at), int(way))
        share = Share(only=only)
        return Sweep(scratch, arguments.seed, arguments.script, range(len(WORDS)), share).run()


def main() -> int:
    arguments = _arguments()
    start_s = time.monotonic()
    if arguments.script:
        tally = repeat(arguments)
    else:
        tally = sweep(
            arguments.seed,
            arguments.points,
            arguments.faults_every,
            arguments.processes,
            arguments.minutes * 60,
            lambda total: print(f"{total} so far", file=sys.stderr, flush=True),
        )
    print(f"seed {arguments.seed}: {tally}, {time.monotonic() - start_s:.1f} s")
    for failure in tally.failures:
        print(failure)
    return 1 if tally.failures or not tally.points else 0


if __name__ == "__main__":
    sys.exit(main())
