"""A state in dictionaries: for reading another cluster's log, and for tests and models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage.errors import Damaged
from storage.view.tables import TABLE_NAMES

# Of another cluster's domain, which is read into memory: a million packs, or backups, fit.
FOREIGN_BYTES_LIMIT = 1 << 29
FOREIGN_SESSIONS_LIMIT = 4096
ROW_OVERHEAD_BYTES = 200  # of a dictionary's entry and two objects


class MemoryTable:
    """A Table in a dictionary."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.rows.get(key)

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        return {key: self.rows[key] for key in keys if key in self.rows}

    def put(self, key: bytes, value: bytes) -> None:
        self.rows[key] = value

    def add_many(self, rows: Sequence[tuple[bytes, bytes]], *, at_end: bool = False) -> None:
        del at_end
        for key, value in rows:
            self.put(key, value)

    def delete(self, key: bytes) -> None:
        self.rows.pop(key, None)

    def scan(self, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        for key in sorted(key for key in self.rows if key.startswith(prefix)):
            yield key, self.rows[key]

    def keys_from(self, start: bytes, prefix: bytes) -> Iterator[bytes]:
        yield from sorted(key for key in self.rows if key.startswith(prefix) and key >= start)


class MemoryTables:
    """All tables of one state."""

    def __init__(self) -> None:
        self.tables = {name: MemoryTable() for name in TABLE_NAMES}

    def table(self, name: str) -> MemoryTable:
        return self.tables[name]

    def copy(self) -> MemoryTables:
        """An independent state with the same rows."""
        twin = MemoryTables()
        for name, table in self.tables.items():
            twin.tables[name].rows = dict(table.rows)
        return twin


class BoundedTables(MemoryTables):
    """MemoryTables for what somebody else wrote: Damaged instead of without end."""

    def __init__(self) -> None:
        super().__init__()
        self._budget = _Budget(FOREIGN_BYTES_LIMIT, FOREIGN_BYTES_LIMIT)
        self.tables = {name: _BoundedTable(name, self._budget) for name in TABLE_NAMES}

    @property
    def size_bytes(self) -> int:
        """About what it takes up."""
        return self._budget.size_bytes - self._budget.left_bytes


@dataclass(slots=True)
class _Budget:
    size_bytes: int
    left_bytes: int


class _BoundedTable(MemoryTable):
    def __init__(self, name: str, budget: _Budget) -> None:
        super().__init__()
        self._name = name
        self._budget = budget

    def put(self, key: bytes, value: bytes) -> None:
        known = self.rows.get(key)
        if known is not None:
            self._spend(len(value) - len(known))
        else:
            if self._name == "sessions" and len(self.rows) >= FOREIGN_SESSIONS_LIMIT:
                raise Damaged(f"more than {FOREIGN_SESSIONS_LIMIT} sessions are open")
            self._spend(len(value) + len(key) + ROW_OVERHEAD_BYTES)
        self.rows[key] = value

    def delete(self, key: bytes) -> None:
        if key in self.rows:
            self._spend(-len(self.rows[key]) - len(key) - ROW_OVERHEAD_BYTES)
        super().delete(key)

    def _spend(self, size_bytes: int) -> None:
        self._budget.left_bytes -= size_bytes
        if self._budget.left_bytes < 0:
            raise Damaged(f"its state is over {FOREIGN_BYTES_LIMIT} bytes")
