from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import Damaged, PointNewerFormat
from storage.files.fs import OsFs
from storage.format.chunks import ZERO_MARK
from storage.format.manifests import (
    PAGE_ENTRIES,
    ManifestReader,
    ManifestWriter,
    decode_page,
    encode_page,
)
from storage.format.sealed import Seal
from tests import forging
from tests.failing_fs import FailingFs, open_below
from tests.forging import CHUNK_SIZE, DISK, SESSION

PAGE_SPAN_BYTES = PAGE_ENTRIES * CHUNK_SIZE
CAPACITY = 5 * PAGE_SPAN_BYTES + CHUNK_SIZE + 1  # the sixth page has two chunks, the last cut short


def chunk_id(number: int) -> bytes:
    return b"id" + number.to_bytes(30, "little")


PAGES = {
    0: {0: chunk_id(1), 7: chunk_id(2), 1023: chunk_id(3)},
    3: {500: chunk_id(1)},
    5: {0: chunk_id(4), 1: chunk_id(5)},
}
page_maps = st.dictionaries(
    st.integers(0, PAGE_ENTRIES - 1), st.binary(min_size=32, max_size=32), max_size=40
)


def write_manifest(
    path: Path, pages: dict[int, dict[int, bytes]], capacity: int = CAPACITY, full: bool = True
) -> Seal:
    writer = ManifestWriter(OsFs(), f"{path}.tmp", SESSION, 7, CHUNK_SIZE, DISK, capacity, full)
    for page_no in sorted(pages):
        writer.add_page(page_no, encode_page(pages[page_no]))
    return writer.seal(str(path))


def read_whole(path: Path) -> dict[int, dict[int, bytes]]:
    with ManifestReader(OsFs(), str(path)) as reader:
        return {page_no: decode_page(page) for page_no, page in reader.pages()}


def by_hand(entries: dict[int, bytes]) -> bytes:
    return b"".join(struct.pack("<H", index) + entries[index] for index in sorted(entries))


def forged(pages: dict[int, dict[int, bytes]]) -> forging.Sealed:
    """The manifest that write_manifest makes, by the specification."""
    items, rows = b"", []
    for page_no in sorted(pages):
        page = by_hand(pages[page_no])
        rows.append(forging.page_row(page_no, len(pages[page_no]), 64 + len(items), page))
        items += page
    return forging.manifest(items, rows, CAPACITY)


@given(page_maps)
def test_pages_round_trip_in_the_specified_layout(entries: dict[int, bytes]) -> None:
    page = encode_page(entries)
    assert page == by_hand(entries)
    assert decode_page(page) == entries
    assert list(decode_page(page)) == sorted(entries)


@pytest.mark.parametrize("index", [-1, 1024, 70_000])
def test_entries_outside_a_page_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"entry {index}"):
        encode_page({0: chunk_id(0), index: chunk_id(1)})


@pytest.mark.parametrize("size", [0, 31, 33])
def test_ids_of_another_length_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes"):
        encode_page({0: bytes(size)})


@pytest.mark.parametrize(
    "page",
    [
        b"\0" * 33,
        b"\0" * 35,
        by_hand({1: chunk_id(1)}) + by_hand({0: chunk_id(2)}),
        by_hand({1: chunk_id(1)}) * 2,
        by_hand({1: chunk_id(1), 2: chunk_id(1)}) + by_hand({1: chunk_id(1)}),
        by_hand({1024: chunk_id(1)}),
        by_hand({0: chunk_id(0), 65535: chunk_id(1)}),
        by_hand({index: chunk_id(index) for index in range(1025)}),
    ],
)
def test_pages_that_were_never_made_are_damage(page: bytes) -> None:
    with pytest.raises(Damaged):
        decode_page(page)


@given(st.binary(max_size=34 * 4))
def test_any_bytes_are_a_page_or_damage(content: bytes) -> None:
    try:
        entries = decode_page(content)
    except Damaged:
        return
    assert encode_page(entries) == content


