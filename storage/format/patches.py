"""Patches: a chunk stored as the blocks in which it differs from another one, its base.

Theory (docs/design.md §4.2): the payload is the base's id, a bitmap of the blocks that differ, and
these blocks one after the other, compressed if that makes them shorter. The chunk's id stays the id
of its whole content, so a patch is proved as any chunk is. A base is always stored whole, so
reading a patch takes two frames, never more.

`encode` decides whether a patch pays; whether it may stand on a base is storage.domain.session's
matter. A PatchEncoder belongs to one thread.
"""

from __future__ import annotations

from typing import NamedTuple

import zstandard

from storage.errors import Damaged
from storage.files.fs import Buffer
from storage.format.chunks import (
    CHUNK_ID_BYTES,
    CODEC_PATCH,
    LEVEL,
    ZERO_MARK,
    Decoder,
    Frame,
    make_frame,
)

BLOCK_BYTES = 4096
MOST_BLOCKS_SHARE = 2  # a chunk with more than 1/2 of its blocks changed is stored whole
# A patch has at most 1/4 of its base's stored bytes. Patches against one base grow with each
# backup; docs/adr/0006 measures what other shares cost in room.
MOST_BYTES_SHARE = 4


class Patch(NamedTuple):
    """A payload taken apart. `blocks`: which differ, ascending; `stored`: their bytes, encoded."""

    base: bytes
    blocks: list[int]
    blocks_bytes: int
    stored: memoryview


def block_count(raw_len: int) -> int:
    """Blocks of a chunk; the last one may be short."""
    return -(-raw_len // BLOCK_BYTES)


def overhead_bytes(raw_len: int) -> int:
    """What comes before the blocks in a patch of a chunk of `raw_len` bytes."""
    return CHUNK_ID_BYTES + -(-block_count(raw_len) // 8)


def base_of(payload: Buffer) -> bytes:
    """The base's id in a patch's payload."""
    return bytes(memoryview(payload)[:CHUNK_ID_BYTES])


def is_base_of(base: bytes, chunk_id: bytes) -> bool:
    """Whether a chunk's patch may name this base at all."""
    return base not in (chunk_id, ZERO_MARK)


def changed_blocks(base: bytes, view: memoryview) -> list[int]:
    """The blocks in which two chunks of one length differ."""
    # startswith is a memcmp without a copy; comparing memoryviews goes by element.
    differ, size = base.startswith, BLOCK_BYTES
    return [at // size for at in range(0, len(base), size) if not differ(view[at : at + size], at)]


class PatchEncoder:
    """Makes patch frames. One per thread."""

    __slots__ = ("_zstd",)

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)

    def encode(
        self, chunk_id: bytes, view: memoryview, base_id: bytes, base: Buffer, base_stored_len: int
    ) -> Frame | None:
        """The frame of a chunk against its base's content; None when it is better stored whole."""
        raw_len = len(view)
        if raw_len != len(base) or not is_base_of(base_id, chunk_id):
            return None
        blocks = changed_blocks(bytes(base), view)
        if not 0 < len(blocks) <= block_count(raw_len) // MOST_BLOCKS_SHARE:
            return None
        changed = b"".join(view[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES] for at in blocks)
        packed = self._zstd.compress(changed)
        head = base_id + _bitmap(blocks, raw_len)
        payload = head + (packed if len(packed) < len(changed) else changed)
        if len(payload) > base_stored_len // MOST_BYTES_SHARE:
            return None
        return make_frame(chunk_id, raw_len, CODEC_PATCH, payload)


def _bitmap(blocks: list[int], raw_len: int) -> bytes:
    bits = sum(1 << block for block in blocks)
    return bits.to_bytes(overhead_bytes(raw_len) - CHUNK_ID_BYTES, "little")


def parse_patch(payload: Buffer, raw_len: int) -> Patch:
    """Takes a payload apart. Damaged unless it can be the patch of a chunk of `raw_len` bytes."""
    view = memoryview(payload)
    head, stored = overhead_bytes(raw_len), view[overhead_bytes(raw_len) :]
    bits = int.from_bytes(view[CHUNK_ID_BYTES:head], "little")
    count = block_count(raw_len)
    blocks = [at for at in range(count) if bits >> at & 1]
    if not blocks or bits >> count or not stored:
        raise Damaged("patch without a valid bitmap or blocks")
    last_bytes = raw_len - (count - 1) * BLOCK_BYTES
    blocks_bytes = len(blocks) * BLOCK_BYTES
    if blocks[-1] == count - 1:
        blocks_bytes += last_bytes - BLOCK_BYTES
    if len(stored) > blocks_bytes:
        raise Damaged(f"patch of {blocks_bytes} bytes stored as {len(stored)}")
    return Patch(bytes(view[:CHUNK_ID_BYTES]), blocks, blocks_bytes, stored)


def patched(
    payload: Buffer, raw_len: int, base: Buffer, decoder: Decoder, into: memoryview | None = None
) -> Buffer:
    """The chunk's content out of its patch and its base's content. Damaged if they don't fit.

    It comes into `into`, if given, which has `raw_len` bytes.
    """
    patch = parse_patch(payload, raw_len)
    if len(base) != raw_len:
        raise Damaged(f"patch of a chunk of {raw_len} bytes, base of {len(base)}")
    changed: Buffer = patch.stored
    if len(patch.stored) < patch.blocks_bytes:
        changed = decoder.decompress(patch.stored, patch.blocks_bytes)
    source = memoryview(changed)
    content = memoryview(bytearray(raw_len)) if into is None else into
    content[:] = base
    for number, block in enumerate(patch.blocks):
        start = block * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, raw_len)
        content[start:end] = source[number * BLOCK_BYTES : number * BLOCK_BYTES + end - start]
    return content
