"""The chunk index from footers and manifests, all at once: what a rebuild does instead of folding.

The fold changes each chunk's row where it lies in the tree. Made for all chunks of a point that way
an index takes twice the time, and as many writes to the medium as chunks. Here what footers and
manifests say of chunks is sorted by chunk id first, as external sorting does it
(storage.view.sorted_runs): where they are placed, which of them are patches of which base, how
often entries name them. Read side by side that gives each row whole, once, in the order of the
table.

A patch refers to its base as long as it is referred to itself, and that may be by other patches, in
a view that lacks something (docs/design.md §5.3). So the bases of the patches that are referred to
are gathered, sorted, and looked at as references beside those of entries, until no patch is added.

The rules of the index, and what a row holds, are storage.view.index's. One thread at a time.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from types import TracebackType

from storage.format.chunks import CHUNK_ID_BYTES, FRAME_HEADER_BYTES, ZERO_MARK
from storage.format.packs import PackEntry
from storage.view import sorted_runs
from storage.view.sorted_runs import Runs
from storage.view.tables import LOST_PACK, PLACE, row_at

ITEMS_PER_RUN = 50_000  # about 12 MB; larger ones leave the processor's cache
ITEMS_PER_RANGE = 50_000

_PLACED = struct.Struct(f"{CHUNK_ID_BYTES}s{PLACE.size}s")
_PATCHED = struct.Struct(f"{CHUNK_ID_BYTES}s{PLACE.size + CHUNK_ID_BYTES}s")
_COUNTED = struct.Struct(f"<{CHUNK_ID_BYTES}sq")
_COUNT = struct.Struct("<q")
_LOST = PLACE.pack(LOST_PACK, 0, 0)


@dataclass(slots=True)
class Live:
    """What chunks that are referred to take up, by the number of their pack, LOST_PACK too."""

    size_bytes: Counter[int] = field(default_factory=Counter)
    chunks: Counter[int] = field(default_factory=Counter)

    def add(self, places: Iterable[bytes]) -> None:
        size_bytes, numbers = self.size_bytes, []
        for number, _, stored_len in PLACE.iter_unpack(b"".join(places)):
            size_bytes[number] += FRAME_HEADER_BYTES + stored_len
            numbers.append(number)
        self.chunks.update(numbers)

    def add_base(self, place: bytes) -> None:
        """The chunk there is a patch."""
        self.size_bytes[PLACE.unpack(place)[0]] += CHUNK_ID_BYTES


class Filling:
    """First `place` and `refer`, in any order; then `rows`. Holds files until its block ends."""

    def __init__(self, directory: str) -> None:
        """`directory` takes what is sorted when memory is not to hold it."""
        self.live = Live()
        self._directory = directory
        self._places = _Latest(_PLACED.size, directory)
        self._patches = _Latest(_PATCHED.size, directory)
        self._entries = _Counts(directory)
        self._bases = _Counts(directory)

    def __enter__(self) -> Filling:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for gathered in (self._places, self._patches, self._entries, self._bases):
            gathered.runs.close()

    def place(self, number: int, entries: Sequence[PackEntry]) -> None:
        """A live pack's table. Packs come in the order of their numbers: the last one that has a
        chunk is its place."""
        if not entries:
            return
        offsets, _, stored_lens, _, _, ids, _, bases = zip(*entries, strict=True)
        places = list(map(PLACE.pack, repeat(number), offsets, stored_lens))
        self._places.update(zip(ids, places, strict=True))
        if any(bases):
            self._patches.update(
                (chunk, place + base)
                for chunk, place, base in zip(ids, places, bases, strict=True)
                if base
            )

    def refer(self, chunks: Iterable[bytes], sign: int = 1) -> None:
        """Entries of live layers name these chunks; `sign` -1: they don't after all."""
        self._entries.add(chunks, sign)

    def rows(self) -> Iterator[list[tuple[bytes, bytes]]]:
        """(chunk id, row) of all that is referred to, ascending, in portions; `live` grows too."""
        self._find_bases()
        for part in self._parts():
            yield self._rows_of(part)

    def _find_bases(self) -> None:
        known = 0
        while self._patches.any and (found := self._live_patches()) != known:
            known = found

    def _live_patches(self) -> int:
        """How many patches are referred to, as far as their bases are known; all bases of these
        are from now on."""
        count, bases = 0, _Counts(self._directory)
        for part in self._parts():
            some = [base for chunk, base in part.bases().items() if part.references.get(chunk)]
            count += len(some)
            bases.add(some)
        self._bases.runs.close()
        self._bases = bases
        return count

    def _parts(self) -> Iterator[_Part]:
        gathered = (self._places, self._patches, self._entries, self._bases)
        for pieces in sorted_runs.ranges(ITEMS_PER_RANGE, *(one.sorted() for one in gathered)):
            places, patches, entries, bases = pieces
            yield _Part(
                dict(chain.from_iterable(map(_PLACED.iter_unpack, places))),
                dict(chain.from_iterable(map(_PATCHED.iter_unpack, patches))),
                _summed(chain(entries, bases)),
                _summed(bases),
            )

    def _rows_of(self, part: _Part) -> list[tuple[bytes, bytes]]:
        references, patches, bases = part.references, part.on_bases, part.bases()
        chunks = sorted(chunk for chunk, count in references.items() if count)
        places = list(map(part.places.get, chunks, repeat(_LOST)))
        self.live.add(places)
        rows = []
        for chunk, place in zip(chunks, places, strict=True):
            base = bases.get(chunk, b"")
            if base:
                self.live.add_base(place)
            rows.append((chunk, row_at(place, references[chunk], patches.get(chunk, 0), base)))
        return rows