def test_the_layout_is_the_specified_one(tmp_path: Path) -> None:
    seal = write_manifest(tmp_path / "m", PAGES)
    content = (tmp_path / "m").read_bytes()
    assert content == forged(PAGES).encoded()
    assert content[32:64] == DISK + struct.pack("<QB", CAPACITY, 0) + bytes(7)
    assert (seal.count, seal.size_bytes, seal.digest) == (3, len(content), content[-32:-16])


def test_an_incremental_manifest_says_so(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m", {0: {3: ZERO_MARK}}, full=False)
    assert (tmp_path / "m").read_bytes()[56] == 1
    assert read_whole(tmp_path / "m") == {0: {3: ZERO_MARK}}


def test_the_reader_knows_the_disk(tmp_path: Path) -> None:
    seal = write_manifest(tmp_path / "m", PAGES)
    with ManifestReader(OsFs(), str(tmp_path / "m")) as reader:
        assert (reader.seal, reader.disk_id, reader.capacity) == (seal, DISK, CAPACITY)
        assert reader.full
        assert (reader.header.session, reader.header.n) == (SESSION, 7)
        assert [page_no for page_no, _ in reader.pages()] == [0, 3, 5]
    assert open_below(tmp_path) == []
    assert read_whole(tmp_path / "m") == PAGES


def test_a_disk_of_zeros_has_an_empty_manifest(tmp_path: Path) -> None:
    assert write_manifest(tmp_path / "m", {0: {}, 4: {}}).count == 0
    assert read_whole(tmp_path / "m") == {}
    write_manifest(tmp_path / "n", {}, capacity=0)
    assert read_whole(tmp_path / "n") == {}


@settings(deadline=None, max_examples=30)
@given(st.dictionaries(st.integers(0, 4), page_maps))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, pages: dict[int, dict[int, bytes]]
) -> None:
    path = tmp_path_factory.mktemp("manifest") / "m"
    write_manifest(path, pages, full=False)
    assert read_whole(path) == {page_no: page for page_no, page in pages.items() if page}


def test_a_long_manifest_is_written_and_read_in_batches(tmp_path: Path) -> None:
    page = encode_page({index: chunk_id(index) for index in range(PAGE_ENTRIES)})
    sizes: list[int] = []

    class Watching(FailingFs):
        def pread(self, fd: int, size_bytes: int, offset: int) -> bytes:
            sizes.append(size_bytes)
            return super().pread(fd, size_bytes, offset)

    fs = Watching()
    capacity = 200 * PAGE_SPAN_BYTES
    writer = ManifestWriter(fs, f"{tmp_path}/tmp", SESSION, 0, CHUNK_SIZE, DISK, capacity, True)
    for page_no in range(200):
        writer.add_page(page_no, page)
    assert writer.size_bytes == 64 + 200 * len(page)
    writer.seal(f"{tmp_path}/m")
    assert 7 <= fs.calls.count("pwrite") <= 10
    with ManifestReader(fs, f"{tmp_path}/m") as reader:
        assert list(reader.pages()) == [(page_no, page) for page_no in range(200)]
    assert len(sizes) <= 12
    assert max(sizes) < (1 << 20) + 2 * len(page)


def test_the_writer_refuses_what_could_not_be_read(tmp_path: Path) -> None:
    page = encode_page({0: chunk_id(1)})
    with pytest.raises(ValueError, match="disk id"):
        ManifestWriter(OsFs(), f"{tmp_path}/tmp", SESSION, 7, CHUNK_SIZE, DISK[1:], 1, True)
    writer = ManifestWriter(OsFs(), f"{tmp_path}/tmp", SESSION, 7, CHUNK_SIZE, DISK, CAPACITY, True)
    writer.add_page(2, page)
    for page_no in (2, 1, -1, 6):
        with pytest.raises(ValueError, match=f"page {page_no}"):
            writer.add_page(page_no, page)
    for wrong in (page[1:], page * 1025):
        with pytest.raises(ValueError, match=f"{len(wrong)} bytes"):
            writer.add_page(5, wrong)
    writer.abandon()
    assert os.listdir(tmp_path) == []


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    pages = {0: PAGES[0], 5: PAGES[5]}
    write_manifest(path, pages)
    content = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for position, value in enumerate(content):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([value ^ 1 << bit]), position)
                kinds = (Damaged, PointNewerFormat) if 4 <= position < 8 else Damaged
                with pytest.raises(kinds):
                    read_whole(path)
            os.pwrite(file.fileno(), bytes([value]), position)
    assert read_whole(path) == pages


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m", PAGES)
    content = (tmp_path / "m").read_bytes()
    for size in range(len(content)):
        (tmp_path / "m").write_bytes(content[:size])
        with pytest.raises(Damaged):
            read_whole(tmp_path / "m")
    assert open_below(tmp_path) == []


