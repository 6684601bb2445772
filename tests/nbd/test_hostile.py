"""A server that lies, dies or sleeps: a named error, soon, and never wrong bytes."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import DiskServerBroken, DiskServerLost, DiskServerRefused, EngineError
from engine.nbd import protocol
from engine.nbd.client import NbdClient
from engine.nbd.connection import NbdAddress
from tests.nbd import fake
from tests.nbd.fake import (
    DONE,
    Answer,
    Asked,
    answering,
    chunk,
    data,
    done,
    error,
    fake_server,
    handshake,
    hole,
    option_reply,
    simple,
    status,
)

SIZE = 1 << 20
BLOCK = 4096
QUICK_S = 0.2
LONG_S = 60.0
GO_ACK = option_reply(7, 1)
FACTS = fake.export_facts(SIZE)


def connect(address: NbdAddress, timeout_s: float = LONG_S) -> NbdClient:
    return NbdClient.connect(address, "disk", ["base:allocation"], timeout_s=timeout_s)


def read(client: NbdClient, offset: int = 0, size_bytes: int = BLOCK) -> bytes:
    found = bytearray(b"\xee" * size_bytes)
    assert client.read_into(memoryview(found), offset) == size_bytes
    return bytes(found)


class TestHandshake:
    @pytest.mark.parametrize(
        ("parts", "expected"),
        [
            ({"greeting": b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n"}, DiskServerBroken),
            ({"greeting": struct.pack(">QQH", 0x4E42444D41474943, 0x420281861253, 3)}, None),
            ({"greeting": fake.GREETING[:16] + b"\0\0"}, DiskServerBroken),
            ({"structured": option_reply(7, 1)}, DiskServerBroken),
            ({"structured": b"\0" * 20}, DiskServerBroken),
            ({"contexts": fake.context(1, b"qemu:dirty-bitmap:other")}, DiskServerBroken),
            ({"contexts": fake.context(1, b"base:allocation") * 2}, DiskServerBroken),
            ({"contexts": option_reply(10, 4, b"\0")}, DiskServerBroken),
            ({"contexts": option_reply(10, 99)}, DiskServerBroken),
            ({"contexts": option_reply(10, 1 << 31 | 3, b"no")}, DiskServerRefused),
            ({"go": option_reply(7, 1 << 31 | 6, b"no such")}, DiskServerRefused),
            ({"go": option_reply(7, 1 << 31 | 5)}, DiskServerRefused),
            ({"go": option_reply(7, 1 << 31 | 1)}, DiskServerRefused),
            ({"go": GO_ACK}, DiskServerBroken),
            ({"go": option_reply(7, 3, b"\0") + GO_ACK}, DiskServerBroken),
            ({"go": option_reply(7, 3, b"\0" * 11) + GO_ACK}, DiskServerBroken),
            ({"go": fake.export_facts(1 << 63) + GO_ACK}, DiskServerBroken),
            ({"go": FACTS + fake.block_sizes(0, 1 << 20) + GO_ACK}, DiskServerBroken),
            ({"go": FACTS + fake.block_sizes(3, 1 << 20) + GO_ACK}, DiskServerBroken),
            ({"go": FACTS + fake.block_sizes(1 << 17, 1 << 20) + GO_ACK}, DiskServerBroken),
            ({"go": FACTS + fake.block_sizes(1, 1) + GO_ACK}, DiskServerBroken),
            ({"go": FACTS + option_reply(7, 3, b"\0\x03") + GO_ACK}, DiskServerBroken),
            (
                {"go": fake.export_facts(SIZE + 1) + fake.block_sizes(512, SIZE) + GO_ACK},
                DiskServerBroken,
            ),
            ({"go": FACTS * 300 + GO_ACK}, DiskServerBroken),
            ({"go": struct.pack(">QIII", 0x3E889045565A9, 7, 3, 1 << 31)}, DiskServerBroken),
        ],
    )
    def test_what_is_wrong_is_named(
        self, tmp_path: Path, parts: dict[str, bytes], expected: type[EngineError] | None
    ) -> None:
        with (
            fake_server(tmp_path, handshake(**parts)) as address,
            pytest.raises(expected or DiskServerBroken, match=r"fake\.sock 'disk': "),
        ):
            connect(address)

    def test_silence_ends(self, tmp_path: Path) -> None:
        with (
            fake_server(tmp_path, lambda connection: (connection.recv(1), None)[1]) as address,
            pytest.raises(DiskServerLost, match=r"sent nothing for 0\.2 s"),
        ):
            connect(address, QUICK_S)

    def test_a_server_that_dribbles_ends(self, tmp_path: Path) -> None:
        def dribble(connection: socket.socket) -> None:
            for byte in fake.GREETING * 100:
                connection.sendall(bytes([byte]))
                time.sleep(QUICK_S / 4)

        began = time.monotonic()
        with fake_server(tmp_path, dribble) as address, pytest.raises(DiskServerLost):
            connect(address, QUICK_S)
        assert time.monotonic() - began < LONG_S / 2

    def test_hanging_up_is_named(self, tmp_path: Path) -> None:
        with (
            fake_server(tmp_path, lambda _: None) as address,
            pytest.raises(DiskServerLost, match="closed the connection"),
        ):
            connect(address)

    def test_nobody_is_there(self, tmp_path: Path) -> None:
        with pytest.raises(DiskServerLost, match="no connection"):
            connect(NbdAddress(str(tmp_path / "none")))
        with pytest.raises(DiskServerLost, match="no connection"):
            connect(NbdAddress("/" + "x" * 200))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            with pytest.raises(DiskServerLost, match="no connection"):
                connect(NbdAddress(host="127.0.0.1", port=taken.getsockname()[1]))


def in_halves(request: Asked, second_offset: int) -> bytes:
    half = b"h" * (request.size_bytes // 2)
    return data(request, request.offset, half) + data(request, second_offset, half)


def header(request: Asked, kind: int, size_bytes: int) -> bytes:
    return struct.pack(">IHHQI", fake.STRUCTURED, DONE, kind, request.cookie, size_bytes)


LIES: dict[str, Answer] = {
    "wrong magic": lambda _: b"\xff" * 64,
    "unknown cookie": lambda it: data(it._replace(cookie=it.cookie + 1), 0, b"x" * BLOCK, DONE),
    "simple reply": lambda it: simple(it, 0, b"x" * BLOCK),
    "no data": done,
    "half the data": lambda it: data(it, 0, b"x" * (BLOCK // 2), DONE),
    "empty data": lambda it: data(it, 0, b"", DONE),
    "no offset": lambda it: chunk(it, 1, b"1234567", DONE),
    "more data": lambda it: data(it, 0, b"x" * (BLOCK + 1), DONE),
    "endless data": lambda it: header(it, 1, 0xFFFFFFFF),
    "before": lambda it: data(it, it.offset - 1, b"x", DONE),
    "behind": lambda it: data(it, it.offset + BLOCK, b"x", DONE),
    "far away": lambda it: data(it, (1 << 64) - 1, b"x" * BLOCK, DONE),
    "twice the same": lambda it: in_halves(it, it.offset) + done(it),
    "overlap": lambda it: in_halves(it, it.offset + BLOCK // 2 - 1) + done(it),
    "overlap before": lambda it: data(it, it.offset + 9, b"x") + data(it, it.offset, b"y" * 10),
    "hole too long": lambda it: hole(it, it.offset, BLOCK + 1, DONE),
    "hole of nothing": lambda it: hole(it, it.offset, 0, DONE),
    "huge hole": lambda it: hole(it, it.offset, 0xFFFFFFFF, DONE),
    "hole over data": lambda it: data(it, it.offset, b"x" * BLOCK) + hole(it, it.offset, 1),
    "hole of no size": lambda it: chunk(it, 2, b"12345678", DONE),
    "status": lambda it: status(it, (BLOCK, 0)),
    "none with a body": lambda it: chunk(it, 0, b"?", DONE),
    "unknown kind": lambda it: chunk(it, 77, b"", DONE),
    "short error": lambda it: chunk(it, 1 << 15 | 1, b"\0\0", DONE),
    "error longer than itself": lambda it: chunk(it, 1 << 15 | 1, b"\0\0\0\x05\xff\xff", DONE),
    "error without offset": lambda it: chunk(it, 1 << 15 | 2, b"\0\0\0\x05\0\0", DONE),
    "endless error": lambda it: header(it, 1 << 15 | 1, 0xFFFFFFFF),
    "endless pieces": lambda it: error(it, flags=0) * 20_000,
    "endless status": lambda it: header(it, 5, 0xFFFFFFFF),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_a_read_is_found_out(tmp_path: Path, lie: str) -> None:
    with fake_server(tmp_path, answering(LIES[lie])) as address, connect(address) as client:
        with pytest.raises(DiskServerBroken, match=r"fake\.sock"):
            read(client, BLOCK)
        with pytest.raises(DiskServerBroken):  # it is not believed again
            read(client, BLOCK)


STATUS_LIES: dict[str, Answer] = {
    "nothing": done,
    "another context": lambda it: status(it, (SIZE, 0), number=8),
    "no extents": status,
    "an extent of nothing": lambda it: status(it, (0, 0)),
    "half an extent": lambda it: chunk(it, 5, b"\0\0\0\x07" + b"\0" * 12, DONE),
    "twice": lambda it: status(it, (512, 0), flags=0) + status(it, (512, 0)),
    "byte by byte": lambda it: status(it, (1, 0)),
    "data": lambda it: data(it, it.offset, b"x" * 8, DONE),
    "a simple reply": simple,
}


@pytest.mark.parametrize("lie", STATUS_LIES)
def test_a_lie_in_a_status_is_found_out(tmp_path: Path, lie: str) -> None:
    with (
        fake_server(tmp_path, answering(STATUS_LIES[lie])) as address,
        connect(address) as client,
        pytest.raises(DiskServerBroken),
    ):
        list(client.extents("base:allocation"))


class TestGoodServersThatAreUnusual:
    def test_pieces_in_any_order(self, tmp_path: Path) -> None:
        def scattered(it: Asked) -> bytes:
            at = it.offset
            return (
                data(it, at + 3000, b"c" * (it.size_bytes - 3000))
                + hole(it, at + 1000, 2000)
                + data(it, at, b"a" * 1000)
                + done(it)
            )

        with fake_server(tmp_path, answering(scattered)) as address, connect(address) as client:
            assert read(client) == b"a" * 1000 + bytes(2000) + b"c" * 1096

    def test_an_error_ends_its_own_request_only(self, tmp_path: Path) -> None:
        def second_fails(it: Asked) -> bytes:
            if it.offset:
                return error(it, b"bad sector")
            return data(it, 0, b"x" * it.size_bytes, DONE)

        with fake_server(tmp_path, answering(second_fails)) as address, connect(address) as client:
            with pytest.raises(DiskServerRefused, match=r"reading 4096 bytes at 8192: EIO .*bad"):
                read(client, 8192)
            assert read(client) == b"x" * BLOCK

    def test_without_structured_replies(self, tmp_path: Path) -> None:
        def plain(it: Asked) -> bytes:
            return simple(it, fake.EIO) if it.offset else simple(it, 0, b"p" * it.size_bytes)

        unsupported = option_reply(8, 1 << 31 | 1)
        script = answering(plain, structured=unsupported)
        with fake_server(tmp_path, script) as address, connect(address) as client:
            assert client.contexts == frozenset()
            assert read(client) == b"p" * BLOCK
            with pytest.raises(DiskServerRefused, match="EIO"):
                read(client, BLOCK)
            with pytest.raises(ValueError, match="no context"):
                client.extents("base:allocation")

    def test_a_structured_reply_that_was_not_agreed_on(self, tmp_path: Path) -> None:
        script = answering(
            lambda it: data(it, it.offset, b"x" * it.size_bytes, DONE),
            structured=option_reply(8, 1 << 31 | 1),
        )
        with (
            fake_server(tmp_path, script) as address,
            connect(address) as client,
            pytest.raises(DiskServerBroken, match="magic"),
        ):
            read(client)

    def test_a_status_that_ends_early_and_one_that_overruns(self, tmp_path: Path) -> None:
        def short_then_long(it: Asked) -> bytes:
            return status(it, (4096, 0), (4096, 3)) if it.offset < 65536 else status(it, (SIZE, 3))

        script = answering(short_then_long)
        with fake_server(tmp_path, script) as address, connect(address) as client:
            found = list(client.extents("base:allocation"))
            assert [one.size_bytes for one in found] == [4096] * 15 + [4096 + SIZE - 65536]
            assert [one.offset for one in found] == [4096 * number for number in range(16)]
            clipped = list(client.extents("base:allocation", 4096 * 20, 8192))
            assert clipped == [protocol.Extent(4096 * 20, 8192, 3)]

    def test_requests_are_as_small_as_the_server_wants(self, tmp_path: Path) -> None:
        sizes = set()

        def note(it: Asked) -> bytes:
            sizes.add(it.size_bytes)
            return data(it, it.offset, b"x" * it.size_bytes, DONE)

        go = FACTS + fake.block_sizes(512, 65536) + GO_ACK
        with fake_server(tmp_path, answering(note, go=go)) as address, connect(address) as client:
            assert read(client, 0, 3 * 65536 + 512) == b"x" * (3 * 65536 + 512)
            assert sizes == {65536, 512}
            with pytest.raises(ValueError, match="blocks of 512"):
                read(client, 1)


class TestManyThreads:
    def fail_together(
        self, tmp_path: Path, answer: Answer, end: Callable[[NbdClient], None], timeout_s: float
    ) -> list[EngineError]:
        """What six readers get; `end` is called when the first request has come in."""
        came, found = threading.Event(), []

        def noting(it: Asked) -> bytes:
            came.set()
            return answer(it)

        with fake_server(tmp_path, answering(noting)) as address:
            client = connect(address, timeout_s)

            def reader() -> None:
                try:
                    while True:
                        read(client, 0, SIZE)
                except EngineError as raised:
                    found.append(raised)

            threads = [threading.Thread(target=reader) for _ in range(6)]
            for thread in threads:
                thread.start()
            assert came.wait(LONG_S)
            end(client)
            for thread in threads:
                thread.join(LONG_S)
                assert not thread.is_alive(), "a reader hangs"
            client.close()
        return found

    def test_all_are_told_when_the_server_dies(self, tmp_path: Path) -> None:
        left = iter(range(40))

        def dies(it: Asked) -> bytes:
            if next(left, None) is None:
                raise EOFError
            return data(it, it.offset, b"x" * it.size_bytes, DONE)

        found = self.fail_together(tmp_path, dies, lambda _: None, LONG_S)
        assert [type(one) for one in found] == [DiskServerLost] * 6

    def test_all_are_told_when_the_server_sleeps(self, tmp_path: Path) -> None:
        found = self.fail_together(tmp_path, lambda _: b"", lambda _: None, QUICK_S)
        assert [type(one) for one in found] == [DiskServerLost] * 6

    def test_all_are_told_when_we_close(self, tmp_path: Path) -> None:
        found = self.fail_together(tmp_path, lambda _: b"", NbdClient.close, LONG_S)
        assert [type(one) for one in found] == [DiskServerLost] * 6

    def test_all_are_told_of_a_lie(self, tmp_path: Path) -> None:
        found = self.fail_together(tmp_path, LIES["wrong magic"], lambda _: None, LONG_S)
        assert [type(one) for one in found] == [DiskServerBroken] * 6
