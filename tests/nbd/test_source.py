"""engine.nbd.source: a disk behind qemu-nbd, backed up as any other."""

from __future__ import annotations

import subprocess
from pathlib import Path

from engine.nbd.source import NbdSource
from engine.snapshot.sources import DiskSource
from tests.nbd import fake
from tests.nbd.fake import DONE, Asked, answering, data, fake_server, option_reply, simple, status
from tests.nbd.servers import qemu_nbd, require
from tests.nbd.test_client import WAIT_S, make_raw
from tests.qemu.images import qemu_io

MIB = 1 << 20


def read(source: DiskSource, offset: int, size_bytes: int) -> bytes:
    found = bytearray(size_bytes)
    source.read_into(memoryview(found), offset)
    return bytes(found)


def test_a_raw_disk(tmp_path: Path) -> None:
    content = make_raw(tmp_path / "v")
    with qemu_nbd(tmp_path / "v", "-r") as server:
        source: DiskSource = NbdSource.open(server.address, timeout_s=WAIT_S)
        assert (source.capacity, source.found_by) == (16 * MIB, "scan")
        assert source.changed_ranges() is None
        ranges = list(source.data_ranges())
        rest = bytearray(content)
        for offset, length in ranges:
            assert read(source, offset, length) == content[offset : offset + length]
            rest[offset : offset + length] = bytes(length)
        assert not any(rest), "data outside of the ranges"
        assert sum(length for _, length in ranges) < 5 * MIB
        source.close()


def test_changes_by_a_bitmap(tmp_path: Path) -> None:
    require("qemu-img")
    image = tmp_path / "v.qcow2"
    subprocess.run(["qemu-img", "create", "-qf", "qcow2", image, "16M"], check=True)
    qemu_io(image, "write -P 1 0 4M")
    subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", image, "b0"], check=True)
    qemu_io(image, "write -P 2 1M 64k", "write -z -u 2M 64k")
    with qemu_nbd(image, "-r", "-B", "b0", form="qcow2") as server:
        source = NbdSource.open(server.address, bitmap="b0", timeout_s=WAIT_S)
        assert source.found_by == "bitmap"
        for _ in range(2):  # asked for, then remembered
            changed = source.changed_ranges()
            assert changed is not None
            assert list(changed) == [(MIB, 65536), (2 * MIB, 65536)]
            assert list(source.data_ranges()) == [(0, 2 * MIB), (2 * MIB + 65536, 2 * MIB - 65536)]
        source.close()
        lacking = NbdSource.open(server.address, bitmap="b1", timeout_s=WAIT_S)
        assert (lacking.found_by, lacking.changed_ranges()) == ("scan", None)
        lacking.close()


def test_a_server_that_tells_nothing_is_read_in_full(tmp_path: Path) -> None:
    script = answering(
        lambda it: simple(it, 0, b"p" * it.size_bytes), structured=option_reply(8, 1 << 31 | 1)
    )
    with fake_server(tmp_path, script) as address:
        source = NbdSource.open(address, bitmap="b0", timeout_s=WAIT_S)
        assert list(source.data_ranges()) == [(0, MIB)]
        assert source.changed_ranges() is None
        source.close()


def test_what_is_not_sure_to_be_zero_is_data(tmp_path: Path) -> None:
    """A hole may read as anything, unless it is said to be zero."""
    flags = [0, 1, 2, 3, 4]

    def answer(it: Asked) -> bytes:
        if it.command == 7:
            return status(it, *((65536, one) for one in flags), (MIB, 3))
        return data(it, it.offset, b"x" * it.size_bytes, DONE)

    with fake_server(tmp_path, answering(answer)) as address:
        source = NbdSource.open(address, timeout_s=WAIT_S)
        assert list(source.data_ranges()) == [(0, 65536), (65536, 65536), (4 * 65536, 65536)]
        source.close()


def test_an_empty_disk(tmp_path: Path) -> None:
    go = fake.export_facts(0) + option_reply(7, 1)
    with fake_server(tmp_path, answering(lambda _: b"", go=go)) as address:
        source = NbdSource.open(address, timeout_s=WAIT_S)
        assert (source.capacity, list(source.data_ranges())) == (0, [])
        source.close()
