"""Horizontal bars as SVG. Written here: a plotting library would be the largest dependency of all,
for some rectangles and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from bench.results import Series, spread
from bench.summary import amount

WIDTH, LABEL, ROW, BAR = 760, 250, 26, 16
LIMIT_COLOR, OURS_COLOR, PEER_COLOR = "#9a9a9a", "#1f6feb", "#d08770"


def bars(title: str, series: Sequence[Series]) -> str:
    """An SVG document: one bar each, as long as the median, a line from the least to the greatest.

    All have one unit. Raises ValueError when there are none.
    """
    most = max(spread(one.values).greatest for one in series) or 1.0
    height = ROW * (len(series) + 1) + 8
    rows = "".join(_row(number, one, most) for number, one in enumerate(series, start=1))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        ' font-family="sans-serif" font-size="13">'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
        f'<text x="4" y="17" font-weight="bold">{escape(title)}</text>{rows}</svg>\n'
    )


def _row(number: int, one: Series, most: float) -> str:
    found = spread(one.values)
    top = ROW * number + 4
    scale = (WIDTH - LABEL - 90) / most
    middle = top + BAR / 2
    least, greatest = LABEL + found.least * scale, LABEL + found.greatest * scale
    return (
        f'<text x="{LABEL - 8}" y="{top + 13}" text-anchor="end">{escape(one.who)}</text>'
        f'<rect x="{LABEL}" y="{top}" width="{found.median * scale:.1f}" height="{BAR}"'
        f' fill="{_color(one.who)}"/>'
        f'<line x1="{least:.1f}" y1="{middle}" x2="{greatest:.1f}" y2="{middle}" stroke="black"/>'
        f'<text x="{greatest + 6:.1f}" y="{top + 13}">{amount(found.median, one.unit)}</text>'
    )


def _color(who: str) -> str:
    if who.startswith("limit"):
        return LIMIT_COLOR
    return OURS_COLOR if who.startswith("vmkeep") else PEER_COLOR
