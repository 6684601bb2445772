from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import Damaged, PointNewerFormat, Refused
from storage.files.fs import NO_FD, OsFs
from storage.format.chunks import (
    FRAME_HEADER_BYTES,
    ChunkHasher,
    Decoder,
    Encoder,
    Frame,
    make_frame,
)
from storage.format.packs import (
    PackEntry,
    PackWriter,
    parse_frame,
    read_footer,
)
from storage.format.sealed import Seal
from tests import forging
from tests.failing_fs import FailingFs, open_below
from tests.forging import CHUNK_SIZE, SESSION

HASHER = ChunkHasher(bytes(32))
ENCODER = Encoder()
CONTENTS = [b"compressible " * 9, b"raw one", bytes(blake3(b"noise").digest(40)), b"z" * 700]


def framed(content: bytes) -> Frame:
    return ENCODER.encode(HASHER.full(content), content)


def write_pack(path: Path, contents: list[bytes]) -> Seal:
    writer = PackWriter(OsFs(), f"{path}.tmp", SESSION, 7, CHUNK_SIZE)
    for content in contents:
        writer.add(framed(content))
    return writer.seal(str(path))


def read_whole(path: Path) -> list[bytes]:
    """Every chunk of a pack, with all checks that a restore makes."""
    content = memoryview(path.read_bytes())
    chunks = []
    for entry in read_footer(OsFs(), str(path))[1]:
        found = parse_frame(content[entry.offset :], CHUNK_SIZE, "here")
        raw = bytes(Decoder().decode(found.codec, found.payload, found.raw_len))
        if not HASHER.full(raw) == found.chunk_id == entry.chunk_id:
            raise Damaged("chunk id")
        chunks.append(raw)
    return chunks


def forged(contents: list[bytes]) -> forging.Sealed:
    """The pack that write_pack makes, by the specification."""
    items, rows = b"", []
    for content in contents:
        made = framed(content)
        payload = bytes(made.payload)
        place = (made.chunk_id, made.codec, len(content), payload)
        rows.append(forging.pack_row(64 + len(items), *place))
        items += forging.frame(*place)
    return forging.pack(items, rows)


def test_the_layout_is_the_specified_one(tmp_path: Path) -> None:
    seal = write_pack(tmp_path / "p", CONTENTS)
    content = (tmp_path / "p").read_bytes()
    assert content == forged(CONTENTS).encoded()
    assert (seal.count, seal.size_bytes, seal.digest) == (4, len(content), content[-32:-16])


def test_the_footer_says_where_each_frame_is(tmp_path: Path) -> None:
    seal = write_pack(tmp_path / "p", CONTENTS)
    found, entries = read_footer(OsFs(), str(tmp_path / "p"))
    assert found == seal
    made = framed(CONTENTS[0])
    fields = (64, len(CONTENTS[0]), made.stored_len, 1, 0, made.chunk_id, made.check)
    assert entries[0] == PackEntry(*fields)
    assert entries[1].offset == 64 + FRAME_HEADER_BYTES + made.stored_len
    assert [entry.codec for entry in entries] == [1, 0, 0, 1]
    assert read_whole(tmp_path / "p") == CONTENTS


