"""The folded state as tables of bytes, and their typed rows.

The fold (storage.log.fold) sees only `Tables`. There are two implementations: dictionaries
(storage.view.memory_tables) and LMDB (storage.view.lmdb_tables). Rows are encoded the same way for
both, so two states are equal when their bytes are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import msgspec

from storage.errors import ViewDamaged
from storage.format.chunks import CHUNK_ID_BYTES
from storage.format.record import FIRST_PREVIOUS, SessionKind

TABLE_NAMES = (
    "meta",
    "sessions",
    "backups",
    "disks",
    "manifests",
    "packs",
    "pack_ids",
    "chunks",
    "pages",
)

# Rows whose keys begin with the same so many bytes are proved whole together; else a whole table.
GROUP_BYTES = {"pages": 8}


class Table(Protocol):
    """An ordered map of bytes. While a scan is under way the table must not change."""

    def add_many(self, rows: Sequence[tuple[bytes, bytes]], *, at_end: bool = False) -> None:
        """Rows in ascending order whose keys the table does not have; `at_end`: nor any behind
        the first. ViewDamaged, or nothing, when it has."""
        ...

    def get(self, key: bytes) -> bytes | None: ...
    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]: ...
    def put(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> None: ...
    def scan(self, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]: ...
    def keys_from(self, start: bytes, prefix: bytes) -> Iterator[bytes]:
        """Keys with the prefix, from `start` on, ascending."""
        ...


class Tables(Protocol):
    """All tables of one state, in one transaction."""

    def table(self, name: str) -> Table: ...


class _Row(msgspec.Struct, frozen=True, array_like=True):
    pass


class SessionState(_Row, frozen=True, array_like=True):
    kind: SessionKind
    host: str
    incarnation: str
    holds: tuple[str, ...]
    seq: int


class BackupState(_Row, frozen=True, array_like=True):
    parent: str
    label: bytes
    disks: tuple[str, ...]
    seq: int
    forgotten: bool = False


class DiskState(_Row, frozen=True, array_like=True):
    backup: str
    capacity: int
    layer: int
    parent: str
    children: tuple[str, ...]
    manifest: str


class ManifestState(_Row, frozen=True, array_like=True):
    size_bytes: int
    count: int
    digest: bytes
    base: str
    users: int


class PackState(_Row, frozen=True, array_like=True):
    number: int
    size_bytes: int
    count: int
    digest: bytes
    live_bytes: int = 0
    live_chunks: int = 0
    imported: bool = False  # by a session that takes over what others made (storage.domain.adopted)


RowT = TypeVar("RowT", bound=_Row)


class Rows(Generic[RowT]):
    """Typed access to one table. Keys are ASCII ids."""

    def __init__(self, name: str, row_type: type[RowT]) -> None:
        self._name = name
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(row_type)

    def get(self, tables: Tables, key: str) -> RowT | None:
        found = tables.table(self._name).get(key.encode())
        return None if found is None else self.decode(found)

    def require(self, tables: Tables, key: str) -> RowT:
        """The row that the state's own links say is there; ViewDamaged when it is not."""
        row = self.get(tables, key)
        if row is None:
            raise ViewDamaged(f"view: {self._name} lacks {key}")
        return row

    def put(self, tables: Tables, key: str, row: RowT) -> None:
        tables.table(self._name).put(key.encode(), self._encoder.encode(row))

    def delete(self, tables: Tables, key: str) -> None:
        tables.table(self._name).delete(key.encode())

    def scan(self, tables: Tables) -> Iterator[tuple[str, RowT]]:
        for key, value in tables.table(self._name).scan():
            yield key.decode(), self.decode(value)

    def decode(self, value: bytes) -> RowT:
        """A row's bytes. Damaged."""
        try:
            return self._decoder.decode(value)
        except msgspec.MsgspecError as error:
            raise ViewDamaged(f"view: {self._name}: {error}") from error


