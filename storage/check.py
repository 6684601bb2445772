"""The checker: asserts the invariants of docs/design.md §3 on a point, reading only.

Shallow: every log, every live pack's and manifest's table, every manifest's pages, and that each
chunk a live backup names is in a live pack. Deep: every frame too, decoded and held against its id.
It works while services use the point: what they delete meanwhile is looked at again, not reported.
Memory is bounded: the index it needs is a throw-away view in the temporary directory.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from storage import tables
from storage.chunks import FRAME_HEADER_BYTES, ZERO_MARK, ChunkHasher, Decoder
from storage.errors import Damaged, PointNewerFormat, StorageError, translated
from storage.fs import Fs, OsFs
from storage.listing import backup_rows
from storage.log import RECORDS_PER_EPOCH, Log
from storage.manifests import ManifestReader, decode_page
from storage.packs import PackEntry, parse_frame, read_footer
from storage.paths import DomainPaths, FileContents
from storage.point import Point
from storage.rebuild import fold_records, merged_pages, own_part
from storage.tables import ManifestState, PackState
from storage.view import View

READ_BYTES = 8 << 20
_SEQ = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be. `backups`: uuids of those that lose data by it."""

    kind: str  # "log", "label", "pack", "manifest", "chunk", "orphan"
    path: str
    detail: str
    offset: int = -1
    backups: tuple[str, ...] = ()

    @property
    def harmless(self) -> bool:
        """Costs room, not data."""
        return self.kind == "orphan"


@dataclass(slots=True)
class CheckReport:
    """What was looked at, and what was found wrong."""

    findings: list[Finding] = field(default_factory=list)
    domains: int = 0
    records: int = 0
    backups: int = 0
    packs: int = 0
    manifests: int = 0
    chunks: int = 0
    bytes_read: int = 0

    @property
    def clean(self) -> bool:
        """Whether no data is lost or in doubt."""
        return all(finding.harmless for finding in self.findings)


class Cancelled(Exception):
    """`cancelled` said so."""


@dataclass(frozen=True, slots=True)
class _Watch:
    """How a check reports and is stopped. on_progress(bytes done, bytes in all)."""

    cancelled: Callable[[], bool]
    on_progress: Callable[[int, int], None]


def check_point(
    path: str,
    *,
    deep: bool,
    cancelled: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    fs: Fs | None = None,
) -> CheckReport:
    """Checks every domain. Raises when the point itself can't be opened, or Cancelled."""
    fs = fs or OsFs()
    point = Point.open(path, fs=fs)
    report = CheckReport()
    root = os.path.join(path, "domains")
    with translated(root):
        names = fs.listdir(root)
    for name in names:
        report.domains += 1
        watch = _Watch(cancelled, on_progress)
        with tempfile.TemporaryDirectory(prefix="vmkeep-check-") as scratch:
            view = View(os.path.join(scratch, "view"), b"check")
            try:
                paths = DomainPaths(path, name)
                _DomainCheck(fs, point, paths, view, report, watch).run(deep=deep)
            finally:
                view.close()
    return report


