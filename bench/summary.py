"""Results in words: one line each, and what became of each bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.bars import BARS, Bar, is_met
from bench.results import Answer, Figure, Note, Result, Series, Unit, spread


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar and what was measured for it. `met` is None when nothing was."""

    bar: Bar
    values: tuple[float, ...]
    met: bool | None
    how: str

    def line(self) -> str:
        state = {True: "met   ", False: "MISSED", None: "  -   "}[self.met]
        return f"{state} {self.bar.row}: {self.bar.text}: {self.measured()} ({self.wanted()})"

    def measured(self) -> str:
        """Median and spread, or that there is none."""
        return quoted(self.values, self.bar.unit) if self.values else "not measured"

    def wanted(self) -> str:
        return f"{self.bar.kind} {amount(self.bar.limit, self.bar.unit)}"


def verdicts(answers: Sequence[Answer]) -> list[Verdict]:
    """One for each bar, in the table's order. Figures of several questions for a bar are pooled."""
    figures = [
        result for answer in answers for result in answer.results if isinstance(result, Figure)
    ]
    return [_verdict(bar, [figure for figure in figures if figure.bar == bar.key]) for bar in BARS]


def one_line(result: Result) -> str:
    match result:
        case Note(text):
            return text
        case Figure(bar, values, how):
            return f"{bar}: {', '.join(f'{value:.4g}' for value in values)}  {how}"
        case Series(what, who, unit, values):
            return f"{what}: {who}: {quoted(values, unit)}"


def quoted(values: tuple[float, ...], unit: Unit) -> str:
    """The median, and least and greatest when there are several."""
    found = spread(values)
    median = amount(found.median, unit)
    if found.count == 1:
        return median
    return f"{median} ({amount(found.least, unit)} to {amount(found.greatest, unit)})"


def amount(value: float, unit: Unit) -> str:
    """A quantity, to read."""
    match unit:
        case "s":
            return f"{value * 1000:.3g} ms" if value < 0.1 else f"{value:.2f} s"
        case "B":
            return _bytes(value)
        case "1/s":
            return f"{value:,.0f}/s"
        case "×":
            return f"{value:.3g} ×"
        case "count":
            return f"{value:,.0f}"


def _bytes(value: float) -> str:
    for power, name in ((50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        size = 1 << power
        if value >= size:
            # %g would write a thousand and more with an exponent.
            return f"{value / size:.{3 if value < 1000 * size else 4}g} {name}"
    return f"{value:.0f} B"


def _verdict(bar: Bar, figures: Sequence[Figure]) -> Verdict:
    values = tuple(value for figure in figures for value in figure.values)
    how = " ".join(dict.fromkeys(figure.how for figure in figures if figure.how))
    met = is_met(bar, values, spread(values).median) if values else None
    return Verdict(bar, values, met, how)
