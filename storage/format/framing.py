"""Small objects (docs/design.md §4.1): POINT, DOMAIN and the log's records, as bytes.

Magic, format, flags, length, body, and a digest of all that. Decoding checks in the order in which
the bytes can be believed: what it is, whether this version may read it, how long it is, and then
the digest, before anybody looks at the body. The format comes before the digest, since a newer
format may have another one; but an object of our format whose format or flags were damaged is told
by its digest, so that nobody is sent to upgrade for a flipped bit.
"""

from __future__ import annotations

import struct
from typing import TypeVar

import msgspec
from blake3 import blake3

from storage.errors import Damaged, PointNewerFormat

FORMAT = 1
DIGEST_BYTES = 16
BodyT = TypeVar("BodyT")

_HEADER = struct.Struct("<4sHHI")
UPGRADE = "a newer one wrote it, upgrade this host"


def encode_object(magic: bytes, body: bytes) -> bytes:
    """The object's bytes. `magic` is 4 bytes, the body under 4 GiB."""
    start = _HEADER.pack(magic, FORMAT, 0, len(body)) + body
    return start + blake3(start).digest(DIGEST_BYTES)


def decode_object(magic: bytes, data: bytes, limit_bytes: int, what: str) -> bytes:
    """The body of an object of at most `limit_bytes`. `what` names it in errors.

    Raises Damaged unless `data` is exactly one such object; PointNewerFormat for a format or flag
    that this version does not know.
    """
    if len(data) < _HEADER.size + DIGEST_BYTES:
        raise Damaged(f"{what}: {len(data)} bytes are too few")
    found, version, flags, body_bytes = _HEADER.unpack_from(data)
    if found != magic:
        raise Damaged(f"{what}: magic is {found!r}, not {magic!r}")
    try:
        check_format(version, flags, what)
    except PointNewerFormat as error:
        ours = _HEADER.pack(magic, FORMAT, 0, body_bytes) + data[_HEADER.size : -DIGEST_BYTES]
        if blake3(ours).digest(DIGEST_BYTES) == data[-DIGEST_BYTES:]:
            raise Damaged(f"{what}: its header is not the one that was written") from error
        raise
    if body_bytes > limit_bytes:
        raise Damaged(f"{what}: body of {body_bytes} bytes; at most {limit_bytes} are allowed")
    end = _HEADER.size + body_bytes
    if len(data) != end + DIGEST_BYTES:
        raise Damaged(f"{what}: {len(data)} bytes, {end + DIGEST_BYTES} were written")
    view = memoryview(data)
    if blake3(view[:end]).digest(DIGEST_BYTES) != data[end:]:
        raise Damaged(f"{what}: digest does not match")
    return data[_HEADER.size : end]


def decode_body(decoder: msgspec.msgpack.Decoder[BodyT], body: bytes, what: str) -> BodyT:
    """The body as its Struct. Damaged for anything else, however it is nested or spelled."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(f"{what}: {error}") from error


def check_format(version: int, flags: int, what: str) -> None:
    """Raises PointNewerFormat for what only a newer vmkeep writes, Damaged for what none did."""
    if version > FORMAT:
        raise PointNewerFormat(f"{what}: format {version}, this vmkeep reads {FORMAT}: {UPGRADE}")
    if version < FORMAT:
        raise Damaged(f"{what}: no such format: {version}")
    if flags:
        raise PointNewerFormat(f"{what}: unknown flags {flags:#06x}: {UPGRADE}")
