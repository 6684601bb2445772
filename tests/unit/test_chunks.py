from __future__ import annotations

import mmap
import struct
import tracemalloc

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from storage.errors import Damaged
from storage.files.fs import Buffer
from storage.format.chunks import (
    MAX_CHUNK_BYTES,
    ZERO_MARK,
    ChunkHasher,
    Decoder,
    Encoder,
    is_chunk_size,
    is_zero,
    make_frame,
)
from tests.forging import frame
from tests.vectors import colliding_chunks

KEY = b"whats the Elvish word for friend"
HASHER = ChunkHasher(KEY)
ID = bytes(range(32))


def noise(size: int) -> bytes:
    """Bytes that zstd cannot make shorter, the same each time."""
    return bytes(blake3(b"noise").digest(size))


def test_the_id_of_an_empty_input_by_the_published_vectors() -> None:
    assert HASHER.full(b"").hex() == (
        "99aa06d3014798d86001c324468d497f92b2b75604ed3c761f9d6f62392c8a92"
    )


@given(st.binary(max_size=1000))
def test_an_id_is_the_fast_half_and_the_keyed_half(content: bytes) -> None:
    assert HASHER.fast(content).hex() == xxh3_128_hexdigest(content)
    whole = HASHER.fast(content) + blake3(content, key=KEY).digest()[:16]
    assert HASHER.full(content) == whole
    assert HASHER.full_from(HASHER.fast(content), content) == whole


@given(st.binary(min_size=1, max_size=300))
def test_every_kind_of_buffer_has_the_same_id(content: bytes) -> None:
    with mmap.mmap(-1, len(content)) as page:
        page[:] = content
        views: list[Buffer] = [bytearray(content), memoryview(content), page]
        assert {HASHER.full(view) for view in views} == {HASHER.full(content)}
        with memoryview(page) as whole:
            assert HASHER.full(whole) == HASHER.full(content)


def test_the_key_decides_the_second_half_only() -> None:
    other = ChunkHasher(bytes(32)).full(b"content")
    assert other[:16] == HASHER.full(b"content")[:16]
    assert other[16:] != HASHER.full(b"content")[16:]
    with pytest.raises(ValueError, match="32"):
        ChunkHasher(bytes(31))


@pytest.mark.parametrize("size", [241, 4096, 64 << 10, 1 << 20, 4 << 20])
def test_chunks_that_collide_in_the_fast_half_have_different_ids(size: int) -> None:
    first, second = colliding_chunks(size)
    assert first != second
    assert len(first) == len(second) == size
    assert HASHER.fast(first) == HASHER.fast(second)
    assert xxh3_64_intdigest(first) == xxh3_64_intdigest(second)
    assert HASHER.full(first) != HASHER.full(second)


@given(st.integers(1, 5000), st.data())
def test_one_byte_that_is_not_zero_is_seen_anywhere(size: int, data: st.DataObject) -> None:
    assert is_zero(bytes(size))
    content = bytearray(size)
    content[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(1, 255))
    assert not is_zero(content)
    assert not is_zero(memoryview(bytes(content)))


@pytest.mark.parametrize("size", [1, 4096, 64 << 10, 1 << 20, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 9])
def test_zeros_of_any_size_in_a_mapping(size: int) -> None:
    with mmap.mmap(-1, size) as page:
        assert is_zero(page)
        with memoryview(page) as whole:
            assert is_zero(whole)
        page[size - 1] = 1
        assert not is_zero(page)


def test_chunk_sizes() -> None:
    allowed = [size for size in range(0, 9 << 20, 4096) if is_chunk_size(size)]
    assert allowed == [(64 << 10) << shift for shift in range(7)]
    assert not is_chunk_size((64 << 10) + 1)


@pytest.mark.parametrize("content", [b"a" * 4096, noise(4096), b"x", noise(64 << 10)])
def test_a_frame_is_laid_out_as_specified(content: bytes) -> None:
    made = Encoder().encode(ID, content)
    payload = bytes(made.payload)
    assert made.header + payload == frame(ID, made.codec, len(content), payload)
    assert (made.chunk_id, made.raw_len, made.stored_len) == (ID, len(content), len(payload))
    assert made.check == xxh3_64_intdigest(payload)


def test_the_codec_is_zstd_where_that_gains_something() -> None:
    encoder = Encoder()
    assert encoder.encode(ID, b"a" * 4096).codec == 1
    assert encoder.encode(ID, noise(4096)).codec == 0
    hardly = noise(64 << 10)[: (64 << 10) - 600] + bytes(600)
    assert encoder.encode(ID, hardly).codec == 0
    assert encoder.encode(ID, noise(60 << 10) + bytes(4 << 10)).codec == 1


def test_an_incompressible_chunk_is_not_copied() -> None:
    buffer = bytearray(noise(4096))
    made = Encoder().encode(ID, memoryview(buffer))
    buffer[0] ^= 1
    assert made.payload == buffer


