"""Sealed files (docs/design.md §4.2): what packs and manifests have in common.

Header, items, table, annex, tail. The writer appends items as they come and keeps table and annex
in memory; seal() writes them and the tail and publishes the file, which never changes afterwards.
The tail's digest covers header, table and annex, and each row carries a digest of its item, so a
log record that names the tail's digest fixes every byte of the file.

Reading starts at the end. Nothing is allocated on the word of a length in the file before that
length fits the file's true size and the limits here.

A writer is used by one thread at a time. Plain OSErrors come through; the callers translate.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from storage.errors import Damaged, PointNewerFormat, Refused
from storage.files.bad_places import read_at
from storage.files.fs import Buffer, Fs
from storage.files.growing import GrowingFile
from storage.files.publish import publish
from storage.format.chunks import is_chunk_size
from storage.format.framing import DIGEST_BYTES, FORMAT, check_format

HEADER_BYTES = 64
TAIL_BYTES = 48
TAIL_MAGIC = b"VKEN"
MAX_TABLE_BYTES = 1 << 30

_HEADER = struct.Struct("<4sHH16sII32s")
_TAIL = struct.Struct("<QII16sQI4s")
_SIGNED_TAIL = struct.Struct("<QII")  # the part of the tail that its digest covers
_FIRST_READ_BYTES = 32 << 10  # the tail and most packs' tables: one round trip instead of two


@dataclass(frozen=True, slots=True)
class Header:
    """What a sealed file says of itself at its start. `extra`: the kind's own 32 bytes."""

    magic: bytes
    session: bytes
    n: int
    chunk_size: int
    extra: bytes


@dataclass(frozen=True, slots=True)
class Seal:
    """What a record says of a sealed file: rows in its table, file size, the tail's digest."""

    count: int
    size_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Footer:
    """A sealed file's table and annex, and its header: the tail's digest proves all three."""

    header: Header
    rows: bytes
    annex: bytes
    count: int
    size_bytes: int
    digest: bytes

    @property
    def seal(self) -> Seal:
        return Seal(self.count, self.size_bytes, self.digest)

    @property
    def items_end(self) -> int:
        """Offset just behind the last item."""
        return self.size_bytes - TAIL_BYTES - len(self.annex) - len(self.rows)


class SealedWriter:
    """A sealed file in the making. After any error the only call allowed is abandon()."""

    def __init__(
        self, fs: Fs, tmp_path: str, header: Header, row_size: int, *, large: bool = False
    ) -> None:
        """Creates `tmp_path` and writes the header. `large`: as for GrowingFile."""
        self._fs = fs
        self._tmp_path = tmp_path
        self._header = _encoded_header(header)
        self._row_size = row_size
        self._rows = bytearray()
        self._annex = bytearray()
        self._file = GrowingFile(fs, tmp_path, large=large)
        try:
            self.append([self._header])
        except BaseException:
            self.abandon()
            raise

    @property
    def size_bytes(self) -> int:
        """Header and items so far."""
        return self._file.size_bytes

    @property
    def count(self) -> int:
        """Rows so far."""
        return len(self._rows) // self._row_size

    @property
    def annex_bytes(self) -> int:
        """Annex so far."""
        return len(self._annex)

    def append(self, pieces: Sequence[Buffer]) -> int:
        """Adds an item, or several; returns its offset.

        Nothing is kept: the buffers are free on return. Not durable before seal().
        """
        return self._file.append(pieces)

    def add_row(self, row: bytes) -> None:
        """Adds a row of `row_size` bytes to the table."""
        if len(row) != self._row_size:
            raise ValueError(f"row of {len(row)} bytes in a table of {self._row_size}-byte rows")
        if len(self._rows) + len(row) > MAX_TABLE_BYTES:
            raise Refused(f"{self._tmp_path}: table over {MAX_TABLE_BYTES} bytes")
        self._rows += row

    def add_to_annex(self, piece: bytes) -> None:
        """Adds to what the kind of file keeps behind its table."""
        self._annex += piece

    def seal(self, final_path: str) -> Seal:
        """Writes table, annex and tail and gives the file its name. Durable on return.

        Raises FileExistsError when the name is taken. The temporary file is gone either way.
        """
        items_end = self.size_bytes
        signed = _SIGNED_TAIL.pack(items_end, self.count, self._row_size)
        digest = _table_digest(self._header, self._rows, self._annex, signed)
        size_bytes = items_end + len(self._rows) + len(self._annex) + TAIL_BYTES
        rest = struct.pack("<16sQI4s", digest, size_bytes, len(self._annex), TAIL_MAGIC)
        try:
            self._file.append([self._rows, self._annex, signed + rest])
            fd = self._file.finish()
        except BaseException:
            self.abandon()
            raise
        publish(self._fs, fd, self._tmp_path, final_path)
        return Seal(self.count, size_bytes, digest)

    def abandon(self) -> None:
        """Closes and deletes the temporary file. Nothing to do after seal(), or a second time."""
        self._file.abandon()


