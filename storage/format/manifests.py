"""Manifests: which chunks a disk backup consists of (docs/design.md §4.2).

A page maps up to 1,024 chunk indexes to ids; a manifest holds a disk's pages, ascending, each with
its digest in the table. A full one lists what is not zero; an incremental one what differs from
its base, where the zero mark stands for "now zero".

Memory: a writer and a reader hold the table (32 bytes a page, so 32 bytes per GiB of volume at
1 MiB chunks) and about 1 MiB of pages. One thread at a time. Plain OSErrors come through; the
callers translate.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from itertools import chain
from types import TracebackType
from typing import NamedTuple

from blake3 import blake3

from storage.errors import Damaged
from storage.files.bad_places import open_to_read
from storage.files.fs import NO_FD, Fs
from storage.format.chunks import CHUNK_ID_BYTES, ZERO_MARK
from storage.format.framing import DIGEST_BYTES
from storage.format.sealed import (
    HEADER_BYTES,
    Footer,
    Header,
    Seal,
    SealedWriter,
    read_exactly,
    read_sealed_footer,
)

PAGE_ENTRIES = 1024
ENTRY_BYTES = 34
MANIFEST_MAGIC = b"VKMF"
ROW_BYTES = 32
MAX_PAGES = 1 << 32

_ENTRY = struct.Struct("<H32s")
_ID = struct.Struct("<2x32s")
_ROW = struct.Struct("<IIQ16s")
_EXTRA = struct.Struct("<16sQB7s")
_FULL = 0
_INCREMENTAL = 1
_BATCH_BYTES = 1 << 20


class _Row(NamedTuple):
    page_no: int
    entries: int
    offset: int
    digest: bytes


def encode_page(entries: Mapping[int, bytes]) -> bytes:
    """The page's bytes: entries ascending by index (0 to 1,023), each with its 32-byte id."""
    for index, chunk_id in entries.items():
        if not 0 <= index < PAGE_ENTRIES or len(chunk_id) != CHUNK_ID_BYTES:
            raise ValueError(f"entry {index} with an id of {len(chunk_id)} bytes")
    return b"".join([_ENTRY.pack(index, entries[index]) for index in sorted(entries)])


def decode_page(page: bytes) -> dict[int, bytes]:
    """The page's entries, ascending. Raises Damaged unless they are what encode_page makes."""
    if len(page) % ENTRY_BYTES:
        raise Damaged(f"page of {len(page)} bytes")
    entries: dict[int, bytes] = dict(_ENTRY.iter_unpack(page))
    indexes = list(entries)
    if len(indexes) * ENTRY_BYTES != len(page) or indexes != sorted(indexes):
        raise Damaged("page entries are not in ascending order")
    if indexes and indexes[-1] >= PAGE_ENTRIES:
        raise Damaged(f"page has an entry {indexes[-1]}")
    return entries


def page_chunks(page: bytes) -> Iterator[bytes]:
    """The ids of a page that has been checked, zero marks among them."""
    return chain.from_iterable(_ID.iter_unpack(page))


class ManifestWriter:
    """A manifest in the making. After any error the only call allowed is abandon()."""

    def __init__(
        self,
        fs: Fs,
        tmp_path: str,
        session: bytes,
        n: int,
        chunk_size: int,
        disk_id: bytes,
        capacity: int,
        full: bool,
    ) -> None:
        """Creates `tmp_path`. `session` and `disk_id`: 16 bytes; `capacity`: the volume's bytes."""
        if len(disk_id) != 16:
            raise ValueError("the disk id is 16 bytes")
        extra = _EXTRA.pack(disk_id, capacity, _FULL if full else _INCREMENTAL, bytes(7))
        header = Header(MANIFEST_MAGIC, session, n, chunk_size, extra)
        self._page_limit = _page_count(capacity, chunk_size)
        self._next_page = 0
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._sealed = SealedWriter(fs, tmp_path, header, ROW_BYTES)

    @property
    def size_bytes(self) -> int:
        """Header and pages so far."""
        return self._sealed.size_bytes + self._pending_bytes

    def add_page(self, page_no: int, page: bytes) -> None:
        """Adds a page as encode_page makes it. Ascending page numbers; an empty page is skipped."""
        if not self._next_page <= page_no < self._page_limit:
            raise ValueError(f"page {page_no} after {self._next_page - 1} of {self._page_limit}")
        if len(page) % ENTRY_BYTES or len(page) > ENTRY_BYTES * PAGE_ENTRIES:
            raise ValueError(f"page of {len(page)} bytes")
        self._next_page = page_no + 1
        if not page:
            return
        digest = blake3(page).digest(DIGEST_BYTES)
        entries = len(page) // ENTRY_BYTES
        self._sealed.add_row(_ROW.pack(page_no, entries, self.size_bytes, digest))
        self._pending.append(page)
        self._pending_bytes += len(page)
        if self._pending_bytes >= _BATCH_BYTES:
            self._flush()

    def seal(self, final_path: str) -> Seal:
        """Gives the manifest its name. Durable on return; FileExistsError when it is taken."""
        try:
            self._flush()
        except BaseException:
            self.abandon()
            raise
        return self._sealed.seal(final_path)

    def abandon(self) -> None:
        """Deletes what was written. Nothing to do after seal(), or a second time."""
        self._sealed.abandon()

    def _flush(self) -> None:
        self._sealed.append(self._pending)
        self._pending = []
        self._pending_bytes = 0


