"""A session: what owns new packs and manifests until its COMMIT or RETIRE makes them live.

Any number of threads may call known() and store(); packs are sealed (fsync, link) by one background
thread while the next one fills. Nothing that a session wrote counts before its record; leaving the
`with` block without one aborts it and deletes its files. A process that dies leaves the session
open; the host's next start aborts it (Domain.clear_dead_sessions), and keeps a backup's sealed
packs for the next one (storage.domain.salvage).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from storage.domain import orphans
from storage.domain.adopted import Vouched, nobody
from storage.domain.new_packs import NewPacks, file_seal
from storage.errors import PointFull, Refused, SessionEnded, StorageError, translated
from storage.files.publish import make_dirs
from storage.format.chunks import Frame
from storage.format.manifests import ManifestReader, ManifestWriter, decode_page, encode_page
from storage.format.packs import read_footer
from storage.format.record import (
    BackupSeal,
    Commit,
    DiskSeal,
    FileSeal,
    Op,
    Rebase,
    Retire,
    file_id,
)
from storage.log.fold import Garbage
from storage.view import tables
from storage.view.proof import may_go
from storage.view.tables import Tables

if TYPE_CHECKING:
    from storage.domain.domain import Domain

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NewBackup:
    """What a commit makes live. `disks` name the session's manifests, in the VM's disk order."""

    backup: str
    label: bytes
    disks: Sequence[str]
    parent: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """A chunk that a patch may stand on, and what it takes up itself."""

    chunk_id: bytes
    stored_len: int


@dataclass(frozen=True, slots=True)
class _SealedManifest:
    seal: FileSeal
    capacity: int
    parent_disk: str


@dataclass(frozen=True, slots=True)
class FoldedChain:
    """A disk whose layer the session has written as one manifest, and what it was made from."""

    disk: str
    was: str
    parent: str

    def still_true(self, state: Tables) -> bool:
        """Whether the layer is the one that was written."""
        row = tables.disks.get(state, self.disk)
        return row is not None and (row.manifest, row.parent) == (self.was, self.parent)

    def rebase(self, n: int) -> Rebase:
        """To the session's manifest of that number."""
        return Rebase(disk=self.disk, manifest=n, was=self.was, parent=self.parent)


class ManifestBuilder:
    """A disk's manifest in the making. One thread at a time."""

    def __init__(self, writer: ManifestWriter, n: int, capacity: int, parent_disk: str) -> None:
        self.n = n
        self.capacity = capacity
        self.parent_disk = parent_disk
        self.writer = writer

    def add_page(self, page_no: int, entries: Mapping[int, bytes]) -> None:
        """Adds a page's entries; page numbers ascend. Against a parent: the changed entries only,
        chunks.ZERO_MARK for what reads as zeros now. Full: no zero marks."""
        with translated("manifest"):
            self.writer.add_page(page_no, encode_page(entries))


