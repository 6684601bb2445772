"""When a deep verify last read each pack of a point, and where an interrupted one goes on.

One row a pack, and one without a pack that says when the verify under way began: while it is there,
what was read since then is not read again. Written in batches: what a crash forgets is read again.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.model import PackRead
from engine.state import State

BATCH_PACKS = 8  # half a GiB of full packs: a sync for each is little beside reading them


class PackReads:
    """storage.check.Reads, kept in the state. One thread."""

    def __init__(self, state: State, point_uuid: str, clock: Callable[[], float]) -> None:
        self._rows = state.pack_reads
        self._point = point_uuid
        self._clock = clock
        self._at = {row.pack: row.at for row in self._rows.values() if row.point_uuid == point_uuid}
        self._fresh: list[PackRead] = []
        began = self._at.pop("", None)
        self._goes_on = began is not None
        self._began = clock() if began is None else began
        if began is None:
            # What was read by a clock that was ahead would count as read by this verify.
            ahead = [pack for pack, at in self._at.items() if at >= self._began]
            self._at |= dict.fromkeys(ahead, 0.0)
            rows = [self._row(pack, 0.0) for pack in ahead]
            self._rows.put_all([*rows, self._row("", self._began)])

    def last(self, pack: str) -> float | None:
        return self._at.get(pack)

    def skip(self, pack: str) -> bool:
        return self._goes_on and self._at.get(pack, float("-inf")) >= self._began

    def done(self, pack: str) -> None:
        self._fresh.append(self._row(pack, self._clock()))
        if len(self._fresh) >= BATCH_PACKS:
            self.flush()

    def flush(self) -> None:
        """Durable on return."""
        if self._fresh:
            self._rows.put_all(self._fresh)
            self._fresh = []

    def _row(self, pack: str, at: float) -> PackRead:
        return PackRead(point_uuid=self._point, pack=pack, at=at)

    @staticmethod
    def end(state: State, point_uuid: str) -> None:
        """The verify came to its end: the next one reads everything.

        Packs that it did not come to are gone, or not to be read: their rows go, or they would
        gather for as long as there are backups.
        """
        rows = [row for row in state.pack_reads.values() if row.point_uuid == point_uuid]
        began = next((row.at for row in rows if not row.pack), 0.0)
        past = [row.pack for row in rows if row.at < began]
        state.pack_reads.delete(*(f"{point_uuid}/{pack}" for pack in ("", *past)))
