"""`python -m bench`: runs the questions, one after the other, and writes what they found.

    python -m bench [--quick] [--only NAME,NAME] [--repeats N] [--dir DIR] [--json FILE]

A question that fails leaves its error in the results, and the others go on; the exit code is 1
then. So it is with --strict when a bar was measured and missed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import bench
from bench import machine
from bench.lab import Lab, say
from bench.peers import versions
from bench.results import Answer, Result, Run, write_run
from bench.summary import one_line, verdicts

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "bench"

# First what others are held against, then what takes long; unknown ones come last, by name.
ORDER = (
    "full",
    "incompressible",
    "incremental",
    "unchanged",
    "template",
    "sparse",
    "patch",
    "restore",
    "chain",
)


@dataclass(frozen=True, slots=True)
class Question:
    """A module that follows the convention of bench/__init__.py."""

    name: str
    text: str
    run: Callable[[Lab], Iterator[Result]]


def questions() -> list[Question]:
    """All of them, in the order in which they run."""
    found = []
    for entry in pkgutil.iter_modules(bench.__path__):
        if entry.name != "__main__":
            module = importlib.import_module(f"bench.{entry.name}")
            if isinstance(text := getattr(module, "QUESTION", None), str):
                found.append(Question(entry.name, text, module.run))
    places = {name: place for place, name in enumerate(ORDER)}
    return sorted(found, key=lambda one: (places.get(one.name, len(ORDER)), one.name))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all questions, or those of --only."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("--only", default="", help="names of questions, with commas")
    known = questions()
    given = _parsed(parser, argv)
    wanted = [name for name in given.only.split(",") if name]
    if unknown := set(wanted) - {question.name for question in known}:
        parser.error(f"no question {', '.join(sorted(unknown))}")
    return _run([one for one in known if not wanted or one.name in wanted], given)


def alone(file: str) -> int:
    """Runs the question of one module, as `python -m bench.NAME` does."""
    name = Path(file).stem
    given = _parsed(argparse.ArgumentParser(prog=f"python -m bench.{name}"), None)
    return _run([one for one in questions() if one.name == name], given)


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    parser.add_argument("--quick", action="store_true", help="small sizes, one or two minutes")
    parser.add_argument("--repeats", type=int, default=0, help="3, or 1 when quick")
    parser.add_argument("--dir", type=Path, default=CACHE, help="for corpora and scratch files")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--strict", action="store_true", help="fail when a bar is missed")
    return parser.parse_args(argv)


def _run(wanted: Sequence[Question], given: argparse.Namespace) -> int:
    scale: Literal["quick", "full"] = "quick" if given.quick else "full"
    work = Path(tempfile.mkdtemp(prefix="work-", dir=_made(given.dir)))
    lab = Lab(
        full=not given.quick,
        cache=_made(given.dir / "corpora" / scale),
        work=work,
        repeats=given.repeats or (1 if given.quick else 3),
        cores=len(os.sched_getaffinity(0)),
    )
    began, load = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0]
    try:
        answers = tuple(ask(question, lab) for question in wanted)
    finally:
        shutil.rmtree(work)
    run = Run(
        commit=machine.commit(),
        began=began,
        scale=scale,
        machine=machine.describe(given.dir),
        peers=versions(),
        load=load,
        answers=answers,
    )
    target = given.json or given.dir / "results" / f"{scale}.json"
    write_run(target, run)
    say(f"\nresults: {target}\n")
    found = verdicts(run.answers)
    for verdict in found:
        if verdict.met is not None or len(wanted) == len(questions()):
            say(verdict.line())
    missed = any(verdict.met is False for verdict in found)
    failed = any(answer.error for answer in answers)
    return 1 if failed or (given.strict and missed) else 0


def ask(question: Question, lab: Lab) -> Answer:
    """Runs a question to its end, or to its failure."""
    say(f"{question.name}: {question.text}")
    results: list[Result] = []
    error = ""
    started_s = time.perf_counter()
    try:
        for result in question.run(lab):
            results.append(result)
            say(f"  {one_line(result)}")
    except Exception as failure:  # noqa: BLE001 - told, kept in the results, and the run fails
        error = f"{type(failure).__name__}: {failure}"
        traceback.print_exception(failure, file=sys.stderr)
    took_s = time.perf_counter() - started_s
    say(f"  took {took_s:.1f} s")
    return Answer(question.name, question.text, took_s, tuple(results), error)


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()
