"""A registry: which request provokes which row of api.errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from tests.api_site import Answer, Gate, Site

Sent: TypeAlias = Awaitable[Answer]
Case: TypeAlias = Callable[[Site], Awaitable[Sent]]
GatedCase: TypeAlias = Callable[[Site, Gate], Awaitable[Sent]]


@dataclass(frozen=True)
class Refusal:
    row: str
    says: str
    case: Case


CASES: list[Refusal] = []
GATED: list[tuple[str, GatedCase]] = []


def provokes(row: str, says: str = "") -> Callable[[Case], Case]:
    """The case provokes this row, and `desc` begins with `says`."""

    def keep(case: Case) -> Case:
        CASES.append(Refusal(row, says, case))
        return case

    return keep


def provokes_gated(row: str) -> Callable[[GatedCase], GatedCase]:
    """As `provokes`, with a backup under way."""

    def keep(case: GatedCase) -> GatedCase:
        GATED.append((row, case))
        return case

    return keep
