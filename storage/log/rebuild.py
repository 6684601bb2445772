"""Making a view: from the newest checkpoint and the log's tail, or from log, footers and manifests.

The second way folds all records without contents first, which settles who is live and how packs and
layers are numbered; then it fills the index from the live files (storage.view.filling). Both give,
byte for byte, what the record-by-record fold gives (invariant I8). Work is cut into small
transactions, so memory is bounded; a half-made view lies beside its final place and is thrown away
at the next start, so none of them waits for the medium: the whole is flushed before it gets its
seal and name.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, islice
from typing import NamedTuple, Protocol, TypeVar

from blake3 import blake3
from msgspec.structs import replace

from storage.errors import Damaged, FileDamaged, FileGone, StorageError, translated
from storage.files.bad_places import open_to_read, read_at
from storage.files.fs import Fs
from storage.format.manifests import decode_page, encode_page, page_chunks
from storage.format.paths import DomainPaths, FileContents
from storage.format.record import Checkpoint
from storage.log.fold import fold
from storage.log.log import Log
from storage.view import tables
from storage.view.filling import Filling, Live
from storage.view.index import Contents
from storage.view.tables import LOST_LAYER, LOST_PACK, Losses, Tables
from storage.view.view import View, adopt_copy, destroy

RECORDS_PER_STEP = 256
PACKS_PER_STEP = 1000
PAGES_PER_STEP = 64
COPY_BYTES = 4 << 20

_CHECKPOINT = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.mdb")

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

log = logging.getLogger(__name__)


class Host(NamedTuple):
    """Whose view it is. `seen`: the last record that it knows to be durable."""

    id: str
    seen: int


class Update(Protocol):
    """Runs a change of the state in a transaction of its own, and returns what it returned."""

    def __call__(self, change: Callable[[Tables], ResultT], /) -> ResultT: ...


def open_view(fs: Fs, paths: DomainPaths, path: str, identity: bytes, us: Host) -> View:
    """The domain's view, made anew when it is absent or can't be used. Not yet at the log's end."""
    destroy(_unfinished(path))
    destroy(path + ".old")  # of a View.replace that was killed
    if os.path.exists(path):
        try:
            return View(path, identity)
        except Damaged as error:
            log.warning("view_discarded", extra={"path": path, "error": str(error)})
            destroy(path)
    view = _from_checkpoint(fs, paths, path, identity)
    if view is None:
        made = make_view(fs, paths, path, identity, us)
        with translated(f"view {path}"):
            os.rename(made, path)
        view = View(path, identity)
    return view


def make_view(fs: Fs, paths: DomainPaths, path: str, identity: bytes, us: Host) -> str:
    """Makes a view from log, footers and manifests alone; returns the directory beside `path`
    that it lies in, closed. Raises Damaged when the log is; see `fill` for damaged files. Nothing
    is left of one that was not finished."""
    unfinished = _unfinished(path)
    try:
        _make_view(fs, paths, unfinished, identity, us)
    except BaseException:
        with contextlib.suppress(StorageError):
            destroy(unfinished)  # it may have taken all the room that there was
        raise
    return unfinished


def _make_view(fs: Fs, paths: DomainPaths, path: str, identity: bytes, us: Host) -> None:
    records = Log(fs, paths.log, paths.tmp)
    before = frozenset[str]()
    while True:
        destroy(path)
        view = View(path, identity, scratch=True)
        try:
            lost = fill(view.update, records, FileContents(fs, paths), path)
            with view.read() as state:
                last, _ = tables.applied(state)
            view.close(seal=True)
        except BaseException:
            view.close()
            raise
        # What is gone was lost only if no later record has let it go: there is none, or the log
        # named it still when it had been missed before. (Others may append all the time.)
        if lost <= before or records.read_surely(last + 1) is None:
            if lost:
                why = "what the point lost is missing in it"
                log.warning("view_incomplete", extra={"path": path, "why": why})
            _settle_names(records, last, us)
            return
        before = lost


