"""storage.view.filling against the rules of the index, over dictionaries. See also invariant I8 in
the model (tests/model), the state machine (tests/property) and tests/damage."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.format.chunks import CODEC_PATCH, CODEC_ZSTD, FRAME_HEADER_BYTES, ZERO_MARK
from storage.format.packs import PackEntry
from storage.view import filling as filling_module
from storage.view.filling import Filling
from storage.view.tables import LOST_PACK, ChunkRow, unpack_chunk_row

CHUNKS = [bytes([number]) * 32 for number in range(1, 13)]
NOWHERE = PackEntry(0, 0, 0, 0, 0, b"", 0)
Frames = list[tuple[int, int | None]]  # chunk, base

frames = st.lists(
    st.tuples(st.integers(0, 11), st.one_of(st.none(), st.none(), st.integers(0, 11))), max_size=8
)


def entries_of(pack: Frames) -> list[PackEntry]:
    return [
        PackEntry(
            offset=64 + 1000 * at,
            raw_len=65536,
            stored_len=500 + at,
            codec=CODEC_ZSTD if base is None else CODEC_PATCH,
            flags=0,
            chunk_id=CHUNKS[chunk],
            check=0,
            base=b"" if base is None else CHUNKS[base],
        )
        for at, (chunk, base) in enumerate(pack)
    ]


def expected(packs: list[Frames], named: Counter[bytes]) -> dict[bytes, ChunkRow]:
    """The last pack places a chunk; a patch that is referred to refers to its base, once."""
    places: dict[bytes, tuple[int, PackEntry]] = {}
    for number, pack in enumerate(packs):
        for entry in entries_of(pack):
            places[entry.chunk_id] = (number, entry)
    live: set[bytes] = set()
    while True:
        on_base = Counter(places[chunk][1].base for chunk in live)
        references = named + on_base
        patches = {c for c in references if c in places and places[c][1].base}
        if patches == live:
            break
        live = patches
    rows = {}
    for chunk, count in references.items():
        number, at = places.get(chunk, (LOST_PACK, NOWHERE))
        rows[chunk] = ChunkRow(number, at.offset, at.stored_len, count, on_base[chunk], at.base)
    return rows


@given(
    st.lists(frames, max_size=5),
    st.lists(st.lists(st.integers(0, 12), max_size=9), max_size=5),
    st.lists(st.integers(0, 11), max_size=6),
    st.sampled_from([1, 3, 1000]),
)
@settings(max_examples=400, deadline=None)
def test_it_is_what_the_rules_say(
    tmp_path_factory: pytest.TempPathFactory,
    packs: list[Frames],
    pages: list[list[int]],
    withdrawn: list[int],
    at_once: int,
) -> None:
    ids = [*CHUNKS, ZERO_MARK]
    with pytest.MonkeyPatch.context() as patch, Filling(str(tmp_path_factory.getbasetemp())) as one:
        patch.setattr(filling_module, "ITEMS_PER_RUN", at_once)
        patch.setattr(filling_module, "ITEMS_PER_RANGE", at_once)
        for page in pages:
            one.refer(ids[chunk] for chunk in page)
        for number, pack in enumerate(packs):
            one.place(number, entries_of(pack))
        one.refer(CHUNKS[chunk] for chunk in withdrawn)
        one.refer((CHUNKS[chunk] for chunk in withdrawn), -1)
        rows = [row for some in one.rows() for row in some]
        live = one.live
    named = Counter(ids[chunk] for page in pages for chunk in page)
    del named[ZERO_MARK]
    wanted = expected(packs, named)
    assert [chunk for chunk, _ in rows] == sorted(wanted)
    assert {chunk: unpack_chunk_row(row) for chunk, row in rows} == wanted
    assert live.chunks == Counter(row.pack for row in wanted.values())
    size_bytes: Counter[int] = Counter()
    for row in wanted.values():
        size_bytes[row.pack] += FRAME_HEADER_BYTES + row.stored_len + len(row.base)
    assert live.size_bytes == size_bytes


def test_little_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is gathered nor what is given out grows with what there is."""
    monkeypatch.setattr(filling_module, "ITEMS_PER_RUN", 100)
    monkeypatch.setattr(filling_module, "ITEMS_PER_RANGE", 100)
    chance, largest = random.Random(1), 0
    with Filling(str(tmp_path)) as one:
        for number in range(50):
            ids = [chance.randbytes(32) for _ in range(40)]
            pack = [PackEntry(64, 65536, 500, CODEC_ZSTD, 0, chunk, 0) for chunk in ids]
            one.place(number, pack)
            one.refer(ids)
        sizes = [len(some) for some in one.rows()]
        largest = max(sizes)
    assert sum(sizes) == 2000
    assert largest <= 200