def read_sealed_footer(
    fs: Fs,
    fd: int,
    size_bytes: int,
    magic: bytes,
    row_size: int,
    what: str,
    *,
    rows_limit: int = 1 << 32,
    annex_row_bytes: int = 0,
) -> Footer:
    """Header, table and annex of a sealed file of `size_bytes`, checked against the tail's digest.

    The annex has at most `annex_row_bytes` for each of the table's rows.
    The items are not read. Raises Damaged, or PointNewerFormat; `what` names the file in errors.
    """
    if size_bytes < HEADER_BYTES + TAIL_BYTES:
        raise Damaged(f"{what}: {size_bytes} bytes are too few")
    raw_header = read_exactly(fs, fd, HEADER_BYTES, 0, what)
    try:
        header = _decoded_header(raw_header, magic, what)
    except PointNewerFormat as error:
        if _sealed_otherwise(fs, fd, size_bytes, row_size, raw_header, what):
            raise Damaged(f"{what}: its header is not the one that was sealed") from error
        raise
    end = _read_end(fs, fd, size_bytes, what)
    count, annex_bytes, digest = _checked_tail(end[-TAIL_BYTES:], size_bytes, row_size, what)
    if count > rows_limit:
        raise Damaged(f"{what}: table of {count} rows; at most {rows_limit} are allowed")
    if annex_bytes > count * annex_row_bytes:
        raise Damaged(f"{what}: annex of {annex_bytes} bytes for {count} rows")
    need_bytes = count * row_size + annex_bytes + TAIL_BYTES
    if need_bytes > len(end):
        end = read_exactly(fs, fd, need_bytes, size_bytes - need_bytes, what)
    table = end[len(end) - need_bytes : -TAIL_BYTES]
    rows, annex = table[: count * row_size], table[count * row_size :]
    if _table_digest(raw_header, rows, annex, end[-TAIL_BYTES:][: _SIGNED_TAIL.size]) != digest:
        raise Damaged(f"{what}: digest of header and table does not match")
    return Footer(header, rows, annex, count, size_bytes, digest)


def read_header(fs: Fs, fd: int, magic: bytes, what: str) -> Header:
    """The header alone, which nothing proves. Raises Damaged or PointNewerFormat."""
    return _decoded_header(read_exactly(fs, fd, HEADER_BYTES, 0, what), magic, what)


def _sealed_otherwise(
    fs: Fs, fd: int, size_bytes: int, row_size: int, raw_header: bytes, what: str
) -> bool:
    """Whether table and tail are of our format, but sealed with another header than there is: then
    the header does not say what a newer vmkeep wrote, but was damaged."""
    end = _read_end(fs, fd, size_bytes, what)
    try:
        count, annex, digest = _checked_tail(end[-TAIL_BYTES:], size_bytes, row_size, what)
    except Damaged:
        return False
    need_bytes = count * row_size + annex + TAIL_BYTES
    end = read_exactly(fs, fd, need_bytes, size_bytes - need_bytes, what)
    signed = end[-TAIL_BYTES:][: _SIGNED_TAIL.size]
    return _table_digest(raw_header, end[:-TAIL_BYTES], b"", signed) != digest


def read_exactly(fs: Fs, fd: int, size_bytes: int, offset: int, what: str) -> bytes:
    """These bytes of the file, all of them; Damaged when it ends before, or they can't be read."""
    found = read_at(fs, fd, size_bytes, offset, what)
    if len(found) != size_bytes:
        raise Damaged(f"{what}: ends at {offset + len(found)}, inside what should be there")
    return found


def _read_end(fs: Fs, fd: int, size_bytes: int, what: str) -> bytes:
    first_bytes = min(size_bytes - HEADER_BYTES, _FIRST_READ_BYTES)
    return read_exactly(fs, fd, first_bytes, size_bytes - first_bytes, what)


def _checked_tail(tail: bytes, size_bytes: int, row_size: int, what: str) -> tuple[int, int, bytes]:
    """(count, bytes of the annex, digest) of a tail that fits the file."""
    table_offset, count, found_row_size, digest, found_size, annex, magic = _TAIL.unpack(tail)
    if magic != TAIL_MAGIC or found_size != size_bytes:
        raise Damaged(f"{what}: no valid tail at its end")
    if found_row_size != row_size or count * row_size > MAX_TABLE_BYTES:
        raise Damaged(f"{what}: table of {count} rows of {found_row_size} bytes")
    end = table_offset + count * row_size + annex + TAIL_BYTES
    if table_offset < HEADER_BYTES or end != size_bytes:
        raise Damaged(f"{what}: table at {table_offset} does not fit the file")
    return count, annex, digest


def _encoded_header(header: Header) -> bytes:
    if not is_chunk_size(header.chunk_size):
        raise ValueError(f"chunk size {header.chunk_size}")
    if (len(header.magic), len(header.session), len(header.extra)) != (4, 16, 32):
        raise ValueError("magic, session and extra are 4, 16 and 32 bytes")
    return _HEADER.pack(
        header.magic, FORMAT, 0, header.session, header.n, header.chunk_size, header.extra
    )


def _decoded_header(raw: bytes, magic: bytes, what: str) -> Header:
    found, version, flags, session, n, chunk_size, extra = _HEADER.unpack(raw)
    if found != magic:
        raise Damaged(f"{what}: magic is {found!r}, not {magic!r}")
    check_format(version, flags, what)
    if not is_chunk_size(chunk_size):
        raise Damaged(f"{what}: chunk size {chunk_size}")
    return Header(found, session, n, chunk_size, extra)


def _table_digest(header: bytes, rows: Buffer, annex: Buffer, signed_tail: bytes) -> bytes:
    hasher = blake3(header)
    hasher.update(rows)
    hasher.update(annex)
    hasher.update(signed_tail)
    return hasher.digest(DIGEST_BYTES)
