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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from typing import TypeAlias

from storage.errors import StorageError
from tests.crash_scripts import SCRIPTS, Step, random_script
from tests.crash_world import Chance, HostKey, World, repeatable
from tests.simdisk import Choice, Disk
from tests.simfs import FAULTS, Fault

WORDS = ("none", "random", "kill", "all", "random", "random")
FAILURES_KEPT = 5
THOROUGH_EVERY = 8
FEW_POINTS = 10_000

# What proofs of a script have started from; True: proved thoroughly.
Proved: TypeAlias = "dict[Hashable, bool]"


@dataclass
class Tally:
    """What was tried; `failures` say how to repeat them."""

    points: int = 0
    images: int = 0
    faults: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.points} crash points, {self.images} distinct images proved, "
            f"{self.faults} failing calls, {len(self.failures)} failures"
        )

    def add(self, other: Tally) -> None:
        self.points += other.points
        self.images += other.images
        self.faults += other.faults
        self.failures += other.failures

    def failed(self, repeat: str) -> None:
        if len(self.failures) < FAILURES_KEPT:
            self.failures.append(f"python -m tests.crash_sweep {repeat}\n{traceback.format_exc()}")


def steps_of(script: str) -> list[Step]:
    """A named script, or "random-<seed>"."""
    return SCRIPTS[script] if script in SCRIPTS else random_script(int(script.split("-")[1]))


class Sweep:
    """Crashes one run of a script at every call; with `only` at that one, in that way."""

    def __init__(
        self,
        scratch: str,
        seed: int,
        script: str,
        ways: range,
        only: tuple[int, int] | None = None,
    ) -> None:
        self.tally = Tally()
        self._scratch = scratch
        self._seed = seed
        self._script = script
        self._ways = ways
        self._only = only
        self._proved: Proved = {}
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
        if self._only is not None:
            ways = [self._only[1]] if self._at == self._only[0] else []
        for way in ways:
            if len(self.tally.failures) < FAILURES_KEPT:
                self._crash(world, self._at, way)

    def _crash(self, world: World, at: int, way: int) -> None:
        name = f"{self._seed} {self._script} {at} {way}"
        with Chance.seeded(name):
            try:
                self.tally.add(crash(world, WORDS[way % len(WORDS)], name, self._proved))
            except Exception:  # noqa: BLE001
                self.tally.failed(f"--seed {self._seed} --script {self._script} --at {at}/{way}")


def crash(world: World, word: str, name: str, proved: Proved | None = None) -> Tally:
    """The power fails, or the process dies, now, and what is left is proved; but for an image that
    is in `proved`, unless the power is to fail once more while that is recovered."""
    source = random.Random(name)
    disk = world.fs.disk
    image = disk.copied() if word == "kill" else disk.crashed(Choice(word, source.getrandbits(32)))
    keeps = word == "kill" or source.random() < 0.6
    views = world.views() if keeps else {}
    deeper = word == "kill" or source.random() < 0.15
    left = source.randrange(1, 80)
    thorough = source.random() * THOROUGH_EVERY < 1
    tally = Tally(points=1)
    proved = {} if proved is None else proved
    start = _start_of(world, image, views)
    if not deeper and proved.get(start, -1) >= thorough:
        return tally

    after = world.after(image, views)

    def watch(_call: str, _path: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            choice = Choice(source.choice(("none", "random", "random")), source.getrandbits(32))
            crashed = after.fs.disk.crashed(choice)
            second = after.after(crashed, after.views() if keeps else {})
            with Chance.seeded(name + " again"):
                second.prove(thorough=False)
            second.discard()
            tally.add(Tally(points=1, images=1))

    if deeper:
        after.fs.watch = watch
    after.prove(thorough=thorough)
    after.discard()
    tally.images += start not in proved
    proved[start] = max(thorough, proved.get(start, False))
    return tally


def _start_of(world: World, image: Disk, views: Mapping[HostKey, bytes]) -> Hashable:
    """Equal for two images only if a proof finds the same in both: the same bytes, the same views,
    and the same is expected. (Random names made in the proof may be others.)"""
    digests = tuple((key, sha256(content).digest()) for key, content in views.items())
    return image.root.seen(), digests, world.known()


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
                tally.add(crash(world, word, name))
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
    """A script's part of a sweep. `faults_every`: which of the faults, every n-th; 0: none."""

    seed: int
    script: str
    ways: range
    faults_every: int = 0


def work(part: Work) -> Tally:
    with repeatable() as scratch:
        tally = Sweep(scratch, part.seed, part.script, part.ways).run()
        if part.faults_every:
            calls = calls_of(scratch, part.seed, part.script)
            chosen = random.Random(part.script).randrange(part.faults_every)
            for fault in islice(faults_of(calls), chosen, None, part.faults_every):
                fail(scratch, part.seed, part.script, fault, tally)
    return tally


def plan(seed: int, points: int, faults_every: int) -> Iterator[Work]:
    """The named scripts first, the longest of them before others, then random ones."""
    ways = range(2 if points <= FEW_POINTS else len(WORDS))
    for script in sorted(SCRIPTS, key=lambda name: len(SCRIPTS[name]), reverse=True):
        yield Work(seed, script, ways, faults_every)
    for number in range(points):
        yield Work(seed, f"random-{seed}{number:06d}", range(3))


def sweep(
    seed: int,
    points: int,
    faults_every: int,
    processes: int = 2,
    time_s: float = math.inf,
    tell: Callable[[Tally], None] = lambda _total: None,
) -> Tally:
    """At least so many points, and every n-th fault of the named scripts (`faults_every`); fewer
    when the time is over before. `tell` sees the tally grow."""
    total = Tally()
    end_s = time.monotonic() + time_s
    named = len(SCRIPTS)
    parts = plan(seed, points, faults_every)
    running: set[Future[Tally]] = set()

    def goes_on() -> bool:
        wanted = named > 0 or total.points < points
        return wanted and time.monotonic() < end_s and len(total.failures) < FAILURES_KEPT

    with ProcessPoolExecutor(processes) as pool:
        while True:
            while len(running) < processes and goes_on():
                running.add(pool.submit(work, next(parts)))
                named -= 1
            if not running:
                return total
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for tally in [one.result() for one in done]:
                total.add(tally)
                print(*tally.failures, sep="\n", end="", file=sys.stderr, flush=True)
            tell(total)


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
        return Sweep(scratch, arguments.seed, arguments.script, range(len(WORDS)), only).run()


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