def _settle_names(records: Log, last: int, us: Host) -> None:
    """The names of the last records are durable on return. Our own newest one may be there though
    its fsync failed, unless we have seen it so; and then another fsync proves nothing.

    One that can't be read came from its bundle: others have gone on from it long ago.
    """
    first = max(1, last - RECORDS_PER_STEP + 1)
    records.make_names_durable(first, last)
    for seq in range(last, max(first - 1, us.seen), -1):
        try:
            found = records.read(seq)
        except Damaged:
            continue
        if found is not None and found[0].host == us.id:
            records.name_anew(seq, found[1])
            return


def _unfinished(path: str) -> str:
    return path + ".unfinished"


# From a checkpoint.


def checkpoint_name(seq: int, digest: bytes) -> str:
    """Its file name: the state's record number and the BLAKE3 of the whole file."""
    return f"{seq:016x}-{digest.hex()}.mdb"


def _from_checkpoint(fs: Fs, paths: DomainPaths, path: str, identity: bytes) -> View | None:
    """The view in the newest checkpoint that proves whole and belongs to this log, if any."""
    try:
        names = [name for name in fs.listdir(paths.checkpoints) if _CHECKPOINT.fullmatch(name)]
    except OSError as error:
        log.warning(
            "checkpoints_unreadable", extra={"path": paths.checkpoints, "error": str(error)}
        )
        return None
    for name in _announced(Log(fs, paths.log, paths.tmp), names):
        try:
            view = _adopted(fs, paths, name, path, identity)
        except StorageError as error:
            log.warning("checkpoint_unusable", extra={"checkpoint": name, "error": str(error)})
            destroy(_unfinished(path))
        else:
            log.info("view_from_checkpoint", extra={"checkpoint": name, "path": path})
            return view
    return None


def _adopted(fs: Fs, paths: DomainPaths, name: str, path: str, identity: bytes) -> View:
    records, source = Log(fs, paths.log, paths.tmp), os.path.join(paths.checkpoints, name)
    unfinished = _unfinished(path)
    with translated(f"view {unfinished}"):
        os.makedirs(unfinished, mode=0o700)
    copy = os.path.join(unfinished, "copy")
    if checkpoint_name(int(name[:16], 16), _copied(fs, source, copy)) != name:
        raise Damaged(f"{source}: its content does not match its name")
    adopt_copy(copy, unfinished)
    view = View(unfinished, identity)
    with view.read() as state:
        seq, digest = tables.applied(state)
    view.close()
    found = records.read(seq)
    if found is None or found[1] != digest:
        raise Damaged(f"{source}: is not a state of this log")
    with translated(f"view {path}"):
        os.rename(unfinished, path)
    return View(path, identity)


def _announced(records: Log, names: list[str]) -> Iterator[str]:
    """Those of the names, newest first, that a record vouches for. Nobody else does, and LMDB
    believes what it reads: a file that was put there must not be opened, however well its name
    fits it. Each record is read once, however many names there are."""
    vouched: set[str] = set()
    known = None  # what this record and those after it vouch for
    for name in sorted(names, reverse=True):
        start = int(name[:16], 16) + 1
        try:
            vouched |= _announced_from(records, start, known)
        except Damaged as error:
            # Who starts from there needs this record itself; from the log's start, its bundle.
            log.warning("checkpoint_unusable", extra={"checkpoint": name, "error": str(error)})
            return
        known = start
        if name in vouched:
            yield name
        else:
            log.warning("checkpoint_unannounced", extra={"checkpoint": name})


def _announced_from(records: Log, seq: int, end: int | None) -> set[str]:
    """The names that the records from `seq` on announce, up to `end` or the log's end."""
    names: set[str] = set()
    while seq != end and (found := records.read(seq)) is not None:
        ops = (op for op in found[0].ops if isinstance(op, Checkpoint))
        names.update(checkpoint_name(op.seq, op.digest) for op in ops)
        seq += 1
    return names


