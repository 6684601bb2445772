"""The invariants of docs/design.md, as far as one state of one domain can break them.

What needs the disk or the past of a run is asserted by tests.model.world.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

from storage.domain.maps import DiskMap
from storage.errors import StorageError
from storage.format.chunks import ZERO_MARK
from storage.format.manifests import decode_page
from storage.format.record import Record, Retire
from storage.log.log import Log
from storage.log.rebuild import fill
from storage.view import tables
from storage.view.index import Contents
from storage.view.memory_tables import MemoryTables
from storage.view.tables import TABLE_NAMES, Tables, unpack_chunk_row
from storage.view.view import View

ResultT = TypeVar("ResultT")


class SnapshotView:
    """Stands for storage.view.view.View where real code wants one: one state, read only."""

    def __init__(self, state: MemoryTables) -> None:
        self._state = state

    @contextmanager
    def read(self) -> Iterator[MemoryTables]:
        yield self._state

    def ask(self, question: Callable[[MemoryTables], ResultT]) -> ResultT:
        return question(self._state)


class Violation(Exception):
    """An invariant does not hold. `str()` begins with its name in docs/design.md."""


def must(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def retired_by_record(before: MemoryTables, after: MemoryTables, record: Record) -> None:
    """I3: packs leave the state by being named in a RETIRE, and in no other way."""
    gone = before.table("packs").rows.keys() - after.table("packs").rows.keys()
    named = {pack for op in record.ops if isinstance(op, Retire) for pack in op.retired}
    must({pack.decode() for pack in gone} == named, f"I3: packs {gone} left by no RETIRE")


class _EndedLog:
    """Stands for storage.log.log.Log where all records were read already."""

    def read_bundled(self, _seq: int, _previous: bytes) -> list[tuple[Record, bytes]]:
        return []

    def read(self, seq: int) -> None:
        del seq


def rebuilt(state: MemoryTables, bare: MemoryTables, contents: Contents) -> None:
    """I8: log, footers and manifests (the live ones only) give the same bytes as the fold did."""
    made = bare.copy()

    def update(change: Callable[[Tables], ResultT]) -> ResultT:
        return change(made)

    try:
        fill(update, cast(Log, _EndedLog()), contents, tempfile.gettempdir())
    except StorageError as error:
        raise Violation(f"I8: can't be rebuilt: {error}") from error
    for name in TABLE_NAMES:
        same = made.table(name).rows == state.table(name).rows
        must(same, f"I8: a rebuild has other {name}")


def restores(
    state: MemoryTables, contents: Contents, images: Mapping[str, Mapping[int, bytes]]
) -> None:
    """I1 and the half of I7 that needs no past: every backup reads as it must, every chunk lies
    where the index says, and every count is right."""
    counted: Counter[bytes] = Counter()
    for _, page in state.table("pages").scan():
        counted.update(decode_page(page).values())
    counted.pop(ZERO_MARK, None)
    _places(state, contents, counted)
    for backup, row in tables.backups.scan(state):
        for disk in row.disks:
            disk_map = DiskMap(_view(state), disk, 1 << 30, 1 << 20)
            read = {at: chunk for _, page in disk_map.pages() for at, chunk in page.items()}
            must(read == images[backup], f"I7: backup {backup} reads as something else")
            must(counted.keys() >= set(read.values()), f"I1: backup {backup} lacks chunks")


def _places(state: MemoryTables, contents: Contents, counted: Counter[bytes]) -> None:
    rows = {chunk: unpack_chunk_row(value) for chunk, value in state.table("chunks").scan()}
    on_bases = Counter(row.base for row in rows.values() if row.base)
    counted = counted + on_bases
    must(
        rows.keys() == counted.keys(), "I1: the index has other chunks than pages and patches name"
    )
    live: Counter[int] = Counter()
    for chunk, row in rows.items():
        pack = state.table("pack_ids").get(row.pack.to_bytes(4, "big"))
        must(pack is not None, "I1: a chunk lies in a pack that is not live")
        name = (pack or b"").decode()
        digest = tables.packs.require(state, name).digest
        at = {entry.offset: entry.chunk_id + entry.base for entry in contents.footer(name, digest)}
        must(at.get(row.offset) == chunk + row.base, "I1: a chunk is not where the index says")
        must(not (row.base and row.patches), "I1: a base is a patch itself")
        must(row.patches == on_bases[chunk], "I8: a count of patches is wrong")
        must(row.references == counted[chunk], "I8: a reference count is wrong")
        live[row.pack] += 1
    for _, pack_row in tables.packs.scan(state):
        must(pack_row.live_chunks == live[pack_row.number], "I8: a pack's count is wrong")


def _view(state: MemoryTables) -> View:
    return cast(View, SnapshotView(state))
