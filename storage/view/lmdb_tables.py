"""A view's tables in LMDB: no row is believed that is not what was written, nor its absence.

Each value ends in a check over its table, key and bytes. That tells a changed row, not one that is
missing or an older one in its place. So each group of rows (a table; of `pages` a layer) has a
count and a sum of its rows' checks in a database of its own, kept in the same transactions; a scan
of a whole group holds what it saw against them. A wrong sum stays wrong, whatever is changed
after, until the view is made anew.

Read first: docs/design.md §8.1. Then storage.view.view.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, TypeAlias

import lmdb
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from storage.errors import ViewDamaged
from storage.view.tables import GROUP_BYTES, TABLE_NAMES

SUMS = "sums"
CHECK_BYTES = 4

_SUM = struct.Struct("<QQ")
_WRAP = 1 << 64

Db: TypeAlias = Any  # py-lmdb's handle type has no public name
Sum: TypeAlias = tuple[int, int]  # how many rows, and the sum of their checks


def _wrong(table: str, key: bytes, what: str) -> ViewDamaged:
    return ViewDamaged(f"view: table {table}, {key.hex() or 'as a whole'}: {what}")


class _Checked:
    """Rows of one database, each with its check."""

    def __init__(self, txn: lmdb.Transaction, db: Db, name: str) -> None:
        self.name = name
        self._txn = txn
        self._db = db
        self._seed = xxh3_64_intdigest(name.encode())

    def with_check(self, key: bytes, value: bytes) -> bytes:
        """The value with its check behind it."""
        return value + xxh3_64_digest(key + value, self._seed + len(key))[:CHECK_BYTES]

    def without_check(self, key: bytes, found: bytes) -> bytes:
        """The value that was written under this key; ViewDamaged if these bytes are not it."""
        value = found[:-CHECK_BYTES]
        check = xxh3_64_digest(key + value, self._seed + len(key))[:CHECK_BYTES]
        if check != found[-CHECK_BYTES:]:
            raise _wrong(self.name, key, "is not what was written")
        return value

    def get(self, key: bytes) -> bytes | None:
        found = self._txn.get(key, db=self._db)
        return None if found is None else self.without_check(key, bytes(found))

    def rows(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """(key, value with check) from `start` on; ViewDamaged when keys do not ascend."""
        before = b""
        with self._txn.cursor(db=self._db) as cursor:
            if not cursor.set_range(start):
                return
            found: Any = cursor  # bytes: the environment gives no buffers
            for key, value in found:
                if key <= before:
                    raise _wrong(self.name, key, "is not in its place")
                before = key
                yield key, value


def _check_of(found: bytes) -> int:
    return int.from_bytes(found[-CHECK_BYTES:], "little")


class Sums:
    """Of one transaction. Changes are kept back until `flush`."""

    def __init__(self, txn: lmdb.Transaction, db: Db) -> None:
        self._txn = txn
        self._db = db
        self._rows = _Checked(txn, db, SUMS)
        self._changed: dict[bytes, Sum] = {}

    def of(self, group: bytes) -> Sum:
        """(0, 0) for a group without rows."""
        changed = self._changed.get(group)
        if changed is not None:
            return changed
        value = self._rows.get(group)
        return (0, 0) if value is None else _SUM.unpack(value)

    def change(self, group: bytes, old: bytes | None, new: bytes | None) -> None:
        """A row of the group changed; with their checks, None for no row."""
        count, total = self.of(group)
        if old is not None:
            count, total = count - 1, total - _check_of(old)
        if new is not None:
            count, total = count + 1, total + _check_of(new)
        self._changed[group] = (count, total % _WRAP)

    def add(self, group: bytes, rows: Sequence[bytes]) -> None:
        """These rows came to the group; with their checks."""
        count, total = self.of(group)
        total += sum(
            struct.unpack(f"<{len(rows)}I", b"".join([row[-CHECK_BYTES:] for row in rows]))
        )
        self._changed[group] = (count + len(rows), total % _WRAP)

    def flush(self) -> None:
        """Writes them. ViewDamaged when rows were deleted that had not all been put."""
        for group, (count, total) in self._changed.items():
            if count < 0 or (total and not count):
                raise _wrong(SUMS, group, "rows are missing, or are not those that were written")
            if count:
                row = self._rows.with_check(group, _SUM.pack(count, total))
                self._txn.put(group, row, db=self._db)
            else:
                self._txn.delete(group, db=self._db)
        self._changed.clear()

    def all(self) -> dict[bytes, Sum]:
        """Of every group that has rows, as last flushed."""
        return {
            group: _SUM.unpack(self._rows.without_check(group, found))
            for group, found in self._rows.rows()
        }


class LmdbTable(_Checked):
    """A storage.view.tables.Table in a transaction. Everything raises ViewDamaged."""

    def __init__(self, txn: lmdb.Transaction, db: Db, name: str, sums: Sums) -> None:
        super().__init__(txn, db, name)
        self._sums = sums
        self._group_bytes = GROUP_BYTES.get(name, 0)
        self._group_name = name.encode() + b"\0"

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        with self._txn.cursor(db=self._db) as cursor:
            found: Any = cursor.getmulti(keys)
            return {key: self.without_check(key, value) for key, value in found}

    def put(self, key: bytes, value: bytes) -> None:
        row = self.with_check(key, value)
        old: Any = self._txn.replace(key, row, db=self._db)
        self._sums.change(self._group(key), old, row)

    def add_many(self, rows: Sequence[tuple[bytes, bytes]], *, at_end: bool = False) -> None:
        seed = self._seed
        new = [  # as with_check() does, but for the call: it is made for millions of rows
            (key, value + xxh3_64_digest(key + value, seed + len(key))[:CHECK_BYTES])
            for key, value in rows
        ]
        with self._txn.cursor(db=self._db) as cursor:
            _, added = cursor.putmulti(new, overwrite=False, append=at_end)
        if added != len(new):
            raise _wrong(self.name, b"", f"{len(new) - added} rows were there, or out of order")
        if not self._group_bytes:
            self._sums.add(self._group_name, [row for _, row in new])
            return
        for group, some in groupby(new, lambda row: self._group(row[0])):
            self._sums.add(group, [row for _, row in some])

    def delete(self, key: bytes) -> None:
        old: Any = self._txn.pop(key, db=self._db)
        if old is not None:
            self._sums.change(self._group(key), old, None)

    def scan(self, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """When `prefix` is a whole group's, its end is reached only if all its rows were seen."""
        count = total = 0
        for key, found in self.rows(prefix):
            if not key.startswith(prefix):
                break
            count, total = count + 1, total + _check_of(found)
            yield key, self.without_check(key, found)
        if len(prefix) == self._group_bytes:
            self._require((count, total % _WRAP), self._group(prefix))

    def keys_from(self, start: bytes, prefix: bytes) -> Iterator[bytes]:
        before = b""
        with self._txn.cursor(db=self._db) as cursor:
            if not cursor.set_range(start):
                return
            keys: Any = cursor.iternext(keys=True, values=False)
            for key in keys:
                if not key.startswith(prefix):
                    return
                if key <= before:
                    raise _wrong(self.name, key, "is not in its place")
                before = key
                yield key

    def sums_of_rows(self) -> dict[bytes, Sum]:
        """By group, of the rows that are there; each one's check is checked too."""
        found: dict[bytes, Sum] = {}
        for key, row in self.rows():
            self.without_check(key, row)
            count, total = found.get(self._group(key), (0, 0))
            found[self._group(key)] = count + 1, (total + _check_of(row)) % _WRAP
        return found

    def _group(self, key: bytes) -> bytes:
        return self._group_name + key[: self._group_bytes]

    def _require(self, found: Sum, group: bytes) -> None:
        if found != self._sums.of(group):
            raise _wrong(self.name, group, "rows are missing, or older ones in their place")


