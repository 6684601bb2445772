"""Comparing a view with one that is made anew from log, footers and manifests (invariant I8)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING

from storage.check.check import Finding
from storage.log.rebuild import fill
from storage.view import tables
from storage.view.tables import Tables
from storage.view.view import View

if TYPE_CHECKING:
    from storage.domain.domain import Domain

ATTEMPTS = 5


def check_view(domain: Domain) -> list[Finding]:
    """What differs; at most one finding a table. Costs what a rebuild costs; changes nothing.

    Nothing is said about a view that lacks something, or when records came at every attempt.
    """
    for _ in range(ATTEMPTS):
        domain.refresh()
        with tempfile.TemporaryDirectory(prefix="vmkeep-view-") as scratch:
            anew = View(os.path.join(scratch, "view"), domain.view.identity, scratch=True)
            try:
                fill(anew.update, domain.records, domain.contents, scratch)
                with domain.view.read() as mine, anew.read() as other:
                    if tables.applied(mine) != tables.applied(other):
                        continue
                    if any(tables.losses(one) or tables.lost_disks(one) for one in (mine, other)):
                        return []
                    return _differences(domain.view.path, mine, other)
            finally:
                anew.close()
    return []


def _differences(path: str, mine: Tables, other: Tables) -> list[Finding]:
    found = []
    for name in tables.TABLE_NAMES:
        for one, two in zip_longest(_rows(mine, name), _rows(other, name)):
            if one != two:
                row = min(row[0] for row in (one, two) if row is not None)
                detail = f"{name} {row.hex()} is not what the point's files say: rebuild the view"
                found.append(Finding("view", path, detail))
                break
    return found


def _rows(state: Tables, name: str) -> Iterator[tuple[bytes, bytes]]:
    return state.table(name).scan()
