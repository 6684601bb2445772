"""What a benchmark run found, as it is written to a JSON file. bench/__init__.py has the words."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Literal

import msgspec

Unit = Literal["s", "B", "1/s", "×", "count"]


class Series(msgspec.Struct, frozen=True, tag="series"):
    """One quantity, as often as it was measured. `who`: "vmkeep", a peer's name, or "limit"."""

    what: str
    who: str
    unit: Unit
    values: tuple[float, ...]


class Figure(msgspec.Struct, frozen=True, tag="figure"):
    """What was measured for a bar (a key of bench.bars.BARS), in the bar's unit.

    `how`: what a reader must know: a smaller size than the bar's, an extrapolation, a cause.
    """

    bar: str
    values: tuple[float, ...]
    how: str = ""


class Note(msgspec.Struct, frozen=True, tag="note"):
    """A sentence for the report: a peer that is absent, what a profile showed."""

    text: str


Result = Series | Figure | Note


class Machine(msgspec.Struct, frozen=True):
    """What the figures depend on, and nothing that names the machine."""

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    file_system: str
    python: str


class Answer(msgspec.Struct, frozen=True):
    """One question's results. `error`: why there are no more of them."""

    module: str
    question: str
    took_s: float
    results: tuple[Result, ...]
    error: str = ""


class Run(msgspec.Struct, frozen=True):
    """A whole run, or part of one. `load`: the 1-minute load average when it began; `peers`: the
    version of each that is installed."""

    commit: str
    began: str
    scale: Literal["quick", "full"]
    machine: Machine
    peers: dict[str, str]
    load: float
    answers: tuple[Answer, ...]


class Spread(msgspec.Struct, frozen=True):
    """Median, least and greatest of some values."""

    median: float
    least: float
    greatest: float
    count: int


def spread(values: tuple[float, ...]) -> Spread:
    """Raises ValueError for no values."""
    if not values:
        raise ValueError("no values")
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(above: tuple[float, ...], below: tuple[float, ...]) -> tuple[float, ...]:
    """Pair by pair; both were measured in turns, so both are equally long. Raises ValueError."""
    return tuple(one / other for one, other in zip(above, below, strict=True))


def write_run(path: Path, run: Run) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


def read_run(path: Path) -> Run:
    """Raises msgspec.ValidationError when it is none."""
    return _RUNS.decode(path.read_bytes())


_RUNS = msgspec.json.Decoder(Run)