class LmdbTables:
    """All tables in one transaction."""

    def __init__(self, txn: lmdb.Transaction, databases: dict[str, Db]) -> None:
        self._txn = txn
        self._databases = databases
        self._sums = Sums(txn, databases[SUMS])
        self._tables: dict[str, LmdbTable] = {}

    def table(self, name: str) -> LmdbTable:
        found = self._tables.get(name)
        if found is None:  # most transactions ask one or two
            found = LmdbTable(self._txn, self._databases[name], name, self._sums)
            self._tables[name] = found
        return found

    def flush(self) -> None:
        """Writes the sums of what was changed, before the commit."""
        self._sums.flush()

    def rows(self) -> int:
        """How many there are, as LMDB counts them: to judge what reading them would cost."""
        return sum(self._txn.stat(db)["entries"] for db in self._databases.values())

    def copy_bytes(self) -> int:
        """How large a compact copy is, but for a few pages."""
        stats = [self._txn.stat(db) for db in self._databases.values()]
        return sum(
            one["psize"] * (one["branch_pages"] + one["leaf_pages"] + one["overflow_pages"])
            for one in stats
        )

    def prove(self) -> None:
        """Reads every row: returns if they are, all of them and nothing else, what was written.

        Costs about a microsecond a row. ViewDamaged.
        """
        found: dict[bytes, Sum] = {}
        for name in TABLE_NAMES:
            found |= self.table(name).sums_of_rows()
        if found != self._sums.all():
            raise ViewDamaged("view: rows are missing, or older ones in their place")
