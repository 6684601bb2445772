"""Heartbeats: so that somebody else may end the sessions of a host that has died.

Efficiency only. A host that is declared dead wrongly loses its sessions, not data: its next COMMIT
is refused, because the session has an outcome. No host's clock is read by another: an observer
notes when, by its own clock, a counter last moved.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Annotated

import msgspec

from storage import tables
from storage.errors import Damaged, SessionEnded, translated
from storage.framing import decode_object, encode_object
from storage.publish import close_discarded, discard, make_dirs

if TYPE_CHECKING:
    from storage.domain import Domain

MAGIC = b"VKHB"
LIMIT_BYTES = 4096
DEFAULT_PATIENCE_S = 600.0


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
        fd = fs.open_new(tmp)
        try:
            fs.pwrite(fd, [encode_object(MAGIC, _encoder.encode(heartbeat))], 0)
        except BaseException:
            close_discarded(fs, fd)
            discard(fs, tmp)
            raise
        fs.close(fd)
        fs.rename(tmp, os.path.join(paths.hosts, domain.host))


def read_beat(domain: Domain, host: str) -> Heartbeat | None:
    """Another host's heartbeat; None when it never beat, or what is there is none."""
    path = os.path.join(domain.paths.hosts, host)
    with translated(path):
        try:
            fd = domain.fs.open_read(path)
        except FileNotFoundError:
            return None
        try:
            found = domain.fs.pread(fd, LIMIT_BYTES, 0)
        finally:
            domain.fs.close(fd)
    try:
        return _decoder.decode(decode_object(MAGIC, found, LIMIT_BYTES, path))
    except (Damaged, msgspec.MsgspecError):
        return None


class Observer:
    """Watches other hosts' heartbeats. One thread at a time."""

    def __init__(self, patience_s: float = DEFAULT_PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._seen: dict[str, tuple[Heartbeat | None, float]] = {}

    def silent(self, host: str, heartbeat: Heartbeat | None, now_s: float) -> bool:
        """Whether the host's heartbeat has not moved for the whole patience. `now_s`: any clock
        of the observer's that never goes back."""
        known = self._seen.get(host)
        if known is None or known[0] != heartbeat:
            self._seen[host] = (heartbeat, now_s)
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
        beats = {host: read_beat(domain, host) for host in {host for _, host, _ in foreign}}
        silent = {host for host, found in beats.items() if self.silent(host, found, now_s)}
        ended = 0
        for session, host, incarnation in foreign:
            found = beats[host]
            restarted = found is not None and found.incarnation != incarnation
            if host in silent or restarted:
                ended += _end(domain, session)
        return ended


def _end(domain: Domain, session: str) -> bool:
    try:
        domain.abort(session)
    except SessionEnded:
        return False  # its owner, or another observer, was first
    return True