class Session:
    """See the module. Made by Domain.begin."""

    def __init__(self, domain: Domain, session: str, *, may_use_reserve: bool = False) -> None:
        self.id = session
        self._domain = domain
        self._tmp = f"{domain.paths.tmp}/{session}"
        self.packs = NewPacks(domain, session, self._tmp, may_use_reserve=may_use_reserve)
        self._adopting = threading.Lock()
        self._adopted: set[str] = set()
        self._builders: dict[str, ManifestBuilder] = {}
        self._manifests: dict[str, _SealedManifest] = {}
        self._ended = False

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, PointFull):
            self._domain.salvage.drop()
        if not self._ended:
            self._abandon()

    # Chunks.

    def known(self, ids: Sequence[bytes], vouched: Vouched = nobody) -> list[bool]:
        """For each id, whether it need not be stored: it is live, or this session's own already.

        What is known to be damaged where it lies is not: it is stored anew, which heals it. What
        only another cluster says is read first, unless its pack is `vouched` for
        (storage.domain.adopted). The answer may become wrong by somebody's delete; the commit finds
        that out.
        """
        adopted = self._domain.adopted

        def found(state: Tables) -> tuple[dict[bytes, bytes], dict[bytes, str]]:
            live = state.table("chunks").get_many(ids)
            return live, adopted.placed(state, live)

        live, placed = self._domain.view.ask(found)
        sound = adopted.reliable(placed, vouched)
        known = [chunk in self.packs or chunk in sound for chunk in ids]
        salvaged = self._salvaged([chunk for chunk in ids if chunk not in live])
        return [there or chunk in salvaged for chunk, there in zip(ids, known, strict=True)]

    def bases(self, predecessors: Mapping[bytes, bytes]) -> dict[bytes, Base]:
        """What chunks that are to be stored may be patches of, given each one's predecessor: that,
        or what it is a patch of itself. Without those that must be stored whole: the ones that are
        live but not trusted, and the ones without a predecessor that can be relied on.

        The answer may become wrong by somebody's delete; the commit finds that out.
        """
        return self._domain.view.ask(partial(self._bases, predecessors))

    def _bases(self, predecessors: Mapping[bytes, bytes], state: Tables) -> dict[bytes, Base]:
        live = state.table("chunks").get_many(list(predecessors))
        rows = self._domain.trust.sound(state, list(predecessors.values()))
        roots = {chunk: row.base or chunk for chunk, row in rows.items()}
        places = self._domain.trust.sound(state, list(roots.values()))
        return {
            chunk: Base(roots[before], places[roots[before]].stored_len)
            for chunk, before in predecessors.items()
            if chunk not in live and before in roots
        }

    def _salvaged(self, ids: Sequence[bytes]) -> set[bytes]:
        """Those of the chunks that a salvaged pack holds; the session has the pack on return."""
        found = self._domain.salvage.find(ids)
        usable = {path for path in sorted(set(found.values())) if self._adopt_salvaged(path)}
        return {chunk for chunk, path in found.items() if path in usable}

    def _adopt_salvaged(self, path: str) -> bool:
        with self._adopting:
            if path in self._adopted:
                return True
            try:
                self._require_standing(path)
                self.adopt_pack(path)
            except StorageError as error:
                # Its chunks are stored again, which tells what is wrong if the point itself is.
                log.info("pack_not_salvaged", extra={"path": path, "error": str(error)})
                self._domain.salvage.gone(path)
                return False
            self._adopted.add(path)
            return True

    def _require_standing(self, path: str) -> None:
        """Refused when the pack has a patch whose base is not live and whole any more, or one of a
        chunk that has come to be live: the commit would find it missing, and nobody has it whole.
        """
        with translated(path):
            _, entries = read_footer(self._domain.fs, path)
        bases = {entry.chunk_id: entry.base for entry in entries if entry.base}
        with self._domain.view.read() as state:
            live = state.table("chunks").get_many(list(bases))
            sound = self._domain.trust.sound(state, list(bases.values()))
        if live or any(base not in sound or sound[base].base for base in bases.values()):
            raise Refused(f"{path}: has patches that don't stand any more")

    def store(self, frames: Sequence[Frame], *, again: bool = False) -> int:
        """Adds frames that the session does not have yet to its packs; returns bytes added.

        `again`: those, too, that it has, for what a commit found missing. They must be whole.
        The frames' buffers are free on return. Durable only after commit. Raises what an earlier
        pack failed with, PointFull, PointUnreachable, PointReadOnly.
        """
        return self.packs.store(frames, again=again)

    # Manifests.

    def manifest(self, disk: str, capacity: int, parent_disk: str | None) -> ManifestBuilder:
        """Begins the manifest of a disk backup: incremental against a parent's disk, or full."""
        with translated(self._tmp):
            make_dirs(self._domain.fs, self._tmp, self._domain.paths.root)
            n = len(self._builders)
            writer = ManifestWriter(
                self._domain.fs,
                f"{self._tmp}/manifest-{n:08x}",
                bytes.fromhex(self.id),
                n,
                self._domain.chunk_size,
                bytes.fromhex(disk.replace("-", "")),
                capacity,
                full=not parent_disk,
            )
        builder = ManifestBuilder(writer, n, capacity, parent_disk or "")
        self._builders[disk] = builder
        return builder

    def pages(self, disk: str) -> Iterator[tuple[int, dict[int, bytes]]]:
        """What was added to a disk's manifest, which is complete with that."""
        self._seal_manifests()
        path = self._domain.paths.manifest(file_id(self.id, self._builders[disk].n))
        with translated(path), ManifestReader(self._domain.fs, path) as reader:
            for page_no, page in reader.pages():
                yield page_no, decode_page(page)

    def _seal_manifests(self) -> None:
        for disk, builder in self._builders.items():
            if disk in self._manifests:
                continue
            path = self._domain.paths.manifest(file_id(self.id, builder.n))
            with translated(path):
                make_dirs(self._domain.fs, os.path.dirname(path), self._domain.paths.root)
                seal = file_seal(builder.n, builder.writer.seal(path))
            self._manifests[disk] = _SealedManifest(seal, builder.capacity, builder.parent_disk)

    # Outcomes.

    def commit(
        self,
        backups: Sequence[NewBackup],
        require: Callable[[Tables], None] = lambda _: None,
    ) -> None:
        """Seals what is open and makes the backups live. Durable, and acknowledged, on return.

        `require` is shown the state that the commit follows; what it raises ends the commit.

        ChunkMissing: chunks that known() had vouched for are gone; the session is still open: store
        them again, then commit again. Other StorageErrors: leave the `with` block.
        """
        packs = self._seal_all()
        op = Commit(
            session=self.id,
            packs=packs,
            manifests=tuple(sealed.seal for sealed in self._manifests.values()),
            backups=tuple(self._backup_seal(backup) for backup in backups),
        )

        def build(state: Tables) -> Sequence[Op]:
            require(state)
            return [op]

        self._append(build)

    def retire(
        self,
        packs: Sequence[str],
        folded: Sequence[FoldedChain],
        require: Callable[[Tables], None] = lambda _: None,
    ) -> Garbage:
        """A gc session's outcome: `packs` are dead, its own hold what was live in them, and its
        manifests replace those of the folded disks. What is out of date by the time of the record
        is left out. Refused when one of `packs` still holds live chunks. `require` as for `commit`.
        Durable on return."""
        own = self._seal_all()

        def build(state: Tables) -> Sequence[Op]:
            require(state)
            lost = bool(tables.lost_disks(state))
            live = tuple(pack for pack in packs if may_go(state, pack, lost=lost))
            rebased = [chain for chain in folded if chain.still_true(state)]
            seals = {chain.disk: self._manifests[chain.disk].seal for chain in rebased}
            return [
                Retire(
                    session=self.id,
                    packs=own,
                    retired=live,
                    manifests=tuple(seals.values()),
                    rebased=tuple(chain.rebase(seals[chain.disk].n) for chain in rebased),
                )
            ]

        return self._append(build)

    def adopt_pack(self, path: str) -> str:
        """Takes over a sealed pack from elsewhere on the point, another domain's or a salvaged one,
        by hard link or, failing that, by copy; returns its FileId here. PointUnreachable when it
        has gone; Damaged when its footer is not whole."""
        return self.packs.adopt(path)

    def end(self) -> None:
        """A reader's normal end: what it held may go."""
        self._append(lambda _: [Commit(session=self.id)])

    def _append(self, build: Callable[[Tables], Sequence[Op]]) -> Garbage:
        garbage = self._domain.append(build)
        self._ended = True
        self.packs.close()
        orphans.unlink_garbage(self._domain, garbage)
        orphans.remove_directory(self._domain.fs, self._tmp)
        self._domain.salvage.used(self._adopted)
        return garbage

    def set_aside(self) -> None:
        """Ends our part without an outcome: this process ends, and the host's next start keeps what
        is sealed by then (storage.domain.salvage). Raises nothing; what is not sealed is lost."""
        if self._ended:
            return
        self._ended = True
        self.packs.seal_open()
        self.packs.close()
        self._abandon_builders()

    def require_open(self) -> None:
        """SessionEnded when the log says that somebody has ended the session; StorageErrors."""
        self._domain.refresh()
        with self._domain.view.read() as state:
            ended = tables.sessions.get(state, self.id) is None
            ours = any(tables.disks.get(state, disk) is not None for disk in self._builders)
            if ended and not ours:
                raise SessionEnded(
                    f"session {self.id} was ended by another host, which took this one for dead; "
                    "nothing of it was committed"
                )

    def _seal_all(self) -> tuple[FileSeal, ...]:
        packs = self.packs.seal_all()
        self._seal_manifests()
        return packs

    def _backup_seal(self, backup: NewBackup) -> BackupSeal:
        disks = tuple(
            DiskSeal(
                disk=disk,
                capacity=self._manifests[disk].capacity,
                manifest=self._manifests[disk].seal.n,
                parent=self._manifests[disk].parent_disk,
            )
            for disk in backup.disks
        )
        # A backup of which no disk builds on the parent is a full one, whatever was asked for.
        parent = backup.parent if any(disk.parent for disk in disks) else ""
        return BackupSeal(backup=backup.backup, label=backup.label, disks=disks, parent=parent)

    def _abandon_builders(self) -> None:
        for disk, builder in self._builders.items():
            if disk not in self._manifests:
                builder.writer.abandon()

    def _abandon(self) -> None:
        """ABORT, then delete the files. When the point does not answer, Domain.end_left_open does
        it, or the next start."""
        self._ended = True
        self.packs.abandon()
        self._abandon_builders()
        try:
            self._domain.abort(self.id)
        except SessionEnded:
            log.info("session_ended_already", extra={"session": self.id})
        except StorageError as error:
            log.warning("session_left_open", extra={"session": self.id, "error": str(error)})
            self._domain.leave_open(self.id)