@settings(deadline=None, max_examples=40)
@given(contents=st.lists(st.binary(min_size=1, max_size=400), max_size=12), data=st.data())
def test_round_trip_in_batches(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("pack") / "p"
    writer = PackWriter(OsFs(), f"{path}.tmp", SESSION, 7, CHUNK_SIZE)
    offsets = []
    rest = list(contents)
    while rest:
        take = data.draw(st.integers(1, len(rest)))
        offsets += writer.add_many([framed(content) for content in rest[:take]])
        rest = rest[take:]
    assert writer.count == len(contents)
    seal = writer.seal(str(path))
    assert [entry.offset for entry in read_footer(OsFs(), str(path))[1]] == offsets
    assert read_whole(path) == contents
    assert seal.size_bytes == path.stat().st_size
    assert path.read_bytes() == forged(contents).encoded()


def test_a_batch_is_one_write_through_the_page_cache(tmp_path: Path) -> None:
    class Cached(FailingFs):
        def open_direct(self, _fd: int, _path: str) -> int:
            return NO_FD

    fs = Cached()
    writer = PackWriter(fs, f"{tmp_path}/tmp", SESSION, 7, CHUNK_SIZE)
    fs.calls.clear()
    writer.add_many([framed(content) for content in CONTENTS])
    assert fs.calls == ["pwrite"]
    writer.abandon()
    assert os.listdir(tmp_path) == []


def test_a_gc_copy_is_the_same_frame(tmp_path: Path) -> None:
    write_pack(tmp_path / "p", CONTENTS)
    content = memoryview((tmp_path / "p").read_bytes())
    copy = PackWriter(OsFs(), f"{tmp_path}/tmp", SESSION, 7, CHUNK_SIZE)
    for entry in read_footer(OsFs(), str(tmp_path / "p"))[1]:
        found = parse_frame(content[entry.offset :], CHUNK_SIZE, "here")
        copy.add(make_frame(found.chunk_id, found.raw_len, found.codec, found.payload))
    copy.seal(f"{tmp_path}/q")
    assert (tmp_path / "q").read_bytes() == content


def test_the_writer_refuses_what_could_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = PackWriter(OsFs(), f"{tmp_path}/tmp", SESSION, 7, CHUNK_SIZE)
    with pytest.raises(ValueError, match="65537"):
        writer.add(framed(bytes(CHUNK_SIZE + 1)))
    monkeypatch.setattr("storage.format.packs.MAX_PACK_BYTES", 64 + 2 * (56 + 7 + 56) + 48)
    writer.add(framed(CONTENTS[1]))
    with pytest.raises(Refused, match="4 GiB"):
        writer.add_many([framed(CONTENTS[1])] * 2)
    writer.add(framed(CONTENTS[1]))
    seal = writer.seal(f"{tmp_path}/p")
    assert (seal.count, seal.size_bytes) == (2, 64 + 2 * (56 + 7 + 56) + 48)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p"
    write_pack(path, CONTENTS[:3])
    content = path.read_bytes()
    starts = {entry.offset for entry in read_footer(OsFs(), str(path))[1]}
    newer = {4, 5, 6, 7} | {start + 4 for start in starts} | {start + 5 for start in starts}
    with open(path, "r+b", buffering=0) as file:
        for position, value in enumerate(content):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([value ^ 1 << bit]), position)
                kinds = (Damaged, PointNewerFormat) if position in newer else Damaged
                with pytest.raises(kinds):
                    read_whole(path)
            os.pwrite(file.fileno(), bytes([value]), position)
    assert read_whole(path) == CONTENTS[:3]


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write_pack(tmp_path / "p", CONTENTS)
    content = (tmp_path / "p").read_bytes()
    for size in range(len(content)):
        (tmp_path / "p").write_bytes(content[:size])
        with pytest.raises(Damaged):
            read_footer(OsFs(), str(tmp_path / "p"))
    assert open_below(tmp_path) == []


def test_a_pack_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_footer(OsFs(), f"{tmp_path}/none")


def test_a_file_over_4_gib_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "p", "wb") as sparse:
        sparse.truncate(1 << 32)
    with pytest.raises(Damaged, match="4294967296"):
        read_footer(OsFs(), str(tmp_path / "p"))


ID = HASHER.full(b"raw one")
ONE = (ID, 0, 7, b"raw one")
FRAME = forging.frame(*ONE)
ROW = forging.pack_row(64, *ONE)


