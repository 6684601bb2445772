"""Ranges of a disk, as (offset, length) in bytes."""

from __future__ import annotations

from collections.abc import Iterable


def joined(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pieces ascending, made one where they touch or overlap."""
    found: list[tuple[int, int]] = []
    for offset, length in sorted(pieces):
        if found and offset <= sum(found[-1]):
            start = found[-1][0]
            found[-1] = (start, max(sum(found[-1]), offset + length) - start)
        else:
            found.append((offset, length))
    return found
