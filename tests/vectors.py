"""Inputs that are made, not found: chunks that collide under XXH3.

XXH3's loop for inputs over 240 bytes keeps eight sums. For each 8-byte lane of each 64-byte stripe
it adds the data to one sum and low32(data ^ key) * high32(data ^ key) to another, the key coming
from a public constant. When the high half of the data is the key's, the product is zero, and what
is left is a plain sum of the low halves: two numbers in one lane of two stripes of the same block
may change places and nobody notices.
"""

from __future__ import annotations

import random
import struct

# The first 16 of the 192 bytes of XXH3's default secret (xxhash.h, XXH3_kSecret); the key of lane 0
# is at 0 for the first stripe and at 8 for the second.
_SECRET = bytes.fromhex("b8fe6c3923a44bbe7c01812cf721ad1c")
_STRIPE_BYTES = 64
_LEAST_BYTES = 241  # shorter inputs take another path through XXH3


def colliding_chunks(size: int) -> tuple[bytes, bytes]:
    """Two different chunks of `size` (at least 241) bytes with equal XXH3-128 and XXH3-64."""
    if size < _LEAST_BYTES:
        raise ValueError(f"XXH3 sums from {_LEAST_BYTES} bytes on, not at {size}")
    content = random.Random(size).randbytes(size)
    return _with_lanes(content, 1, 2), _with_lanes(content, 2, 1)


def _with_lanes(content: bytes, first: int, second: int) -> bytes:
    """The content with these low halves in lane 0 of its first two stripes."""
    chunk = bytearray(content)
    for stripe, low in enumerate((first, second)):
        (key,) = struct.unpack_from("<Q", _SECRET, 8 * stripe)
        struct.pack_into("<II", chunk, _STRIPE_BYTES * stripe, low, key >> 32)
    return bytes(chunk)
