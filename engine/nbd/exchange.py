"""Many threads, one connection: requests go out, replies come back in whatever order.

`run` takes a caller's requests and returns when all of them are answered. There is no thread of our
own: of the callers that wait, one *leads*: it receives replies, anybody's, straight into the
buffers of their requests, and sends what is queued as there is place for it. When its own requests
are answered it hands the lead to another caller. So data is never handed from thread to thread, and
the server always has several requests, which keeps it and its disks busy.

`_lock` guards all but the socket's receiving side and the requests that were sent; those are the
leader's. It is held while sending: MOST_IN_FLIGHT request headers fit any socket's buffer, so only
a write's payload can block there, and that needs nothing of us but the server's reading it.

A fault of the connection, or a message that no server may send, ends the exchange for everybody:
the place in the stream is lost with it. An error that the server reports ends its request only.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import DiskServerBroken, DiskServerLost, DiskServerRefused, EngineError
from engine.nbd import protocol
from engine.nbd.connection import Connection
from engine.nbd.protocol import ChunkHead, Extent
from storage.files.fs import Buffer

# QEMU works on 16 requests of a connection at a time. More bytes under way were slower, as the
# server's buffers fall out of the processor's caches (bench/nbd.py).
MOST_IN_FLIGHT = 16
MOST_BYTES_IN_FLIGHT = 1 << 20
# A request may be answered in pieces; none of ours is larger than 512 × this.
_MOST_CHUNKS = 1 << 14


@dataclass(slots=True, eq=False)
class Request:
    """One command. `buffer` is for what is read, `payload` for what is written."""

    command: int
    offset: int = 0
    size_bytes: int = 0
    buffer: memoryview | None = None
    payload: Buffer = b""
    extents: dict[int, list[Extent]] = field(default_factory=dict)  # by context id
    refusal: str = ""
    chunks: int = 0
    _covered: list[tuple[int, int]] = field(default_factory=list)  # [from, to), ascending

    @property
    def moved_bytes(self) -> int:
        """How much data it moves over the connection, in either direction."""
        return len(self.buffer) if self.buffer is not None else len(self.payload)

    def claim(self, offset: int, size_bytes: int) -> memoryview:
        """The part of the buffer for this piece of the export; no piece comes twice."""
        start = offset - self.offset
        end = start + size_bytes
        if self.buffer is None or size_bytes <= 0 or start < 0 or end > self.size_bytes:
            raise DiskServerBroken(f"{size_bytes} bytes at {offset} that were not asked for")
        at = bisect(self._covered, (start, end))
        before = self._covered[at - 1][1] if at else 0
        after = self._covered[at][0] if at < len(self._covered) else end
        if before > start or after < end:
            raise DiskServerBroken(f"{size_bytes} bytes at {offset} twice")
        self._covered.insert(at, (start, end))
        return self.buffer[start:end]

    @property
    def complete(self) -> bool:
        """Whether what was asked for is there (or the refusal is)."""
        if self.refusal:
            return True
        if self.buffer is not None:
            return sum(end - start for start, end in self._covered) == self.size_bytes
        return self.command != protocol.CMD_BLOCK_STATUS or bool(self.extents)


class _Batch:
    """The requests of one `run`; `wake` tells its thread that all are answered, or to lead."""

    def __init__(self, requests: Sequence[Request], lock: threading.Lock) -> None:
        self.requests = requests
        self.left = len(requests)
        self.wake = threading.Condition(lock)


class Exchange:
    """Thread-safe. Owns the connection, which is in the transmission phase."""

    def __init__(self, connection: Connection, structured: bool) -> None:
        self._connection = connection
        self._structured = structured
        self._lock = threading.Lock()
        self._queue: deque[tuple[_Batch, Request]] = deque()
        self._in_flight: dict[int, tuple[_Batch, Request]] = {}
        self._bytes_in_flight = 0
        self._waiting: list[_Batch] = []
        self._cookie = 0
        self._led = False
        self._failure: EngineError | None = None

    @property
    def under_way(self) -> int:
        """How many requests are sent or queued. Any thread may ask; it may have changed since."""
        return len(self._queue) + len(self._in_flight)

    def run(self, requests: Sequence[Request]) -> None:
        """Sends them, and returns when all are answered: their buffers are filled.

        DiskServerRefused when the server answered one with an error. DiskServerLost and
        DiskServerBroken are final: every later call raises the like. However it ends, nobody
        touches the buffers any more.
        """
        batch = _Batch(requests, self._lock)
        with self._lock:
            self._queue.extend((batch, request) for request in requests)
            self._send_queued()
            while batch.left:
                if self._led:
                    self._waiting.append(batch)
                    batch.wake.wait()
                    self._waiting.remove(batch)
                elif self._failure is not None:
                    raise type(self._failure)(str(self._failure)) from self._failure
                else:
                    self._lead(batch)
        for request in requests:
            if request.refusal:
                raise DiskServerRefused(request.refusal)

    def close(self) -> None:
        """Says good-bye if nothing is under way. Whoever waits gets DiskServerLost."""
        with self._lock:
            if self._led:
                self._connection.abort()  # which its receiver notices, and ends
                return
            if self._failure is None:
                self._failure = DiskServerLost("closed by us")
                with contextlib.suppress(DiskServerLost):
                    self._connection.send(protocol.encode_request(protocol.CMD_DISC, 0, 0, 0))
            self._connection.close()

    def _fail(self, error: EngineError) -> None:
        """Nothing more goes over this connection. The lock is held."""
        self._failure = self._failure or error
        self._queue.clear()
        self._connection.abort()

    def _send_queued(self) -> None:
        """As many as there are places for. The lock is held."""
        while self._failure is None and self._has_place():
            batch, request = self._queue.popleft()
            self._bytes_in_flight += request.moved_bytes
            self._cookie += 1
            self._in_flight[self._cookie] = batch, request
            head = protocol.encode_request(
                request.command, self._cookie, request.offset, request.size_bytes
            )
            try:
                self._connection.send(head, *([request.payload] if request.payload else []))
            except DiskServerLost as error:
                self._fail(error)

    def _has_place(self) -> bool:
        """Whether the next request in the queue, if there is one, may be sent now."""
        if not self._queue or not self._in_flight:
            return bool(self._queue)
        bytes_then = self._bytes_in_flight + self._queue[0][1].moved_bytes
        return len(self._in_flight) < MOST_IN_FLIGHT and bytes_then <= MOST_BYTES_IN_FLIGHT

    def _lead(self, batch: _Batch) -> None:
        """Receives for everybody until `batch` is answered, then lets another one lead."""
        self._led = True
        try:
            while batch.left and self._failure is None:
                self._receive_unlocked()
                self._send_queued()
        except EngineError as error:
            self._fail(error)
        except BaseException as error:
            self._fail(DiskServerLost(f"interrupted by {type(error).__name__}"))
            raise
        finally:
            self._led = False
            if self._failure is not None:
                self._connection.close()
            heirs = [other for other in self._waiting if other.left]
            for heir in heirs[:1] if self._failure is None else heirs:
                heir.wake.notify()

    def _receive_unlocked(self) -> None:
        """One message; the lock is let go while it comes in."""
        self._lock.release()
        try:
            answered = self._receive()
        finally:
            self._lock.acquire()
        if answered is not None:
            batch, request = self._in_flight.pop(answered)
            self._bytes_in_flight -= request.moved_bytes
            batch.left -= 1
            if not batch.left:
                batch.wake.notify()

    def _receive(self) -> int | None:
        """Takes in one message; the cookie of the request that it completed."""
        head = self._connection.receive(protocol.REPLY_HEAD.size)
        magic, second, cookie = protocol.REPLY_HEAD.unpack(head)
        if cookie not in self._in_flight:
            raise DiskServerBroken(f"a reply to a request {cookie:#x} that was not made")
        _, request = self._in_flight[cookie]
        if magic == protocol.SIMPLE_REPLY_MAGIC:
            self._take_simple(request, second)
            return int(cookie)
        if magic != protocol.STRUCTURED_REPLY_MAGIC or not self._structured:
            raise DiskServerBroken(f"a reply with the magic {magic:#x}")
        chunk = protocol.chunk_head(second, cookie)
        self._take_chunk(request, chunk)
        if not chunk.flags & protocol.CHUNK_DONE:
            return None
        if not request.complete:
            raise DiskServerBroken(f"an end of the answer for {request.offset} before all was sent")
        return int(cookie)

    def _take_simple(self, request: Request, error: int) -> None:
        if self._structured and request.command in (
            protocol.CMD_READ,
            protocol.CMD_BLOCK_STATUS,
        ):
            raise DiskServerBroken("a simple reply where a structured one was agreed on")
        if error:
            request.refusal = _refused(request, protocol.error_name(error))
        elif request.buffer is not None:
            self._connection.receive_into(request.claim(request.offset, request.size_bytes))

    def _take_chunk(self, request: Request, chunk: ChunkHead) -> None:
        (size_bytes,) = protocol.CHUNK_LENGTH.unpack(
            self._connection.receive(protocol.CHUNK_LENGTH.size)
        )
        request.chunks += 1
        if request.chunks > _MOST_CHUNKS:
            raise DiskServerBroken(f"over {_MOST_CHUNKS} pieces of one answer")
        if chunk.kind == protocol.CHUNK_OFFSET_DATA:
            self._take_data(request, size_bytes)
        elif chunk.kind == protocol.CHUNK_OFFSET_HOLE:
            body = self._receive_body(size_bytes, protocol.HOLE.size, protocol.HOLE.size)
            view = request.claim(*protocol.HOLE.unpack(body))
            view[:] = bytes(len(view))
        elif chunk.kind == protocol.CHUNK_BLOCK_STATUS:
            self._take_status(request, size_bytes)
        elif chunk.kind & protocol.CHUNK_ERROR:
            body = self._receive_body(size_bytes, 0, protocol.MOST_ERROR_BYTES)
            request.refusal = _refused(request, protocol.decode_error(chunk.kind, body))
        elif chunk.kind != protocol.CHUNK_NONE or size_bytes:
            raise DiskServerBroken(f"a chunk of kind {chunk.kind} and {size_bytes} bytes")

    def _take_data(self, request: Request, size_bytes: int) -> None:
        if not 0 < size_bytes - protocol.OFFSET.size <= request.size_bytes:
            raise DiskServerBroken(f"a data chunk of {size_bytes} bytes")
        (offset,) = protocol.OFFSET.unpack(self._connection.receive(protocol.OFFSET.size))
        view = request.claim(offset, size_bytes - protocol.OFFSET.size)
        self._connection.receive_into(view)

    def _take_status(self, request: Request, size_bytes: int) -> None:
        body = self._receive_body(size_bytes, 0, protocol.MOST_STATUS_BYTES)
        context, extents = protocol.decode_status(body, request.offset)
        if request.command != protocol.CMD_BLOCK_STATUS or context in request.extents:
            raise DiskServerBroken(f"a block status of context {context} that was not asked for")
        request.extents[context] = extents

    def _receive_body(self, size_bytes: int, least: int, most: int) -> bytes:
        if not least <= size_bytes <= most:
            raise DiskServerBroken(f"a chunk of {size_bytes} bytes, not {least} to {most}")
        return self._connection.receive(size_bytes)


_VERBS = {
    protocol.CMD_READ: "reading",
    protocol.CMD_WRITE: "writing",
    protocol.CMD_FLUSH: "flushing",
    protocol.CMD_BLOCK_STATUS: "the status of",
}


def _refused(request: Request, error: str) -> str:
    verb = _VERBS.get(request.command, "?")
    return f"{verb} {request.size_bytes} bytes at {request.offset}: {error}"
