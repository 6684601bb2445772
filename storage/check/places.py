"""What a check knows of chunks: where the newest copy of each lies, and whether it can be read.

Kept in the tables `chunks` and `pages` of the check's throw-away view, which nothing else uses
there: chunk id → place, and base id ‖ chunk id of each patch, so that a deep check goes through the
patches by their bases.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from storage.format.chunks import CHUNK_ID_BYTES
from storage.format.packs import PackEntry
from storage.view.tables import Tables
from storage.view.view import View

PATCHES_PER_READ = 1000

_PLACE = struct.Struct("<IIII?")


class Place(NamedTuple):
    """A pack's number and a frame in it. `base`: of a patch, what it stands on."""

    number: int
    offset: int
    raw_len: int
    stored_len: int
    sound: bool
    base: bytes = b""


class Lack(NamedTuple):
    """Why a chunk can't be read: `chunk`, itself or its base, can't. None: no whole pack has it."""

    chunk: bytes
    place: Place | None


def note(number: int, entries: Sequence[PackEntry], bad: set[int], state: Tables) -> None:
    """Notes where the chunks of a pack lie; of several copies the newest counts, as for a read."""
    known = _places(state, [entry.chunk_id for entry in entries])
    for entry in entries:
        if entry.chunk_id in known and known[entry.chunk_id].number >= number:
            continue
        sound = entry.offset not in bad
        _put(
            state,
            entry.chunk_id,
            Place(number, entry.offset, entry.raw_len, entry.stored_len, sound, entry.base),
        )
        if entry.base:
            state.table("pages").put(entry.base + entry.chunk_id, b"")


def note_unsound(chunks: Iterable[bytes], state: Tables) -> None:
    """What turned out to be damaged where it lies."""
    for chunk, place in _places(state, list(chunks)).items():
        _put(state, chunk, place._replace(sound=False))


def lacks(state: Tables, wanted: Sequence[bytes]) -> dict[bytes, Lack]:
    """Those of the chunks that can't be read, each with the reason."""
    places = _places(state, wanted)
    bases = _places(state, [place.base for place in places.values() if place.base])
    found = {}
    for chunk in wanted:
        place = places.get(chunk)
        if place is None or not place.sound:
            found[chunk] = Lack(chunk, place)
        elif place.base and not _is_whole(bases.get(place.base)):
            under = bases.get(place.base)
            found[chunk] = Lack(place.base, None if under is not None and under.sound else under)
    return found


def _is_whole(place: Place | None) -> bool:
    return place is not None and place.sound and not place.base


class Standing(NamedTuple):
    """A base and the patches that stand on it, all where they are read from."""

    base: bytes
    base_place: Place
    patches: list[tuple[bytes, Place]]


def standing(view: View) -> Iterator[Standing]:
    """All patches that can be read, by their bases."""
    start: bytes | None = b""
    while start is not None:
        with view.read() as state:
            keys = list(islice(state.table("pages").keys_from(start, b""), PATCHES_PER_READ))
            found = _standing(state, keys)
        yield from found
        start = keys[-1] + b"\0" if len(keys) == PATCHES_PER_READ else None


def _standing(state: Tables, keys: Sequence[bytes]) -> list[Standing]:
    pairs = [(key[:CHUNK_ID_BYTES], key[CHUNK_ID_BYTES:]) for key in keys]
    places = _places(state, list({chunk for pair in pairs for chunk in pair}))
    found: dict[bytes, Standing] = {}
    for base, chunk in pairs:
        under, place = places.get(base), places[chunk]
        if under is not None and _is_whole(under) and place.sound and place.base == base:
            found.setdefault(base, Standing(base, under, [])).patches.append((chunk, place))
    return list(found.values())


def _places(state: Tables, ids: Sequence[bytes]) -> dict[bytes, Place]:
    found = state.table("chunks").get_many(ids)
    return {
        chunk: Place(*_PLACE.unpack_from(value))._replace(base=value[_PLACE.size :])
        for chunk, value in found.items()
    }


def _put(state: Tables, chunk: bytes, place: Place) -> None:
    state.table("chunks").put(chunk, _PLACE.pack(*place[:5]) + place.base)