@pytest.mark.parametrize("size", [0, MAX_CHUNK_BYTES + 1])
def test_chunks_of_no_allowed_size_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="chunk of"):
        Encoder().encode(ID, bytes(size))
    with pytest.raises(Damaged):
        Decoder().decode(0, bytes(size), size)


def test_an_id_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="id of 31"):
        Encoder().encode(ID[:31], b"x")


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=1, max_size=2000), st.integers(1, 200))
def test_what_was_encoded_is_decoded(piece: bytes, times: int) -> None:
    content = piece * times
    made = Encoder().encode(ID, content)
    assert bytes(Decoder().decode(made.codec, made.payload, made.raw_len)) == content
    again = make_frame(ID, made.raw_len, made.codec, made.payload)
    assert (again.header, again.payload) == (made.header, made.payload)


def test_contexts_can_be_used_again_after_damage() -> None:
    encoder, decoder = Encoder(), Decoder()
    for content in (b"a" * 100_000, noise(1000), b"b" * 70_000):
        made = encoder.encode(ID, content)
        with pytest.raises(Damaged):
            decoder.decode(1, b"nonsense", 100)
        assert decoder.decode(made.codec, made.payload, made.raw_len) == content


def test_a_raw_payload_is_handed_through() -> None:
    view = memoryview(b"content")
    assert Decoder().decode(0, view, 7) is view
    for raw_len in (6, 8):
        with pytest.raises(Damaged):
            Decoder().decode(0, view, raw_len)


def test_unknown_codecs() -> None:
    for codec in (2, 3):  # a patch alone is no chunk
        with pytest.raises(Damaged):
            Decoder().decode(codec, b"x", 1)


@given(st.binary(max_size=200), st.integers(1, 200))
def test_any_bytes_decode_to_that_many_or_are_damaged(stored: bytes, raw_len: int) -> None:
    try:
        raw = Decoder().decode(1, stored, raw_len)
    except Damaged:
        return
    assert len(raw) == raw_len


def bomb(promised: int | None, actual: int) -> bytes:
    """A zstd frame of `actual` zeros (128 KiB blocks of run length) that promises another size."""
    if promised is None:
        start = b"\x28\xb5\x2f\xfd" + bytes([0x00, 0x58])  # window of 2 MiB, size not said
    else:
        start = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", promised)  # single segment
    block_bytes = 128 << 10
    count = actual // block_bytes
    blocks = [
        struct.pack("<I", block_bytes << 3 | 2 | (at == count - 1))[:3] for at in range(count)
    ]
    return start + b"".join(block + b"\0" for block in blocks)


def test_the_bomb_is_valid_zstd() -> None:
    one_mib = bomb(1 << 20, 1 << 20)
    assert zstandard.ZstdDecompressor().decompress(one_mib) == bytes(1 << 20)
    assert Decoder().decode(1, one_mib, 1 << 20) == bytes(1 << 20)
    unsaid = bomb(None, 1 << 20)
    assert zstandard.ZstdDecompressor().decompress(unsaid, 1 << 20) == bytes(1 << 20)


@pytest.mark.parametrize(
    "stored",
    [
        bomb(1 << 32, 1 << 32),
        bomb(1 << 30, 1 << 30),
        bomb(1 << 20, 1 << 30),
        bomb(None, 1 << 30),
        bomb(1 << 62, 1 << 20),
        bomb((1 << 64) - 3, 1 << 20),
        bomb((1 << 20) - 1, 1 << 20),
        bomb((1 << 20) + 1, 1 << 20),
        bomb(0, 1 << 20),
        # The right size, cut short, with a window of 64 MiB for what is still to come.
        b"\x28\xb5\x2f\xfd\x80\x80" + struct.pack("<I", 1 << 20) + bomb(0, 1 << 20)[13:-1],
    ],
)
def test_a_bomb_ends_at_the_raw_length(stored: bytes) -> None:
    decoder = Decoder()
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            decoder.decode(1, stored, 1 << 20)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3 << 20


@pytest.mark.parametrize("extra", [b"\0", bomb(1 << 20, 1 << 20), b"\x50\x2a\x4d\x18\0\0\0\0"])
def test_bytes_behind_the_compressed_chunk_are_damage(extra: bytes) -> None:
    with pytest.raises(Damaged):
        Decoder().decode(1, bomb(1 << 20, 1 << 20) + extra, 1 << 20)


def test_every_truncation_of_a_compressed_chunk_is_damage() -> None:
    stored = bytes(Encoder().encode(ID, noise(300) * 20).payload)
    for size in range(len(stored)):
        with pytest.raises(Damaged):
            Decoder().decode(1, stored[:size], 6000)


def test_the_zero_mark_is_no_chunk() -> None:
    assert bytes(32) == ZERO_MARK
    assert HASHER.full(bytes(1 << 20)) != ZERO_MARK
