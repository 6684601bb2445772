"""The checker: asserts the invariants of docs/design.md §3 on a point, reading only.

Shallow: every log, label and heartbeat, every live pack's and manifest's table, every manifest's
pages, and that each chunk a live backup names is in a live pack. Deep: every frame too, decoded and
held against its id (patches after all others, by their bases), the checkpoints and the bundles.

It works while services use the point: what they delete meanwhile is looked at again, not reported.
A deep check reads the packs in the order that `Reads` gives, at most `rate_bytes_per_s`, and may be
cancelled at any time and gone on with.

Memory is bounded: the index it needs is a throw-away view in the temporary directory, and of what
is damaged only so much is listed (the rest is counted). storage.check.against_rebuild compares a
view.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

from storage.check.frames import FrameCheck
from storage.check.harmless import HarmlessCheck
from storage.check.places import Lack, Standing, lacks, note, note_unsound, standing
from storage.check.report import (
    MOST_FINDINGS,
    NEWER,
    SHOWN_RANGES,
    Cancelled,
    CheckReport,
    Damage,
    DiskDamage,
    Finding,
    NoReads,
    Pieces,
    Reads,
    Watch,
)
from storage.errors import Damaged, PointNewerFormat, StorageError, shown, translated
from storage.files.fs import Fs, OsFs
from storage.format.chunks import ZERO_MARK
from storage.format.manifests import PAGE_ENTRIES, ManifestReader, decode_page
from storage.format.packs import read_footer
from storage.format.paths import DomainPaths, FileContents
from storage.format.record import Open
from storage.log.fold import fold
from storage.log.log import Log
from storage.log.rebuild import (
    RECORDS_PER_STEP,
    manifest_chain,
    merged_pages,
    own_part,
)
from storage.point import Point
from storage.view import tables
from storage.view.listing import backup_rows
from storage.view.tables import ManifestState, PackState
from storage.view.view import View

__all__ = [
    "Cancelled",
    "CheckReport",
    "Damage",
    "DiskDamage",
    "Finding",
    "NoReads",
    "Reads",
    "check_point",
]


def check_point(
    path: str,
    *,
    deep: bool,
    cancelled: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    on_damage: Callable[[Damage], None] = lambda _damage: None,
    reads: Reads | None = None,
    rate_bytes_per_s: int = 0,
    fs: Fs | None = None,
) -> CheckReport:
    """Checks every domain; `rate_bytes_per_s` 0 = as fast as it goes.

    Of one that a newer vmkeep has written to, what comes after the first such file is not checked:
    without that file, what is sound may look lost.
    Raises when the point itself can't be opened, or Cancelled.
    """
    fs = fs or OsFs()
    point = Point.open(path, fs=fs)
    report = CheckReport()
    root = os.path.join(path, "domains")
    with translated(root):
        names = fs.listdir(root)
    watch = Watch(cancelled, on_progress, on_damage, reads or NoReads(), rate_bytes_per_s)
    for name in names:
        with translated(root):
            if fs.stat(os.path.join(root, name)).kind != "directory":
                where = os.path.join(root, name)
                report.add(Finding("label", where, "is no domain's directory"))
                continue
        report.domains += 1
        with tempfile.TemporaryDirectory(prefix="vmkeep-check-") as scratch:
            view = View(os.path.join(scratch, "view"), b"check")
            try:
                paths = DomainPaths(path, name)
                _DomainCheck(fs, point, paths, view, report, watch).run(deep=deep)
            except PointNewerFormat as error:
                report.add(Finding(NEWER, paths.root, str(error)))
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
        watch: Watch,
    ) -> None:
        self._fs = fs
        self._point = point
        self._paths = paths
        self._name = os.path.basename(paths.root)
        self._cluster = shown(self._name)
        self._view = view
        self._report = report
        self._watch = watch
        self._records = Log(fs, paths.log, paths.tmp)
        self._contents = FileContents(fs, paths)
        self._frames = FrameCheck(fs, point, report, watch)
        self._harmless = HarmlessCheck(fs, paths, report, watch)
        self._names: dict[int, str] = {}  # the packs that were checked, by number

    def run(self, *, deep: bool) -> None:
        self._harmless.list_files()
        if not self._fold():
            return
        packs, manifests = self._live()
        self._check_packs(deep=deep)
        for manifest, row in manifests.items():
            self._watch.pause()
            self._check_manifest(manifest, row)
        self._check_disks(deep=deep)
        self._harmless.check_heartbeats()
        if deep:
            self._harmless.check_checkpoints()
            self._harmless.check_bundles(self._records)
        self._harmless.check_orphans(self._view, packs.keys(), manifests.keys())

    def _found(
        self, kind: str, path: str, detail: str, offset: int = -1, backups: tuple[str, ...] = ()
    ) -> None:
        self._report.add(Finding(kind, path, detail, offset, backups))

    # The log.

    def _fold(self) -> bool:
        """Folds all records, which proves the chain; False when they can't be followed."""
        try:
            if self._point.cluster(self._name) is None and self._records.newest_name():
                self._found("label", self._paths.label, "is not there; its owner makes it anew")
        except PointNewerFormat:
            raise
        except StorageError as error:
            self._found("label", self._paths.label, str(error))
        try:
            while self._view.update(self._fold_some):
                self._watch.pause()
            self._check_gaps()
        except PointNewerFormat:
            raise
        except StorageError as error:
            self._found("log", self._paths.log, str(error), backups=self._all_backups())
            return False
        with self._view.read() as state:
            self._report.records += tables.applied(state)[0]
            self._report.backups += sum(1 for _ in backup_rows(state))
        return True

    def _fold_some(self, state: tables.Tables, *, surely: bool = False) -> bool:
        """Some records; False at the tail: `surely` the server's. A session never recurs (I5)."""
        seen = state.table("chunks")
        for _ in range(RECORDS_PER_STEP):
            seq = tables.applied(state)[0] + 1
            found = self._records.read(seq)
            if found is None and (surely or self._records.newest_name() >= seq):
                # An NFS client's memory of its absence may be out of date; is, when it is listed.
                found = self._records.read_surely(seq)
            if found is None:
                return False
            fold(state, *found, None)
            for op in found[0].ops:
                if isinstance(op, Open):
                    key = b"session " + op.session.encode()
                    if seen.get(key) is not None:
                        raise Damaged(f"record {found[0].seq}: session {op.session} came before")
                    seen.put(key, b"")
        return True

    def _all_backups(self) -> tuple[str, ...]:
        """Those that the part of the log which can be read knows."""
        with self._view.read() as state:
            return tuple(row.backup for row in backup_rows(state))[:SHOWN_RANGES]

    def _check_gaps(self) -> None:
        """A name behind the last record that can be reached means that one is missing. Names first:
        what is appended meanwhile must not look as if it came after a gap."""
        newest = self._records.newest_name()
        self._fold_to_the_end()
        with self._view.read() as state:
            last, _ = tables.applied(state)
        if newest > last:
            self._found("log", self._paths.log, f"record {last + 1} is missing")

    def _fold_to_the_end(self) -> None:
        while self._view.update(partial(self._fold_some, surely=True)):
            self._watch.pause()

    def _live(self) -> tuple[dict[str, PackState], dict[str, ManifestState]]:
        """Live packs and live manifests."""
        with self._view.read() as state:
            return dict(tables.packs.scan(state)), dict(tables.manifests.scan(state))

    def _users(self, manifest: str) -> tuple[str, ...]:
        """The backups that need a manifest."""
        with self._view.read() as state:
            users = {
                row.backup
                for _, row in tables.disks.scan(state)
                if any(name == manifest for name, _ in manifest_chain(state, row.manifest))
            }
        return tuple(sorted(users))

    def _still_live(self, table: str, name: str) -> bool:
        """Whether the log, read to its end by now, still has it: else it was deleted beside us."""
        self._fold_to_the_end()
        with self._view.read() as state:
            return state.table(table).get(name.encode()) is not None

    # Packs.

    def _check_packs(self, *, deep: bool) -> bool:
        """All live packs that were not checked yet, also those that come meanwhile; whether there
        were any. Deep: those first that were not read for longest."""
        found = False
        while new := self._new_packs():
            found = True
            for pack, row in self._in_order(new, deep=deep):
                self._watch.pause()
                self._names[row.number] = pack
                self._check_pack(pack, row, deep=deep)
                self._watch.did(self._to_do(pack, row, deep=deep))
        if deep and found:
            for one in standing(self._view):
                self._check_patches(one)
        return found

    def _check_patches(self, found: Standing) -> None:
        """Proves a base's patches. What has gone meanwhile is looked at where it went."""
        try:
            wrong = self._frames.unfit(found, lambda number: self._paths.pack(self._names[number]))
        except StorageError:
            packs = {place.number for _, place in found.patches} | {found.base_place.number}
            if not all(self._still_live("packs", self._names[number]) for number in packs):
                return
            raise
        places = {found.base: found.base_place, **dict(found.patches)}
        for chunk in wrong:
            pack = self._names[places[chunk].number]
            self._watch.on_damage(Damage(self._cluster, pack=pack, chunk=chunk))
        self._view.update(partial(note_unsound, wrong))

    def _new_packs(self) -> dict[str, PackState]:
        while self._view.update(self._fold_some):
            pass
        with self._view.read() as state:
            return {
                pack: row for pack, row in tables.packs.scan(state) if row.number not in self._names
            }

    def _in_order(self, packs: dict[str, PackState], *, deep: bool) -> list[tuple[str, PackState]]:
        last = self._watch.reads.last
        self._watch.total += sum(self._to_do(pack, row, deep=deep) for pack, row in packs.items())
        if not deep:
            return list(packs.items())
        return sorted(
            packs.items(), key=lambda item: last(f"{self._cluster}/{item[0]}") or float("-inf")
        )

    def _to_do(self, pack: str, row: PackState, *, deep: bool) -> int:
        """What the pack counts for in the progress: bytes to read; 1 in a shallow check."""
        if not deep:
            return 1
        return 0 if self._watch.reads.skip(f"{self._cluster}/{pack}") else row.size_bytes

    def _check_pack(self, pack: str, row: PackState, *, deep: bool) -> None:
        path = self._paths.pack(pack)
        bad: set[int] = set()
        skipped = deep and self._watch.reads.skip(f"{self._cluster}/{pack}")
        try:
            with translated(path):
                seal, entries = read_footer(self._fs, path)
            if (seal.digest, seal.size_bytes) != (row.digest, row.size_bytes):
                raise Damaged(f"{path}: is whole, but is not the file that the log names")
            if deep and not skipped:
                bad = self._frames.damaged(path, entries)
        except PointNewerFormat:
            raise
        except StorageError as error:
            if self._still_live("packs", pack):
                self._found("pack", path, str(error))
                self._watch.on_damage(Damage(self._cluster, pack=pack))
            return
        self._report.packs += 1
        self._report.packs_skipped += skipped
        self._report.chunks += len(entries)
        self._view.update(partial(note, row.number, entries, bad))
        for entry in entries:
            if entry.offset in bad:
                self._watch.on_damage(Damage(self._cluster, pack=pack, chunk=entry.chunk_id))
        if deep and not skipped and not bad:
            self._watch.reads.done(f"{self._cluster}/{pack}")

    # Manifests.

    def _check_manifest(self, manifest: str, row: ManifestState) -> None:
        path = self._paths.manifest(manifest)
        try:
            with translated(path), ManifestReader(self._fs, path) as reader:
                if (reader.seal.digest, reader.seal.size_bytes) != (row.digest, row.size_bytes):
                    raise Damaged(f"{path}: is whole, but is not the file that the log names")
                for _, page in reader.pages():
                    self._report.bytes_read += len(page)
                    self._watch.pause(len(page))
        except PointNewerFormat:
            raise
        except StorageError as error:
            if self._still_live("manifests", manifest):
                self._found("manifest", path, str(error), backups=self._users(manifest))
                self._watch.on_damage(Damage(self._cluster, manifest=manifest))
            return
        self._report.manifests += 1

    # Disks: each entry of a live layer names a chunk in a whole live pack (I1).

    def _check_disks(self, *, deep: bool) -> None:
        with self._view.read() as state:
            disks = [disk for disk, _ in tables.disks.scan(state)]
        hit: set[str] = set()
        for disk in disks:
            self._watch.pause()
            sound = self._check_layer(disk)
            if not sound and self._check_packs(deep=deep):
                sound = self._check_layer(disk)  # a gc moved what was looked for
            if not sound:
                self._report_layer(disk)
                with self._view.read() as state:
                    hit |= {disk, *_heirs(state, disk)}
        for disk in sorted(hit):
            self._watch.pause()
            self._measure(disk)

    def _check_layer(self, disk: str) -> bool:
        """Whether the disk's own part of its map is whole, and so is what it names."""
        try:
            return not any(self._lacking(page) for page in self._layer(disk))
        except StorageError:
            return not self._still_live("disks", disk)

    def _layer(self, disk: str) -> Iterator[dict[int, bytes]]:
        """The pages of the disk's own part; none of one that was deleted meanwhile."""
        with self._view.read() as state:
            if tables.disks.get(state, disk) is None:
                return
            _, root, chain = own_part(state, disk)
        for _, page in merged_pages(self._contents, chain, root=root):
            yield decode_page(page)

    def _report_layer(self, disk: str) -> None:
        """Says what is wrong with the disk's own part, and who needs it."""
        with self._view.read() as state:
            row = tables.disks.get(state, disk)
            if row is None:
                return
            users = {row.backup, *(_backup(state, heir) for heir in _heirs(state, disk))}
        lacking: dict[bytes, Lack] = {}
        try:
            for page in self._layer(disk):
                if len(lacking) < MOST_FINDINGS:
                    lacking |= self._lacking(page)
        except StorageError:
            return  # a manifest of the chain is not whole, which has been reported as such
        self._report_lacking(self._paths.manifest(row.manifest), lacking, tuple(sorted(users)))

    def _lacking(self, page: dict[int, bytes]) -> dict[bytes, Lack]:
        """The page's chunks that can't be read, and why."""
        with self._view.read() as state:
            return lacks(state, list(set(page.values()) - {ZERO_MARK}))

    def _report_lacking(
        self,
        path: str,
        lacking: dict[bytes, Lack],
        users: tuple[str, ...],
    ) -> None:
        elsewhere = 0
        for chunk, place in sorted({lack.chunk: lack.place for lack in lacking.values()}.items()):
            if place is None:
                elsewhere += 1
                continue
            pack = self._paths.pack(self._names[place.number])
            detail = self._frames.details.get(chunk, f"{pack} at {place.offset}: is damaged")
            self._found("chunk", pack, detail, place.offset, users)
        if elsewhere:
            detail = f"names {elsewhere} chunks that no whole live pack holds"
            self._found("manifest", path, detail, backups=users)

    def _measure(self, disk: str) -> None:
        """Lists what of a disk can't be restored, by its complete map."""
        with self._view.read() as state:
            row = tables.disks.get(state, disk)
            if row is None:
                return
            chain = manifest_chain(state, row.manifest)
        size, pieces = self._point.chunk_size, Pieces()
        try:
            for page_no, page in merged_pages(self._contents, chain, root=True):
                entries = decode_page(page)
                lacking = self._lacking(entries)
                for at in (at for at, chunk in entries.items() if chunk in lacking):
                    offset = (page_no * PAGE_ENTRIES + at) * size
                    pieces.add(offset, min(size, row.capacity - offset))
        except StorageError:
            pieces = Pieces()
            pieces.add(0, row.capacity)
        if pieces.count:
            shown = tuple(pieces.shown)
            self._report.disks.append(
                DiskDamage(row.backup, disk, row.capacity, pieces.size_bytes, pieces.count, shown)
            )


def _heirs(state: tables.Tables, disk: str) -> set[str]:
    """The disks that build on a disk, at any distance."""
    heirs: set[str] = set()
    waiting = [disk]
    while waiting:
        children = set(tables.disks.require(state, waiting.pop()).children) - heirs
        heirs |= children
        waiting += children
    return heirs


def _backup(state: tables.Tables, disk: str) -> str:
    return tables.disks.require(state, disk).backup
