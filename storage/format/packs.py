"""Packs: files of frames (docs/design.md §4.2).

A frame can be checked alone (its payload's XXH3-64, and its chunk's id once decoded), a footer too
(the tail's digest). Frames follow one another without gaps from the header to the table, so each
byte of a pack is covered by one or the other. The annex holds the base ids of the frames that are
patches, in the table's order, so that who follows the log knows them without reading frames.

A PackWriter is used by one thread at a time. Plain OSErrors come through; the callers translate.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from storage.errors import Damaged, PointNewerFormat, Refused
from storage.files.bad_places import open_to_read, read_at
from storage.files.fs import Buffer, Fs
from storage.format.chunks import (
    CHUNK_ID_BYTES,
    CODEC_PATCH,
    CODEC_RAW,
    CODEC_ZSTD,
    FRAME_HEADER,
    FRAME_HEADER_BYTES,
    FRAME_MAGIC,
    ChunkHasher,
    Decoder,
    Frame,
    payload_check,
)
from storage.format.framing import UPGRADE
from storage.format.patches import base_of, is_base_of, overhead_bytes
from storage.format.record import file_id
from storage.format.sealed import (
    HEADER_BYTES,
    TAIL_BYTES,
    Footer,
    Header,
    Seal,
    SealedWriter,
    read_header,
    read_sealed_footer,
)

PACK_MAGIC = b"VKPK"
ROW_BYTES = 56
MAX_PACK_BYTES = (1 << 32) - 1
MAX_PACK_ROWS = 1 << 21  # a table's entries are held in memory

_ROW = struct.Struct("<IIIBB2x32sQ")
_NO_EXTRA = bytes(32)


class PackEntry(NamedTuple):
    """A table row: where a frame is and what it holds. `check`: XXH3-64 of its payload. `base`: of
    a patch, the chunk that it stands on."""

    offset: int
    raw_len: int
    stored_len: int
    codec: int
    flags: int
    chunk_id: bytes
    check: int
    base: bytes = b""


class FrameView(NamedTuple):
    """A frame found in a buffer; `payload` is a part of that buffer."""

    chunk_id: bytes
    raw_len: int
    stored_len: int
    codec: int
    payload: memoryview


class PackWriter:
    """A pack in the making. After any error the only call allowed is abandon()."""

    def __init__(self, fs: Fs, tmp_path: str, session: bytes, n: int, chunk_size: int) -> None:
        """Creates `tmp_path`. `session`: 16 bytes."""
        header = Header(PACK_MAGIC, session, n, chunk_size, _NO_EXTRA)
        self._chunk_size = chunk_size
        self._sealed = SealedWriter(fs, tmp_path, header, ROW_BYTES, large=True)

    @property
    def size_bytes(self) -> int:
        """Header and frames so far."""
        return self._sealed.size_bytes

    @property
    def count(self) -> int:
        """Frames so far."""
        return self._sealed.count

    def add(self, frame: Frame) -> int:
        """Writes a frame; returns its offset. See add_many."""
        return self.add_many((frame,))[0]

    def add_many(self, frames: Sequence[Frame]) -> list[int]:
        """Writes the frames with one call; returns their offsets.

        Their buffers are free on return. Not durable before seal(). Raises Refused, with nothing
        written, when the pack would reach 4 GiB.
        """
        pieces: list[Buffer] = []
        for frame in frames:
            if not 0 < frame.stored_len <= frame.raw_len <= self._chunk_size:
                raise ValueError(f"frame of {frame.raw_len} bytes stored as {frame.stored_len}")
            pieces += (frame.header, frame.payload)
        self._require_room(frames)
        offset = self._sealed.append(pieces)
        return [self._add_row(frame, at) for frame, at in _placed(frames, offset)]

    def seal(self, final_path: str) -> Seal:
        """Gives the pack its name. Durable on return; FileExistsError when the name is taken."""
        return self._sealed.seal(final_path)

    def abandon(self) -> None:
        """Deletes what was written. Nothing to do after seal(), or a second time."""
        self._sealed.abandon()

    def _require_room(self, frames: Sequence[Frame]) -> None:
        frames_bytes = sum(FRAME_HEADER_BYTES + frame.stored_len for frame in frames)
        patches = sum(frame.codec == CODEC_PATCH for frame in frames)
        table_bytes = ROW_BYTES * (self._sealed.count + len(frames))
        table_bytes += CHUNK_ID_BYTES * patches + self._sealed.annex_bytes
        if self._sealed.count + len(frames) > MAX_PACK_ROWS:
            raise Refused(f"a pack has at most {MAX_PACK_ROWS} frames")
        if self.size_bytes + frames_bytes + table_bytes + TAIL_BYTES > MAX_PACK_BYTES:
            raise Refused("a pack stays under 4 GiB")

    def _add_row(self, frame: Frame, offset: int) -> int:
        raw_len, stored_len = frame.raw_len, frame.stored_len
        self._sealed.add_row(
            _ROW.pack(offset, raw_len, stored_len, frame.codec, 0, frame.chunk_id, frame.check)
        )
        if frame.codec == CODEC_PATCH:
            self._sealed.add_to_annex(base_of(frame.payload))
        return offset


def read_footer(fs: Fs, path: str) -> tuple[Seal, list[PackEntry]]:
    """A pack's seal and table, ascending by offset. No frame is read.

    Raises Damaged or PointNewerFormat; FileNotFoundError when the name is gone.
    """
    fd = open_to_read(fs, path)
    try:
        size_bytes = fs.stat(path).size_bytes
        if size_bytes > MAX_PACK_BYTES:
            raise Damaged(f"{path}: a pack of {size_bytes} bytes")
        footer = read_sealed_footer(
            fs,
            fd,
            size_bytes,
            PACK_MAGIC,
            ROW_BYTES,
            path,
            rows_limit=MAX_PACK_ROWS,
            annex_row_bytes=CHUNK_ID_BYTES,
        )
    finally:
        fs.close(fd)
    if footer.header.extra != _NO_EXTRA:
        raise Damaged(f"{path}: header is not a pack's")
    return footer.seal, _checked_entries(footer, path)


def read_maker(fs: Fs, path: str) -> str:
    """The FileId under which the pack was made, as its header says. The rest is not looked at.

    Raises Damaged or PointNewerFormat; FileNotFoundError when the name is gone.
    """
    fd = open_to_read(fs, path)
    try:
        header = read_header(fs, fd, PACK_MAGIC, path)
    finally:
        fs.close(fd)
    return file_id(header.session.hex(), header.n)


def parse_frame(buffer: memoryview, chunk_size: int, what: str) -> FrameView:
    """The frame at the buffer's start; what follows it there is ignored.

    Checked: header, lengths against the buffer and `chunk_size`, and the payload's XXH3-64. Not
    the chunk id: that takes decoding, a patch's base, and the point's key. `what` names the place
    in errors. Raises Damaged, and PointNewerFormat for a reserved flag.
    """
    if len(buffer) < FRAME_HEADER_BYTES:
        raise Damaged(f"{what}: {len(buffer)} bytes are no frame")
    header = FRAME_HEADER.unpack_from(buffer)
    magic, codec, flags, zero, raw_len, stored_len, chunk_id, check = header
    if magic != FRAME_MAGIC or zero:
        raise Damaged(f"{what}: no frame here")
    _check_flags(flags, what)
    _check_lengths(codec, raw_len, stored_len, chunk_size, what)
    payload = buffer[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + stored_len]
    if len(payload) != stored_len:
        raise Damaged(f"{what}: frame of {stored_len} bytes ends after {len(payload)}")
    if payload_check(payload) != check:
        raise Damaged(f"{what}: payload does not match its checksum")
    if codec == CODEC_PATCH and not is_base_of(base_of(payload), chunk_id):
        raise Damaged(f"{what}: a patch of itself")
    return FrameView(chunk_id, raw_len, stored_len, codec, payload)


def read_frame(fs: Fs, fd: int, entry: PackEntry, chunk_size: int, path: str) -> FrameView:
    """The frame of a row of the pack at `path`, on which `fd` is open. It is not decoded.

    Raises Damaged unless it is the one that the row says; PointNewerFormat.
    """
    what = f"{path} at {entry.offset}"
    raw = read_at(fs, fd, FRAME_HEADER_BYTES + entry.stored_len, entry.offset, path)
    view = parse_frame(memoryview(raw), chunk_size, what)
    require_entry(view, entry, what)
    return view


def require_entry(view: FrameView, entry: PackEntry, what: str) -> None:
    """Damaged unless the frame is the one that its pack's table says."""
    base = base_of(view.payload) if view.codec == CODEC_PATCH else b""
    said = (entry.chunk_id, entry.raw_len, entry.stored_len, entry.codec, entry.base)
    if (*view[:4], base) != said:
        raise Damaged(f"{what}: is not the frame that the pack's table says")


