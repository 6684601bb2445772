"""What a command prints: tables and short lines for people, one JSON document for machines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from api.client import Reply

AnswerT = TypeVar("AnswerT")

_PIPE_WIDTH = 10_000  # a pipe has no width: nothing is wrapped or cut there


class Screen:
    """Standard output in one of two tongues. With `json`, only `document` prints to it."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        tty = sys.stdout.isatty()
        self.console = Console(width=None if tty else _PIPE_WIDTH, highlight=False)
        self.bars = Console(stderr=True)

    def answer(self, reply: Reply[AnswerT], view: Callable[[AnswerT], object]) -> None:
        """An answer: its `data` as it came, or what `view` makes of it."""
        if self.json:
            self.document(reply.raw)
        else:
            self.console.print(view(reply.data), soft_wrap=not self.console.is_terminal)

    def line(self, text: str) -> None:
        """A line for people. `text` is printed as it is."""
        if not self.json:
            self.console.print(text, markup=False, soft_wrap=True)

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
        shown.add_row(*(escape(cell) for cell in row))
    return shown


def card(pairs: Iterable[tuple[str, str]]) -> Table:
    """One thing, a member a line. Members without a value are left out."""
    shown = Table(box=None, show_header=False, pad_edge=False)
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            shown.add_row(escape(name), escape(value))
    return shown
