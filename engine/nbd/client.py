"""An NBD server's export as the engine uses it: read, write, ask what is allocated or dirty.

A client is one connection or, where the server says that all of them see the same, several, of
which a call takes the one with the least to do: a server works on each with another thread, and so
do we (bench/nbd.py). Any thread may call anything; who reads while others write over the same
client depends on the server for not waiting for itself, so the engine does one or the other.
Requests are cut to REQUEST_BYTES, of which several are under way (exchange.py). Errors name the
server and the export.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType

from engine.errors import DiskServerBroken, DiskServerLost, DiskServerRefused
from engine.nbd import protocol
from engine.nbd.connection import Connection, NbdAddress
from engine.nbd.exchange import Exchange, Request
from engine.nbd.handshake import negotiate
from engine.nbd.protocol import ExportFacts, Extent
from storage.files.fs import Buffer
from storage.files.in_flight import InFlight

# Less is more system calls, more falls out of the processor's caches (bench/nbd.py).
REQUEST_BYTES = 512 << 10
# One question about a disk's state: lengths are 32 bits.
_STATUS_BYTES = (1 << 32) - (64 << 10)
# Less than this, and not the end, is not an answer but a way to keep us busy.
_LEAST_ANSWER_BYTES = 512


class NbdClient:
    """An export that is open. A context manager; its end closes the connections."""

    def __init__(
        self, exchanges: Sequence[Exchange], facts: ExportFacts, name: str, place: str
    ) -> None:
        """`facts` are what the first exchange was told; its contexts are the first's alone."""
        self._exchanges = exchanges
        self._facts = facts
        self._name = name
        self._place = place

    @classmethod
    def connect(
        cls,
        address: NbdAddress,
        export: str,
        contexts: Sequence[str] = (),
        *,
        timeout_s: float,
        connections: int = 1,
        place: str = "",
    ) -> NbdClient:
        """Opens `export`, and those of `contexts` that the server has (see `contexts`).

        `timeout_s` bounds the connecting, and then every single wait for the server. More than one
        of `connections` only to a server that lets as many in: another one may leave us waiting.
        `place`: the path of the file that is served, if it is known, for storage.files.in_flight.
        Raises DiskServerLost, DiskServerRefused (no such export, it wants TLS), DiskServerBroken.
        """
        name = f"{address} {export!r}" if export else str(address)
        with _naming(name), contextlib.ExitStack() as undo:
            first, facts = _open(address, export, contexts, timeout_s)
            undo.callback(first.close)
            opened = [first]
            if facts.flags & protocol.FLAG_CAN_MULTI_CONN:
                for _ in range(connections - 1):
                    more, same = _open(address, export, (), timeout_s)
                    undo.callback(more.close)
                    opened.append(more)
                    if same.size_bytes != facts.size_bytes:
                        raise DiskServerBroken(f"of {facts.size_bytes} and {same.size_bytes} bytes")
            undo.pop_all()
        return cls(opened, facts, name, place)

    @property
    def size_bytes(self) -> int:
        return self._facts.size_bytes

    @property
    def contexts(self) -> frozenset[str]:
        """Those of the contexts asked for that the server has."""
        return frozenset(self._facts.contexts)

    @property
    def read_only(self) -> bool:
        return bool(self._facts.flags & protocol.FLAG_READ_ONLY)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills `buffer` from `offset`; returns its length. All of it is inside the export.

        Raises DiskServerLost, DiskServerRefused, DiskServerBroken; then the content is undefined.
        """
        self._require_inside(offset, len(buffer))
        self._run(
            [
                Request(protocol.CMD_READ, at, size, buffer[at - offset : at - offset + size])
                for at, size in self._pieces(offset, len(buffer))
            ]
        )
        return len(buffer)

    def extents(self, context: str, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """What `context` says about a range, ascending, without gaps; neighbours differ.

        ValueError if the server does not have that context. Raises as read_into, while iterating.
        """
        if context not in self._facts.contexts:
            raise ValueError(f"{self._name} has no context {context!r}")
        end = self.size_bytes if length is None else offset + length
        self._require_inside(offset, end - offset)
        return _joined(self._answers(self._facts.contexts[context], offset, end))

    def write(self, offset: int, buffer: Buffer) -> None:
        """Writes `buffer`; durable after the next `flush`. Raises as read_into."""
        view = memoryview(buffer).cast("B")
        if self.read_only:
            raise DiskServerRefused(f"{self._name} is read-only")
        self._require_inside(offset, len(view))
        self._run(
            [
                Request(
                    protocol.CMD_WRITE, at, size, payload=view[at - offset : at - offset + size]
                )
                for at, size in self._pieces(offset, len(view))
            ]
        )

    def flush(self) -> None:
        """What was written before is durable on return. Raises as read_into."""
        if not self._facts.flags & protocol.FLAG_SEND_FLUSH:
            raise DiskServerRefused(f"{self._name} can't flush")
        self._run([Request(protocol.CMD_FLUSH)])

    def close(self) -> None:
        """Ends the connections; a call that is under way fails with DiskServerLost."""
        for exchange in self._exchanges:
            exchange.close()

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, requests: Sequence[Request]) -> None:
        exchange = min(self._exchanges, key=lambda each: each.under_way)
        with _naming(self._name), InFlight(self._place):
            exchange.run(requests)

    def _answers(self, number: int, offset: int, end: int) -> Iterator[Extent]:
        """The extents from `offset` to `end` as they come: an answer may stop early, or overrun."""
        while offset < end:
            request = Request(protocol.CMD_BLOCK_STATUS, offset, min(_STATUS_BYTES, end - offset))
            with _naming(self._name), InFlight(self._place):
                self._exchanges[0].run([request])
            asked_to = offset + request.size_bytes
            for extent in request.extents.get(number, ()):
                if offset >= end:
                    break
                clipped = min(extent.size_bytes, end - offset)
                yield Extent(offset, clipped, extent.flags)
                offset += clipped
            if offset < min(asked_to, request.offset + _LEAST_ANSWER_BYTES):
                raise DiskServerBroken(
                    f"{self._name}: the status of {offset - request.offset} bytes only"
                )

    def _pieces(self, offset: int, size_bytes: int) -> Iterator[tuple[int, int]]:
        """(offset, size) of the requests that a range is cut into."""
        most = min(REQUEST_BYTES, self._facts.max_block_bytes)
        for at in range(offset, offset + size_bytes, most):
            yield at, min(most, offset + size_bytes - at)

    def _require_inside(self, offset: int, size_bytes: int) -> None:
        block = self._facts.min_block_bytes
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.size_bytes:
            raise ValueError(f"{size_bytes} bytes at {offset} of {self.size_bytes}")
        if offset % block or size_bytes % block:
            raise ValueError(f"{size_bytes} bytes at {offset}: {self._name} has blocks of {block}")


def _open(
    address: NbdAddress, export: str, contexts: Sequence[str], timeout_s: float
) -> tuple[Exchange, ExportFacts]:
    connection = Connection(address, timeout_s)
    try:
        facts = negotiate(connection, export, contexts)
    except BaseException:
        connection.close()
        raise
    return Exchange(connection, facts.structured), facts


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts `name` before what a DiskServer… error says."""
    try:
        yield
    except (DiskServerLost, DiskServerRefused, DiskServerBroken) as error:
        raise type(error)(f"{name}: {error}") from error


def _joined(extents: Iterator[Extent]) -> Iterator[Extent]:
    """Neighbours of the same flags made one."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and last.flags == extent.flags:
            last = Extent(last.offset, last.size_bytes + extent.size_bytes, last.flags)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last