class _DomainCheck:
    def __init__(
        self,
        fs: Fs,
        point: Point,
        paths: DomainPaths,
        view: View,
        report: CheckReport,
        watch: _Watch,
    ) -> None:
        self._fs = fs
        self._point = point
        self._paths = paths
        self._view = view
        self._report = report
        self._watch = watch
        self._records = Log(fs, paths.log, paths.tmp)
        self._damaged: dict[bytes, Finding] = {}

    def run(self, *, deep: bool) -> None:
        orphans = self._listed()
        if not self._fold():
            return
        packs, manifests, users = self._live()
        total_bytes = sum(row.size_bytes for row in packs.values()) if deep else len(packs)
        done = 0
        for pack, row in packs.items():
            self._pause()
            self._check_pack(pack, row, deep=deep)
            done += row.size_bytes if deep else 1
            self._watch.on_progress(done, total_bytes)
        for manifest, row_of in manifests.items():
            self._pause()
            self._check_manifest(manifest, row_of, users.get(manifest, ()))
        with self._view.read() as state:
            disks = [disk for disk, _ in tables.disks.scan(state)]
        for disk in disks:
            self._pause()
            self._check_disk(disk)
        self._check_orphans(orphans, packs, manifests)

    def _pause(self) -> None:
        if self._watch.cancelled():
            raise Cancelled

    def _found(
        self, kind: str, path: str, detail: str, offset: int = -1, backups: tuple[str, ...] = ()
    ) -> None:
        self._report.findings.append(Finding(kind, path, detail, offset, backups))

    # The log.

    def _fold(self) -> bool:
        """Folds all records, which proves the chain; False when they can't be followed."""
        try:
            self._point.cluster(os.path.basename(self._paths.root))
        except StorageError as error:
            self._found("label", self._paths.label, str(error))
        try:
            while self._view.update(partial(fold_records, records=self._records)):
                self._pause()
        except StorageError as error:
            self._found("log", self._paths.log, str(error))
            return False
        with self._view.read() as state:
            last, _ = tables.applied(state)
            self._report.records += last
            self._report.backups += sum(1 for _ in backup_rows(state))
        self._check_gaps(last)
        return True

    def _check_gaps(self, last: int) -> None:
        """Records behind the last one that can be reached mean that one is missing."""
        with translated(self._paths.log):
            epochs = self._fs.listdir(self._paths.log)
            for epoch in epochs[last // RECORDS_PER_EPOCH :]:
                for name in self._fs.listdir(os.path.join(self._paths.log, epoch)):
                    if _SEQ.fullmatch(name) and int(name, 16) > last + 1:
                        self._found("log", self._paths.log, f"record {last + 1} is missing")
                        return

    def _live(
        self,
    ) -> tuple[dict[str, PackState], dict[str, ManifestState], dict[str, tuple[str, ...]]]:
        """Live packs, live manifests, and which backups need each manifest."""
        users: dict[str, set[str]] = {}
        with self._view.read() as state:
            packs = dict(tables.packs.scan(state))
            manifests = dict(tables.manifests.scan(state))
            for _, row in tables.disks.scan(state):
                name = row.manifest
                while name:
                    users.setdefault(name, set()).add(row.backup)
                    name = manifests[name].base
        return packs, manifests, {name: tuple(sorted(who)) for name, who in users.items()}

    def _still_live(self, table: str, name: str) -> bool:
        """Whether the log, read to its end by now, still has it: else it was deleted beside us."""
        while self._view.update(partial(fold_records, records=self._records)):
            pass
        with self._view.read() as state:
            return state.table(table).get(name.encode()) is not None

    # Packs.

    def _check_pack(self, pack: str, row: PackState, *, deep: bool) -> None:
        path = self._paths.pack(pack)
        try:
            with translated(path):
                seal, entries = read_footer(self._fs, path)
            if (seal.digest, seal.size_bytes) != (row.digest, row.size_bytes):
                raise Damaged(f"{path}: is whole, but is not the file that the log names")
            if deep:
                self._check_frames(path, entries)
        except PointNewerFormat:
            raise
        except StorageError as error:
            if self._still_live("packs", pack):
                self._found("pack", path, str(error))
            return
        self._report.packs += 1
        self._report.chunks += len(entries)
        good = [entry.chunk_id for entry in entries if entry.chunk_id not in self._damaged]
        self._view.update(partial(_note, good))

    def _check_frames(self, path: str, entries: list[PackEntry]) -> None:
        decoder = Decoder()
        with translated(path):
            fd = self._fs.open_read(path)
            try:
                for entry, frame in _frames(self._fs, fd, entries):
                    self._pause()
                    self._check_frame(decoder, self._point.hasher, path, entry, frame)
            finally:
                self._fs.close(fd)

    def _check_frame(
        self,
        decoder: Decoder,
        hasher: ChunkHasher,
        path: str,
        entry: PackEntry,
        frame: memoryview,
    ) -> None:
        what = f"{path} at {entry.offset}"
        self._report.bytes_read += len(frame)
        try:
            view = parse_frame(frame, self._point.chunk_size, what)
            raw = decoder.decode(view.codec, view.payload, view.raw_len)
            if view.chunk_id != entry.chunk_id or hasher.full(raw) != entry.chunk_id:
                raise Damaged(f"{what}: content does not have its id")
        except StorageError as error:
            finding = Finding("chunk", path, str(error), entry.offset)
            self._damaged[entry.chunk_id] = finding

    # Manifests.

    def _check_manifest(self, manifest: str, row: ManifestState, users: tuple[str, ...]) -> None:
        path = self._paths.manifest(manifest)
        try:
            with translated(path), ManifestReader(self._fs, path) as reader:
                if (reader.seal.digest, reader.seal.size_bytes) != (row.digest, row.size_bytes):
                    raise Damaged(f"{path}: is whole, but is not the file that the log names")
                self._report.bytes_read += sum(len(page) for _, page in reader.pages())
        except PointNewerFormat:
            raise
        except StorageError as error:
            if self._still_live("manifests", manifest):
                self._found("manifest", path, str(error), backups=users)
            return
        self._report.manifests += 1

    # Disks: each entry of a live layer names a chunk in a whole live pack (I1).

    def _check_disk(self, disk: str) -> None:
        with self._view.read() as state:
            row = tables.disks.get(state, disk)
            if row is None:
                return
            _, root, chain = own_part(state, disk)
            users = tuple(sorted({row.backup, *_heirs(state, disk)}))
        lacking: set[bytes] = set()
        try:
            for _, page in merged_pages(FileContents(self._fs, self._paths), chain, root=root):
                lacking |= self._lacking(page)
        except StorageError:
            return  # a manifest of the chain is not whole, which has been reported as such
        if lacking and self._still_live("disks", disk):
            self._report_lacking(self._paths.manifest(row.manifest), lacking, users)

    def _lacking(self, page: bytes) -> set[bytes]:
        wanted = set(decode_page(page).values()) - {ZERO_MARK}
        with self._view.read() as state:
            return wanted - state.table("chunks").get_many(list(wanted)).keys()

    def _report_lacking(self, path: str, lacking: set[bytes], users: tuple[str, ...]) -> None:
        for chunk in sorted(lacking & self._damaged.keys()):
            damage = self._damaged[chunk]
            self._found("chunk", damage.path, damage.detail, damage.offset, users)
        elsewhere = lacking - self._damaged.keys()
        if elsewhere:
            detail = f"names {len(elsewhere)} chunks that no whole live pack holds"
            self._found("manifest", path, detail, backups=users)

    # What nobody owns.

    def _listed(self) -> list[tuple[str, str]]:
        """(table, FileId) of all pack and manifest files, listed before the log is read."""
        found = []
        for table, root in (("packs", self._paths.packs), ("manifests", self._paths.manifests)):
            with translated(root):
                for session in self._fs.listdir(root):
                    names = self._fs.listdir(os.path.join(root, session))
                    found += [(table, f"{session}/{name}") for name in names]
        return found

    def _check_orphans(
        self,
        listed: list[tuple[str, str]],
        packs: dict[str, PackState],
        manifests: dict[str, ManifestState],
    ) -> None:
        with self._view.read() as state:
            for table, name in listed:
                owned = name in packs if table == "packs" else name in manifests
                open_session = tables.sessions.get(state, name.partition("/")[0]) is not None
                if not owned and not open_session:
                    path = os.path.join(self._paths.root, table, name)
                    self._found("orphan", path, "belongs to nobody; the next gc removes it")


def _heirs(state: tables.Tables, disk: str) -> set[str]:
    """The backups whose disks build on a disk, at any distance."""
    heirs: set[str] = set()
    waiting = [disk]
    while waiting:
        for child in tables.disks.require(state, waiting.pop()).children:
            heirs.add(tables.disks.require(state, child).backup)
            waiting.append(child)
    return heirs


def _note(chunks: list[bytes], state: tables.Tables) -> None:
    table = state.table("chunks")
    for chunk in chunks:
        table.put(chunk, b"\x01")


def _frames(fs: Fs, fd: int, entries: list[PackEntry]) -> Iterator[tuple[PackEntry, memoryview]]:
    """Each entry with its frame's bytes, read in large pieces. Entries lie without gaps."""
    at = 0
    while at < len(entries):
        start, end, last = entries[at].offset, entries[at].offset, at
        while last < len(entries) and (end - start < READ_BYTES or last == at):
            end += FRAME_HEADER_BYTES + entries[last].stored_len
            last += 1
        piece = memoryview(fs.pread(fd, end - start, start))
        for entry in entries[at:last]:
            offset = entry.offset - start
            yield entry, piece[offset : offset + FRAME_HEADER_BYTES + entry.stored_len]
        at = last
