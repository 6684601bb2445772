"""Keeping a domain's view in step with its log: folding what came, appending what is ours.

See storage.domain.domain for the order in an append, and why it is safe.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from storage.errors import (
    ChunkMissing,
    Damaged,
    FileDamaged,
    FileGone,
    PointUnreachable,
    Refused,
    StorageError,
    ViewDamaged,
)
from storage.format.record import Op, Record, encode_record, record_digest
from storage.log.fold import Garbage, fold
from storage.log.log import Log
from storage.log.rebuild import Host, make_view
from storage.log.seen import Seen
from storage.view import tables
from storage.view.lmdb_tables import LmdbTables
from storage.view.tables import Tables
from storage.view.tally import Delta, Noticing, Tally

if TYPE_CHECKING:
    from storage.domain.domain import Domain

RECORDS_PER_TRANSACTION = 64
APPEND_ATTEMPTS = 1000

log = logging.getLogger(__name__)


class _LostRace(Exception):
    """Another host's record took the number."""


class Appender:
    """See the module. Any thread may call anything; `lock` is held by who changes the view."""

    def __init__(self, domain: Domain, log: Log, seen: Seen, tally: Tally) -> None:
        self._domain = domain
        self._paths = domain.paths
        self._view = domain.view
        self._log = log
        self._seen = seen
        self._tally = tally
        self.lock = threading.RLock()
        domain.view.mend = self._mend

    def refresh(self) -> int:
        """See Domain.refresh."""
        with self.lock:
            self._mend()
            try:
                while self._domain.ballast.spend(self._fold_next):
                    pass
            except FileGone as error:
                log.info("view_made_anew", extra={"domain": self._paths.root, "reason": str(error)})
                self.rebuild()
            except (FileDamaged, Refused, ChunkMissing, ViewDamaged) as error:
                # A file is damaged, or was when this view or the record's author looked.
                log.warning(
                    "view_made_anew", extra={"domain": self._paths.root, "reason": str(error)}
                )
                self.rebuild()
            with self._view.read() as state:
                seq, digest = tables.applied(state)
            self._seen.note(seq, digest)
            return seq

    def refresh_to_end(self) -> None:
        """See Domain.refresh_to_end."""
        self.require_own_past()
        while not self._log.ends_before(self.refresh() + 1):
            pass

    def require_own_past(self) -> None:
        """See Domain.require_own_past."""
        self._require_record(*self._view.ask(tables.applied))
        self._require_seen()

    def require_no_gap(self) -> None:
        """See Domain.require_no_gap."""
        newest = self._log.newest_name()
        last = self.refresh()
        # That an NFS client finds none may be its memory, which a listing does not correct.
        while newest > last and self._log.read_surely(last + 1) is not None:
            last = self.refresh()
        if newest > last:
            raise Damaged(f"{self._paths.log}: record {last + 1} is missing, {newest} is there")

    def _require_seen(self) -> None:
        if self._seen.last is not None:
            self._require_record(*self._seen.last)

    def _require_record(self, seq: int, digest: bytes) -> None:
        """Damaged unless record `seq` is there and has this digest; 0 always is."""
        found = self._log.read_surely(seq) if seq else None
        if seq and (found is None or found[1] != digest):
            raise Damaged(
                f"{self._paths.log}: record {seq}, which this host has seen, is not there any "
                "more: the point was put back to an older state"
            )

    def _mend(self) -> None:
        """Makes the view anew when something in it was found damaged. Not from within a read."""
        with self.lock:
            if self._view.suspect:
                log.warning(
                    "view_made_anew",
                    extra={"domain": self._paths.root, "reason": self._view.suspect},
                )
                self.rebuild()

    def _fold_next(self) -> bool:
        """Folds up to a transaction's worth of records; False when the tail was reached."""
        delta = self._view.update(self._fold_some)
        self._tally.follow(delta)
        return delta.last - delta.before == RECORDS_PER_TRANSACTION

    def _fold_some(self, view: Tables) -> Delta:
        state = Noticing(view)
        first = tables.applied(state)[0] + 1
        own = (0, b"")
        for _ in range(RECORDS_PER_TRANSACTION):
            found = self._log.read(tables.applied(state)[0] + 1)
            if found is None:
                break
            fold(state, *found, self._domain.contents)
            if found[0].host == self._domain.host:
                own = (found[0].seq, found[1])
        last = tables.applied(state)[0]
        # Who linked them may have died before their names were durable; a view that outlives them
        # would look like a point that was put back.
        self._log.make_names_durable(first, last)
        if own[0]:  # ours, and not in our view: how its append ended is not known
            self._log.name_anew(*own)
        return state.delta()

    def append(
        self, build: Callable[[Tables], Sequence[Op]], *, spend_ballast: bool = True
    ) -> Garbage:
        """See Domain.append."""
        with self.lock:
            if spend_ballast:
                return self._domain.ballast.spend(lambda: self._append(build))
            return self._append(build)

    def _append(self, build: Callable[[Tables], Sequence[Op]]) -> Garbage:
        """`lock` is held."""
        mended = False
        for _ in range(APPEND_ATTEMPTS):
            self.refresh()
            try:
                garbage = self._append_next(build)
            except ViewDamaged:
                if mended:
                    raise
                mended = True  # the next refresh does it
                continue
            if garbage is not None:
                return garbage
        raise PointUnreachable(f"{self._paths.log}: {APPEND_ATTEMPTS} times another host was first")

    def _append_next(self, build: Callable[[Tables], Sequence[Op]]) -> Garbage | None:
        """One attempt at the next number; None when another record took it."""
        published: Record | None = None
        digest = b""
        garbage = Garbage()

        def change(view: LmdbTables) -> Delta:
            nonlocal published, digest, garbage
            state = Noticing(view)
            record = published or self._next_record(state, build(state))
            digest = record_digest(encode_record(record))
            garbage = fold(state, record, digest, self._domain.contents, strict=published is None)
            view.flush()
            if published is None:
                self._require_record(record.seq - 1, record.previous)
                if not self._log.publish(record):
                    raise _LostRace
                published = record
            return state.delta()

        try:
            self._tally.follow(self._view.update(change))
        except _LostRace:
            return None
        except StorageError:
            if published is None:
                raise
            # The record is in the log; only our view is behind.
            self._catch_up(published)
        if published is not None:
            self._seen.note(published.seq, digest)
        return garbage

    def _catch_up(self, published: Record) -> None:
        try:
            self.refresh()
        except StorageError as error:  # the next refresh tries it again
            fields = {"seq": published.seq, "path": self._view.path, "error": str(error)}
            log.warning("view_behind", extra=fields)

    def _next_record(self, state: Tables, ops: Sequence[Op]) -> Record:
        seq, previous = tables.applied(state)
        return Record(
            seq=seq + 1,
            previous=previous,
            nonce=secrets.token_bytes(16),
            host=self._domain.host,
            ops=tuple(ops),
        )

    def rebuild(self) -> None:
        """See Domain.rebuild."""
        with self.lock:
            self._require_seen()  # by a view of an older state, what comes next would be appended
            path, identity = self._view.path, self._view.identity
            us = Host(self._domain.host, self._seen.number)
            self._view.replace(make_view(self._domain.fs, self._paths, path, identity, us))
            self._tally.forget()
            self._domain.proof.forget()
            self._domain.trust.follow()
