"""What this host has last seen of a domain's log, kept off the point.

So that a point that was put back to an older state of itself is noticed, also when the view that
lies on the point went back with it. A file in the host's data directory, overwritten in place and
flushed only when a domain is opened or closed: it survives the process, and after a power failure
it may be behind, which makes it notice less and never refuse what is sound.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import Annotated, NamedTuple

import msgspec

from storage.errors import Damaged, translated
from storage.format.framing import decode_object, encode_object
from storage.format.record import Digest32

MAGIC = b"VKSE"
LIMIT_BYTES = 4096

log = logging.getLogger(__name__)


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    seq: Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]
    digest: Digest32


class SeenRecord(NamedTuple):
    """A record's number and digest."""

    seq: int
    digest: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Body)


class Seen:
    """Thread-safe. With the path "" nothing is kept."""

    def __init__(self, path: str) -> None:
        """Reads what the file has. StorageError when it can't be read or made."""
        self._path = path
        self._lock = threading.Lock()
        self._last: SeenRecord | None = None
        if path:
            with translated(path):
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                self._last = _read(path)

    @property
    def last(self) -> SeenRecord | None:
        return self._last

    @property
    def number(self) -> int:
        """Of the last one; 0 for none."""
        return self._last.seq if self._last else 0

    def note(self, seq: int, digest: bytes) -> None:
        """Remembers a record that is durable on the point, if it is later than the last one."""
        with self._lock:
            if not seq or (self._last is not None and seq <= self._last.seq):
                return
            self._last = SeenRecord(seq, digest)
            if self._path:
                try:
                    _write(self._path, self._last)
                except OSError as error:
                    # It only watches: the record itself stands.
                    log.warning("seen_not_written", extra={"path": self._path, "error": str(error)})

    def make_durable(self) -> None:
        """What was noted survives a power failure, too. Failing to see to that is no error."""
        if self._path and self._last is not None:
            with self._lock, contextlib.suppress(OSError):
                _write(self._path, self._last, durable=True)


def _read(path: str) -> SeenRecord | None:
    try:
        with open(path, "rb") as file:
            found = file.read(LIMIT_BYTES)
    except FileNotFoundError:
        return None
    try:
        body = _decoder.decode(decode_object(MAGIC, found, LIMIT_BYTES, path))
    except (Damaged, msgspec.MsgspecError) as error:
        log.warning("seen_unreadable", extra={"path": path, "error": str(error)})
        return None
    return SeenRecord(body.seq, body.digest)


def _write(path: str, record: SeenRecord, *, durable: bool = False) -> None:
    """In place: the number only grows, so the new bytes cover the old ones."""
    body = _encoder.encode(_Body(seq=record.seq, digest=record.digest))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.pwrite(fd, encode_object(MAGIC, body), 0)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
