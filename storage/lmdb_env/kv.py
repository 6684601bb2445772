"""The host's own small tables: typed rows under text keys, in one LMDB environment.

Not on a backup point: this is what a host knows about its VMs, jobs and catalogue (engine/state.py
says which tables there are). Rows are msgspec structs, stored as msgpack.

Durability: when the block of `Store.write()` is left normally, everything put and deleted in it is
on the disk; when it is left by an exception, nothing is. A reader sees one such state throughout.

Damage: each row carries a check of itself, its key and its table, so a wrong one is never believed.
When the environment is closed the whole file gets a seal (storage.lmdb_env.clean_close), which the
next opening checks, so what happens to a file that nobody uses is found before LMDB follows a
pointer in it. After a kill there is no seal: then its pages are walked first
(storage.lmdb_env.pages), so what LMDB would be led astray by, or end the process at, is an error
with a name; the rows have their checks.

The map grows when it is full. LMDB allows that only while the process has no transaction open, so
the full transaction is rolled back, the map enlarged once no reader is inside, and the journal of
this transaction replayed: nobody else can have written in between, as the writers' lock is held.
Hence: never open a `read()` inside a `write()` block of the same thread. Nor may LMDB's environment
be closed, to be opened anew, before the readers have left.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import lmdb
import msgspec
from xxhash import xxh3_64_digest

from storage.errors import Damaged, PointUnreachable, Refused, ViewDamaged, translated
from storage.files.fs import NO_FD
from storage.files.in_flight import InFlight
from storage.lmdb_env.clean_close import break_seal, put_seal
from storage.lmdb_env.lock_file import READERS, lock_in_memory, occupy
from storage.lmdb_env.pages import require_sound_pages

FIRST_MAP_BYTES = 64 << 20
_MOST_KEY_BYTES = 511  # LMDB's own limit

_CHECK_BYTES = 8
_DATA_FILE = "data.mdb"

RowT = TypeVar("RowT", bound=msgspec.Struct)

_encoder = msgspec.msgpack.Encoder()


class Table(Generic[RowT]):
    """A named table and the type of its rows. Made once, at import."""

    def __init__(self, name: str, row_type: type[RowT]) -> None:
        self.name = name
        self._decoder = msgspec.msgpack.Decoder(row_type)

    def encode(self, row: RowT, key: bytes) -> bytes:
        """The row's bytes, and a check of them, the key and the table."""
        body = _encoder.encode(row)
        return body + self._check(body, key)

    def decode(self, found: bytes, key: bytes) -> RowT:
        """The row; Damaged if these bytes are none, or another's."""
        body = found[:-_CHECK_BYTES]
        if found[-_CHECK_BYTES:] != self._check(body, key):
            raise Damaged(f"state table {self.name}, row {_text(key)!r}: is not what was written")
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise Damaged(f"state table {self.name}, row {_text(key)!r}: {error}") from error

    def _check(self, body: bytes, key: bytes) -> bytes:
        return xxh3_64_digest(b"%s\0%s\0%s" % (self.name.encode(), key, body))


class ReadTxn:
    """One consistent state. Only valid inside its block, in its thread."""

    def __init__(self, txn: lmdb.Transaction, handles: dict[str, lmdb._Database]) -> None:
        self._txn = txn
        self._handles = handles

    def get(self, table: Table[RowT], key: str) -> RowT | None:
        """The row, or None. A key that could never be put is simply not there."""
        raw = _raw_key(key)
        if raw is None:
            return None
        body = self._txn.get(raw, db=self._handles[table.name])
        return None if body is None else table.decode(bytes(body), raw)

    def rows(self, table: Table[RowT], *, reverse: bool = False) -> Iterator[tuple[str, RowT]]:
        """(key, row) in the order of the keys' UTF-8."""
        with self._txn.cursor(db=self._handles[table.name]) as cursor:
            step = cursor.iterprev if reverse else cursor.iternext
            for raw, body in step(keys=True, values=True):
                yield _text(raw), table.decode(bytes(body), bytes(raw))


class WriteTxn(ReadTxn):
    """A change in the making; sees its own puts. Finish `rows()` before the next `put`."""

    def __init__(
        self, store: Store, txn: lmdb.Transaction, handles: dict[str, lmdb._Database]
    ) -> None:
        super().__init__(txn, handles)
        self._store = store
        self._journal: list[tuple[str, bytes, bytes | None]] = []

    def put(self, table: Table[RowT], key: str, row: RowT) -> None:
        """Adds the row, or replaces it."""
        raw = _raw_key(key)
        self._change(table.name, key, None if raw is None else table.encode(row, raw))

    def delete(self, table: Table[RowT], key: str) -> None:
        """Removes the row if it is there."""
        self._change(table.name, key, None)

    def commit(self) -> None:
        """For Store only: makes it durable."""
        try:
            self._txn.commit()
        except lmdb.MapFullError:
            self._replay()
            self._txn.commit()

    def abort(self) -> None:
        """For Store only."""
        self._txn.abort()

    def _change(self, table: str, key: str, body: bytes | None) -> None:
        raw = _raw_key(key)
        if raw is None:
            raise ValueError(f"state table {table}: no key may be {key!r}")
        self._journal.append((table, raw, body))
        try:
            self._apply(table, raw, body)
        except lmdb.MapFullError:
            self._replay()

    def _apply(self, table: str, raw: bytes, body: bytes | None) -> None:
        database = self._handles[table]
        if body is None:
            self._txn.delete(raw, db=database)
        else:
            self._txn.put(raw, body, db=database)

    def _replay(self) -> None:
        while True:
            self._txn.abort()
            self._txn = self._store.begin_larger()
            try:
                for table, raw, body in self._journal:
                    self._apply(table, raw, body)
                return
            except lmdb.MapFullError:
                continue


