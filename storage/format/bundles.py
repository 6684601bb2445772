"""Bundles: a stretch of the log's records in one file, for those who read a log from its start.

A record is a file of its own, since its name is what orders appends; so who reads ten thousand of
them from a cold medium waits ten thousand times. Once a stretch is full, any host of the domain
writes it out once more as one file (storage.domain.bundling).

Nobody believes a bundle. Its last record has to be, byte for byte, the one that the log has under
that number, and each one names the digest of the one before; so all of them are what the log says,
or the bundle is not used (Log.read_bundled). One that is damaged, lies or is not there costs time
only. The log is its records: they alone are appended to, and never deleted.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from storage.errors import Damaged
from storage.format.framing import decode_body, decode_object, encode_object

MAGIC = b"VKBU"
SUFFIX = ".bundle"
RECORDS_PER_BUNDLE = 256  # the rest of a log, which is read one by one, is shorter
# All records of one. Of larger ones, opening each is not what takes the time.
RECORDS_LIMIT_BYTES = 16 << 20
BODY_LIMIT_BYTES = RECORDS_LIMIT_BYTES + RECORDS_PER_BUNDLE * 8
FILE_LIMIT_BYTES = BODY_LIMIT_BYTES + 64

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[bytes])


def stretch_of(seq: int) -> tuple[int, int]:
    """(first, last) of the records that are in one bundle with `seq`."""
    start = seq - seq % RECORDS_PER_BUNDLE
    return max(start, 1), start + RECORDS_PER_BUNDLE - 1


def encode_bundle(records: Sequence[bytes]) -> bytes:
    """The file that holds these records' files, in order: RECORDS_LIMIT_BYTES at most."""
    return encode_object(MAGIC, _encoder.encode(records))


def decode_bundle(file_bytes: bytes, count: int, what: str) -> list[bytes]:
    """The `count` records' files. Damaged, PointNewerFormat."""
    body = decode_object(MAGIC, file_bytes, BODY_LIMIT_BYTES, what)
    records = decode_body(_decoder, body, f"{what}: not a bundle")
    if len(records) != count:
        raise Damaged(f"{what}: holds {len(records)} records, not {count}")
    return records
