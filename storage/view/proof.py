"""Which dead packs may be retired: those that a view called dead which had been proved as a whole.

The proof reads every row, a microsecond each, so it is not made for each delete. It need not be: a
pack without a placed chunk stays dead for ever (docs/design.md §5.1), so what one proved state
calls dead may go at any time after it. Small views are proved at once, large ones when there is
time for it: REST times as long as the last proof took lies between two of them. What is not proved
yet waits on the point, for a later reclaim.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from storage.view import tables
from storage.view.lmdb_tables import LmdbTables
from storage.view.tables import Tables
from storage.view.view import View

QUICK_ROWS = 5_000
REST = 20.0


class Proof:
    """Of one view, and of those that are made anew in its place. Thread-safe."""

    def __init__(self, view: View, clock: Callable[[], float] = time.monotonic) -> None:
        self._view = view
        self._clock = clock
        self._proving = threading.Lock()
        self._dead: frozenset[str] = frozenset()
        self._rests_until_s = 0.0

    def dead(self, packs: Sequence[str], *, at_once: bool) -> tuple[str, ...]:
        """Those of the packs that may be retired; all that are dead, if `at_once` or quick.

        ViewDamaged, and what else making a view anew raises.
        """
        found = self._view.ask(lambda state: plan_dead(state, packs))
        if found and not self._dead.issuperset(found):
            with self._proving:
                if at_once or self.is_due():
                    found = self._prove(packs)
        return tuple(pack for pack in found if pack in self._dead)

    def is_quick(self) -> bool:
        """Whether a proof takes no longer than a few writes."""
        with self._view.read() as state:
            return state.rows() <= QUICK_ROWS

    def is_due(self) -> bool:
        """Whether the next proof may be made now."""
        return self._clock() >= self._rests_until_s or self.is_quick()

    def forget(self) -> None:
        """The view was made anew: it may lack something now."""
        self._dead = frozenset()

    def _prove(self, packs: Sequence[str]) -> tuple[str, ...]:
        def proved(state: LmdbTables) -> tuple[str, ...]:
            state.prove()
            return plan_dead(state, packs)

        began_s = self._clock()
        found = self._view.ask(proved)
        ended_s = self._clock()
        self._rests_until_s = ended_s + REST * (ended_s - began_s)
        self._dead = frozenset(found)
        return found


def plan_dead(state: Tables, packs: Sequence[str]) -> tuple[str, ...]:
    """Those of the packs that are dead and may go. No others are looked at."""
    rows = [(pack, tables.packs.get(state, pack)) for pack in packs]
    dead = [pack for pack, row in rows if row is not None and not row.live_chunks]
    if not dead or tables.lost_disks(state):
        return ()
    return tuple(pack for pack in dead if tables.may_retire(state, pack))


def may_go(state: Tables, pack: str, *, lost: bool) -> bool:
    """False for one that went already, and for one that a lost chunk, or disk, may be in."""
    row = tables.packs.get(state, pack)
    if row is None or row.live_chunks:
        return row is not None
    return not lost and tables.may_retire(state, pack)
