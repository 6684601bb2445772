"""Heartbeats: so that somebody else may end the sessions of a host that has died.

Efficiency only. A host that is declared dead wrongly loses its sessions, not data: its next COMMIT
is refused, because the session has an outcome. No host's clock is read by another: an observer
notes when, by its own clock, a counter last moved.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import msgspec

from storage.errors import Damaged, PointNewerFormat, SessionEnded, translated
from storage.files.bad_places import open_to_read, read_at
from storage.files.fs import Fs
from storage.files.publish import discard, make_dirs, write_new
from storage.format.framing import decode_body, decode_object, encode_object
from storage.view import tables

if TYPE_CHECKING:
    from storage.domain.domain import Domain

MAGIC = b"VKHB"
LIMIT_BYTES = 4096
DEFAULT_PATIENCE_S = 600.0

log = logging.getLogger(__name__)


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """A file in hosts/, named by the host. `counter` moves while the incarnation lives."""

    incarnation: Annotated[str, msgspec.Meta(max_length=64)]
    counter: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Heartbeat)


def beat(domain: Domain, counter: int) -> None:
    """Replaces this host's heartbeat. The one file on a point that changes under its name."""
    fs, paths = domain.fs, domain.paths
    heartbeat = Heartbeat(incarnation=domain.incarnation, counter=counter)
    tmp = os.path.join(paths.host_tmp(domain.host), f"beat-{secrets.token_hex(8)}")
    with translated(paths.hosts):
        make_dirs(fs, os.path.dirname(tmp), paths.root)
        fd = write_new(fs, tmp, encode_object(MAGIC, _encoder.encode(heartbeat)))
        try:
            fs.close(fd)
            fs.rename(tmp, os.path.join(paths.hosts, domain.host))
        except BaseException:
            discard(fs, tmp)
            raise


def read_beat(domain: Domain, host: str) -> Heartbeat | None:
    """Another host's heartbeat; None when it never beat, or what is there is none. Raises
    PointNewerFormat."""
    if host in ("", ".", "..") or "/" in host or "\0" in host:
        return None  # a record may say so; no host has such an id
    path = os.path.join(domain.paths.hosts, host)
    with translated(path):
        try:
            if domain.fs.stat(path).kind != "file":
                return None
            return load_beat(domain.fs, path)
        except (FileNotFoundError, Damaged):
            return None


def read_beats(domain: Domain, hosts: Iterable[str]) -> dict[str, Heartbeat | None]:
    """`read_beat` of each; without hosts whose heartbeat has a newer format. Whether such a host
    lives, those tell that can read it: here it would look silent for ever."""
    found = {}
    for host in hosts:
        try:
            found[host] = read_beat(domain, host)
        except PointNewerFormat as error:
            log.debug("heartbeat_unread", extra={"host": host, "error": str(error)})
    return found


def load_beat(fs: Fs, path: str) -> Heartbeat:
    """The heartbeat in a file. Raises Damaged or PointNewerFormat when there is none in it,
    FileNotFoundError when it is gone, and other OSErrors."""
    fd = open_to_read(fs, path)
    try:
        found = read_at(fs, fd, LIMIT_BYTES, 0, path)
    finally:
        fs.close(fd)
    return decode_body(_decoder, decode_object(MAGIC, found, LIMIT_BYTES, path), path)


class Observer:
    """Watches other hosts' heartbeats. One thread at a time."""

    def __init__(self, patience_s: float = DEFAULT_PATIENCE_S) -> None:
        self._patience_s = patience_s
        # By incarnation: the counter last seen, None for no heartbeat of it, and when it changed.
        self._seen: dict[str, tuple[int | None, float]] = {}

    def silent(self, incarnation: str, heartbeat: Heartbeat | None, now_s: float) -> bool:
        """Whether no heartbeat of the incarnation has moved for the whole patience. `now_s`: any
        clock of the observer's that never goes back. `heartbeat`: its host's.

        A host that has just restarted opens sessions before others see it beat anew: so another
        incarnation's heartbeat says no more than none does.
        """
        ours = heartbeat is not None and heartbeat.incarnation == incarnation
        counter = heartbeat.counter if heartbeat is not None and ours else None
        known = self._seen.get(incarnation)
        if known is None or known[0] != counter:
            self._seen[incarnation] = (counter, now_s)
            return False
        return now_s - known[1] >= self._patience_s

    def end_dead_sessions(self, domain: Domain, now_s: float) -> int:
        """Aborts the sessions of hosts that are silent; returns how many. Raises StorageErrors."""
        domain.refresh()
        with domain.view.read() as state:
            foreign = [
                (session, row.host, row.incarnation)
                for session, row in tables.sessions.scan(state)
                if row.host != domain.host
            ]
        beats = read_beats(domain, {host for _, host, _ in foreign})
        owners = {(host, incarnation) for _, host, incarnation in foreign if host in beats}
        silent = {owner for owner in owners if self.silent(owner[1], beats[owner[0]], now_s)}
        self._seen = {one: self._seen[one] for _, one in owners}
        return sum(
            _end(domain, session)
            for session, host, incarnation in foreign
            if (host, incarnation) in silent
        )


def _end(domain: Domain, session: str) -> bool:
    try:
        domain.abort(session)
    except SessionEnded:
        return False  # its owner, or another observer, was first
    return True
