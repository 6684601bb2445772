from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from storage.errors import Damaged, PointNewerFormat, Refused
from storage.files.fs import OsFs
from storage.format.sealed import Footer, Header, Seal, SealedWriter, read_sealed_footer
from tests.failing_fs import FailingFs, open_below
from tests.forging import CHUNK_SIZE, SESSION, Sealed, digest16

EXTRA = bytes(range(200, 232))
HEADER = Header(b"VKXX", SESSION, 7, CHUNK_SIZE, EXTRA)
ROWS = [b"row 1...", b"row 2..."]
FORGED = Sealed(b"VKXX", EXTRA, b"item one and item two", ROWS, 8)


def read(path: Path) -> Footer:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_sealed_footer(OsFs(), fd, path.stat().st_size, b"VKXX", 8, "it")
    finally:
        os.close(fd)


def written(path: Path, fs: OsFs | None = None) -> Seal:
    writer = SealedWriter(fs or OsFs(), f"{path}.tmp", HEADER, 8)
    assert writer.append([b"item ", b"one"]) == 64
    writer.add_row(ROWS[0])
    assert writer.append([b" and item two"]) == 72
    writer.add_row(ROWS[1])
    assert (writer.size_bytes, writer.count) == (85, 2)
    return writer.seal(str(path))