sessions = Rows("sessions", SessionState)
backups = Rows("backups", BackupState)
disks = Rows("disks", DiskState)
manifests = Rows("manifests", ManifestState)
packs = Rows("packs", PackState)

# In place of a pack's number: no readable live pack is known to hold the chunk.
LOST_PACK = 0xFFFF_FFFF
# In place of a layer's: the disk's own part of its map can't be read.
LOST_LAYER = 0xFFFF_FFFF_FFFF_FFFF

_U64 = struct.Struct(">Q")
_PAGE_KEY = struct.Struct(">QI")
# A chunk's row: pack, offset, stored length, references; and no more, if it is neither a patch nor
# a base. The first three are its place.
WHOLE = struct.Struct("<IIII")
PLACE = struct.Struct("<III")
_COUNT = struct.Struct("<I")
_NONE = _COUNT.pack(0)
_NUMBER = struct.Struct(">I")


class ChunkRow(NamedTuple):
    """Where a chunk lies, and what refers to it: entries of live layers and `patches`, which are
    counted in both. `base`: if it is a patch, the chunk that it stands on.

    What is no base has no `patches` in its bytes, and what is no patch no `base`; only in a view
    that lacks something (docs/design.md §5.3) may a row have both.
    """

    pack: int
    offset: int
    stored_len: int
    references: int
    patches: int = 0
    base: bytes = b""


def pack_chunk_row(row: ChunkRow) -> bytes:
    patches = _COUNT.pack(row.patches) if row.patches else b""
    return WHOLE.pack(*row[:4]) + patches + row.base


def row_at(place: bytes, references: int, patches: int, base: bytes) -> bytes:
    """pack_chunk_row, of a place that is packed already."""
    if not patches:
        return place + _COUNT.pack(references) + base
    return place + _COUNT.pack(references) + _COUNT.pack(patches) + base


def unpack_chunk_row(value: bytes) -> ChunkRow:
    row = ChunkRow(*WHOLE.unpack_from(value))
    if len(value) == WHOLE.size:
        return row
    base = chunk_base(value)
    rest = len(value) - WHOLE.size - len(base)
    patches = _COUNT.unpack_from(value, WHOLE.size)[0] if rest else 0
    return row._replace(patches=patches, base=base)


def chunk_base(value: bytes) -> bytes:
    """The base in a chunk's row; b"" of one that is stored whole."""
    return value[-CHUNK_ID_BYTES:] if len(value) >= WHOLE.size + CHUNK_ID_BYTES else b""


def is_unreferenced(value: bytes) -> bool:
    """Whether a chunk's row says that nothing refers to it."""
    return value[PLACE.size : WHOLE.size] == _NONE


def applied(tables: Tables) -> tuple[int, bytes]:
    """Number and digest of the last record that was folded in; (0, zeros) before the first."""
    value = tables.table("meta").get(b"applied")
    if value is None:
        return 0, FIRST_PREVIOUS
    return _U64.unpack(value[:8])[0], value[8:]


def set_applied(tables: Tables, seq: int, digest: bytes) -> None:
    tables.table("meta").put(b"applied", _U64.pack(seq) + digest)


def checkpoint_seq(tables: Tables) -> int:
    """The record that the newest announced checkpoint holds the state after; 0 for none."""
    value = tables.table("meta").get(b"checkpoint")
    return 0 if value is None else int(_U64.unpack(value)[0])


def set_checkpoint_seq(tables: Tables, seq: int) -> None:
    tables.table("meta").put(b"checkpoint", _U64.pack(seq))


def take_number(tables: Tables, counter: bytes) -> int:
    """The counter's next value, from 0, each given once."""
    meta = tables.table("meta")
    value = meta.get(counter)
    number = 0 if value is None else int(_U64.unpack(value)[0])
    meta.put(counter, _U64.pack(number + 1))
    return number


class Losses(_Row, frozen=True, array_like=True):
    """What a view could not take in from the point. `chunks` counts those without a place."""

    packs: tuple[str, ...] = ()
    chunks: int = 0

    def __bool__(self) -> bool:
        return bool(self.packs or self.chunks)


