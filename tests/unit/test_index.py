"""storage.view.index: new references, of our own records and of others', beside what is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from storage.errors import ChunkMissing
from storage.format.manifests import encode_page
from storage.format.packs import PackEntry
from storage.view import tables
from storage.view.index import Index
from storage.view.memory_tables import MemoryTables
from storage.view.tables import LOST_PACK, ChunkRow, ManifestState, pack_chunk_row, unpack_chunk_row

LOST, FOUND, BASE, ABSENT = (bytes([number]) * 32 for number in range(1, 5))
MANIFEST = "session/0"


class OnePage:
    """Contents with one manifest of one page."""

    def __init__(self, *chunks: bytes) -> None:
        self._page = encode_page(dict(enumerate(chunks)))

    def footer(self, pack: str, digest: bytes) -> Sequence[PackEntry]:
        raise AssertionError(f"{pack} {digest!r}")

    def pages(self, manifest: str, digest: bytes) -> Iterator[tuple[int, bytes]]:
        assert (manifest, digest) == (MANIFEST, b"digest")
        yield 0, self._page


@pytest.fixture
def state() -> MemoryTables:
    made = MemoryTables()
    tables.manifests.put(made, MANIFEST, ManifestState(1, 1, b"digest", "", 1))
    tables.add_pack(made, "session/1", tables.PackState(7, 1000, 2, b"", 0, 0))
    rows = {
        LOST: ChunkRow(LOST_PACK, 0, 0, 1),
        FOUND: ChunkRow(7, 64, 100, 1),
        BASE: ChunkRow(7, 300, 100, 3, 2),
    }
    for chunk, row in rows.items():
        made.table("chunks").put(chunk, pack_chunk_row(row))
    return made


def references(state: MemoryTables) -> dict[bytes, int]:
    return {key: unpack_chunk_row(row).references for key, row in state.table("chunks").scan()}


@pytest.mark.parametrize("beside", [[FOUND], [FOUND, BASE]], ids=["all whole", "a base too"])
def test_a_record_of_ours_can_not_refer_to_what_is_lost(
    state: MemoryTables, beside: list[bytes]
) -> None:
    index = Index(state, OnePage(LOST, *beside), strict=True)
    index.add_layer(1, MANIFEST, root=True)
    with pytest.raises(ChunkMissing) as caught:
        index.flush()
    assert caught.value.ids == {LOST}
    assert references(state) == {LOST: 1, FOUND: 1, BASE: 3}


@pytest.mark.parametrize("beside", [[FOUND], [FOUND, BASE]], ids=["all whole", "a base too"])
def test_a_record_of_the_log_can(state: MemoryTables, beside: list[bytes]) -> None:
    """Its author may have seen the chunk in a pack that we can't read."""
    index = Index(state, OnePage(LOST, FOUND, *beside))
    index.add_layer(1, MANIFEST, root=True)
    index.flush()
    assert references(state) == {LOST: 2, FOUND: 3, BASE: 3 + (BASE in beside)}


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_nowhere_is_missing(state: MemoryTables, strict: bool) -> None:
    index = Index(state, OnePage(FOUND, ABSENT), strict=strict)
    index.add_layer(1, MANIFEST, root=True)
    with pytest.raises(ChunkMissing) as caught:
        index.flush()
    assert caught.value.ids == {ABSENT}
