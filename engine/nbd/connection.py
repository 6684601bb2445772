"""One socket to an NBD server, on which nothing takes longer than it may.

The socket blocks; the kernel ends a wait after `timeout_s` (SO_RCVTIMEO, SO_SNDTIMEO). That costs
one system call where Python's own time limit costs two, and MSG_WAITALL fills a whole buffer with
one call, without the GIL. A server that dribbles is caught by a deadline for each whole message.

One thread receives and one sends at a time; `abort` may be called by any thread at any time.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import DiskServerLost
from engine.nbd.protocol import DEFAULT_PORT
from storage.files.fs import Buffer


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """A unix socket (`path`), or, if that is "", TCP."""

    path: str = ""
    host: str = ""
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


class Connection:
    """A connected socket. Every fault of it is a DiskServerLost."""

    def __init__(self, address: NbdAddress, timeout_s: float) -> None:
        """Connects. DiskServerLost when nobody answers there within `timeout_s`."""
        self._timeout_s = timeout_s
        try:
            self._socket = _connected(address, timeout_s)
        except (OSError, ValueError) as error:
            raise DiskServerLost(f"no connection: {error}") from error

    def send(self, *pieces: Buffer) -> None:
        """Sends all of the pieces, one after the other."""
        rest = [memoryview(piece) for piece in pieces]
        deadline = time.monotonic() + self._timeout_s
        while rest:
            try:
                sent = self._socket.sendmsg(rest)
            except BlockingIOError:
                raise DiskServerLost(f"it took nothing for {self._timeout_s:g} s") from None
            except OSError as error:
                raise DiskServerLost(f"the connection failed: {error}") from error
            rest = _after(rest, sent)
            if rest and time.monotonic() > deadline:
                raise DiskServerLost(f"it took no whole message in {self._timeout_s:g} s")

    def receive_into(self, view: memoryview) -> None:
        """Fills `view`."""
        have, deadline = 0, 0.0
        while have < len(view):
            try:
                count = self._socket.recv_into(view[have:], 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise DiskServerLost(f"it sent nothing for {self._timeout_s:g} s") from None
            except OSError as error:
                raise DiskServerLost(f"the connection failed: {error}") from error
            if count == 0:
                raise DiskServerLost("it closed the connection")
            have += count
            if have < len(view):
                now = time.monotonic()
                deadline = deadline or now + self._timeout_s
                if now > deadline:
                    raise DiskServerLost(f"it sent no whole message in {self._timeout_s:g} s")

    def receive(self, size_bytes: int) -> bytes:
        """The next `size_bytes` bytes; the caller has bounded them."""
        found = bytearray(size_bytes)
        self.receive_into(memoryview(found))
        return bytes(found)

    def abort(self) -> None:
        """Wakes whoever waits for the server; nothing can be sent or received any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _connected(address: NbdAddress, timeout_s: float) -> socket.socket:
    if not address.path:
        made = socket.create_connection((address.host, address.port), timeout_s)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if address.path:
            made.settimeout(timeout_s)
            made.connect(address.path)
        made.settimeout(None)
        wait = struct.pack("ll", int(timeout_s), max(1, int(timeout_s % 1 * 1e6)))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
    except BaseException:
        made.close()
        raise
    return made


def _after(pieces: Sequence[memoryview], sent: int) -> list[memoryview]:
    """What is left of `pieces` behind their first `sent` bytes."""
    rest = []
    for piece in pieces:
        skipped = min(sent, len(piece))
        sent -= skipped
        if skipped < len(piece):
            rest.append(piece[skipped:])
    return rest
