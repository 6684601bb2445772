"""Packs that another cluster's domain made, and what of ours may stand on them.

An import links such packs as they are, so what they hold is only what a stranger says. The imported
backups are no better than that; ours must be. So the first time that a session would rely on a
chunk in such a pack, instead of storing its own, the chunk is read and proved by its id. One that
is wrong loses the domain's trust, is stored anew, and is healed by that for the import as well.
gc copies nothing out of such a pack that it has not proved, as the copy would look like ours.

The log tells which packs came with an import: all others are ours, without a look at them. An
import has packs of its own, too: so the header says who made a pack, and one that names another
session than the path does was adopted. What was proved is remembered in memory, and only so much of
it: by place, since the same chunk may come to lie in another stranger's pack.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from storage.domain.reader import MAX_RUN_BYTES, plan_chunks
from storage.errors import ChunkDamaged, Damaged, PointNewerFormat, translated
from storage.files.fs import Buffer
from storage.files.memory import large_buffer
from storage.format.chunks import FRAME_HEADER_BYTES
from storage.format.packs import read_maker
from storage.view import tables
from storage.view.tables import Tables

if TYPE_CHECKING:
    from storage.domain.domain import Domain

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")

PROVED_REMEMBERED = 1 << 16
MAKERS_REMEMBERED = 1 << 14


Vouched: TypeAlias = Callable[[str, str], bool]
"""Whether somebody who is believed vouches for an adopted pack, given its FileId and the one that
its header says."""


def nobody(_pack: str, _maker: str) -> bool:
    """Vouches for no pack."""
    return False


class AdoptedPacks:
    """One domain's. Thread-safe."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._lock = threading.Lock()
        self._makers: dict[str, str] = {}  # FileId here → FileId with its maker
        self._proved: dict[tuple[str, bytes], None] = {}  # a pack's FileId, and a chunk there

    def placed(self, state: Tables, live: Mapping[bytes, bytes]) -> dict[bytes, str]:
        """The packs of those of the chunks (chunk → row, packed) that the domain trusts."""
        rows = self._domain.trust.sound_among(state, live)
        names = {
            number: tables.pack_id(state, number) for number in {r.pack for r in rows.values()}
        }
        return {chunk: names[row.pack] for chunk, row in rows.items()}

    def reliable(self, placed: Mapping[bytes, str], vouched: Vouched = nobody) -> set[bytes]:
        """Those of the chunks (chunk → pack) that lie in packs of ours, in adopted ones that are
        `vouched` for, or are proved now, by reading them."""
        adopted = {pack for pack in self._imported(placed.values()) if self._maker(pack) != pack}
        doubted = {pack for pack in adopted if not vouched(pack, self._maker(pack))}
        doubtful = {(pack, chunk) for chunk, pack in placed.items() if pack in doubted}
        with self._lock:
            doubtful -= self._proved.keys()
        if doubtful:
            doubtful -= self._prove(doubtful)
        return placed.keys() - {chunk for _, chunk in doubtful}

    def _imported(self, packs: Iterable[str]) -> set[str]:
        """Those of the packs that came with an import, or have gone meanwhile."""

        def found(state: Tables) -> set[str]:
            rows = {pack: tables.packs.get(state, pack) for pack in set(packs)}
            return {pack for pack, row in rows.items() if row is None or row.imported}

        return self._domain.view.ask(found)

    def _maker(self, pack: str) -> str:
        """The FileId that the pack's header says; "" if there is none to be read."""
        with self._lock:
            if pack in self._makers:
                return self._makers[pack]
        path, maker = self._domain.paths.pack(pack), ""
        with translated(path), contextlib.suppress(FileNotFoundError, Damaged, PointNewerFormat):
            maker = read_maker(self._domain.fs, path)
        if not maker:
            return ""
        with self._lock:
            self._makers[pack] = maker
            _forget_oldest(self._makers, MAKERS_REMEMBERED)
        return maker

    def _prove(self, doubtful: set[tuple[str, bytes]]) -> set[tuple[str, bytes]]:
        """Those of (pack, chunk) where the chunk is what its id says. The others are not trusted
        any more."""
        sound = [c for c, _ in sound_chunks(self._domain, {chunk for _, chunk in doubtful})]

        def lying(state: Tables) -> dict[bytes, str]:
            return self.placed(state, state.table("chunks").get_many(sound))

        # A chunk never comes back to a pack that it has left: so one that lies there still, after
        # it was read, was read there.
        proved = doubtful & {(pack, c) for c, pack in self._domain.view.ask(lying).items()}
        with self._lock:
            self._proved.update(dict.fromkeys(proved))
            _forget_oldest(self._proved, PROVED_REMEMBERED)
        return proved


def sound_chunks(domain: Domain, ids: Iterable[bytes]) -> Iterator[tuple[bytes, Buffer]]:
    """Those of the chunks that are on the point and are what their ids say, each good until the
    next is asked for. The others are not trusted any more."""
    buffer = large_buffer(MAX_RUN_BYTES + FRAME_HEADER_BYTES + domain.chunk_size)
    with contextlib.closing(domain.reader()) as reader:
        for run in plan_chunks(domain, sorted(ids)):
            for place, found in reader.read_each(run, buffer):
                if not isinstance(found, ChunkDamaged):
                    yield place.chunk_id, found
                elif found.pack:
                    domain.trust.withdraw(found.pack, frozenset({found.chunk}))


def _forget_oldest(remembered: dict[KeyT, ValueT], most: int) -> None:
    while len(remembered) > most:
        del remembered[next(iter(remembered))]
