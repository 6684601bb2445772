"""The NBD protocol as bytes: numbers, headers, and what a server's messages may look like.

Fixed newstyle handshake, structured replies, block status; 32-bit lengths (no extended headers, no
TLS). Everything is big-endian. Nothing here does I/O. Every decoder takes a whole message whose
length was checked against the `MOST_…` limits before it was received, and raises DiskServerBroken
for one that no server may send. The protocol's own document is the truth on the meaning:
github.com/NetworkBlockDevice/nbd, doc/proto.md.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.errors import DiskServerBroken

DEFAULT_PORT = 10809

# Handshake.
INIT_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
HANDSHAKE_FIXED_NEWSTYLE = 1
HANDSHAKE_NO_ZEROES = 2
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_SET_META_CONTEXT = 10
REP_ACK = 1
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERROR = 1 << 31
REP_ERR_UNSUP = REP_ERROR | 1
INFO_EXPORT = 0
INFO_BLOCK_SIZE = 3

# What an export can do.
FLAG_READ_ONLY = 1 << 1
FLAG_SEND_FLUSH = 1 << 2
FLAG_CAN_MULTI_CONN = 1 << 8

# Transmission.
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_BLOCK_STATUS = 7
CHUNK_DONE = 1
CHUNK_NONE = 0
CHUNK_OFFSET_DATA = 1
CHUNK_OFFSET_HOLE = 2
CHUNK_BLOCK_STATUS = 5
CHUNK_ERROR = 1 << 15
CHUNK_ERROR_OFFSET = CHUNK_ERROR | 2

# Flags of an extent, by its context.
BASE_ALLOCATION = "base:allocation"
STATE_ZERO = 2
STATE_DIRTY = 1

MOST_NAME_BYTES = 4096  # of any string, says the protocol
MOST_OPTION_REPLY_BYTES = 64 << 10
MOST_OPTION_REPLIES = 256
MOST_ERROR_BYTES = MOST_NAME_BYTES + 64
MOST_STATUS_BYTES = 16 << 20  # QEMU sends 1 MiB at most, nbdkit 8
SMALLEST_MAX_BLOCK_BYTES = 4096

GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
REPLY_HEAD = struct.Struct(">IIQ")  # all of a simple reply; the beginning of a chunk
CHUNK_LENGTH = struct.Struct(">I")
OFFSET = struct.Struct(">Q")
HOLE = struct.Struct(">QI")

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_EXPORT = struct.Struct(">HQH")
_BLOCK_SIZE = struct.Struct(">HIII")
_ERROR = struct.Struct(">IH")
_EXTENT = struct.Struct(">II")


class Extent(NamedTuple):
    """`size_bytes` bytes from `offset` that have the same `flags` in one context."""

    offset: int
    size_bytes: int
    flags: int


@dataclass(frozen=True, slots=True)
class ExportFacts:
    """What the handshake agreed on. Block sizes bound the place and length of requests, in bytes.

    `contexts`: by name, the ids of those asked for that the server has.
    """

    size_bytes: int
    flags: int
    structured: bool
    contexts: dict[str, int]
    min_block_bytes: int = 1
    max_block_bytes: int = 32 << 20  # what every server has to take that names no limit


class ChunkHead(NamedTuple):
    flags: int
    kind: int
    cookie: int


def encode_option(option: int, body: bytes) -> bytes:
    return OPTION.pack(OPTION_MAGIC, option, len(body)) + body


def encode_go(export: str) -> bytes:
    """The body of OPT_GO that also asks for the block sizes."""
    return _string(export) + _U16.pack(1) + _U16.pack(INFO_BLOCK_SIZE)


def encode_contexts(export: str, contexts: Sequence[str]) -> bytes:
    """The body of OPT_SET_META_CONTEXT."""
    return _string(export) + _U32.pack(len(contexts)) + b"".join(map(_string, contexts))


def encode_request(command: int, cookie: int, offset: int, size_bytes: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, offset, size_bytes)


def decode_context(body: bytes) -> tuple[int, str]:
    """(id, name) of a REP_META_CONTEXT."""
    if len(body) < _U32.size:
        raise DiskServerBroken(f"a metadata context of {len(body)} bytes")
    return _U32.unpack_from(body)[0], body[_U32.size :].decode(errors="replace")


def decode_export(body: bytes) -> tuple[int, int]:
    """(size in bytes, flags) of an INFO_EXPORT."""
    if len(body) != _EXPORT.size:
        raise DiskServerBroken(f"export facts of {len(body)} bytes")
    _, size_bytes, flags = _EXPORT.unpack(body)
    if size_bytes >= 1 << 63:
        raise DiskServerBroken(f"an export of {size_bytes} bytes")
    return size_bytes, flags


def decode_block_sizes(body: bytes) -> tuple[int, int]:
    """(smallest, largest) block in bytes of an INFO_BLOCK_SIZE."""
    if len(body) != _BLOCK_SIZE.size:
        raise DiskServerBroken(f"block sizes of {len(body)} bytes")
    _, least, _, most = _BLOCK_SIZE.unpack(body)
    if not 0 < least <= 64 << 10 or least & (least - 1):
        raise DiskServerBroken(f"a smallest block of {least} bytes")
    if most < max(least, SMALLEST_MAX_BLOCK_BYTES):
        raise DiskServerBroken(f"a largest block of {most} bytes")
    return least, most - most % least


def info_kind(body: bytes) -> int:
    """Which INFO_… a REP_INFO carries."""
    if len(body) < _U16.size:
        raise DiskServerBroken(f"a piece of information of {len(body)} bytes")
    return int(_U16.unpack_from(body)[0])


def chunk_head(flags_and_kind: int, cookie: int) -> ChunkHead:
    """From the two members of REPLY_HEAD that follow its magic."""
    return ChunkHead(flags_and_kind >> 16, flags_and_kind & 0xFFFF, cookie)


def decode_error(kind: int, body: bytes) -> str:
    """What an error chunk says, for people."""
    if len(body) < _ERROR.size:
        raise DiskServerBroken(f"an error chunk of {len(body)} bytes")
    number, text_bytes = _ERROR.unpack_from(body)
    if len(body) < _ERROR.size + text_bytes + (OFFSET.size if kind == CHUNK_ERROR_OFFSET else 0):
        raise DiskServerBroken("an error chunk that is shorter than its text")
    text = body[_ERROR.size : _ERROR.size + text_bytes].decode(errors="replace")
    return f"{error_name(number)}: {text}" if text else error_name(number)


def error_name(number: int) -> str:
    """NBD's error numbers are those of Linux."""
    name = errno.errorcode.get(number)
    return f"{name} ({os.strerror(number)})" if name else f"error {number}"


def decode_status(body: bytes, offset: int) -> tuple[int, list[Extent]]:
    """(context id, extents) of a CHUNK_BLOCK_STATUS that answers for what begins at `offset`."""
    pairs = body[_U32.size :]
    if len(body) < _U32.size + _EXTENT.size or len(pairs) % _EXTENT.size:
        raise DiskServerBroken(f"a block status of {len(body)} bytes")
    extents = []
    for size_bytes, flags in _EXTENT.iter_unpack(pairs):
        if size_bytes == 0:
            raise DiskServerBroken("an extent of no bytes")
        extents.append(Extent(offset, size_bytes, flags))
        offset += size_bytes
    return int(_U32.unpack_from(body)[0]), extents


def _string(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > MOST_NAME_BYTES:
        raise ValueError(f"a name of {len(encoded)} bytes")
    return _U32.pack(len(encoded)) + encoded
