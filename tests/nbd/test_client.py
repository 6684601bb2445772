"""engine.nbd.client with real servers: qemu-nbd and nbdkit."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from engine.errors import DiskServerLost, DiskServerRefused
from engine.nbd.client import NbdClient
from engine.nbd.connection import NbdAddress
from engine.nbd.exchange import Exchange, Request
from engine.nbd.protocol import BASE_ALLOCATION, STATE_DIRTY, STATE_ZERO, Extent
from tests.nbd.servers import nbdkit, qemu_nbd, require
from tests.qemu.images import qemu_io
from tests.rig import random_bytes

MIB = 1 << 20
WAIT_S = 30.0


def connect(address: NbdAddress, *contexts: str, export: str = "") -> NbdClient:
    return NbdClient.connect(address, export, contexts, timeout_s=WAIT_S)


def read(client: NbdClient, offset: int, size_bytes: int) -> bytes:
    found = bytearray(b"\xee" * size_bytes)
    client.read_into(memoryview(found), offset)
    return bytes(found)


def make_raw(path: Path) -> bytes:
    """16 MiB: data, a long hole, data, a hole."""
    with path.open("wb") as file:
        file.write(random_bytes(3 * MIB, 1))
        file.seek(9 * MIB)
        file.write(random_bytes(MIB + 12345, 2))
        file.truncate(16 * MIB)
    return path.read_bytes()


class TestReading:
    def test_all_of_a_raw_disk(self, tmp_path: Path) -> None:
        content = make_raw(tmp_path / "v")
        with qemu_nbd(tmp_path / "v", "-r") as server, connect(server.address) as client:
            assert (client.size_bytes, client.read_only) == (16 * MIB, True)
            assert read(client, 0, 16 * MIB) == content
            assert read(client, 9 * MIB + 777, 4321) == content[9 * MIB + 777 :][:4321]
            assert read(client, 16 * MIB, 0) == b""
            with pytest.raises(ValueError, match="of 16777216"):
                read(client, 16 * MIB - 1, 2)

    def test_over_tcp(self, tmp_path: Path) -> None:
        content = make_raw(tmp_path / "v")
        with qemu_nbd(tmp_path / "v", "-r") as unix:
            port = _free_port()
            relay = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "nbd"]
            require("nbdkit")
            process = subprocess.Popen([*relay, f"socket={unix.address.path}"])
            try:
                client = _patiently(NbdAddress(host="127.0.0.1", port=port))
                assert read(client, 0, 16 * MIB) == content
                client.close()
            finally:
                process.kill()
                process.wait()

    def test_an_export_that_is_not_there(self, tmp_path: Path) -> None:
        make_raw(tmp_path / "v")
        with (
            qemu_nbd(tmp_path / "v", "-r", "-x", "vda") as server,
            pytest.raises(DiskServerRefused, match="no such export"),
        ):
            connect(server.address, export="vdb")

    def test_many_threads_and_a_server_that_answers_out_of_order(self, tmp_path: Path) -> None:
        content = make_raw(tmp_path / "v")
        delayed = ["--filter=delay", "file", str(tmp_path / "v"), "delay-read=2ms"]
        with nbdkit(tmp_path, *delayed) as server, connect(server.address) as client:
            assert _read_by_many(client, content) == []

    @pytest.mark.parametrize(("mode", "connections"), [("emulate", 3), ("disable", 1)])
    def test_several_connections_where_all_see_the_same(
        self, tmp_path: Path, mode: str, connections: int
    ) -> None:
        content = make_raw(tmp_path / "v")
        filters = ["--filter=multi-conn", "--filter=delay", "file", str(tmp_path / "v")]
        options = [f"multi-conn-mode={mode}", "delay-read=1ms"]
        with nbdkit(tmp_path, *filters, *options) as server:
            client = NbdClient.connect(
                server.address, "", [BASE_ALLOCATION], timeout_s=WAIT_S, connections=3
            )
            with client:
                assert _connected_to(server.address) == connections
                assert _read_by_many(client, content) == []
                for _ in range(4):  # of the one connection that knows the context
                    assert sum(e.size_bytes for e in client.extents(BASE_ALLOCATION)) == 16 * MIB
            _await(lambda: _connected_to(server.address) == 0)

    def test_nobody_queues_behind_another_as_long_as_a_connection_is_idle(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_raw(tmp_path / "v")
        used: list[Exchange] = []
        run = Exchange.run

        def noted(self: Exchange, requests: Sequence[Request]) -> None:
            used.append(self)
            run(self, requests)

        monkeypatch.setattr(Exchange, "run", noted)
        slow = ["--filter=delay", "file", str(tmp_path / "v"), "delay-read=200ms"]
        with nbdkit(tmp_path, *slow) as server:
            client = NbdClient.connect(server.address, "", timeout_s=WAIT_S, connections=2)
            long = threading.Thread(target=_read_until_closed, args=(client, 16 * MIB))
            long.start()
            _await(lambda: len(used) == 1)
            for offset in range(3):
                read(client, offset * 4096, 4096)
            client.close()
            long.join()
        assert len(set(used)) == 2
        assert used[0] not in used[1:]

    def test_a_server_that_lets_fewer_in_than_was_said(self, tmp_path: Path) -> None:
        make_raw(tmp_path / "v")
        arguments = ["--filter=limit", "file", str(tmp_path / "v"), "limit=1"]
        with nbdkit(tmp_path, *arguments) as server:
            with pytest.raises(DiskServerLost):
                NbdClient.connect(server.address, "", timeout_s=WAIT_S, connections=2)
            _await(lambda: _connected_to(server.address) == 0)
            with connect(server.address) as client:
                assert len(read(client, 0, MIB)) == MIB

    def test_an_error_of_the_disk(self, tmp_path: Path) -> None:
        make_raw(tmp_path / "v")
        gate = tmp_path / "fails"
        wrong = ["--filter=error", "file", str(tmp_path / "v"), "error-pread=EIO"]
        always = ["error-pread-rate=100%", f"error-pread-file={gate}"]
        with nbdkit(tmp_path, *wrong, *always) as server, connect(server.address) as client:
            before = read(client, 0, MIB)
            gate.touch()
            with pytest.raises(DiskServerRefused, match=r"reading .* EIO"):
                read(client, 0, MIB)
            gate.unlink()
            assert read(client, 0, MIB) == before

    def test_a_server_that_is_killed(self, tmp_path: Path) -> None:
        slow = ["--filter=delay", "memory", "64M", "delay-read=20ms"]
        with nbdkit(tmp_path, *slow) as server, connect(server.address) as client:
            found: list[type[Exception]] = []

            def reader() -> None:
                try:
                    while True:
                        read(client, 0, 64 * MIB)
                except DiskServerLost as error:
                    found.append(type(error))

            threads = [threading.Thread(target=reader) for _ in range(3)]
            for thread in threads:
                thread.start()
            server.kill()
            for thread in threads:
                thread.join(WAIT_S)
            assert found == [DiskServerLost] * 3
            with pytest.raises(DiskServerLost):
                read(client, 0, 1)


class TestExtents:
    def test_allocation_is_what_the_file_has(self, tmp_path: Path) -> None:
        content = make_raw(tmp_path / "v")
        with (
            qemu_nbd(tmp_path / "v", "-r") as server,
            connect(server.address, BASE_ALLOCATION) as client,
        ):
            found = list(client.extents(BASE_ALLOCATION))
            _assert_whole(found, 16 * MIB)
            assert sum(one.size_bytes for one in found if one.flags & STATE_ZERO) > 10 * MIB
            for one in found:
                if one.flags & STATE_ZERO:
                    piece = content[one.offset : one.offset + one.size_bytes]
                    assert not any(piece)

    def test_a_tib_of_nothing(self, tmp_path: Path) -> None:
        with (
            nbdkit(tmp_path, "memory", "1T") as server,
            connect(server.address, BASE_ALLOCATION) as client,
        ):
            assert list(client.extents(BASE_ALLOCATION)) == [Extent(0, 1 << 40, 3)]

    def test_scattered_data(self, tmp_path: Path) -> None:
        scattered = ["sparse-random", "4G", "seed=1", "percent=2", "runlength=102400"]
        with (
            nbdkit(tmp_path, *scattered) as server,
            connect(server.address, BASE_ALLOCATION) as client,
        ):
            found = list(client.extents(BASE_ALLOCATION))
            _assert_whole(found, 4 << 30)
            assert len(found) > 100
            places = random.Random(1).sample([one for one in found if one.flags], 20)
            assert not any(any(read(client, one.offset, min(one[1], MIB))) for one in places)

    def test_a_dirty_bitmap(self, tmp_path: Path) -> None:
        image = tmp_path / "v.qcow2"
        require("qemu-img")
        subprocess.run(["qemu-img", "create", "-qf", "qcow2", image, "16M"], check=True)
        qemu_io(image, "write -P 1 0 4M")
        subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", image, "b0"], check=True)
        qemu_io(image, "write -P 2 1M 64k", "write -z 2M 64k")
        dirty = "qemu:dirty-bitmap:b0"
        with (
            qemu_nbd(image, "-r", "-B", "b0", form="qcow2") as server,
            connect(server.address, BASE_ALLOCATION, dirty, "qemu:dirty-bitmap:b1") as client,
        ):
            assert client.contexts == {BASE_ALLOCATION, dirty}
            changed = [one for one in client.extents(dirty) if one.flags & STATE_DIRTY]
            assert changed == [Extent(MIB, 65536, 1), Extent(2 * MIB, 65536, 1)]
            _assert_whole(list(client.extents(dirty)), 16 * MIB)
            with pytest.raises(ValueError, match="no context"):
                client.extents("qemu:dirty-bitmap:b1")


class TestWriting:
    def test_what_is_written_is_there(self, tmp_path: Path) -> None:
        path = tmp_path / "v"
        path.write_bytes(random_bytes(16 * MIB, 3))
        expected = bytearray(path.read_bytes())
        with qemu_nbd(path, "--discard=unmap") as server, connect(server.address) as client:
            new = random_bytes(5 * MIB + 77, 4)
            client.write(3 * MIB + 5, new)
            expected[3 * MIB + 5 : 8 * MIB + 82] = new
            client.flush()
            assert path.read_bytes() == expected
            assert read(client, 0, 16 * MIB) == expected

    def test_a_read_only_disk(self, tmp_path: Path) -> None:
        make_raw(tmp_path / "v")
        with (
            qemu_nbd(tmp_path / "v", "-r") as server,
            connect(server.address) as client,
            pytest.raises(DiskServerRefused, match="read-only"),
        ):
            client.write(0, b"abc")

    def test_a_server_that_can_not_make_it_durable(self, tmp_path: Path) -> None:
        poor = ["eval", "get_size=echo 1048576", "pread=cat", "pwrite=cat >/dev/null"]
        with (
            nbdkit(tmp_path, *poor) as server,
            connect(server.address) as client,
            pytest.raises(DiskServerRefused, match="can't flush"),
        ):
            client.flush()


def _read_by_many(client: NbdClient, content: bytes) -> list[int]:
    """The offsets at which six threads found something else than `content`."""
    wrong: list[int] = []

    def reader(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(12):
            offset = dice.randrange(len(content))
            size_bytes = dice.choice([1, 5000, 2 * MIB])
            piece = content[offset : offset + size_bytes]
            if read(client, offset, len(piece)) != piece:
                wrong.append(offset)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    return wrong


def _read_until_closed(client: NbdClient, size_bytes: int) -> None:
    with contextlib.suppress(DiskServerLost):
        read(client, 0, size_bytes)


def _connected_to(address: NbdAddress) -> int:
    """How many connections the server at a unix socket has accepted (proc(5): state 03)."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return sum(row[-1] == address.path and row[5] == "03" for row in rows)


def _await(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _assert_whole(extents: list[Extent], size_bytes: int) -> None:
    """Without gaps, and neighbours differ."""
    assert extents[0].offset == 0
    for one, following in itertools.pairwise(extents):
        assert one.offset + one.size_bytes == following.offset
        assert one.flags != following.flags
    assert extents[-1].offset + extents[-1].size_bytes == size_bytes


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _patiently(address: NbdAddress) -> NbdClient:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return connect(address)
        except DiskServerLost:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