def require_content(view: FrameView, decoder: Decoder, hasher: ChunkHasher, what: str) -> None:
    """Damaged unless the frame is a whole chunk's, and that has its id."""
    content = decoder.decode(view.codec, view.payload, view.raw_len)
    if hasher.full(content) != view.chunk_id:
        raise Damaged(f"{what}: content does not have its id")


def _placed(frames: Sequence[Frame], offset: int) -> Iterable[tuple[Frame, int]]:
    """Each frame with its offset, the first at `offset`."""
    for frame in frames:
        yield frame, offset
        offset += FRAME_HEADER_BYTES + frame.stored_len


def _checked_entries(footer: Footer, what: str) -> list[PackEntry]:
    """The rows, which must cover header's end to table's start without gap or overlap."""
    entries = _with_bases(footer, what)
    chunk_size = footer.header.chunk_size
    offset = HEADER_BYTES
    for found, raw_len, stored_len, codec, flags, _, _, _ in entries:
        if found != offset:
            raise Damaged(f"{what}: table has a frame at {found}, expected at {offset}")
        if flags or codec != CODEC_ZSTD or not 0 < stored_len < raw_len <= chunk_size:
            _check_flags(flags, what)  # a rebuild comes here for each chunk of a point: so no calls
            _check_lengths(codec, raw_len, stored_len, chunk_size, what)  # for most of them
        offset += FRAME_HEADER_BYTES + stored_len
    if offset != footer.items_end:
        raise Damaged(f"{what}: frames end at {offset}, table starts at {footer.items_end}")
    return entries