class Store:
    """The environment in directory `path`, which is made if it is not there. Thread-safe.

    Refused while it is open already, here or in another process: neither would know of the other.
    """

    def __init__(
        self, path: str, tables: Sequence[Table[RowT]], *, map_bytes: int = FIRST_MAP_BYTES
    ) -> None:
        self._path = path
        self._writer = threading.Lock()
        self._gate = threading.Condition()
        self._readers = 0
        self._closed = False
        self._names = [table.name for table in tables]
        self._map_bytes = map_bytes
        with translated(f"state {path}"):
            os.makedirs(path, mode=0o700, exist_ok=True)
            self._occupied_fd = _occupied(path)
            try:
                self._open()
            except BaseException:
                self._let_others()
                raise

    def _open(self) -> None:
        _require_sound(os.path.join(self._path, _DATA_FILE))
        with lock_in_memory(self._path) as place:
            self._env = lmdb.open(
                place, map_size=self._map_bytes, max_dbs=len(self._names), max_readers=READERS
            )
        self._handles: dict[str, lmdb._Database] = {
            name: self._env.open_db(name.encode()) for name in self._names
        }

    @contextlib.contextmanager
    def read(self) -> Iterator[ReadTxn]:
        """A state to read. Keep it short: the map can't grow meanwhile."""
        self._enter()
        try:
            with translated(f"state {self._path}"), self._env.begin() as txn:
                yield ReadTxn(txn, self._handles)
        finally:
            self._leave()

    @contextlib.contextmanager
    def write(self) -> Iterator[WriteTxn]:
        """A change: all of it is durable when the block ends, or none of it. One at a time."""
        with self._writer, translated(f"state {self._path}"):
            if self._closed:
                raise PointUnreachable(f"state {self._path} is closed")
            change = WriteTxn(self, self._begin(), self._handles)
            try:
                yield change
                with InFlight(self._path):  # LMDB's writing; what comes before it computes
                    change.commit()
            except BaseException as error:
                change.abort()
                if isinstance(error, lmdb.Error):
                    with contextlib.suppress(lmdb.Error, OSError, Damaged):
                        self._begin().abort()
                raise

    def _begin(self) -> lmdb.Transaction:
        """A write transaction. After a head page that could not be written LMDB refuses all else,
        reads too, though the file is as it was: until it is opened anew. `_writer` is held."""
        try:
            return self._env.begin(write=True)
        except lmdb.Error:
            with self._gate:
                self._gate.wait_for(lambda: self._readers == 0)
                self._env.close()
                self._open()
                return self._env.begin(write=True)

    def begin_larger(self) -> lmdb.Transaction:
        """For WriteTxn only: doubles the map; the new write transaction. Waits for readers."""
        with self._gate:
            self._gate.wait_for(lambda: self._readers == 0)
            self._env.set_mapsize(self._env.info()["map_size"] * 2)
            return self._env.begin(write=True)

    def release_memory(self) -> None:
        """What was read of the file is this process's memory no more, unless somebody is reading;
        the kernel still has it."""
        with self._writer, self._gate, translated(f"state {self._path}"):
            if not self._readers and not self._closed:
                self._env.set_mapsize(self._env.info()["map_size"])  # which maps it anew

    def close(self) -> None:
        """Ends it, once nobody is inside; from then on every call is PointUnreachable."""
        with self._writer, self._gate:
            if self._closed_already():
                return
            self._gate.wait_for(lambda: self._readers == 0)
            self._env.close()
            put_seal(os.path.join(self._path, _DATA_FILE))
            self._let_others()

    def _let_others(self) -> None:
        if self._occupied_fd != NO_FD:
            os.close(self._occupied_fd)

    def _closed_already(self) -> bool:
        """Notes that it is closed now."""
        before, self._closed = self._closed, True
        return before

    def _enter(self) -> None:
        with self._gate:
            if self._closed:
                raise PointUnreachable(f"state {self._path} is closed")
            self._readers += 1

    def _leave(self) -> None:
        with self._gate:
            self._readers -= 1
            self._gate.notify_all()


def _occupied(path: str) -> int:
    try:
        return occupy(os.path.realpath(path))
    except BlockingIOError:
        raise Refused(f"state {path} is in use already") from None
    except OSError:
        return NO_FD  # where no directory can be locked, as on NFS


def _require_sound(path: str) -> None:
    """Damaged unless the file is as it was closed, or, after a kill, its pages hang together."""
    if not break_seal(path) and os.path.exists(path):
        try:
            require_sound_pages(path)
        except ViewDamaged as error:
            raise Damaged(str(error)) from error


def _text(raw: bytes | memoryview) -> str:
    try:
        return bytes(raw).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise Damaged(f"state: a key is not text: {error}") from error


def _raw_key(key: str) -> bytes | None:
    raw = key.encode("utf-8", "surrogatepass")
    return raw if 0 < len(raw) <= _MOST_KEY_BYTES else None