_losses = Rows("meta", Losses)
_LOSSES = "losses"


def losses(tables: Tables) -> Losses:
    """Nothing, for a view that was made from whole files."""
    return _losses.get(tables, _LOSSES) or Losses()


def set_losses(tables: Tables, found: Losses) -> None:
    """A view without losses has no row for them: it is, byte for byte, as if there were none."""
    if found:
        _losses.put(tables, _LOSSES, found)
    else:
        _losses.delete(tables, _LOSSES)


def may_retire(tables: Tables, pack: str) -> bool:
    """Whether nothing can need a pack without live chunks, as far as this view can tell.

    What a view that lacks something does not count may still be counted by another host's. So
    nothing goes while a disk's map is lost (see `lost_disks`, which the caller has asked: it takes
    a scan), and no lost pack while a chunk is that may be in it.
    """
    found = losses(tables)
    return not (found.chunks and pack in found.packs)


def lost_disks(tables: Tables) -> list[str]:
    """The disk backups whose layers could not be read."""
    return [disk for disk, row in disks.scan(tables) if row.layer == LOST_LAYER]


def add_pack(tables: Tables, pack: str, state: PackState) -> None:
    packs.put(tables, pack, state)
    tables.table("pack_ids").put(_NUMBER.pack(state.number), pack.encode())


def drop_pack(tables: Tables, pack: str, state: PackState) -> None:
    found = losses(tables)
    if pack in found.packs:
        left = tuple(lost for lost in found.packs if lost != pack)
        set_losses(tables, msgspec.structs.replace(found, packs=left))
    packs.delete(tables, pack)
    tables.table("pack_ids").delete(_NUMBER.pack(state.number))


def pack_id(tables: Tables, number: int) -> str:
    """The FileId of the pack of that number."""
    value = tables.table("pack_ids").get(_NUMBER.pack(number))
    if value is None:
        raise ViewDamaged(f"view: no pack has the number {number}")
    return value.decode()


def pack_ids_from(tables: Tables, first: int) -> Iterator[tuple[int, str]]:
    """(number, FileId) of the packs from a number on, ascending."""
    for key in tables.table("pack_ids").keys_from(_NUMBER.pack(first), b""):
        number = _NUMBER.unpack(key)[0]
        yield number, pack_id(tables, number)


def page_key(layer: int, page_no: int) -> bytes:
    return _PAGE_KEY.pack(layer, page_no)


def layer_pages(tables: Tables, layer: int) -> Iterator[tuple[int, bytes]]:
    """(page number, page) of a layer, ascending."""
    for key, page in tables.table("pages").scan(_U64.pack(layer)):
        yield _PAGE_KEY.unpack(key)[1], page


def layer_page_nos(tables: Tables, layer: int, first: int) -> Iterator[int]:
    """The numbers, from `first` on, of the pages that a layer has, ascending."""
    for key in tables.table("pages").keys_from(page_key(layer, first), _U64.pack(layer)):
        yield _PAGE_KEY.unpack(key)[1]


def require_no_pages(tables: Tables, layer: int) -> None:
    """ViewDamaged when a layer that was emptied still has pages, or had not all of them before."""
    for page_no, _ in layer_pages(tables, layer):
        raise ViewDamaged(f"view: layer {layer} still has page {page_no}")


def read_layer(tables: Tables, layer: int) -> None:
    """ViewDamaged unless all pages of a layer are there, as they were written."""
    for _ in layer_pages(tables, layer):
        pass


def read_whole(tables: Tables, *names: str) -> None:
    """Reads whole tables: ViewDamaged unless all their rows are there, as they were written."""
    for name in names:
        for _ in tables.table(name).scan():
            pass


def held_backups(tables: Tables) -> frozenset[str]:
    """The backups that open sessions hold."""
    return frozenset(backup for _, row in sessions.scan(tables) for backup in row.holds)
