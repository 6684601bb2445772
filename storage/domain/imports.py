"""Taking backups over from another cluster's domain of the same point.

The packs that hold their chunks, and the bases of these, get second names in our domain (hard
links; copies where links don't work), each disk gets a full manifest of ours, and one COMMIT makes
all of them ours. From then on the file system's link count keeps the bytes, whatever the other
cluster deletes. The other domain is read, never written, and not believed: decoders are bounded,
restores check chunk ids.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from storage.files.bad_places import open_to_read, read_at
from storage.files.fs import Fs
from storage.format.chunks import CHUNK_ID_BYTES, FRAME_HEADER_BYTES, ZERO_MARK, Decoder, Encoder
from storage.format.manifests import PAGE_ENTRIES, decode_page
from storage.format.packs import PackEntry, parse_frame, read_footer, require_content, require_entry
from storage.format.paths import DomainPaths, FileContents
from storage.log.log import Log
from storage.log.rebuild import fold_records, manifest_chain, merged_pages
from storage.view import tables
from storage.view.listing import BackupRow, backup_rows
from storage.view.tables import BoundedTables, Tables

if TYPE_CHECKING:
    from storage.domain.domain import Domain

ATTEMPTS = 3

log = logging.getLogger(__name__)


class _Overtaken(Refused):
    """A chunk that was new to us when its copy was adopted is not new any more."""

    retryable = True


@dataclass(frozen=True, slots=True)
class ForeignDomain:
    """Another domain as its log tells it: who is live, without an index."""

    paths: DomainPaths
    state: BoundedTables

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
    for attempt in range(ATTEMPTS):
        here = {row.backup for row in domain.backups()}
        missing = [backup for backup in dict.fromkeys(wanted) if backup not in here]
        if not missing:
            break
        try:
            _take(domain, read_domain(domain.fs, source), missing, relabel)
            taken(missing)
            break
        except (PointUnreachable, ChunkMissing, AlreadyOnPoint, _Overtaken) as error:
            # The owner deleted or repacked meanwhile: its log tells where things are now. Or
            # another host of ours took the same ones over, or somebody stored the same chunks.
            if attempt + 1 == ATTEMPTS:
                raise
            log.info("import_again domain=%s reason=%s", source.root, error)
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
    with domain.begin("import") as session:
        needed: set[bytes] = set()
        for backup in wanted:
            for disk in rows[backup].disks:
                needed |= _write_manifest(domain, session, source, disk.disk, vouched)
        fresh = _link_packs(domain, session, source, needed, vouched)
        session.commit(
            [
                NewBackup(backup, relabel(rows[backup]), [d.disk for d in rows[backup].disks])
                for backup in wanted
            ],
            partial(_require_fresh, fresh),
        )


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
    domain: Domain, session: Session, source: ForeignDomain, disk: str, vouched: Vouched
) -> set[bytes]:
    """Writes a disk's whole map as a full manifest of ours; returns the chunks we lack."""
    row = tables.disks.require(source.state, disk)
    chain = manifest_chain(source.state, row.manifest)
    builder = session.manifest(disk, row.capacity, None)
    lacking: set[bytes] = set()
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
        known = session.known(ids, vouched)
        lacking.update(chunk for chunk, there in zip(ids, known, strict=True) if not there)
    return lacking


def _link_packs(
    domain: Domain,
    session: Session,
    source: ForeignDomain,
    needed: set[bytes],
    vouched: Vouched,
) -> list[bytes]:
    """Gives those of the source's live packs that hold a needed chunk a name in the session;
    returns the ids of their chunks that we did not have, and so could not prove ours by.

    Older packs first, so that of two copies of a chunk the newer one becomes its place, as it is
    with the source. Patches take no place of ours: we store again what they would (see _ours).
    """
    chosen = dict(_holders(domain, source, needed))
    bases = list({base for found in chosen.values() for base in found.values() if base})
    known = session.known(bases, vouched)
    lacking = [base for base, there in zip(bases, known, strict=True) if not there]
    chosen |= dict(_holders(domain, source, set(lacking)))
    ours, fresh = set[bytes](), list[bytes]()
    for _, pack in sorted(chosen):
        path = source.paths.pack(pack)
        with translated(path):
            adopted = domain.paths.pack(session.adopt_pack(path))
            _, entries = read_footer(domain.fs, adopted)
        with domain.view.read() as state:
            here = state.table("chunks").get_many([entry.chunk_id for entry in entries])
            ours |= _ours(domain, state, [entry for entry in entries if entry.base], needed)
        _prove(domain, adopted, [e for e in entries if e.chunk_id in here and not e.base])
        fresh.append(b"".join(e.chunk_id for e in entries if e.chunk_id not in here))
    _store_whole(domain, session, ours)
    return fresh


def _require_fresh(fresh: Sequence[bytes], state: Tables) -> None:
    """Raises _Overtaken if one of the chunks, whose ids are joined, is ours by now: the copy that
    is about to take its place has not been proved."""
    for ids in fresh:
        chunks = [ids[at : at + CHUNK_ID_BYTES] for at in range(0, len(ids), CHUNK_ID_BYTES)]
        if state.table("chunks").get_many(chunks):
            raise _Overtaken("chunks of an imported backup were stored here meanwhile")


def _holders(
    domain: Domain, source: ForeignDomain, needed: set[bytes]
) -> Iterator[tuple[tuple[int, str], dict[bytes, bytes]]]:
    """(number, pack) of the source's packs that have the newest copies of the chunks, and these:
    chunk → base. Those that can't be read are passed over, unless what is needed is in no other."""
    numbered = ((row.number, pack) for pack, row in tables.packs.scan(source.state))
    left = set(needed)
    unread: StorageError | None = None
    for number, pack in sorted(numbered, reverse=True):
        if not left:
            return
        path = source.paths.pack(pack)
        try:
            _require_directory(domain.fs, os.path.dirname(path))
            with translated(path):
                _, entries = read_footer(domain.fs, path)
        except (Damaged, PointUnreachable) as error:
            log.info("pack_passed_over path=%s error=%s", path, error)
            unread = unread or error
            continue
        held = {entry.chunk_id: entry.base for entry in entries if entry.chunk_id in left}
        if held:
            yield (number, pack), held
        left -= held.keys()
    if left:
        raise unread or ChunkMissing(frozenset(left))


def _ours(
    domain: Domain, state: Tables, patches: Sequence[PackEntry], needed: set[bytes]
) -> set[bytes]:
    """What must be stored whole again beside an adopted pack: chunks that we have and that are
    patches there, since patches of ours may stand on them; and bases that are patches here."""
    here = domain.trust.sound(state, [entry.chunk_id for entry in patches])
    wanted = [entry.base for entry in patches if entry.chunk_id in needed]
    bases = domain.trust.sound(state, wanted)
    return here.keys() | {base for base, row in bases.items() if row.base}


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
                what = f"{path} at {entry.offset}"
                size_bytes = FRAME_HEADER_BYTES + entry.stored_len
                raw = read_at(domain.fs, fd, size_bytes, entry.offset, path)
                frame = parse_frame(memoryview(raw), domain.chunk_size, what)
                require_entry(frame, entry, what)
                require_content(frame, decoder, domain.hasher, what)
        finally:
            domain.fs.close(fd)