def _with_bases(footer: Footer, what: str) -> list[PackEntry]:
    """The rows; those of patches with the ids in the annex, of which there must be as many."""
    entries = [PackEntry(*row) for row in _ROW.iter_unpack(footer.rows)]
    patches = [at for at, entry in enumerate(entries) if entry.codec == CODEC_PATCH]
    if len(footer.annex) != len(patches) * CHUNK_ID_BYTES:
        raise Damaged(f"{what}: {len(patches)} patches, bases of {len(footer.annex)} bytes")
    for number, at in enumerate(patches):
        base = footer.annex[number * CHUNK_ID_BYTES : (number + 1) * CHUNK_ID_BYTES]
        if not is_base_of(base, entries[at].chunk_id):
            raise Damaged(f"{what}: a patch of itself")
        entries[at] = entries[at]._replace(base=base)
    return entries


def _check_flags(flags: int, what: str) -> None:
    if flags:
        raise PointNewerFormat(f"{what}: unknown frame flags {flags:#04x}: {UPGRADE}")


def _check_lengths(codec: int, raw_len: int, stored_len: int, chunk_size: int, what: str) -> None:
    if codec not in (CODEC_RAW, CODEC_ZSTD, CODEC_PATCH):
        raise Damaged(f"{what}: no such codec: {codec}")
    least = overhead_bytes(raw_len) if codec == CODEC_PATCH else 0
    gained = stored_len == raw_len if codec == CODEC_RAW else least < stored_len < raw_len
    if not (0 < raw_len <= chunk_size and gained):
        raise Damaged(f"{what}: frame of {raw_len} bytes stored as {stored_len}, codec {codec}")
