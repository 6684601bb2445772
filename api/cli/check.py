"""`vmkeep point check`: the checker, without a server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.progress import Progress

from api.cli.exits import BROKEN, FAILED, Failure
from api.cli.screen import Screen
from engine.points.pack_reads import PackReads
from engine.points.verify import report_lines
from engine.state import State
from storage.check.check import CheckReport, NoReads, Reads, check_point
from storage.errors import StorageError
from storage.point import Point


def check_and_tell(
    screen: Screen, path: Path, *, deep: bool, rate_bytes_per_s: int = 0, resume: Path | None = None
) -> None:
    """Prints what was found. Ends the command with FAILED unless all data is known to be sound.

    `resume`: a directory of its own, where a deep check that is interrupted leaves how far it was.
    """
    try:
        with _remembered(path, resume if deep else None) as reads:
            report = _check(screen, path, deep, rate_bytes_per_s, reads)
    except StorageError as error:
        raise Failure(BROKEN, str(error)) from error
    if screen.json:
        screen.document(msgspec.json.encode(report))
    for line in report_lines(report):
        screen.line(line)
    if not report.clean:
        raise Failure(FAILED, f"{path} is not sound: {len(report.findings)} findings")
    if report.unread:
        raise Failure(FAILED, f"{path} could not all be checked: {report.unread[0].detail}")


@contextlib.contextmanager
def _remembered(path: Path, directory: Path | None) -> Iterator[Reads]:
    """What was read of the point, kept until a check has come to its end."""
    if directory is None:
        yield NoReads()
        return
    point = Point.open(str(path)).uuid
    with contextlib.closing(State(str(directory))) as state:
        reads = PackReads(state, point, time.time)
        try:
            yield reads
        finally:
            reads.flush()
        reads.end()


def _check(
    screen: Screen, path: Path, deep: bool, rate_bytes_per_s: int, reads: Reads
) -> CheckReport:
    quiet = screen.json or not screen.bars.is_terminal
    with Progress(console=screen.bars, disable=quiet, transient=True) as bars:
        bar = bars.add_task("check", total=None)

        def on_progress(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total or None)

        return check_point(
            str(path),
            deep=deep,
            on_progress=on_progress,
            reads=reads,
            rate_bytes_per_s=rate_bytes_per_s,
        )