@pytest.mark.parametrize(
    "lie",
    [
        forging.pack(FRAME, []),
        forging.pack(b"", [ROW]),
        forging.pack(FRAME, [ROW, ROW]),
        forging.pack(FRAME + b"\0", [ROW]),
        forging.pack(b"\0" + FRAME, [forging.pack_row(65, *ONE)]),
        forging.pack(FRAME * 2, [forging.pack_row(64 + len(FRAME), *ONE), ROW]),
        forging.pack(FRAME, [forging.pack_row(0, *ONE)]),
        forging.pack(FRAME, [forging.pack_row(64, ID, 0, 8, b"raw one")]),
        forging.pack(FRAME, [forging.pack_row(64, ID, 1, 7, b"raw one")]),
        forging.pack(FRAME, [forging.pack_row(64, ID, 1, CHUNK_SIZE + 1, b"raw one")]),
        forging.pack(FRAME, [forging.pack_row(64, ID, 1, 0xFFFFFFFF, b"raw one")]),
        forging.pack(FRAME, [forging.pack_row(64, ID, 3, 7, b"raw one")]),
        forging.pack(FRAME[:56], [forging.pack_row(64, ID, 0, 0, b"")]),
        forging.pack(FRAME, [ROW]).but(extra=bytes(31) + b"\1"),
        forging.pack(FRAME, [ROW]).but(magic=b"VKMF"),
    ],
)
def test_a_footer_that_lies_with_a_right_digest(tmp_path: Path, lie: forging.Sealed) -> None:
    (tmp_path / "p").write_bytes(lie.encoded())
    with pytest.raises(Damaged):
        read_footer(OsFs(), str(tmp_path / "p"))


def test_a_footer_of_a_newer_version(tmp_path: Path) -> None:
    for codec, flags in ((0, 1), (0, 0x80), (1, 1)):
        row = forging.pack_row(64, ID, codec, 7, b"raw one", flags)
        (tmp_path / "p").write_bytes(forging.pack(FRAME, [row]).encoded())
        with pytest.raises(PointNewerFormat):
            read_footer(OsFs(), str(tmp_path / "p"))


def test_a_frame_is_found_at_the_start_of_a_longer_buffer() -> None:
    buffer = memoryview(FRAME + b"what follows")
    found = parse_frame(buffer, CHUNK_SIZE, "here")
    assert (found.chunk_id, found.raw_len, found.stored_len, found.codec) == (ID, 7, 7, 0)
    assert bytes(found.payload) == b"raw one"
    assert found.payload.obj is buffer.obj


@pytest.mark.parametrize("size", range(len(FRAME)))
def test_a_frame_cut_off_anywhere_is_damage(size: int) -> None:
    with pytest.raises(Damaged, match=r"^here: "):
        parse_frame(memoryview(FRAME)[:size], CHUNK_SIZE, "here")


@pytest.mark.parametrize(
    ("offset", "claim"),
    [
        (8, b"\xff\xff\xff\xff"),
        (12, b"\xff\xff\xff\xff"),
        (8, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
        (8, bytes(4)),
        (8, bytes(8)),
        (12, bytes(4)),
        (8, b"\x01\x00\x01\x00\x01\x00\x01\x00"),
        (6, b"\1\0"),
        (0, b"VKFS"),
    ],
)
def test_a_frame_with_impossible_lengths_is_damage(offset: int, claim: bytes) -> None:
    lie = bytearray(FRAME + bytes(200_000))
    lie[offset : offset + len(claim)] = claim
    for codec in (0, 1):
        lie[4] = codec
        with pytest.raises(Damaged):
            parse_frame(memoryview(lie), CHUNK_SIZE, "here")


def test_frames_of_a_newer_version() -> None:
    for codec, flags in ((0, 1), (1, 2), (2, 1)):
        newer = forging.frame(ID, codec, 9, b"raw one", flags)
        with pytest.raises(PointNewerFormat):
            parse_frame(memoryview(newer), CHUNK_SIZE, "here")
    with pytest.raises(Damaged):
        parse_frame(memoryview(forging.frame(ID, 3, 9, b"raw one")), CHUNK_SIZE, "here")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_frame_or_damage(content: bytes) -> None:
    for candidate in (content, b"VKFR" + content):
        try:
            found = parse_frame(memoryview(candidate), CHUNK_SIZE, "here")
        except (Damaged, PointNewerFormat):
            continue
        assert len(found.payload) == found.stored_len
