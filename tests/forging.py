"""Files of the point written from docs/design.md alone, without the code in storage/.

So a test sees it when the code's format drifts, and can make files whose digests are right and
whose contents lie.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blake3 import blake3
from xxhash import xxh3_64_intdigest

SESSION = bytes(range(16))
DISK = bytes(range(100, 116))
CHUNK_SIZE = 64 << 10


def digest16(content: bytes) -> bytes:
    return bytes(blake3(content).digest()[:16])


def small_object(magic: bytes, body: bytes, version: int = 1, flags: int = 0) -> bytes:
    start = magic + struct.pack("<HHI", version, flags, len(body)) + body
    return start + digest16(start)


@dataclass(frozen=True)
class Sealed:
    """All that a sealed file says; None where the truth is to be worked out."""

    magic: bytes
    extra: bytes
    items: bytes
    rows: Sequence[bytes]
    row_size: int
    version: int = 1
    flags: int = 0
    n: int = 7
    chunk_size: int = CHUNK_SIZE
    table_offset: int | None = None
    count: int | None = None
    file_size: int | None = None
    annex: bytes = b""
    annex_size: int | None = None
    session: bytes = SESSION

    def but(self, **changes: object) -> Sealed:
        return replace(self, **changes)  # type: ignore[arg-type]

    def encoded(self) -> bytes:
        header = self.magic + struct.pack("<HH", self.version, self.flags) + self.session
        header += struct.pack("<II", self.n, self.chunk_size) + self.extra
        table = b"".join(self.rows)
        offset = _or(self.table_offset, 64 + len(self.items))
        signed = struct.pack("<QII", offset, _or(self.count, len(self.rows)), self.row_size)
        behind = table + self.annex
        size = _or(self.file_size, len(header) + len(self.items) + len(behind) + 48)
        annex_size = _or(self.annex_size, len(self.annex))
        rest = digest16(header + behind + signed) + struct.pack("<QI", size, annex_size) + b"VKEN"
        return header + self.items + behind + signed + rest


def frame(chunk_id: bytes, codec: int, raw_len: int, payload: bytes, flags: int = 0) -> bytes:
    start = b"VKFR" + struct.pack("<BBHII", codec, flags, 0, raw_len, len(payload))
    return start + chunk_id + struct.pack("<Q", xxh3_64_intdigest(payload)) + payload


def pack_row(
    offset: int, chunk_id: bytes, codec: int, raw_len: int, payload: bytes, flags: int = 0
) -> bytes:
    start = struct.pack("<IIIBBH", offset, raw_len, len(payload), codec, flags, 0)
    return start + chunk_id + struct.pack("<Q", xxh3_64_intdigest(payload))


def pack(items: bytes, rows: Sequence[bytes], bases: bytes = b"") -> Sealed:
    return Sealed(b"VKPK", bytes(32), items, rows, 56, annex=bases)


def page_row(page_no: int, entries: int, offset: int, page: bytes) -> bytes:
    return struct.pack("<IIQ", page_no, entries, offset) + digest16(page)


def manifest(items: bytes, rows: Sequence[bytes], capacity: int, kind: int = 0) -> Sealed:
    extra = DISK + struct.pack("<QB", capacity, kind) + bytes(7)
    return Sealed(b"VKMF", extra, items, rows, 32)


def _or(given: int | None, truth: int) -> int:
    return truth if given is None else given
