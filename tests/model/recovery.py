"""What a restart after a crash of everybody makes of a state: I9 and I10.

All sessions are dead: they are aborted, what is nobody's is swept, then one gc runs. No live backup
may be touched by that, and the disk must then hold exactly the live files.
"""

from __future__ import annotations

from storage.errors import StorageError
from storage.format.record import Abort, Op
from tests.model.chain import Edge
from tests.model.cleaners import orphans_of
from tests.model.collector import Gc
from tests.model.invariants import must
from tests.model.world import Model, World


class Recovery:
    """Recovers from states; each (log, disk) of a domain once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._aborted: dict[tuple[int, int], int] = {}
        self._swept: set[tuple[int, int, int]] = set()
        self._gc = Gc(model, "restart", host=0)
        self._gc.place = 0

    @property
    def count(self) -> int:
        """How many different crashes were recovered from."""
        return len(self._swept)

    def check(self, world: World) -> None:
        for domain, head in enumerate(world.heads):
            disk = world.disk & self._model.files.domains.get(domain, 0)
            if (domain, head, disk) not in self._swept:
                self._swept.add((domain, head, disk))
                self._recover(domain, head, disk)

    def _recover(self, domain: int, head: int, disk: int) -> None:
        chain = self._model.chains[domain]
        ended = self._all_aborted(domain, head)
        must(chain.nodes[ended].live == chain.nodes[head].live, "I10: a restart lost a backup")
        left = disk & ~orphans_of(self._model, domain, ended, disk)
        must(left == chain.nodes[ended].files, "I9: a sweep leaves other files than the live ones")

    def _all_aborted(self, domain: int, head: int) -> int:
        known = self._aborted.get((domain, head))
        if known is None:
            known = head
            for session in self._model.chains[domain].nodes[head].open_sessions:
                known = self._append(domain, known, [Abort(session=session)]).child
            if domain == 0:
                self._collect(known)
            self._aborted[domain, head] = known
        return known

    def _append(self, domain: int, head: int, ops: list[Op]) -> Edge:
        edge = self._model.chains[domain].extend(head, tuple(ops), "host-0")
        must(not isinstance(edge, StorageError), f"I10: a restart is refused: {edge}")
        assert isinstance(edge, Edge)
        return edge

    def _collect(self, head: int) -> None:
        """One gc, alone, on a swept disk."""
        disk = self._model.chains[0].nodes[head].files
        world = World((head, 0), (head, head, 0), disk, (self._gc.start,))
        while step := next(self._gc.steps(world), None):
            world = step[1]
            self._model.check(world)
        node = self._model.chains[0].nodes[world.heads[0]]
        must(world.disk == node.files, "I9: a gc leaves other files than the live ones")
        must(node.live == self._model.chains[0].nodes[head].live, "I10: a gc lost a backup")
