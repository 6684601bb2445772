"""The chunks table as one step of a fold sees it: changes are kept back and written in one go.

A new chunk's row is written three times by a commit: when it is placed, referred to, and looked at
again. Kept back it costs one look-up and one write, and these in the order of the keys, which is
that of LMDB's pages. Keys of chunks lie all over the table, so this is most of what a fold costs.
Rows that a look-up did not find, as most of a commit's, are written as new ones, all with one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from storage.view.tables import Table

MOST_KEPT_BACK = 150_000  # about 40 MB


class ChunkRows:
    """Of one transaction. Nothing else may read or write the table before `flush`."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._new: dict[bytes, bytes] = {}  # the table does not have these
        self._changed: dict[bytes, bytes | None] = {}  # and may have these; None: it goes

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The rows of those that are there."""
        new, changed = self._new, self._changed
        if new.keys() >= set(keys):
            return {key: new[key] for key in keys}
        unknown = [key for key in keys if key not in new and key not in changed]
        found = self._table.get_many(unknown)
        if len(unknown) < len(keys):
            kept = ((key, new.get(key) or changed.get(key)) for key in keys)
            found.update((key, value) for key, value in kept if value is not None)
        return found

    def put(self, key: bytes, value: bytes) -> None:
        if key in self._new:
            self._new[key] = value
        else:
            self._changed[key] = value
        self._keep_few()

    def put_many(self, rows: Mapping[bytes, bytes]) -> None:
        if self._new.keys() >= rows.keys():
            self._new.update(rows)
        else:
            for key, value in rows.items():
                self.put(key, value)

    def add_many(self, rows: Mapping[bytes, bytes]) -> None:
        """Rows that `get_many` did not find."""
        if self._changed.keys().isdisjoint(rows):
            self._new.update(rows)
        else:  # some were deleted, but may still be in the table
            for key, value in rows.items():
                (self._changed if key in self._changed else self._new)[key] = value
        self._keep_few()

    def delete(self, key: bytes) -> None:
        if self._new.pop(key, None) is None:
            self._changed[key] = None
        self._keep_few()

    def flush(self) -> None:
        """Writes what was kept back."""
        self._table.add_many([(key, self._new[key]) for key in sorted(self._new)])
        self._new.clear()
        for key in sorted(self._changed):
            value = self._changed[key]
            if value is None:
                self._table.delete(key)
            else:
                self._table.put(key, value)
        self._changed.clear()

    def _keep_few(self) -> None:
        if len(self._new) + len(self._changed) >= MOST_KEPT_BACK:
            self.flush()
