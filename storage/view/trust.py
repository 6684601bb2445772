"""Which chunks may be relied on where they lie: all, but for those that were found damaged.

Whoever reads a damaged chunk withdraws the trust in it. A session then stores it anew when it comes
by, and so it is healed: its newest copy is its place, and that one is trusted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from storage.view import tables
from storage.view.tables import LOST_PACK, ChunkRow, Tables, unpack_chunk_row
from storage.view.view import View


class Trust:
    """One domain's. Thread-safe. Kept in memory only; the engine keeps it over restarts."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._lock = threading.Lock()
        self._keeping = threading.Lock()  # of who writes down what is withdrawn
        self._by_pack: dict[str, frozenset[bytes] | None] = {}
        self._by_number: dict[int, frozenset[bytes] | None] = {}  # replaced, never changed

    def withdraw(self, pack: str, chunks: frozenset[bytes] | None = None) -> None:
        """From now on a session stores these chunks of the pack anew (None: all of it).

        A chunk whose place is in another pack is not meant: so what was stored anew is trusted.
        """
        with self._lock:
            before = self._by_pack.get(pack, frozenset())
            whole = chunks is None or before is None
            self._by_pack[pack] = None if whole else (before or frozenset()) | (chunks or set())
            self._by_number = self._resolved(self._by_pack)

    def withdrawn(self) -> dict[str, frozenset[bytes] | None]:
        """What is still placed in a live pack and not trusted there, by pack; None: all of it."""
        with self._lock:
            with self._view.read() as state:
                still = {pack: _placed(state, pack, some) for pack, some in self._by_pack.items()}
            self._by_pack = {pack: some for pack, some in still.items() if some != frozenset()}
            self._by_number = self._resolved(self._by_pack)
            return dict(self._by_pack)

    def keep(self, write: Callable[[Mapping[str, frozenset[bytes] | None]], None]) -> None:
        """Has `write` write down what is `withdrawn`: one at a time, so who writes last has looked
        last."""
        with self._keeping:
            write(self.withdrawn())

    def follow(self) -> None:
        """After the view was made anew: its packs may have other numbers."""
        with self._lock:
            self._by_number = self._resolved(self._by_pack)

    def is_whole(self) -> bool:
        """Whether nothing at all is known to be damaged."""
        return not self._by_pack and not self._view.ask(tables.losses).chunks

    def doubted(self, ids: Sequence[bytes]) -> set[bytes]:
        """Those of the chunks that are live, and not `sound`."""

        def found(state: Tables) -> set[bytes]:
            live = state.table("chunks").get_many(ids)
            return live.keys() - self.sound_among(state, live).keys()

        return self._view.ask(found)

    def sound(self, state: Tables, ids: Sequence[bytes]) -> dict[bytes, ChunkRow]:
        """The rows of those of the chunks that can be expected to be whole where they lie: a patch
        not without its base."""
        return self.sound_among(state, state.table("chunks").get_many(ids))

    def sound_among(self, state: Tables, rows: Mapping[bytes, bytes]) -> dict[bytes, ChunkRow]:
        """As `sound`, of chunks whose rows have been looked up already."""
        found = self._sound_rows(rows)
        wanted = [row.base for row in found.values() if row.base]
        if not wanted:
            return found
        bases = self._sound_rows(state.table("chunks").get_many(wanted))
        return {
            chunk: row
            for chunk, row in found.items()
            if not row.base or (row.base in bases and not bases[row.base].base)
        }

    def _sound_rows(self, rows: Mapping[bytes, bytes]) -> dict[bytes, ChunkRow]:
        found = {chunk: unpack_chunk_row(value) for chunk, value in rows.items()}
        return {chunk: row for chunk, row in found.items() if self.is_sound(chunk, row.pack)}

    def is_sound(self, chunk: bytes, number: int) -> bool:
        """Whether nothing is known against the chunk's frame in the pack of that number."""
        if number == LOST_PACK:
            return False
        if number not in self._by_number:
            return True
        chunks = self._by_number[number]
        return chunks is not None and chunk not in chunks

    def _resolved(
        self, by_pack: Mapping[str, frozenset[bytes] | None]
    ) -> dict[int, frozenset[bytes] | None]:
        with self._view.read() as state:
            rows = [(tables.packs.get(state, pack), chunks) for pack, chunks in by_pack.items()]
        return {row.number: chunks for row, chunks in rows if row is not None}


def _placed(state: Tables, pack: str, chunks: frozenset[bytes] | None) -> frozenset[bytes] | None:
    """Those of the chunks that lie in the pack still; None, for all that it has, if it has any."""
    row = tables.packs.get(state, pack)
    if row is None or not row.live_chunks:
        return frozenset()
    if chunks is None:
        return None
    rows = state.table("chunks").get_many(list(chunks))
    return frozenset(c for c, value in rows.items() if unpack_chunk_row(value).pack == row.number)
