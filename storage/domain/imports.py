"""Taking backups over from another cluster's domain of the same point.

The packs that hold their chunks, and the bases of these, get second names in our domain (hard
links; copies where links don't work), each disk gets a full manifest of ours, and one COMMIT makes
all of them ours. From then on the file system's link count keeps the bytes, whatever the other
cluster deletes. The other domain is read, never written, and not believed: decoders are bounded,
restores check chunk ids.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from storage.domain.adopted import Vouched, sound_chunks
from storage.domain.session import NewBackup, Session
from storage.errors import (
    AlreadyOnPoint,
    ChunkMissing,
    Damaged,
    NotOnPoint,
    PointUnreachable,
    Refused,
    StorageError,
    translated,
)
from storage.files.bad_places import open_to_read
from storage.files.fs import Fs
from storage.format.chunks import ZERO_MARK, Decoder, Encoder
from storage.format.manifests import PAGE_ENTRIES, decode_page
from storage.format.packs import PackEntry, read_footer, read_frame, require_content
from storage.format.paths import DomainPaths, FileContents
from storage.log.log import Log
from storage.log.rebuild import fold_records, manifest_chain, merged_pages
from storage.view import tables
from storage.view.listing import BackupRow, backup_rows
from storage.view.memory_tables import BoundedTables
from storage.view.sorted_runs import ChunkSet
from storage.view.tables import Tables

if TYPE_CHECKING:
    from storage.domain.domain import Domain

ATTEMPTS = 3

log = logging.getLogger(__name__)


class _Overtaken(Refused):
    """A chunk that was new to us when its copy was adopted is not new any more."""

    retryable = True


@dataclass(frozen=True, slots=True)
class ForeignDomain:
    """Another domain as its log tells it: who is live, without an index. `gone`: packs that were
    not there, though its log named them."""

    paths: DomainPaths
    state: BoundedTables
    gone: set[str] = field(default_factory=set)

    def backups(self) -> list[BackupRow]:
        return list(backup_rows(self.state))


def read_domain(fs: Fs, paths: DomainPaths, known: BoundedTables | None = None) -> ForeignDomain:
    """Reads a domain's log to its end, from `known` on (changed in place) or from the start.

    Raises Damaged, PointNewerFormat, PointUnreachable.
    """
    for directory in (paths.root, paths.log, paths.packs, paths.manifests):
        _require_directory(fs, directory)
    state = known or BoundedTables()
    records = Log(fs, paths.log, paths.tmp)
    while fold_records(state, records):
        pass
    return ForeignDomain(paths, state)


def import_backups(
    domain: Domain,
    source: DomainPaths,
    wanted: Sequence[str],
    relabel: Callable[[BackupRow], bytes],
    taken: Callable[[Sequence[str]], None] = lambda _: None,
) -> list[BackupRow]:
    """Makes the wanted backups of `source` live in `domain`, all or none; returns their rows here.

    Those that are here already are only returned; `taken` is told the others, which this call has
    made live. `relabel` gives each one's label here. Durable on return. NotOnPoint when one is in
    neither; Damaged; PointFull.
    """
    domain.refresh()
    gone: set[str] = set()
    for attempt in range(ATTEMPTS):
        here = {row.backup for row in domain.backups()}
        missing = [backup for backup in dict.fromkeys(wanted) if backup not in here]
        if not missing:
            break
        try:
            _take(domain, replace(read_domain(domain.fs, source), gone=gone), missing, relabel)
            taken(missing)
            break
        except (PointUnreachable, ChunkMissing, AlreadyOnPoint, _Overtaken) as error:
            # The owner deleted or repacked meanwhile: its log tells where things are now. Or
            # another host of ours took the same ones over, or somebody stored the same chunks.
            if attempt + 1 == ATTEMPTS:
                raise
            log.info("import_again", extra={"domain": source.root, "reason": str(error)})
    return [domain.backup(backup) for backup in dict.fromkeys(wanted)]


def _take(
    domain: Domain,
    source: ForeignDomain,
    wanted: Sequence[str],
    relabel: Callable[[BackupRow], bytes],
) -> None:
    rows = {row.backup: row for row in source.backups()}
    absent = [backup for backup in wanted if backup not in rows]
    if absent:
        raise NotOnPoint(f"backup {absent[0]} is not on the point")
    vouched = cache(partial(_same_file, domain, source.paths))
    beside_view = os.path.dirname(domain.view.path)
    with (
        domain.begin("import") as session,
        translated(beside_view),
        contextlib.closing(_Gathered(beside_view)) as gathered,
    ):
        for backup in wanted:
            for disk in rows[backup].disks:
                _write_manifest(domain, session, source, disk.disk, vouched, gathered.needed)
        _link_packs(domain, session, source, vouched, gathered)
        session.commit(
            [
                NewBackup(backup, relabel(rows[backup]), [d.disk for d in rows[backup].disks])
                for backup in wanted
            ],
            partial(_require_fresh, gathered.fresh),
        )


class _Gathered:
    """Chunks that an import has to know of until its commit; a large one's don't fit into memory.

    `needed`: those of its manifests that we lack. `bases`: what these are patches of, as the source
    has them. `ours`: what must be stored whole again beside the adopted packs: chunks that we have
    and that are patches there, since patches of ours may stand on them; and bases that are patches
    here. `fresh`: those of the adopted packs that we did not have, and so could not prove ours by.
    """

    def __init__(self, directory: str) -> None:
        self.needed, self.bases, self.ours, self.fresh = (ChunkSet(directory) for _ in range(4))

    def close(self) -> None:
        """Gives the room back."""
        for gathered in (self.needed, self.bases, self.ours, self.fresh):
            gathered.close()


def _same_file(domain: Domain, source: DomainPaths, pack: str, maker: str) -> bool:
    """Whether our `pack` is the file that the source has as `maker`. That a header names one of
    the source's packs proves nothing: anybody can write that."""
    with translated(source.root):
        try:
            ours = domain.fs.stat(domain.paths.pack(pack))
            theirs = domain.fs.stat(source.pack(maker))
        except FileNotFoundError:
            return False
    return theirs.kind == "file" and theirs.inode == ours.inode