def _copied(fs: Fs, source: str, target: str) -> bytes:
    """Copies a file of the point to a local one, durably; returns its BLAKE3."""
    hasher = blake3()
    with translated(source):
        fd = open_to_read(fs, source)
        try:
            with open(target, "xb") as out:
                offset = 0
                while piece := read_at(fs, fd, COPY_BYTES, offset, source):
                    hasher.update(piece)
                    out.write(piece)
                    offset += len(piece)
                out.flush()
                os.fsync(out.fileno())
        finally:
            fs.close(fd)
    return hasher.digest()


# From log, footers and manifests.


def fill(update: Update, records: Log, contents: Contents, scratch: str) -> frozenset[str]:
    """Fills an empty state; returns what was wrong with files, in words, nothing if all were whole.
    `update` runs a step in a transaction. `scratch`: a directory for files without names.

    Damaged when a record of the log is. A pack or manifest that is damaged or gone keeps nothing
    else from being read: docs/design.md §5.3 says what stands in its place.
    """
    while update(partial(fold_records, records=records)):
        pass
    with translated(f"view {scratch}"), Filling(scratch) as filling:
        lost = dict(_unplaced_packs(update, contents, filling))
        wrong = {*lost.values()}
        for disk in update(_disk_names):
            wrong |= _fill_disk(update, contents, filling, disk)
        for rows in filling.rows():
            update(partial(_add_chunks, rows=rows))
        update(
            partial(_set_losses, packs=tuple(lost), chunks=filling.live.chunks.pop(LOST_PACK, 0))
        )
        for numbers in _batches(sorted(filling.live.chunks), PACKS_PER_STEP):
            update(partial(_set_live, numbers=numbers, live=filling.live))
    return frozenset(wrong)


def fold_records(state: Tables, records: Log) -> bool:
    """Folds the next records without contents; False when the tail was reached."""
    seq, digest = tables.applied(state)
    bundled = records.read_bundled(seq + 1, digest)
    if bundled:
        for record, digest in bundled:
            fold(state, record, digest, None)
        return True
    for _ in range(RECORDS_PER_STEP):
        found = records.read(tables.applied(state)[0] + 1)
        if found is None:
            return False
        fold(state, *found, None)
    return True


def _unplaced_packs(
    update: Update, contents: Contents, filling: Filling
) -> Iterator[tuple[str, str]]:
    """Places the packs' chunks, in the order of the packs' numbers; the packs whose tables can't
    be read, and why."""
    first = 0
    while packs := update(partial(_packs_from, first=first)):
        for number, pack, digest in packs:
            try:
                filling.place(number, contents.footer(pack, digest))
            except (FileDamaged, FileGone) as error:
                log.info("pack_unreadable", extra={"pack": pack, "error": str(error)})
                yield pack, str(error)
        first = packs[-1][0] + 1


def _packs_from(state: Tables, first: int) -> list[tuple[int, str, bytes]]:
    """(number, pack, digest) of the next packs, from a number on."""
    found = islice(tables.pack_ids_from(state, first), PACKS_PER_STEP)
    return [(number, pack, tables.packs.require(state, pack).digest) for number, pack in found]


def _disk_names(state: Tables) -> list[str]:
    return [disk for disk, _ in tables.disks.scan(state)]


