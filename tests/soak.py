"""`make soak`: every sweep in its long form, one after another.

    python -m tests.soak [--minutes 480] [--only NAME ...]

Without a budget each runs whole, which takes most of a day. With one each gets its share of the
time that is left, by how long it takes whole: what one leaves over the next ones have, and one
whose time is over is cut off. At the end there is a line for each: ended, cut off, or FAILED.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

GRACE_S = 120.0  # to unmount and remove what it made


@dataclass(frozen=True, slots=True)
class Sweep:
    """One of them. `whole_min`: about how long it takes whole on two cores; what its share of a
    budget goes by. `takes_minutes`: it has `--minutes`, and ends by itself.
    """

    name: str
    module: str
    options: str
    whole_min: float
    takes_minutes: bool = False
    env: tuple[tuple[str, str], ...] = ()

    def command(self, minutes: float | None) -> list[str]:
        found = [sys.executable, "-m", self.module, *self.options.split()]
        if self.takes_minutes and minutes is not None:
            found += ["--minutes", f"{minutes:.2f}"]
        return found


SWEEPS = (
    Sweep("verbs", "bench.soak", "", 6, takes_minutes=True),
    Sweep("load", "bench.soak_load", "", 12, takes_minutes=True),
    Sweep("two", "bench.soak_two", "--rounds 1000 --hosts-rounds 200", 20),
    Sweep(
        "damage",
        "pytest",
        "-x tests/damage/test_point_damage.py",
        15,
        env=(("VMKEEP_DAMAGE", "20000"),),
    ),
    Sweep(
        "hostile",
        "pytest",
        "-x tests/hostile tests/nfs tests/fire/test_sectors.py -rP",
        35,
        env=(("VMKEEP_SOAK", "1"),),
    ),
    Sweep("model", "tests.model.search", "--full", 120),
    Sweep("crash", "tests.crash_sweep", "--points 1000000", 240, takes_minutes=True),
    Sweep("calls", "tests.fire.sweep", "--stride 1", 120),
    Sweep("below", "tests.fire.below", "--stride 1", 60),
    Sweep("reflink", "tests.reflink_sweep", "--rounds 10000", 60),
    Sweep("plug ext4", "tests.fire.plug", "--kind ext4 --count 2500", 60),
    Sweep("plug xfs", "tests.fire.plug", "--kind xfs --count 2500", 60),
    Sweep("replay", "tests.fire.replay", "--words 400", 60),
)


class Outcome(NamedTuple):
    """How one went: `verdict` is "ended", "cut off" or "FAILED"."""

    name: str
    verdict: str
    minutes: float


def soak(sweeps: Sequence[Sweep], minutes: float | None) -> Iterator[Outcome]:
    """Runs them; None: each whole. Their output goes where this process's does."""
    end_s = time.monotonic() + (minutes or 0) * 60
    for at, sweep in enumerate(sweeps):
        share = None
        if minutes is not None:
            part = sweep.whole_min / sum(later.whole_min for later in sweeps[at:])
            share = max(end_s - time.monotonic(), 0) / 60 * part
        yield run(sweep, share)


def run(sweep: Sweep, minutes: float | None) -> Outcome:
    """Runs one; interrupted, as by Ctrl-C, when its time is over."""
    began_s = time.monotonic()
    # A sweep that this process starts in the background must not ignore the interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(sweep.command(minutes), env={**os.environ, **dict(sweep.env)})
    grace_s = GRACE_S if sweep.takes_minutes else 0
    cut_off = False
    try:
        child.wait(None if minutes is None else minutes * 60 + grace_s)
    except subprocess.TimeoutExpired:
        cut_off = True
    finally:
        _end(child)
    code = child.returncode
    failed = code not in (0, 2, -signal.SIGINT) if cut_off else code != 0
    verdict = "FAILED" if failed else "cut off" if cut_off else "ended"
    return Outcome(sweep.name, verdict, (time.monotonic() - began_s) / 60)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def main() -> int:
    """0 when none failed."""
    names = [sweep.name for sweep in SWEEPS]
    parser = argparse.ArgumentParser(prog="tests.soak")
    parser.add_argument("--minutes", type=float, help="for all of them; without: each whole")
    parser.add_argument("--only", action="append", choices=names, help="may be given again")
    given = parser.parse_args()
    chosen = [sweep for sweep in SWEEPS if given.only is None or sweep.name in given.only]
    outcomes = []
    for outcome in soak(chosen, given.minutes):
        outcomes.append(outcome)
        print(f"soak: {outcome.name}: {outcome.verdict}", flush=True)
    for outcome in outcomes:
        print(f"soak: {outcome.name:10} {outcome.verdict:8} {outcome.minutes:6.1f} min")
    return int(any(outcome.verdict == "FAILED" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
