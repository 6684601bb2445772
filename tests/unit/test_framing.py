from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import Damaged, PointNewerFormat
from storage.format.framing import decode_object, encode_object
from tests.forging import small_object

BODY = b"\x81\xa1k\xa1v"


@given(st.sampled_from([b"VKPO", b"VKDO", b"VKRE"]), st.binary(max_size=300))
def test_round_trip_in_the_specified_layout(magic: bytes, body: bytes) -> None:
    encoded = encode_object(magic, body)
    assert encoded == small_object(magic, body)
    assert decode_object(magic, encoded, 300, "it") == body


def test_the_bytes_of_format_1() -> None:
    assert encode_object(b"VKRE", BODY).hex() == (
        "564b5245010000000500000081a16ba176ef58a55f43903bc5866bc9b040e89eb9"
    )


def test_every_flipped_bit_is_noticed_as_damage() -> None:
    """Also one of the format or the flags: no newer version wrote it."""
    encoded = encode_object(b"VKPO", BODY)
    for position in range(len(encoded)):
        for bit in range(8):
            flipped = bytearray(encoded)
            flipped[position] ^= 1 << bit
            with pytest.raises(Damaged, match=r"^POINT: "):
                decode_object(b"VKPO", bytes(flipped), 64, "POINT")


def test_every_truncation_and_a_longer_file_are_noticed() -> None:
    encoded = encode_object(b"VKPO", BODY)
    for size in range(len(encoded)):
        with pytest.raises(Damaged):
            decode_object(b"VKPO", encoded[:size], 64, "it")
    with pytest.raises(Damaged):
        decode_object(b"VKPO", encoded + b"\0", 64, "it")


def test_another_kind_of_object_is_refused() -> None:
    with pytest.raises(Damaged, match="magic"):
        decode_object(b"VKDO", encode_object(b"VKPO", BODY), 64, "it")


@pytest.mark.parametrize(("version", "flags"), [(2, 0), (0xFFFF, 0), (1, 1), (1, 2), (1, 0x8000)])
def test_what_a_newer_version_wrote_is_refused_as_such(version: int, flags: int) -> None:
    with pytest.raises(PointNewerFormat, match=r"^it: .* upgrade this host$") as caught:
        decode_object(b"VKPO", small_object(b"VKPO", BODY, version, flags), 64, "it")
    assert (f"format {version}," if version > 1 else f"flags {flags:#06x}") in str(caught.value)


def test_format_0_was_never_written() -> None:
    with pytest.raises(Damaged):
        decode_object(b"VKPO", small_object(b"VKPO", BODY, 0), 64, "it")


def test_the_limit_is_on_the_body() -> None:
    encoded = encode_object(b"VKPO", bytes(64))
    assert decode_object(b"VKPO", encoded, 64, "it") == bytes(64)
    with pytest.raises(Damaged, match="at most 63"):
        decode_object(b"VKPO", encoded, 63, "it")


def test_a_claimed_4_gib_body_is_refused() -> None:
    encoded = bytearray(encode_object(b"VKPO", BODY))
    encoded[8:12] = b"\xff\xff\xff\xff"
    for limit_bytes in (64, 1 << 40):
        with pytest.raises(Damaged):
            decode_object(b"VKPO", bytes(encoded), limit_bytes, "it")