def test_the_layout_is_the_specified_one(tmp_path: Path) -> None:
    seal = written(tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    assert content == FORGED.encoded()
    signed = content[-48:-32]
    digest = digest16(content[:64] + b"".join(ROWS) + signed)
    assert seal == Seal(2, len(content), digest)
    assert os.listdir(tmp_path) == ["x"]


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    seal = written(tmp_path / "x")
    table = read(tmp_path / "x")
    assert (table.header, table.rows, table.seal) == (HEADER, b"".join(ROWS), seal)
    assert table.items_end == 85


@pytest.mark.parametrize("count", [4089, 4090, 4091, 10_000])
def test_a_table_longer_than_the_first_read(tmp_path: Path, count: int) -> None:
    rows = [number.to_bytes(8, "little") for number in range(count)]
    writer = SealedWriter(OsFs(), f"{tmp_path}/tmp", HEADER, 8)
    for row in rows:
        writer.add_row(row)
    writer.seal(f"{tmp_path}/x")
    assert read(tmp_path / "x").rows == b"".join(rows)


def test_a_file_without_items(tmp_path: Path) -> None:
    seal = SealedWriter(OsFs(), f"{tmp_path}/tmp", HEADER, 8).seal(f"{tmp_path}/x")
    assert (seal.count, seal.size_bytes) == (0, 112)
    assert read(tmp_path / "x").rows == b""


def test_writeback_starts_as_the_file_grows(tmp_path: Path) -> None:
    fs = FailingFs()
    writer = SealedWriter(fs, f"{tmp_path}/tmp", HEADER, 8)
    for _ in range(9):
        writer.append([bytes(1 << 20)])
    hints = [call for call in fs.calls if call.startswith("start_writeback")]
    assert hints == [
        f"start_writeback 0 {(4 << 20) + 64}",
        f"start_writeback {(4 << 20) + 64} {4 << 20}",
    ]
    writer.abandon()


def test_sealing_follows_the_durable_order(tmp_path: Path) -> None:
    fs = FailingFs()
    written(tmp_path / "x", fs)
    assert fs.calls[-6:] == ["pwrite", "fsync", "close", "link", "fsync_dir", "unlink"]


@pytest.mark.parametrize("step", ["pwrite", "fsync", "close", "link"])
def test_a_failed_seal_leaves_nothing(tmp_path: Path, step: str) -> None:
    fs = FailingFs()
    writer = SealedWriter(fs, f"{tmp_path}/tmp", HEADER, 8)
    fs.fail = {step: errno.EIO}
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        writer.seal(f"{tmp_path}/x")
    writer.abandon()
    assert os.listdir(tmp_path) == []
    assert open_below(tmp_path) == []
    assert fs.calls.count("fsync") <= 1


def test_a_failed_header_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        SealedWriter(FailingFs({"pwrite": errno.ENOSPC}), f"{tmp_path}/tmp", HEADER, 8)
    assert os.listdir(tmp_path) == []
    assert open_below(tmp_path) == []


def test_abandoning(tmp_path: Path) -> None:
    writer = SealedWriter(OsFs(), f"{tmp_path}/tmp", HEADER, 8)
    writer.abandon()
    writer.abandon()
    assert os.listdir(tmp_path) == []
    assert open_below(tmp_path) == []


def test_abandoning_after_the_seal_changes_nothing(tmp_path: Path) -> None:
    writer = SealedWriter(OsFs(), f"{tmp_path}/tmp", HEADER, 8)
    writer.seal(f"{tmp_path}/x")
    (tmp_path / "tmp").write_bytes(b"another's")
    writer.abandon()
    assert sorted(os.listdir(tmp_path)) == ["tmp", "x"]


def test_a_taken_name_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        written(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_the_writer_refuses_what_could_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for header in (
        Header(b"VKX", SESSION, 7, CHUNK_SIZE, EXTRA),
        Header(b"VKXX", SESSION[:15], 7, CHUNK_SIZE, EXTRA),
        Header(b"VKXX", SESSION, 7, CHUNK_SIZE, EXTRA[:31]),
        Header(b"VKXX", SESSION, 7, 1000, EXTRA),
    ):
        with pytest.raises(ValueError, match=r"bytes|chunk size"):
            SealedWriter(OsFs(), f"{tmp_path}/tmp", header, 8)
    monkeypatch.setattr("storage.format.sealed.MAX_TABLE_BYTES", 20)
    writer = SealedWriter(OsFs(), f"{tmp_path}/tmp", HEADER, 8)
    with pytest.raises(ValueError, match="row of 7"):
        writer.add_row(bytes(7))
    writer.add_row(bytes(8))
    writer.add_row(bytes(8))
    with pytest.raises(Refused, match="table over"):
        writer.add_row(bytes(8))
    writer.abandon()


def each_flip(content: bytes) -> list[tuple[int, bytes]]:
    flips = []
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            flips.append((position, bytes(flipped)))
    return flips


def test_every_flipped_bit_outside_the_items_is_noticed(tmp_path: Path) -> None:
    content = FORGED.encoded()
    for position, flipped in each_flip(content):
        (tmp_path / "x").write_bytes(flipped)
        if 64 <= position < 85:
            assert read(tmp_path / "x").rows == b"".join(ROWS)
            continue
        with pytest.raises(Damaged, match=r"^it: "):  # a flipped version is no newer format
            read(tmp_path / "x")


def test_every_truncation_and_a_longer_file_are_noticed(tmp_path: Path) -> None:
    content = FORGED.encoded()
    for size in [*range(len(content)), len(content) + 1]:
        (tmp_path / "x").write_bytes((content + b"\0")[:size])
        with pytest.raises(Damaged, match=r"^it: "):
            read(tmp_path / "x")


@pytest.mark.parametrize(
    "lie",
    [
        FORGED.but(count=0xFFFFFFFF),
        FORGED.but(count=1),
        FORGED.but(count=3),
        FORGED.but(table_offset=0),
        FORGED.but(table_offset=1 << 62),
        FORGED.but(table_offset=(1 << 64) - 1),
        FORGED.but(row_size=0),
        FORGED.but(row_size=0xFFFFFFFF),
        FORGED.but(row_size=16, count=1),
        FORGED.but(file_size=1 << 62),
        FORGED.but(file_size=0),
        FORGED.but(annex_size=1),
        FORGED.but(version=0),
        FORGED.but(magic=b"VKPK"),
        FORGED.but(chunk_size=0),
        FORGED.but(chunk_size=1 << 15),
        FORGED.but(chunk_size=1 << 23),
        FORGED.but(chunk_size=3 << 16),
    ],
)
def test_lies_with_a_right_digest_are_noticed(tmp_path: Path, lie: Sealed) -> None:
    (tmp_path / "x").write_bytes(lie.encoded())
    with pytest.raises(Damaged):
        read(tmp_path / "x")


def test_a_table_that_begins_in_the_header(tmp_path: Path) -> None:
    rows = [EXTRA[-8:], *ROWS]
    lie = FORGED.but(items=b"", rows=rows, table_offset=56, file_size=128).encoded()
    (tmp_path / "x").write_bytes(lie[:64] + lie[72:])
    with pytest.raises(Damaged, match="table at 56"):
        read(tmp_path / "x")


@pytest.mark.parametrize("newer", [FORGED.but(version=2), FORGED.but(flags=1)])
def test_a_newer_file_is_refused_as_such(tmp_path: Path, newer: Sealed) -> None:
    (tmp_path / "x").write_bytes(newer.encoded())
    with pytest.raises(PointNewerFormat):
        read(tmp_path / "x")


def test_a_claimed_huge_table_is_not_read(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Watching(OsFs):
        def pread(self, fd: int, size_bytes: int, offset: int) -> bytes:
            sizes.append(size_bytes)
            return super().pread(fd, size_bytes, offset)

    size_bytes = 64 + (1 << 27) * 16 + 48
    lie = FORGED.but(items=b"", rows=[], count=(1 << 27) * 2, file_size=size_bytes).encoded()
    with open(tmp_path / "x", "wb") as sparse:
        sparse.write(lie[:64])
        sparse.seek(size_bytes - 48)
        sparse.write(lie[-48:])
    with open(tmp_path / "x", "rb") as file, pytest.raises(Damaged, match="table of"):
        read_sealed_footer(Watching(), file.fileno(), size_bytes, b"VKXX", 8, "it")
    assert max(sizes) <= 1 << 16


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    content = FORGED.encoded()
    (tmp_path / "x").write_bytes(content[:70])
    with open(tmp_path / "x", "rb") as file, pytest.raises(Damaged, match="ends at 70"):
        read_sealed_footer(OsFs(), file.fileno(), len(content), b"VKXX", 8, "it")