class ManifestReader:
    """An open manifest: header and table are checked at once, pages as they are read."""

    def __init__(self, fs: Fs, path: str) -> None:
        """Raises Damaged or PointNewerFormat; FileNotFoundError when the name is gone."""
        self._fs = fs
        self._path = path
        self._fd = open_to_read(fs, path)
        try:
            size_bytes = fs.stat(path).size_bytes
            footer = read_sealed_footer(fs, self._fd, size_bytes, MANIFEST_MAGIC, ROW_BYTES, path)
            disk_id, capacity, kind, zeros = _EXTRA.unpack(footer.header.extra)
            if kind not in (_FULL, _INCREMENTAL) or any(zeros):
                raise Damaged(f"{path}: manifest of kind {kind}")
            _check_rows(footer, _page_count(capacity, footer.header.chunk_size), path)
        except BaseException:
            fs.close(self._fd)
            raise
        self._rows = footer.rows
        self.seal: Seal = footer.seal
        self.header: Header = footer.header
        self.disk_id: bytes = disk_id
        self.capacity: int = capacity
        self.full: bool = kind == _FULL

    def __enter__(self) -> ManifestReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """No pages after it. Nothing to do a second time."""
        fd, self._fd = self._fd, NO_FD
        if fd != NO_FD:
            self._fs.close(fd)

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """(page number, page) of each page, ascending, read about 1 MiB at a time. Once.

        Each page matches its digest, decodes, and lies within the volume; Damaged otherwise.
        The file is closed when the last has been read: who merges a long chain has all of its
        manifests open at once, but few are longer than one read.
        """
        left_bytes = len(self._rows)
        for rows in _batches(self._rows):
            start = rows[0].offset
            size_bytes = rows[-1].offset + rows[-1].entries * ENTRY_BYTES - start
            batch = read_exactly(self._fs, self._fd, size_bytes, start, self._path)
            left_bytes -= len(rows) * ROW_BYTES
            if not left_bytes:
                self.close()
            for row in rows:
                at = row.offset - start
                yield row.page_no, self._checked(row, batch[at : at + row.entries * ENTRY_BYTES])

    def _checked(self, row: _Row, page: bytes) -> bytes:
        what = f"{self._path}: page {row.page_no}"
        if blake3(page).digest(DIGEST_BYTES) != row.digest:
            raise Damaged(f"{what}: digest does not match")
        entries = decode_page(page)
        last = (row.page_no * PAGE_ENTRIES + max(entries)) * self.header.chunk_size
        if last >= self.capacity:
            raise Damaged(f"{what}: an entry lies behind the volume's end")
        if self.full and ZERO_MARK in entries.values():
            raise Damaged(f"{what}: a full manifest has a zero mark")
        return page


def _page_count(capacity: int, chunk_size: int) -> int:
    """Pages of a volume of `capacity` bytes, never more than a page number can count."""
    return min(-(-capacity // (chunk_size * PAGE_ENTRIES)), MAX_PAGES)


def _check_rows(footer: Footer, page_limit: int, what: str) -> None:
    """Pages ascend and cover header's end to table's start without gap or overlap."""
    offset, next_page = HEADER_BYTES, 0
    for row in map(_Row._make, _ROW.iter_unpack(footer.rows)):
        if not (next_page <= row.page_no < page_limit and 0 < row.entries <= PAGE_ENTRIES):
            raise Damaged(f"{what}: table has page {row.page_no} of {row.entries} entries")
        if row.offset != offset:
            raise Damaged(f"{what}: table has a page at {row.offset}, expected at {offset}")
        next_page = row.page_no + 1
        offset += row.entries * ENTRY_BYTES
    if offset != footer.items_end:
        raise Damaged(f"{what}: pages end at {offset}, table starts at {footer.items_end}")


def _batches(rows: bytes) -> Iterator[list[_Row]]:
    """Rows in groups whose pages together take up about a read."""
    group: list[_Row] = []
    for row in map(_Row._make, _ROW.iter_unpack(rows)):
        group.append(row)
        if row.offset - group[0].offset >= _BATCH_BYTES:
            yield group
            group = []
    if group:
        yield group
