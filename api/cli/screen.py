"""What a command prints: tables and short lines for people, one JSON document for machines.

Names are anybody's, on a shared point also other clusters': nothing in them is markup, and what
does not print is escaped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from api.client import Reply
from api.printable import one_line

AnswerT = TypeVar("AnswerT")

_PIPE_WIDTH = 10_000  # a pipe has no width: nothing is wrapped or cut there


class Screen:
    """Standard output in one of two tongues. With `json`, only `document` prints to it."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        tty = sys.stdout.isatty()
        self.console = Console(
            width=None if tty else _PIPE_WIDTH, highlight=False, markup=False, emoji=False
        )
        self.bars = Console(stderr=True)

    def answer(self, reply: Reply[AnswerT], view: Callable[[AnswerT], str | Table]) -> None:
        """An answer: its `data` as it came, or what `view` makes of it."""
        if self.json:
            self.document(reply.raw)
            return
        shown = view(reply.data)
        if isinstance(shown, str):
            self.line(shown)
        else:
            self.table(shown)

    def table(self, shown: Table) -> None:
        """A table for people."""
        self.console.print(shown, soft_wrap=not self.console.is_terminal)

    def line(self, text: str) -> None:
        """A line for people."""
        if not self.json:
            self.console.print(one_line(text), soft_wrap=True)

    def warning(self, text: str) -> None:
        """A line on standard error, for people, also beside a document."""
        print(f"vmkeep: {one_line(text)}", file=sys.stderr)

    def document(self, raw: bytes) -> None:
        """A JSON document, for machines."""
        sys.stdout.write(msgspec.json.format(raw, indent=2).decode() + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table. Columns that start with ">" are numbers; ids are never wrapped."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        name = column.removeprefix(">")
        shown.add_column(
            name,
            justify="right" if column.startswith(">") else "left",
            no_wrap=column.startswith(">") or name.endswith("uuid"),
            overflow="fold",
        )
    for row in rows:
        shown.add_row(*(one_line(cell) for cell in row))
    return shown


def card(pairs: Iterable[tuple[str, str]]) -> Table:
    """One thing, a member a line. Members without a value are left out."""
    shown = Table(box=None, show_header=False, pad_edge=False)
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            shown.add_row(one_line(name), one_line(value))
    return shown