@dataclass(frozen=True, slots=True)
class _Part:
    """What is known of a range of ids."""

    places: Mapping[bytes, bytes]
    patches: Mapping[bytes, bytes]  # the last place as a patch, and the base
    references: Mapping[bytes, int]  # of entries and patches
    on_bases: Mapping[bytes, int]  # of patches alone

    def bases(self) -> dict[bytes, bytes]:
        """What each chunk stands on whose place is a patch."""
        size = PLACE.size
        return {
            chunk: patch[size:]
            for chunk, patch in self.patches.items()
            if self.places[chunk] == patch[:size]
        }


class _Latest:
    """The last value that each chunk was given, in runs of which a later one counts."""

    def __init__(self, item_bytes: int, directory: str) -> None:
        self.runs = Runs(item_bytes, directory)
        self.any = False
        self._run: dict[bytes, bytes] = {}

    def update(self, items: Iterable[tuple[bytes, bytes]]) -> None:
        self.any = True
        self._run.update(items)
        if len(self._run) >= ITEMS_PER_RUN:
            self.sorted()

    def sorted(self) -> Runs:
        """All of it."""
        run = self._run
        self.runs.add(b"".join([chunk + run[chunk] for chunk in sorted(run)]))
        run.clear()
        return self.runs


class _Counts:
    """How often chunks are named; zero marks are no chunks."""

    def __init__(self, directory: str) -> None:
        self.runs = Runs(_COUNTED.size, directory)
        self._run: Counter[bytes] = Counter()

    def add(self, chunks: Iterable[bytes], sign: int = 1) -> None:
        if sign < 0:
            self._run.subtract(chunks)
        else:
            self._run.update(chunks)
        if len(self._run) >= ITEMS_PER_RUN:
            self.sorted()

    def sorted(self) -> Runs:
        """All of it; a chunk's counts in several runs are to be added."""
        run = self._run
        run.pop(ZERO_MARK, None)
        self.runs.add(b"".join([chunk + _COUNT.pack(run[chunk]) for chunk in sorted(run)]))
        run.clear()
        return self.runs


def _summed(pieces: Iterable[bytes]) -> dict[bytes, int]:
    counts: dict[bytes, int] = {}
    for piece in pieces:
        for chunk, count in _COUNTED.iter_unpack(piece):
            counts[chunk] = counts.get(chunk, 0) + count
    return counts
