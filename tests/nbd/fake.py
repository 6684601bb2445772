"""An NBD server that does what a test tells it to, right or wrong, on a unix socket."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from engine.nbd.connection import NbdAddress

GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)
STRUCTURED = 0x668E33EF
SIMPLE = 0x67446698
DONE = 1
EIO = 5


class Asked(NamedTuple):
    """A request as it came in."""

    command: int
    cookie: int
    offset: int
    size_bytes: int


Script = Callable[[socket.socket], None]
Answer = Callable[[Asked], bytes]


@contextlib.contextmanager
def fake_server(directory: Path, script: Script) -> Iterator[NbdAddress]:
    """Runs `script` with each connection until that ends; then the connection is closed."""
    path = str(directory / "fake.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError, EOFError):
                script(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield NbdAddress(path)
    finally:
        over.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(path)
        thread.join()
        listener.close()


def receive(connection: socket.socket, size_bytes: int) -> bytes:
    found = b""
    while len(found) < size_bytes:
        piece = connection.recv(size_bytes - len(found))
        if not piece:
            raise EOFError
        found += piece
    return found


def option_reply(option: int, kind: int, body: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(body)) + body


def export_facts(size_bytes: int) -> bytes:
    return option_reply(7, 3, struct.pack(">HQH", 0, size_bytes, 1))


def block_sizes(least: int, most: int) -> bytes:
    return option_reply(7, 3, struct.pack(">HIII", 3, least, 4096, most))


def context(number: int, name: bytes) -> bytes:
    return option_reply(10, 4, struct.pack(">I", number) + name)


class Options(NamedTuple):
    """What the handshake says; each is all that is sent, the last reply included."""

    structured: bytes = option_reply(8, 1)
    contexts: bytes = context(7, b"base:allocation") + option_reply(10, 1)
    go: bytes = export_facts(1 << 20) + option_reply(7, 1)
    greeting: bytes = GREETING


def shake_hands(connection: socket.socket, options: Options) -> None:
    """Up to the answer of GO."""
    connection.sendall(options.greeting)
    receive(connection, 4)
    by_option = {8: options.structured, 10: options.contexts, 7: options.go}
    option = 0
    while option != 7:
        _, option, size_bytes = struct.unpack(">QII", receive(connection, 16))
        receive(connection, size_bytes)
        connection.sendall(by_option[option])


def handshake(**parts: bytes) -> Script:
    """Shakes hands, then waits for the client to go."""

    def script(connection: socket.socket) -> None:
        shake_hands(connection, Options(**parts))
        connection.recv(1)

    return script


def answering(answer: Answer, **parts: bytes) -> Script:
    """Shakes hands, then sends `answer(request)` for each request."""

    def script(connection: socket.socket) -> None:
        shake_hands(connection, Options(**parts))
        for _ in itertools.count():
            connection.sendall(answer(asked(connection)))

    return script


def asked(connection: socket.socket) -> Asked:
    """The next request. EOFError at a good-bye."""
    _, _, command, cookie, offset, size_bytes = struct.unpack(">IHHQQI", receive(connection, 28))
    if command == 2:
        raise EOFError
    if command == 1:
        receive(connection, size_bytes)
    return Asked(command, cookie, offset, size_bytes)


def chunk(request: Asked, kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    head = struct.pack(">IHHQI", STRUCTURED, flags, kind, request.cookie, len(body))
    return head + body


def done(request: Asked) -> bytes:
    return chunk(request, 0, flags=DONE)


def data(request: Asked, offset: int, content: bytes, flags: int = 0) -> bytes:
    return chunk(request, 1, struct.pack(">Q", offset) + content, flags)


def hole(request: Asked, offset: int, size_bytes: int, flags: int = 0) -> bytes:
    return chunk(request, 2, struct.pack(">QI", offset, size_bytes), flags)


def status(request: Asked, *extents: tuple[int, int], number: int = 7, flags: int = DONE) -> bytes:
    body = struct.pack(">I", number) + b"".join(struct.pack(">II", *one) for one in extents)
    return chunk(request, 5, body, flags)


def error(request: Asked, text: bytes = b"", flags: int = DONE) -> bytes:
    return chunk(request, 1 << 15 | 1, struct.pack(">IH", EIO, len(text)) + text, flags)


def simple(request: Asked, number: int = 0, content: bytes = b"") -> bytes:
    return struct.pack(">IIQ", SIMPLE, number, request.cookie) + content
