"""The view: the folded state of one domain in one LMDB environment.

A view is proved before anything in it is used: by its seal (storage.lmdb_env.clean_close) when it
was closed, else by a walk over its pages (storage.lmdb_env.pages) and all of its rows
(storage.view.lmdb_tables). What is found damaged later raises ViewDamaged and is remembered as
`suspect`: the domain makes it anew.

`update(change)` runs `change(tables)` in a write transaction and commits it when it returns;
`read()` gives the tables as they are after the last commit. The map grows by itself. One process
opens a view at a time (its directory carries the host's id); threads may share it: writers take
turns in LMDB, readers never wait. Values are copied out, so nothing outlives its transaction.

A scratch view is one in the making, that nobody has use for before it is whole: its transactions
don't wait for the medium, and it is flushed once, when it is sealed. Until then nothing may take it
for a view: it lies beside its final name, and without a seal.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import lmdb

from storage.errors import Damaged, PointUnreachable, ViewDamaged, translated
from storage.files.fs import NO_FD
from storage.files.in_flight import InFlight
from storage.lmdb_env.clean_close import break_seal, put_seal
from storage.lmdb_env.lock_file import READERS, lock_in_memory, occupy
from storage.lmdb_env.pages import require_sound_pages
from storage.view.lmdb_tables import SUMS, Db, LmdbTables
from storage.view.tables import TABLE_NAMES

FIRST_MAP_BYTES = 1 << 30
_DATA_FILE = "data.mdb"
_LAYOUT = b"vmkeep view 3"
_DATABASES = (*TABLE_NAMES, SUMS)

ResultT = TypeVar("ResultT")


@dataclass(slots=True, eq=False)
class _Opened:
    env: lmdb.Environment
    databases: dict[str, Db]
    proved: bool  # the file is what it was when it was closed, or is new
    directory_fd: int
    readers: int = 0

    def close(self) -> None:
        """Once more is no error."""
        self.env.close()
        fd, self.directory_fd = self.directory_fd, NO_FD
        if fd != NO_FD:
            os.close(fd)


def _open(path: str, *, scratch: bool = False) -> _Opened:
    directory_fd = occupy(path)
    try:
        return _opened(path, directory_fd, scratch)
    except BaseException:
        os.close(directory_fd)
        raise


def _opened(path: str, directory_fd: int, scratch: bool) -> _Opened:
    size = FIRST_MAP_BYTES
    data_file = os.path.join(path, _DATA_FILE)
    proved = break_seal(data_file)
    if os.path.exists(data_file):
        size = max(size, 2 * os.path.getsize(data_file))
        if not proved:
            require_sound_pages(data_file)
    else:
        proved = True
    with InFlight(path), lock_in_memory(path) as place:
        env = lmdb.open(
            place,
            map_size=size,
            max_dbs=len(_DATABASES),
            max_readers=READERS,
            mode=0o600,
            sync=not scratch,
        )
        databases = {name: env.open_db(name.encode()) for name in _DATABASES}
    return _Opened(env, databases, proved, directory_fd)


class View:
    """An open LMDB view. `identity` names point and domain; another one's view is refused."""

    def __init__(self, path: str, identity: bytes, *, scratch: bool = False) -> None:
        """Opens or makes it. Damaged when it can't be used and must be made anew.

        A view that was not closed is read as a whole for that. `scratch`: a new one, of which
        nothing is durable before close(seal=True).
        """
        self.path = path
        self._scratch = scratch
        self.identity = identity
        self.suspect = ""  # what was found damaged; "" for nothing
        self.mend: Callable[[], None] | None = None  # how to; None: it stays as it is
        self._stamp = _LAYOUT + b" " + identity
        self._replaced: list[_Opened] = []
        self._gate = threading.Condition()
        self._reading = threading.local()
        self._readers = 0
        self._growing = False
        self._writing = threading.Lock()
        self._panicked = False  # LMDB refuses all, until it is opened anew
        self._closed = False
        with translated(f"view {path}", ViewDamaged):
            os.makedirs(path, mode=0o700, exist_ok=True)
            self._current = _open(path, scratch=scratch)
        try:
            self._check_stamp()
            if not self._current.proved:
                self.prove()
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
        self._require_open()
        old = self.path + ".old"
        destroy(old)
        with translated(f"view {self.path}"):
            with contextlib.suppress(FileNotFoundError):  # a view may be deleted at any time
                os.rename(self.path, old)
            os.rename(other, self.path)
            opened = _open(self.path)
        with self._gate:
            self._replaced.append(self._current)
            self._current = opened
            self._panicked = False
            self._close_unread()
        self.suspect = ""
        destroy(old)

    @contextlib.contextmanager
    def read(self) -> Iterator[LmdbTables]:
        """The state after the last commit. Keep it short; never across a wait."""
        with self._watched():
            if self._panicked and not getattr(self._reading, "depth", 0):
                with self._writing:
                    self._revive()
            with self._entered() as current, current.env.begin() as txn:
                yield LmdbTables(txn, current.databases)

    def ask(self, question: Callable[[LmdbTables], ResultT]) -> ResultT:
        """`question` of the state after the last commit; asked once more, of the view made anew,
        when this one turns out to be damaged. Not from within a transaction that it may wait for.
        """
        try:
            with self.read() as tables:
                return question(tables)
        except ViewDamaged:
            depth: int = getattr(self._reading, "depth", 0)
            mend = self.mend
            if mend is None or depth:
                raise
        mend()
        with self.read() as tables:
            return question(tables)

    def prove(self) -> None:
        """Reads all of it. ViewDamaged unless every row is there, as it was written."""
        with self.read() as tables:
            tables.prove()

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Errors are translated, and what tells of damage is remembered."""
        try:
            with translated(f"view {self.path}", ViewDamaged):
                yield
        except ViewDamaged as error:
            self.suspect = str(error)
            raise

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
            opened.close()

    def update(self, change: Callable[[LmdbTables], ResultT]) -> ResultT:
        """Runs `change` in a write transaction, durable on return; none of it when it raises.
        (Of a scratch view nothing is durable yet.)

        `change` is run again, on the old state, when the map was too small for it.
        """
        with self._watched(), self._writing:
            while True:
                self._revive()
                try:
                    return self._changed(change)
                except lmdb.MapFullError:
                    self.grow()
                except lmdb.Error:
                    self._panicked = self._is_panicked()
                    raise

    def _changed(self, change: Callable[[LmdbTables], ResultT]) -> ResultT:
        txn = self._current.env.begin(write=True)
        try:
            tables = LmdbTables(txn, self._current.databases)
            result = change(tables)
            tables.flush()
            with InFlight(self.path):  # LMDB's writing; what comes before it computes
                txn.commit()
        except BaseException:
            txn.abort()
            raise
        return result

    def grow(self) -> None:
        """Doubles the map, when nobody is reading. Not from within a transaction."""
        with self._unread(), translated(f"view {self.path}"):
            env = self._current.env
            env.set_mapsize(2 * env.info()["map_size"])

    def release_memory(self) -> None:
        """What was read of the file is this process's memory no more, unless somebody is reading;
        the kernel still has it. Not while an update is under way."""
        with self._gate, translated(f"view {self.path}"):
            if not self._readers and not self._growing:
                env = self._current.env
                env.set_mapsize(env.info()["map_size"])  # which maps it anew

    def _is_panicked(self) -> bool:
        try:
            self._current.env.begin().abort()
        except lmdb.Error:
            return True
        return False

    def _revive(self) -> None:
        """After a head page that could not be written LMDB refuses all else, reads too, though the
        file is as it was: until it is opened anew. `_writing` is held."""
        if self._panicked:
            with self._unread():
                self._require_open()
                self._current.close()
                self._current = _open(self.path, scratch=self._scratch)
                self._panicked = False

    def _require_open(self) -> None:
        """Nobody would close what a call that comes late had opened again."""
        if self._closed:
            raise PointUnreachable(f"view {self.path} is closed")

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
        with translated(f"view {self.path}"):
            return os.path.getsize(os.path.join(self.path, _DATA_FILE))

    def copy_to(self, path: str) -> str:
        """A compact copy of the last committed state in directory `path`; returns the file.

        The copy is not flushed to the medium: who keeps it does that.
        """
        with translated(f"view {self.path}"), InFlight(path):
            self._current.env.copy(path, compact=True)
        return os.path.join(path, _DATA_FILE)

    def close(self, *, seal: bool = False) -> None:
        """Once nobody is reading: LMDB would end the process. No update may be under way, and every
        later call is a StorageError. With a seal the next opening need not read all of it to prove
        it. A scratch view is flushed before it gets one; StorageError when that fails.
        """
        with self._unread():
            try:
                if seal and self._scratch:
                    with translated(f"view {self.path}"):
                        self._current.env.sync(True)
            finally:
                self._closed = True
                for opened in (*self._replaced, self._current):
                    opened.close()
        if seal and not self.suspect:
            put_seal(os.path.join(self.path, _DATA_FILE))
        self.suspect = ""  # who comes late has nothing to mend


def adopt_copy(source: str, path: str) -> None:
    """Lets the LMDB file `source`, which the caller has proved, be the data of a new view directory
    `path`."""
    data_file = os.path.join(path, _DATA_FILE)
    with translated(f"view {path}"):
        os.makedirs(path, mode=0o700, exist_ok=True)
        os.replace(source, data_file)
    put_seal(data_file)


def destroy(path: str) -> None:
    """Deletes a view that nobody has open. Nothing is lost: it can be made anew."""
    with translated(f"view {path}"), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