def _write_manifest(
    domain: Domain,
    session: Session,
    source: ForeignDomain,
    disk: str,
    vouched: Vouched,
    needed: ChunkSet,
) -> None:
    """Writes a disk's whole map as a full manifest of ours; adds the chunks we lack."""
    row = tables.disks.require(source.state, disk)
    chain = manifest_chain(source.state, row.manifest)
    builder = session.manifest(disk, row.capacity, None)
    contents = FileContents(domain.fs, source.paths)
    for manifest, _ in chain:
        _require_directory(domain.fs, os.path.dirname(source.paths.manifest(manifest)))
    page_limit = -(-row.capacity // (domain.chunk_size * PAGE_ENTRIES))
    for page_no, page in merged_pages(contents, chain, root=True):
        entries = decode_page(page)
        if page_no >= page_limit or ZERO_MARK in entries.values():
            raise Damaged(f"disk {disk}: page {page_no} is not one of a full disk of its size")
        builder.add_page(page_no, entries)
        ids = list(set(entries.values()))
        needed.update(_lacking(session, ids, vouched))


def _lacking(session: Session, ids: Sequence[bytes], vouched: Vouched) -> set[bytes]:
    known = session.known(ids, vouched)
    return {chunk for chunk, there in zip(ids, known, strict=True) if not there}


def _link_packs(
    domain: Domain,
    session: Session,
    source: ForeignDomain,
    vouched: Vouched,
    gathered: _Gathered,
) -> None:
    """Gives those of the source's live packs that hold a needed chunk, or the base of one, a name
    in the session.

    Older packs first, so that of two copies of a chunk the newer one becomes its place, as it is
    with the source. Patches take no place of ours: we store again what they would.
    """
    chosen = set[tuple[int, str]]()
    for part in gathered.needed.parts():
        for holder, bases in _holders(domain, source, part):
            chosen.add(holder)
            gathered.bases.update(bases)
    for part in gathered.bases.parts():
        lacking = _lacking(session, list(part), vouched)
        chosen.update(holder for holder, _ in _holders(domain, source, lacking))
        gathered.ours.update(_patches_here(domain, part))
    for _, pack in sorted(chosen):
        _link_pack(domain, session, source.paths.pack(pack), gathered)
    for part in gathered.ours.parts():
        _store_whole(domain, session, part)


def _link_pack(domain: Domain, session: Session, path: str, gathered: _Gathered) -> None:
    with translated(path):
        adopted = domain.paths.pack(session.adopt_pack(path))
        _, entries = read_footer(domain.fs, adopted)
    with domain.view.read() as state:
        here = state.table("chunks").get_many([entry.chunk_id for entry in entries])
        patches = [entry.chunk_id for entry in entries if entry.base]
        gathered.ours.update(domain.trust.sound(state, patches))
    _prove(domain, adopted, [e for e in entries if e.chunk_id in here and not e.base])
    gathered.fresh.update(e.chunk_id for e in entries if e.chunk_id not in here)


def _require_fresh(fresh: ChunkSet, state: Tables) -> None:
    """Raises _Overtaken if one of the chunks is ours by now: the copy that is about to take its
    place has not been proved."""
    for part in fresh.parts():
        if state.table("chunks").get_many(sorted(part)):
            raise _Overtaken("chunks of an imported backup were stored here meanwhile")


def _holders(
    domain: Domain, source: ForeignDomain, left: set[bytes]
) -> Iterator[tuple[tuple[int, str], list[bytes]]]:
    """(number, pack) of the source's packs that have the newest copies of the chunks, and the bases
    of these. Empties the set. Packs that can't be read are passed over, unless what is left is in
    no other.

    One that is gone may have been moved: what older packs have of its chunks may be what it had
    healed. So it is passed over only when the log, read again since, still names it.
    """
    numbered = ((row.number, pack) for pack, row in tables.packs.scan(source.state))
    unread: StorageError | None = None
    moved: StorageError | None = None
    for number, pack in sorted(numbered, reverse=True):
        if not left:
            break
        path = source.paths.pack(pack)
        try:
            _require_directory(domain.fs, os.path.dirname(path))
            with translated(path):
                _, entries = read_footer(domain.fs, path)
        except (Damaged, PointUnreachable) as error:
            log.info("pack_passed_over", extra={"path": path, "error": str(error)})
            unread = unread or error
            if isinstance(error, PointUnreachable) and pack not in source.gone:
                source.gone.add(pack)
                moved = error
            continue
        held = {entry.chunk_id: entry.base for entry in entries if entry.chunk_id in left}
        if held:
            yield (number, pack), [base for base in held.values() if base]
        left -= held.keys()
    if moved:
        raise moved
    if left:
        raise unread or ChunkMissing(frozenset(left))


def _patches_here(domain: Domain, bases: set[bytes]) -> set[bytes]:
    with domain.view.read() as state:
        rows = domain.trust.sound(state, list(bases))
    return {base for base, row in rows.items() if row.base}


def _store_whole(domain: Domain, session: Session, ids: set[bytes]) -> None:
    """Stores chunks that we have in the session, where they come after what it adopted. Those that
    turn out to be damaged are left to the patches that it adopted."""
    encoder = Encoder()
    for chunk, content in sound_chunks(domain, ids):
        session.store([encoder.encode(chunk, memoryview(content))], again=True)


def _require_directory(fs: Fs, path: str) -> None:
    """PointUnreachable when it is not there, Damaged when it leads somewhere else."""
    with translated(path):
        if fs.stat(path).kind != "directory":
            raise Damaged(f"{path} is no directory")


def _prove(domain: Domain, path: str, entries: Sequence[PackEntry]) -> None:
    """Checks an adopted pack's copies of chunks that we have: they take the place of ours."""
    decoder = Decoder()
    with translated(path):
        fd = open_to_read(domain.fs, path)
        try:
            for entry in entries:
                frame = read_frame(domain.fs, fd, entry, domain.chunk_size, path)
                require_content(frame, decoder, domain.hasher, f"{path} at {entry.offset}")
        finally:
            domain.fs.close(fd)
