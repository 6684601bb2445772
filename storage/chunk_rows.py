"""The chunks table as one step of a fold sees it: changes are kept back and written in one go.

A new chunk's row is written three times by a commit: when it is placed, referred to, and looked at
again. Kept back it costs one look-up and one write, and these in the order of the keys, which is
that of LMDB's pages. Keys of chunks lie all over the table, so this is most of what a fold costs.
"""

from __future__ import annotations

from collections.abc import Sequence

from storage.tables import Table

MOST_KEPT_BACK = 150_000  # about 40 MB


class ChunkRows:
    """Of one transaction. Nothing else may read or write the table before `flush`."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._changed: dict[bytes, bytes | None] = {}  # None: it goes

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The rows of those that are there."""
        changed = self._changed
        found = self._table.get_many([key for key in keys if key not in changed])
        for key in keys:
            value = changed.get(key)
            if value is not None:
                found[key] = value
        return found

    def put(self, key: bytes, value: bytes) -> None:
        self._change(key, value)

    def delete(self, key: bytes) -> None:
        self._change(key, None)

    def flush(self) -> None:
        """Writes what was kept back."""
        for key in sorted(self._changed):
            value = self._changed[key]
            if value is None:
                self._table.delete(key)
            else:
                self._table.put(key, value)
        self._changed.clear()

    def _change(self, key: bytes, value: bytes | None) -> None:
        self._changed[key] = value
        if len(self._changed) >= MOST_KEPT_BACK:
            self.flush()