def _batches(items: Iterable[ItemT], size: int) -> Iterator[list[ItemT]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _fill_disk(update: Update, contents: Contents, filling: Filling, disk: str) -> set[str]:
    """Makes a disk's layer: its own part of the manifest chain, newest entries on top. Returns what
    is wrong with the chain."""
    layer, root, chain = update(partial(own_part, disk=disk))
    try:
        for batch in _batches(merged_pages(contents, chain, root=root), PAGES_PER_STEP):
            update(partial(_put_pages, layer=layer, pages=batch))
            for _, page in batch:
                filling.refer(page_chunks(page))
    except (FileDamaged, FileGone) as error:
        log.info("map_unreadable", extra={"disk": disk, "error": str(error)})
        while pages := update(partial(_take_pages, layer=layer)):
            for page in pages:
                filling.refer(page_chunks(page), -1)
        update(partial(_note_lost_layer, disk=disk))
        return {str(error)}
    return set()


def _put_pages(state: Tables, layer: int, pages: list[tuple[int, bytes]]) -> None:
    for page_no, page in pages:
        state.table("pages").put(tables.page_key(layer, page_no), page)


def _take_pages(state: Tables, layer: int) -> list[bytes]:
    """Takes some pages out of a layer; none are left when there are none."""
    numbers = list(islice(tables.layer_page_nos(state, layer, 0), PAGES_PER_STEP))
    if not numbers:
        tables.require_no_pages(state, layer)
    keys = [tables.page_key(layer, number) for number in numbers]
    taken = state.table("pages").get_many(keys)
    for key in keys:
        state.table("pages").delete(key)
    return list(taken.values())


def _note_lost_layer(state: Tables, disk: str) -> None:
    row = tables.disks.require(state, disk)
    tables.disks.put(state, disk, replace(row, layer=LOST_LAYER))


def _add_chunks(state: Tables, rows: list[tuple[bytes, bytes]]) -> None:
    state.table("chunks").add_many(rows, at_end=True)


def _set_losses(state: Tables, packs: tuple[str, ...], chunks: int) -> None:
    tables.set_losses(state, Losses(packs, chunks))


def _set_live(state: Tables, numbers: list[int], live: Live) -> None:
    for number in numbers:
        pack = tables.pack_id(state, number)
        size_bytes, chunks = live.size_bytes[number], live.chunks[number]
        row = tables.packs.require(state, pack)
        tables.packs.put(state, pack, replace(row, live_bytes=size_bytes, live_chunks=chunks))


def own_part(state: Tables, disk: str) -> tuple[int, bool, list[tuple[str, bytes]]]:
    """(layer, is a root, [(manifest, digest), oldest first])."""
    row = tables.disks.require(state, disk)
    end = tables.disks.require(state, row.parent).manifest if row.parent else ""
    return row.layer, not row.parent, manifest_chain(state, row.manifest, end)


def manifest_chain(state: Tables, manifest: str, end: str = "") -> list[tuple[str, bytes]]:
    """(manifest, digest) from just above `end` to `manifest`, oldest first. Damaged: a circle."""
    chain: dict[str, bytes] = {}
    while manifest and manifest != end:
        if manifest in chain:
            raise Damaged(f"manifest {manifest} builds on itself")
        row = tables.manifests.require(state, manifest)
        chain[manifest] = row.digest
        manifest = row.base
    return list(chain.items())[::-1]


def merged_pages(
    contents: Contents, chain: list[tuple[str, bytes]], *, root: bool
) -> Iterator[tuple[int, bytes]]:
    """(page number, page) of manifests laid on one another; a root's zero marks are dropped."""
    runs = [
        _tagged(contents.pages(name, digest), order) for order, (name, digest) in enumerate(chain)
    ]
    for page_no, group in groupby(heapq.merge(*runs), key=lambda item: item[0]):
        pages = [page for _, _, page in group]
        if len(pages) == 1 and (not root or len(chain) == 1):
            yield page_no, pages[0]
            continue
        entries: dict[int, bytes] = {}
        for page in pages:
            entries.update(decode_page(page))
        if root:
            entries = {at: chunk for at, chunk in entries.items() if any(chunk)}
        if entries:
            yield page_no, encode_page(entries)


def _tagged(pages: Iterator[tuple[int, bytes]], order: int) -> Iterator[tuple[int, int, bytes]]:
    for page_no, page in pages:
        yield page_no, order, page
