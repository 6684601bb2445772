"""When a deep verify last read each pack of a point, and where an interrupted one goes on.

One row a pack, and one without a pack that says when the verify under way began: while it is there,
what was read since then is not read again. Written in batches: what a crash forgets is read again.
Who has come to the end has read all packs, so what was not read since its beginning has gone.

A clock that goes back makes nothing count as read: no verify begins before what was read by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from engine.model import PackRead
from engine.state import State, pack_read_key

BATCH_PACKS = 8  # half a GiB of full packs: a sync for each is little beside reading them


class PackReads:
    """storage.check.check.Reads, kept in the state. One thread."""

    def __init__(self, state: State, point_uuid: str, clock: Callable[[], float]) -> None:
        self._rows = state.pack_reads
        self._point = point_uuid
        self._clock = clock
        self._at = {row.pack: row.at for row in self._rows.values() if row.point_uuid == point_uuid}
        self._read = set[str]()
        self._fresh: list[PackRead] = []
        began = self._at.pop("", None)
        self._goes_on = began is not None
        self._began = max([clock(), *self._at.values()]) if began is None else began
        if began is None:
            self._rows.put(self._row("", self._began))

    def last(self, pack: str) -> float | None:
        return self._at.get(pack)

    def skip(self, pack: str) -> bool:
        return self._goes_on and self._at.get(pack, float("-inf")) > self._began

    def done(self, pack: str) -> None:
        at = max(self._clock(), math.nextafter(self._began, math.inf))
        self._read.add(pack)
        self._fresh.append(self._row(pack, at))
        if len(self._fresh) >= BATCH_PACKS:
            self.flush()

    def flush(self) -> None:
        """Durable on return."""
        if self._fresh:
            self._rows.put_all(self._fresh)
            self._fresh = []

    def _row(self, pack: str, at: float) -> PackRead:
        return PackRead(point_uuid=self._point, pack=pack, at=at)

    def end(self) -> None:
        """The verify came to its end: the next one reads everything."""
        self.flush()
        gone = {pack for pack, at in self._at.items() if at <= self._began} - self._read
        self._rows.delete(*(pack_read_key(self._point, pack) for pack in ("", *gone)))
