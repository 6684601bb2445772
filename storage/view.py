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
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import lmdb

from storage.errors import Damaged, translated
from storage.lock_file import READERS, allocate_lock_file
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


@dataclass(slots=True, eq=False)
class _Opened:
    env: lmdb.Environment
    databases: dict[str, _Db]
    readers: int = 0


def _open(path: str) -> _Opened:
    size = FIRST_MAP_BYTES
    data_file = os.path.join(path, _DATA_FILE)
    if os.path.exists(data_file):
        size = max(size, 2 * os.path.getsize(data_file))
    allocate_lock_file(path)
    env = lmdb.open(path, map_size=size, max_dbs=len(TABLE_NAMES), max_readers=READERS, mode=0o600)
    return _Opened(env, {name: env.open_db(name.encode()) for name in TABLE_NAMES})


class View:
    """An open LMDB view. `identity` names point and domain; another one's view is refused."""

    def __init__(self, path: str, identity: bytes) -> None:
        """Opens or makes it. Damaged when it can't be used and must be made anew."""
        self.path = path
        self.identity = identity
        self._stamp = _LAYOUT + b" " + identity
        self._replaced: list[_Opened] = []
        self._gate = threading.Condition()
        self._reading = threading.local()
        self._readers = 0
        self._growing = False
        self._panicked = False
        with translated(f"view {path}"):
            os.makedirs(path, mode=0o700, exist_ok=True)
            self._current = _open(path)
        try:
            self._check_stamp()
        except BaseException:
            self.close()
            raise

    def _check_stamp(self) -> None:
        with self.read() as tables:
            found = tables.table("meta").get(b"identity")
        if found is None:
            self.update(lambda tables: tables.table("meta").put(b"identity", self._stamp))
        elif found != self._stamp:
            raise Damaged(f"view {self.path} belongs to another domain or is of another layout")

    def replace(self, other: str) -> None:
        """Goes on with the view directory `other`, which takes this one's place.

        No update may be under way. Reads that are go on with the old state, which is closed, and
        gives its room back, with the last of them.
        """
        old = self.path + ".old"
        destroy(old)
        os.rename(self.path, old)
        os.rename(other, self.path)
        with translated(f"view {self.path}"):
            opened = _open(self.path)
        with self._gate:
            self._replaced.append(self._current)
            self._current = opened
            self._close_unread()
        destroy(old)

    @contextlib.contextmanager
    def read(self) -> Iterator[_LmdbTables]:
        """The state after the last commit. Keep it short; never across a wait."""
        what = f"view {self.path}"
        with self._entered() as current, translated(what), current.env.begin() as txn:
            yield _LmdbTables(txn, current.databases)

    @contextlib.contextmanager
    def _entered(self) -> Iterator[_Opened]:
        """Growing the map would end the transactions that are under way: so it waits for them,
        and new ones wait for it, but for a thread that is in one already."""
        depth: int = getattr(self._reading, "depth", 0)
        with self._gate:
            self._gate.wait_for(lambda: depth or not self._growing)
            self._readers += 1
            current = self._current
            current.readers += 1
        self._reading.depth = depth + 1
        try:
            yield current
        finally:
            self._reading.depth = depth
            with self._gate:
                self._readers -= 1
                current.readers -= 1
                self._close_unread()
                self._gate.notify_all()

    def _close_unread(self) -> None:
        """`_gate` is held."""
        for opened in [one for one in self._replaced if not one.readers]:
            self._replaced.remove(opened)
            opened.env.close()

    def update(self, change: Callable[[_LmdbTables], ResultT]) -> ResultT:
        """Runs `change` in a write transaction, durable on return; none of it when it raises.

        `change` is run again, on the old state, when the map was too small for it.
        """
        with translated(f"view {self.path}"):
            while True:
                if self._panicked:
                    self._reopen()
                try:
                    with self._current.env.begin(write=True) as txn:
                        return change(_LmdbTables(txn, self._current.databases))
                except lmdb.MapFullError:
                    self.grow()
                except lmdb.PanicError:
                    self._panicked = True

    def grow(self) -> None:
        """Doubles the map, when nobody is reading. Not from within a transaction."""
        with self._unread(), translated(f"view {self.path}"):
            env = self._current.env
            env.set_mapsize(2 * env.info()["map_size"])

    def _reopen(self) -> None:
        """After a head page that could not be written LMDB refuses all else, though the file is
        as it was: until it is opened anew."""
        with self._unread():
            self._current.env.close()
            self._current = _open(self.path)
            self._panicked = False

    @contextlib.contextmanager
    def _unread(self) -> Iterator[None]:
        """Nobody is reading inside the block."""
        with self._gate:
            self._growing = True
            try:
                self._gate.wait_for(lambda: not self._readers)
                yield
            finally:
                self._growing = False
                self._gate.notify_all()

    def size_bytes(self) -> int:
        """Of its data file."""
        return os.path.getsize(os.path.join(self.path, _DATA_FILE))

    def copy_to(self, path: str) -> str:
        """A compact copy of the last committed state in directory `path`; returns the file.

        The copy is not flushed to the medium: who keeps it does that.
        """
        with translated(f"view {self.path}"):
            self._current.env.copy(path, compact=True)
        return os.path.join(path, _DATA_FILE)

    def close(self) -> None:
        for opened in (*self._replaced, self._current):
            opened.env.close()


def adopt_copy(source: str, path: str) -> None:
    """Lets the LMDB file `source` be the data of a new view directory `path`."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    os.replace(source, os.path.join(path, _DATA_FILE))


def destroy(path: str) -> None:
    """Deletes a view that nobody has open. Nothing is lost: it can be made anew."""
    if os.path.isdir(path):
        shutil.rmtree(path)
