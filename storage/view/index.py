"""The chunk index: where each referenced chunk lies, and the pages that reference it.

Rules that make the sequential fold and a rebuild agree byte for byte:
- a chunk is in the index exactly while an entry of a live layer, or a patch, refers to it;
- of several live packs that hold it, the one with the highest number is its place;
- a layer without a parent (a root) has no zero marks;
- a chunk that is placed as a patch refers to its base once, and a base is placed whole. So what a
  base is referred to by follows from the places of the chunks that entries name, and from nothing
  that happened before. References to bases are counted at the end of an op (`balance`).

A view that had to be made beside damaged files is the exception (docs/design.md §5.3): a chunk that
no readable live pack holds is placed in LOST_PACK, until a pack comes that has it.

Read first: storage.log.fold, which calls this, and docs/design.md §5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import msgspec

from storage.errors import ChunkMissing, Damaged, Refused, ViewDamaged
from storage.format.chunks import CHUNK_ID_BYTES, FRAME_HEADER_BYTES, ZERO_MARK
from storage.format.manifests import decode_page, encode_page, page_chunks
from storage.format.packs import PackEntry
from storage.view import tables
from storage.view.chunk_rows import MOST_KEPT_BACK, ChunkRows
from storage.view.tables import (
    LOST_PACK,
    WHOLE,
    ChunkRow,
    Tables,
    chunk_base,
    is_unreferenced,
    pack_chunk_row,
    unpack_chunk_row,
)


class Contents(Protocol):
    """What the files that a record names hold.

    `digest` is the one in the record; a file with another is Damaged. FileGone, PointUnreachable.
    """

    def footer(self, pack: str, digest: bytes) -> Sequence[PackEntry]: ...
    def pages(self, manifest: str, digest: bytes) -> Iterator[tuple[int, bytes]]:
        """(page number, page), ascending."""
        ...


class Index:
    """The index half of one fold step. Changes of chunks' rows and of packs' live counts are kept
    back until `flush`.

    `strict`: a new reference needs a chunk that can be read.
    """

    def __init__(self, state: Tables, contents: Contents, *, strict: bool = False) -> None:
        self._state = state
        self._contents = contents
        self._strict = strict
        self._chunks = ChunkRows(state.table("chunks"))
        self._pages = state.table("pages")
        self._live_bytes: Counter[int] = Counter()
        self._live_chunks: Counter[int] = Counter()
        self._missing: set[bytes] = set()
        self._on_bases: Counter[bytes] = Counter()
        self._new_patches: set[bytes] = set()
        self._placed: dict[str, list[bytes]] = {}  # the chunks of packs that were placed
        self._placed_count = 0

    def flush(self) -> None:
        """Writes chunks' rows and packs' live counts. ChunkMissing names all that add_layer did not
        find, and the patches of new packs that stand on nothing."""
        self.balance()
        self._require_all()
        self._chunks.flush()
        for number in sorted(self._live_chunks.keys() | self._live_bytes.keys()):
            size, count = self._live_bytes[number], self._live_chunks[number]
            if number == LOST_PACK:
                self._add_lost(count)
            elif size or count:
                self._add_live(number, size, count)
        self._live_bytes.clear()
        self._live_chunks.clear()

    def _require_all(self) -> None:
        if self._missing:
            raise ChunkMissing(frozenset(self._missing))

    def _add_live(self, number: int, size: int, count: int) -> None:
        name = tables.pack_id(self._state, number)
        row = tables.packs.require(self._state, name)
        live = msgspec.structs.replace(
            row, live_bytes=row.live_bytes + size, live_chunks=row.live_chunks + count
        )
        tables.packs.put(self._state, name, live)

    def _add_lost(self, count: int) -> None:
        before = tables.losses(self._state)
        after = msgspec.structs.replace(before, chunks=before.chunks + count)
        tables.set_losses(self._state, after)

    def _count(self, row: ChunkRow, sign: int) -> None:
        base_bytes = CHUNK_ID_BYTES if row.base else 0
        self._live_bytes[row.pack] += sign * (FRAME_HEADER_BYTES + row.stored_len + base_bytes)
        self._live_chunks[row.pack] += sign
        if row.base:
            self._on_bases[row.base] += sign

    # Packs.

    def place(self, numbers: Mapping[str, int]) -> None:
        """Places all chunks of new packs there, referenced or not yet."""
        for pack, number in numbers.items():
            self._place_pack(pack, number, only_known=False)

    def move(self, numbers: Mapping[str, int]) -> None:
        """Places those chunks of new packs there that the index knows. Refused when that would
        leave a patch on no whole base."""
        for pack, number in numbers.items():
            self._place_pack(pack, number, only_known=True)
        self.balance()
        if self._missing:
            raise Refused(f"{len(self._missing)} chunks are moved as patches of what has changed")

    def _place_pack(self, pack: str, number: int, *, only_known: bool) -> None:
        entries = {entry.chunk_id: entry for entry in self._footer(pack)}
        known = self._chunks.get_many(list(entries))
        if not only_known:
            self._note_placed(pack, list(entries))
            self._place_new(number, [entry for one, entry in entries.items() if one not in known])
        for chunk, value in known.items():
            self._place_known(number, entries[chunk], unpack_chunk_row(value))

    def _place_new(self, number: int, entries: Sequence[PackEntry]) -> None:
        self._chunks.add_many(
            {
                chunk: WHOLE.pack(number, offset, stored_len, 0) + base
                for offset, _, stored_len, _, _, chunk, _, base in entries
            }
        )
        self._new_patches.update([entry.chunk_id for entry in entries if entry.base])

    def _note_placed(self, pack: str, chunks: list[bytes]) -> None:
        """So that a footer need not be read again, as long as that does not take much memory."""
        self._placed_count += len(chunks)
        if self._placed_count <= MOST_KEPT_BACK:
            self._placed[pack] = chunks

    def _chunks_of(self, pack: str) -> list[bytes]:
        found = self._placed.get(pack)
        return [entry.chunk_id for entry in self._footer(pack)] if found is None else found

    def _place_known(self, number: int, entry: PackEntry, was: ChunkRow) -> None:
        row = was._replace(
            pack=number, offset=entry.offset, stored_len=entry.stored_len, base=entry.base
        )
        if row.references:
            self._count(was, -1)
            self._count(row, +1)
        if row.base and row.base != was.base:
            self._new_patches.add(entry.chunk_id)
        self._chunks.put(entry.chunk_id, pack_chunk_row(row))

    def _footer(self, pack: str) -> Sequence[PackEntry]:
        return self._contents.footer(pack, tables.packs.require(self._state, pack).digest)

    def settle(self, numbers: Mapping[str, int]) -> None:
        """Takes the chunks of new packs that nothing references out of the index. ChunkMissing as
        from flush: what is released next must find all that it refers to."""
        self.balance()
        self._require_all()
        for pack in numbers:
            rows = self._chunks.get_many(self._chunks_of(pack))
            for chunk in [chunk for chunk, value in rows.items() if is_unreferenced(value)]:
                self._chunks.delete(chunk)

    # References.

    def _refer(self, changes: Mapping[bytes, int], *, new: bool = False) -> None:
        """Adds to chunks' reference counts; what falls to none leaves the index.

        Only a `new` reference may name a chunk that is not there: flush() says so.
        """
        wanted = [chunk for chunk, change in changes.items() if change]
        rows = self._chunks.get_many(wanted)
        if len(rows) < len(wanted):
            nowhere = [chunk for chunk in wanted if chunk not in rows]
            if not new:
                raise ViewDamaged(f"view: chunk {nowhere[0].hex()} is referenced, but nowhere")
            self._missing.update(nowhere)
        if new and set(map(len, rows.values())) == {WHOLE.size}:
            self._refer_whole(rows, changes)
            return
        for chunk, value in rows.items():
            if new and self._refused(value):
                self._missing.add(chunk)
            else:
                self._refer_one(chunk, unpack_chunk_row(value), changes[chunk])

    def _refer_whole(self, rows: Mapping[bytes, bytes], changes: Mapping[bytes, int]) -> None:
        """As _refer_one, new references to chunks that are neither patches nor bases: most are."""
        after = {}
        live_bytes, live_chunks = self._live_bytes, self._live_chunks
        parts = WHOLE.iter_unpack(b"".join(rows.values()))
        for chunk, (number, offset, stored_len, references) in zip(rows, parts, strict=True):
            if number == LOST_PACK and self._strict:
                self._missing.add(chunk)
                continue
            if not references:
                live_bytes[number] += FRAME_HEADER_BYTES + stored_len
                live_chunks[number] += 1
            after[chunk] = WHOLE.pack(number, offset, stored_len, references + changes[chunk])
        self._chunks.put_many(after)

    def _refused(self, value: bytes) -> bool:
        return self._strict and unpack_chunk_row(value).pack == LOST_PACK

    def _refer_one(self, chunk: bytes, old: ChunkRow, change: int, patches: int = 0) -> None:
        references = old.references + change
        if references < 0:
            raise ViewDamaged(f"view: chunk {chunk.hex()} has fewer references than entries")
        if not old.references:
            self._count(old, +1)
        if not references:
            self._count(old, -1)
        if not references:
            self._chunks.delete(chunk)
        else:
            number, offset, stored_len, _, on_it, base = old
            row = ChunkRow(number, offset, stored_len, references, on_it + patches, base)
            self._chunks.put(chunk, pack_chunk_row(row))

    # Bases.

    def balance(self) -> None:
        """Counts the patches that came and went on their bases; a base that nothing refers to any
        more leaves the index. Notes the new patches that must be stored whole as missing."""
        while self._on_bases:
            changes, self._on_bases = self._on_bases, Counter()
            wanted = [base for base, change in changes.items() if change]
            rows = self._chunks.get_many(wanted)
            for base in wanted:
                self._refer_base(base, rows.get(base), changes[base])
        self._missing |= self._baseless(sorted(self._new_patches))
        self._new_patches.clear()

    def _refer_base(self, base: bytes, value: bytes | None, change: int) -> None:
        if value is None and change < 0:
            raise ViewDamaged(f"view: chunk {base.hex()} is a base, but nowhere")
        if value is not None:
            self._refer_one(base, unpack_chunk_row(value), change, patches=change)

    def _baseless(self, chunks: Sequence[bytes]) -> set[bytes]:
        """Those of the chunks that are patches though they may not be: the base is not there or is
        a patch itself, or other patches stand on them."""
        rows = {
            chunk: row
            for chunk, value in self._chunks.get_many(chunks).items()
            if (row := unpack_chunk_row(value)).base and row.references
        }
        bases = self._chunks.get_many([row.base for row in rows.values()])
        return {
            chunk
            for chunk, row in rows.items()
            if row.patches or not self._is_base(bases.get(row.base))
        }

    def _is_base(self, value: bytes | None) -> bool:
        return value is not None and not chunk_base(value) and not self._refused(value)

    # Layers.

    def add_layer(self, layer: int, manifest: str, *, root: bool) -> None:
        """Writes a manifest's pages as a layer's and counts what they reference."""
        digest = tables.manifests.require(self._state, manifest).digest
        for page_no, page in self._contents.pages(manifest, digest):
            references = Counter(page_chunks(page))
            if references.pop(ZERO_MARK, 0) and root:
                raise Damaged(f"manifest {manifest}: a zero mark, but it is full")
            self._refer(references, new=True)
            self._pages.put(tables.page_key(layer, page_no), page)

    def _put_page(self, layer: int, page_no: int, entries: Mapping[int, bytes]) -> None:
        key = tables.page_key(layer, page_no)
        if entries:
            self._pages.put(key, encode_page(entries))
        else:
            self._pages.delete(key)

    def merge_layer(self, layer: int, children: Sequence[int], *, root: bool) -> None:
        """Folds a released layer into its children's: their entries win over its own.

        All children but the last get copies. The last one takes `layer` itself over, with its own
        entries laid on top, so its old layer is empty afterwards. Without children the layer goes.
        """
        if not children:
            self._drop_layer(layer)
            return
        for child in children[:-1]:
            self._copy_under(layer, child, root=root)
        self._lay_on_top(children[-1], layer, root=root)

    def _drop_layer(self, layer: int) -> None:
        for page_no in list(tables.layer_page_nos(self._state, layer, 0)):
            self._refer(_counts(self._page(layer, page_no).values(), -1))
            self._pages.delete(tables.page_key(layer, page_no))
        tables.require_no_pages(self._state, layer)

    def _copy_under(self, layer: int, child: int, *, root: bool) -> None:
        page_nos = set(tables.layer_page_nos(self._state, layer, 0))
        if root:
            page_nos.update(tables.layer_page_nos(self._state, child, 0))
        for page_no in sorted(page_nos):
            under, over = self._page(layer, page_no), self._page(child, page_no)
            merged = _merge(under, over, root=root)
            changes = _counts(merged.values())
            changes.subtract(_counts(over.values()))
            self._refer(changes)
            self._put_page(child, page_no, merged)

    def _lay_on_top(self, child: int, layer: int, *, root: bool) -> None:
        for page_no in list(tables.layer_page_nos(self._state, child, 0)):
            over, under = self._page(child, page_no), self._page(layer, page_no)
            lost = (under[at] for at in over if at in under)
            self._refer(_counts(lost, -1))
            self._put_page(layer, page_no, _merge(under, over, root=root))
            self._pages.delete(tables.page_key(child, page_no))
        tables.require_no_pages(self._state, child)

    def _page(self, layer: int, page_no: int) -> dict[int, bytes]:
        page = self._pages.get(tables.page_key(layer, page_no))
        return {} if page is None else decode_page(page)


def _counts(ids: Iterable[bytes], sign: int = 1) -> Counter[bytes]:
    """How often each chunk occurs, times `sign`; zero marks are no chunks."""
    counts = Counter(ids)
    counts.pop(ZERO_MARK, None)
    if sign < 0:
        counts = Counter({chunk: -count for chunk, count in counts.items()})
    return counts


def _merge(
    under: Mapping[int, bytes], over: Mapping[int, bytes], *, root: bool
) -> dict[int, bytes]:
    merged = {**under, **over}
    if root:
        merged = {at: chunk for at, chunk in merged.items() if chunk != ZERO_MARK}
    return merged
