"""The view: the folded state of one domain in one LMDB environment.

`update(change)` runs `change(tables)` in a write transaction and commits it when it returns;
`read()` gives the tables as they are after the last commit. The map grows by itself. One process
opens a view at a time (its directory carries the host's id); threads may share it: writers take
turns in LMDB, readers never wait. Values are copied out, so nothing outlives its transaction.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import lmdb

from storage.errors import Damaged, translated
from storage.tables import TABLE_NAMES

FIRST_MAP_BYTES = 1 << 30
_DATA_FILE = "data.mdb"
_LAYOUT = b"vmkeep view 1"

ResultT = TypeVar("ResultT")
_Db: TypeAlias = Any  # py-lmdb's handle type has no public name


class _LmdbTable:
    """A storage.tables.Table in a transaction."""

    def __init__(self, txn: lmdb.Transaction, db: _Db) -> None:
        self._txn = txn
        self._db = db

    def get(self, key: bytes) -> bytes | None:
        found = self._txn.get(key, db=self._db)
        return None if found is None else bytes(found)

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        with self._txn.cursor(db=self._db) as cursor:
            found: Any = cursor.getmulti(keys)  # bytes: the environment gives no buffers
            return dict(found)

    def put(self, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._db)

    def delete(self, key: bytes) -> None:
        self._txn.delete(key, db=self._db)

    def scan(self, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        with self._txn.cursor(db=self._db) as cursor:
            if not cursor.set_range(prefix):
                return
            rows: Any = cursor
            for key, value in rows:
                if not key.startswith(prefix):
                    return
                yield key, value

    def keys_from(self, start: bytes, prefix: bytes) -> Iterator[bytes]:
        with self._txn.cursor(db=self._db) as cursor:
            if not cursor.set_range(start):
                return
            keys: Any = cursor.iternext(keys=True, values=False)
            for key in keys:
                if not key.startswith(prefix):
                    return
                yield key


class _LmdbTables:
    def __init__(self, txn: lmdb.Transaction, databases: dict[str, _Db]) -> None:
        self._tables = {name: _LmdbTable(txn, db) for name, db in databases.items()}

    def table(self, name: str) -> _LmdbTable:
        return self._tables[name]


class View:
    """An open LMDB view. `identity` names point and domain; another one's view is refused."""

    def __init__(self, path: str, identity: bytes) -> None:
        """Opens or makes it. Damaged when it can't be used and must be made anew."""
        self.path = path
        self.identity = identity
        self._stamp = _LAYOUT + b" " + identity
        os.makedirs(path, mode=0o700, exist_ok=True)
        with translated(f"view {path}"):
            self._env = self._open()
        try:
            self._check_identity()
        except BaseException:
            self._env.close()
            raise

    def _open(self) -> lmdb.Environment:
        size = FIRST_MAP_BYTES
        data_file = os.path.join(self.path, _DATA_FILE)
        if os.path.exists(data_file):
            size = max(size, 2 * os.path.getsize(data_file))
        env = lmdb.open(
            self.path, map_size=size, max_dbs=len(TABLE_NAMES), max_readers=512, mode=0o600
        )
        self._databases: dict[str, _Db] = {name: env.open_db(name.encode()) for name in TABLE_NAMES}
        return env

    def _check_identity(self) -> None:
        with self.read() as tables:
            found = tables.table("meta").get(b"identity")
        if found is None:
            self.update(lambda tables: tables.table("meta").put(b"identity", self._stamp))
        elif found != self._stamp:
            raise Damaged(f"view {self.path} belongs to another domain or is of another layout")

    @contextlib.contextmanager
    def read(self) -> Iterator[_LmdbTables]:
        """The state after the last commit. Keep it short; never across a wait."""
        with translated(f"view {self.path}"), self._env.begin() as txn:
            yield _LmdbTables(txn, self._databases)

    def update(self, change: Callable[[_LmdbTables], ResultT]) -> ResultT:
        """Runs `change` in a write transaction, durable on return; none of it when it raises.

        `change` is run again, on the old state, when the map was too small for it.
        """
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    return change(_LmdbTables(txn, self._databases))
            except lmdb.MapFullError:
                self.grow()

    def grow(self) -> None:
        """Doubles the map. No transaction may be open in this thread."""
        with translated(f"view {self.path}"):
            self._env.set_mapsize(2 * self._env.info()["map_size"])

    def copy_to(self, path: str) -> str:
        """A compact copy of the last committed state in directory `path`; returns the file.

        The copy is not flushed to the medium: who keeps it does that.
        """
        with translated(f"view {self.path}"):
            self._env.copy(path, compact=True)
        return os.path.join(path, _DATA_FILE)

    def close(self) -> None:
        self._env.close()


def adopt_copy(source: str, path: str) -> None:
    """Lets the LMDB file `source` be the data of a new view directory `path`."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    os.replace(source, os.path.join(path, _DATA_FILE))


def destroy(path: str) -> None:
    """Deletes a view that nobody has open. Nothing is lost: it can be made anew."""
    if os.path.isdir(path):
        shutil.rmtree(path)
