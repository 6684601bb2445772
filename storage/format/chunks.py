"""Chunks: their ids and how one is encoded for a frame.

Theory (docs/design.md §9): an id is XXH3-128 of the content and then 16 bytes of BLAKE3 keyed with
the point's secret. The first half is nearly free and can be forged; it only ever decides whether
a disk's chunk differs from its own parent's. The second half costs ten times as much and cannot.

This is the hot path. Buffers go into the hash functions and zstd as they are (memoryview, mmap),
and those release the GIL for the work; per chunk only its id, a header and, if smaller, the
compressed bytes are made. `Encoder` and `Decoder` hold a zstd context each and belong to one
thread; `ChunkHasher` may be shared.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import zstandard
from blake3 import blake3
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from storage.errors import Damaged
from storage.files.fs import Buffer

MIN_CHUNK_BYTES = 64 << 10
MAX_CHUNK_BYTES = 4 << 20
CHUNK_ID_BYTES = 32
FAST_BYTES = 16
ZERO_MARK = bytes(CHUNK_ID_BYTES)  # no chunk has this id

CODEC_RAW = 0
CODEC_ZSTD = 1
CODEC_PATCH = 2  # see storage.format.patches

FRAME_MAGIC = b"VKFR"
FRAME_HEADER = struct.Struct("<4sBBHII32sQ")
FRAME_HEADER_BYTES = FRAME_HEADER.size

LEVEL = 1
_LEAST_GAIN_SHIFT = 5  # raw unless zstd saves 1/32: less is not worth its decompression
_ZEROS = bytes(MAX_CHUNK_BYTES)  # never written to, so the kernel backs it with one page


class Frame(NamedTuple):
    """A chunk ready for a pack: header and payload are written one after the other.

    The payload of an incompressible chunk is the caller's own buffer: write it before reusing that.
    """

    chunk_id: bytes
    raw_len: int
    stored_len: int
    codec: int
    header: bytes
    payload: Buffer
    check: int


def is_chunk_size(size_bytes: int) -> bool:
    """Whether docs/design.md §4.3 allows this chunk size."""
    return MIN_CHUNK_BYTES <= size_bytes <= MAX_CHUNK_BYTES and not size_bytes & (size_bytes - 1)


def is_zero(view: Buffer) -> bool:
    """Whether all bytes are zero. Ends at the first that is not."""
    # startswith is a memcmp on any buffer, without a copy; comparing memoryviews goes by element.
    size_bytes = len(view)
    if size_bytes <= MAX_CHUNK_BYTES:
        return _ZEROS.startswith(view)
    whole = memoryview(view)
    step = MAX_CHUNK_BYTES
    return all(_ZEROS.startswith(whole[at : at + step]) for at in range(0, size_bytes, step))


def payload_check(payload: Buffer) -> int:
    """XXH3-64 of a frame's payload: finds damage by chance, not by intent."""
    return xxh3_64_intdigest(payload)


class ChunkHasher:
    """Chunk ids under one point's key. Thread-safe."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        """`key`: the 32 bytes of POINT."""
        if len(key) != 32:
            raise ValueError("the key is 32 bytes")
        self._key = key

    def fast(self, view: Buffer) -> bytes:
        """The id's first half, 16 bytes. Forgeable: docs/design.md §9 says what it may decide."""
        return xxh3_128_digest(view)

    def full(self, view: Buffer) -> bytes:
        """The chunk's id, 32 bytes."""
        return self.full_from(xxh3_128_digest(view), view)

    def full_from(self, fast: bytes, view: Buffer) -> bytes:
        """The chunk's id when fast(view) is known already."""
        return fast + blake3(view, key=self._key).digest(CHUNK_ID_BYTES - FAST_BYTES)


class Encoder:
    """Makes frames out of chunks. One per thread."""

    __slots__ = ("_zstd",)

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)

    def encode(self, chunk_id: bytes, view: Buffer) -> Frame:
        """The frame of a chunk of 1 to 4 MiB bytes. It may keep `view` as its payload."""
        raw_len = len(view)
        if not 0 < raw_len <= MAX_CHUNK_BYTES or len(chunk_id) != CHUNK_ID_BYTES:
            raise ValueError(f"chunk of {raw_len} bytes, id of {len(chunk_id)} bytes")
        codec, payload = CODEC_ZSTD, self._zstd.compress(memoryview(view))
        if len(payload) > raw_len - (raw_len >> _LEAST_GAIN_SHIFT) - 1:
            return make_frame(chunk_id, raw_len, CODEC_RAW, view)
        return make_frame(chunk_id, raw_len, codec, payload)


def make_frame(chunk_id: bytes, raw_len: int, codec: int, payload: Buffer) -> Frame:
    """The frame around a payload that is encoded already (a chunk that gc moves)."""
    check = payload_check(payload)
    stored_len = len(payload)
    header = FRAME_HEADER.pack(FRAME_MAGIC, codec, 0, 0, raw_len, stored_len, chunk_id, check)
    return Frame(chunk_id, raw_len, stored_len, codec, header, payload, check)


class Decoder:
    """Turns payloads into chunks again. One per thread."""

    __slots__ = ("_zstd",)

    def __init__(self) -> None:
        # For a frame that is cut short zstd would allocate the window that it claims.
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_CHUNK_BYTES)

    def decode(
        self, codec: int, stored: Buffer, raw_len: int, into: memoryview | None = None
    ) -> Buffer:
        """The chunk's `raw_len` bytes; for a raw payload that payload itself, not a copy.

        What has to be decompressed comes into `into`, if given, which has `raw_len` bytes; then
        bytes behind the compressed chunk are not noticed: who gives it proves the content.
        Never makes more than `raw_len` bytes. Raises Damaged unless exactly so many come out.
        """
        if not 0 < raw_len <= MAX_CHUNK_BYTES:
            raise Damaged(f"chunk of {raw_len} bytes")
        raw: Buffer
        if codec == CODEC_RAW:
            raw = stored
        elif codec == CODEC_ZSTD and into is not None:
            raw = into[: self._decompress_into(stored, into)]
        elif codec == CODEC_ZSTD:
            raw = self.decompress(stored, raw_len)
        else:
            raise Damaged(f"codec {codec} is no whole chunk's")
        if len(raw) != raw_len:
            raise Damaged(f"chunk has {len(raw)} bytes, not {raw_len}")
        return raw

    def decompress(self, stored: Buffer, raw_len: int) -> bytes:
        """Exactly `raw_len` bytes out of one zstd frame; Damaged."""
        source = memoryview(stored)
        try:
            # zstandard allocates what the frame promises, so that is looked at first.
            promised = zstandard.frame_content_size(source)
            if promised != raw_len:
                raise Damaged(f"compressed chunk promises {promised} bytes, not {raw_len}")
            return self._zstd.decompress(source, max_output_size=raw_len, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Damaged(f"compressed chunk: {error}") from error

    def _decompress_into(self, stored: Buffer, into: memoryview) -> int:
        """The number of bytes that came out, at most as many as fit."""
        try:
            # zstd writes straight into memory that holds all that the frame promises.
            return self._zstd.stream_reader(memoryview(stored)).readinto(into)
        except zstandard.ZstdError as error:
            raise Damaged(f"compressed chunk: {error}") from error