PAGE = by_hand({0: chunk_id(1)})
ROW = forging.page_row(0, 1, 64, PAGE)
FORGED_EXTRA = DISK + struct.pack("<QB", CAPACITY, 0) + bytes(6) + b"\1"


@pytest.mark.parametrize(
    "lie",
    [
        forging.manifest(PAGE, [], CAPACITY),
        forging.manifest(b"", [ROW], CAPACITY),
        forging.manifest(PAGE + b"\0", [ROW], CAPACITY),
        forging.manifest(b"\0" + PAGE, [forging.page_row(0, 1, 65, PAGE)], CAPACITY),
        forging.manifest(PAGE * 2, [ROW, forging.page_row(0, 1, 98, PAGE)], CAPACITY),
        forging.manifest(PAGE, [forging.page_row(0, 0, 64, PAGE)], CAPACITY),
        forging.manifest(PAGE, [forging.page_row(0, 0xFFFFFFFF, 64, PAGE)], CAPACITY),
        forging.manifest(PAGE, [forging.page_row(0, 1, 1 << 62, PAGE)], CAPACITY),
        forging.manifest(PAGE, [forging.page_row(6, 1, 64, PAGE)], CAPACITY),
        forging.manifest(PAGE, [forging.page_row(0xFFFFFFFF, 1, 64, PAGE)], CAPACITY),
        forging.manifest(PAGE, [ROW], 0),
        forging.manifest(PAGE, [ROW], CAPACITY, kind=2),
        forging.manifest(PAGE, [ROW], CAPACITY).but(extra=FORGED_EXTRA),
        forging.manifest(PAGE, [ROW], CAPACITY).but(magic=b"VKPK"),
    ],
)
def test_a_table_that_lies_with_a_right_digest(tmp_path: Path, lie: forging.Sealed) -> None:
    (tmp_path / "m").write_bytes(lie.encoded())
    with pytest.raises(Damaged):
        ManifestReader(OsFs(), str(tmp_path / "m"))
    assert open_below(tmp_path) == []


@pytest.mark.parametrize(
    ("page_no", "entries", "page"),
    [
        (0, 2, by_hand({5: chunk_id(1)}) + by_hand({4: chunk_id(1)})),
        (0, 2, PAGE * 2),
        (0, 1, by_hand({1024: chunk_id(1)})),
        (0, 1, by_hand({3: ZERO_MARK})),
        (5, 1, by_hand({2: chunk_id(1)})),
    ],
)
def test_a_page_that_lies_with_a_right_digest(
    tmp_path: Path, page_no: int, entries: int, page: bytes
) -> None:
    row = forging.page_row(page_no, entries, 64, page)
    (tmp_path / "m").write_bytes(forging.manifest(page, [row], CAPACITY).encoded())
    with ManifestReader(OsFs(), str(tmp_path / "m")) as reader, pytest.raises(Damaged):
        list(reader.pages())


def test_a_capacity_of_16_eib_is_no_excuse(tmp_path: Path) -> None:
    lie = forging.manifest(PAGE, [forging.page_row(0xFFFFFFFF, 1, 64, PAGE)], (1 << 64) - 1)
    (tmp_path / "m").write_bytes(lie.encoded())
    assert read_whole(tmp_path / "m") == {0xFFFFFFFF: {0: chunk_id(1)}}


def test_a_manifest_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ManifestReader(OsFs(), f"{tmp_path}/none")
