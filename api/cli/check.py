"""`vmkeep point check`: the checker, without a server."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.progress import Progress

from api.cli.exits import BROKEN, FAILED, Failure
from api.cli.screen import Screen
from engine.verify import report_lines
from storage.check import CheckReport, check_point
from storage.errors import StorageError


def check_and_tell(screen: Screen, path: Path, *, deep: bool) -> None:
    """Prints what was found. Ends the command with FAILED unless all data is sound."""
    try:
        report = _check(screen, path, deep)
    except StorageError as error:
        raise Failure(BROKEN, str(error)) from error
    if screen.json:
        screen.document(msgspec.json.encode(report))
    for line in report_lines(report):
        screen.line(line)
    if not report.clean:
        raise Failure(FAILED, f"{path} is not sound: {len(report.findings)} findings")


def _check(screen: Screen, path: Path, deep: bool) -> CheckReport:
    quiet = screen.json or not screen.bars.is_terminal
    with Progress(console=screen.bars, disable=quiet, transient=True) as bars:
        bar = bars.add_task("check", total=None)

        def on_progress(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total or None)

        return check_point(str(path), deep=deep, on_progress=on_progress)
