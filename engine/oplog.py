"""The operation log: who asked for what, and what came of it. Bounded: the oldest lines go."""

from __future__ import annotations

import threading
from collections.abc import Callable

from engine.model import Operation
from engine.state import State, operation_key

KEPT_OPERATIONS = 100_000
MOST_TEXT_CHARS = 1000


class OperationLog:
    """Persisted line by line; durable on return. Thread-safe."""

    def __init__(
        self, state: State, clock: Callable[[], float], kept: int = KEPT_OPERATIONS
    ) -> None:
        self._state = state
        self._clock = clock
        self._kept = kept
        self._lock = threading.Lock()  # of those who add; who looks does not wait for a medium
        with state.store.read() as txn:
            newest = state.operations.newest_in(txn)
            oldest = state.operations.oldest_in(txn)
        self._span = (oldest.seq if oldest else 1, newest.seq + 1 if newest else 1)

    def add(
        self, who: str, what: str, target: str, name: str, vm_type: str, scode: int, desc: str
    ) -> None:
        """Adds a line, cutting texts that are too long for a log."""
        with self._lock:
            oldest, following = self._span
            row = Operation(
                seq=following,
                at=self._clock(),
                who=_cut(who),
                what=_cut(what),
                target=_cut(target),
                name=_cut(name),
                vm_type=_cut(vm_type),
                scode=scode,
                desc=_cut(desc),
            )
            first = max(oldest, following + 1 - self._kept)
            with self._state.store.write() as txn:
                self._state.operations.put_in(txn, row)
                for seq in range(oldest, first):
                    self._state.operations.delete_in(txn, operation_key(seq))
            self._span = (first, following + 1)

    def page(self, page: int, page_size: int) -> tuple[list[Operation], int]:
        """(the page, newest first; how many there are). `page` counts from 1."""
        first, following = self._span
        newest = following - 1 - (max(page, 1) - 1) * page_size
        oldest = max(newest - page_size + 1, first)
        with self._state.store.read() as txn:
            found = [
                row
                for seq in range(newest, oldest - 1, -1)
                if (row := self._state.operations.get_in(txn, operation_key(seq))) is not None
            ]
        return found, following - first


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT_CHARS else f"{text[: MOST_TEXT_CHARS - 1]}…"
