"""The fold: how each op of the log changes the state, and when it may.

`fold(tables, record, digest, contents)` is deterministic and does no I/O but through its arguments.
It checks each op against the state that the op follows and raises Refused (or a leaf of it); the
caller then throws the transaction away. The same code checks our own appends and follows others'.

With `contents` (footers and manifests of the record's files) the chunk index, the reference counts
and the pages are kept too. Without it only the protocol's state is: who is live, not where.

Read first: docs/design.md §5. The index itself is in storage.view.index.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from storage.errors import (
    AlreadyOnPoint,
    Damaged,
    FileDamaged,
    NotOnPoint,
    Refused,
    SessionEnded,
)
from storage.format.record import (
    Abort,
    BackupSeal,
    Checkpoint,
    Commit,
    DiskSeal,
    FileSeal,
    Forget,
    Open,
    Rebase,
    Record,
    Retire,
    file_id,
)
from storage.view import tables
from storage.view.index import Contents, Index
from storage.view.tables import (
    LOST_LAYER,
    BackupState,
    DiskState,
    ManifestState,
    PackState,
    SessionState,
    Tables,
)

# Of one disk backup: a row's size, and so the work of adding to it, stays bounded. A VM's backups
# build on its newest one, so children are few.
CHILDREN_LIMIT = 1024


@dataclass(slots=True)
class Garbage:
    """Files that the record made unreferencable. To be unlinked once the record is durable."""

    packs: list[str] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)  # aborted: all of their files


def fold(
    state: Tables,
    record: Record,
    digest: bytes,
    contents: Contents | None,
    *,
    strict: bool = False,
) -> Garbage:
    """Applies the record that follows `applied(state)`; returns what may be unlinked after it.

    `strict`, for a record that is not in the log yet: it may not name a chunk that is lost.
    Raises Refused when an op is not valid here, ChunkMissing when a commit's chunk is nowhere,
    Damaged when the record does not follow the state at all. The state is then half changed.
    """
    seq, previous = tables.applied(state)
    if record.seq != seq + 1 or record.previous != previous:
        raise Damaged(f"record {record.seq} does not follow record {seq}: the log was changed")
    garbage = Garbage()
    index = Index(state, contents, strict=strict) if contents else None
    step = _Step(state, record.seq, index, garbage)
    for op in record.ops:
        step.apply(op)
        if step.index:
            step.index.flush()
    tables.set_applied(state, record.seq, digest)
    return garbage


@dataclass(slots=True)
class _Step:
    """One record being folded."""

    state: Tables
    seq: int
    index: Index | None
    garbage: Garbage

    def apply(self, op: Open | Commit | Abort | Forget | Retire | Checkpoint) -> None:
        match op:
            case Open():
                self._open(op)
            case Commit():
                self._commit(op)
            case Abort():
                self._open_session(op.session)
                self._end_session(op.session)
                self.garbage.sessions.append(op.session)
            case Forget():
                self._forget(op)
            case Retire():
                self._retire(op)
            case Checkpoint():
                self._checkpoint(op)

    # Sessions.

    def _open(self, op: Open) -> None:
        if tables.sessions.get(self.state, op.session) is not None:
            raise Refused(f"session {op.session} is open already")
        for backup in op.holds:
            self._live_backup(backup)
        row = SessionState(op.kind, op.host, op.incarnation, op.holds, self.seq)
        tables.sessions.put(self.state, op.session, row)

    def _open_session(self, session: str) -> SessionState:
        row = tables.sessions.get(self.state, session)
        if row is None:
            raise SessionEnded(f"session {session} is not open: it was aborted or has committed")
        return row

    def _end_session(self, session: str) -> None:
        row = self._open_session(session)
        tables.sessions.delete(self.state, session)
        held = tables.held_backups(self.state) if row.holds else frozenset()
        for backup in row.holds:
            let_go = tables.backups.get(self.state, backup)
            if let_go is not None and let_go.forgotten and backup not in held:
                self._release(backup, let_go)

    # Backups come.

    def _commit(self, op: Commit) -> None:
        row = self._open_session(op.session)
        manifests = {seal.n: seal for seal in op.manifests}
        if len(manifests) != len(op.manifests):
            raise Refused(f"session {op.session}: a manifest number occurs twice")
        numbers = self._add_packs(op.session, op.packs, imported=row.kind == "import")
        if self.index:
            self.index.place(numbers)
        for seal in op.backups:
            self._add_backup(op.session, row, seal, manifests)
        if manifests:
            raise Refused(f"session {op.session}: manifests {sorted(manifests)} belong to no disk")
        if self.index:
            self.index.settle(numbers)
        self._end_session(op.session)

    def _add_packs(
        self, session: str, seals: tuple[FileSeal, ...], *, imported: bool = False
    ) -> dict[str, int]:
        """Makes packs live; returns the number of each, in commit order."""
        numbers: dict[str, int] = {}
        for seal in seals:
            pack = file_id(session, seal.n)
            if pack in numbers or tables.packs.get(self.state, pack) is not None:
                raise Refused(f"pack {pack} occurs twice")
            number = tables.take_number(self.state, b"next_pack")
            state = PackState(number, seal.size_bytes, seal.count, seal.digest, imported=imported)
            tables.add_pack(self.state, pack, state)
            numbers[pack] = number
        return numbers

    def _add_backup(
        self, session: str, row: SessionState, seal: BackupSeal, manifests: dict[int, FileSeal]
    ) -> None:
        """Makes a backup live; takes its disks' manifests out of `manifests`."""
        if tables.backups.get(self.state, seal.backup) is not None:
            raise AlreadyOnPoint(f"backup {seal.backup} is on the point already")
        if seal.parent:
            self._usable_parent(seal.parent, row)
        for disk in seal.disks:
            manifest = manifests.pop(disk.manifest, None)
            if manifest is None:
                raise Refused(f"disk {disk.disk}: manifest {disk.manifest} is not in the record")
            self._add_disk(session, seal, disk, manifest)
        ids = tuple(disk.disk for disk in seal.disks)
        tables.backups.put(
            self.state, seal.backup, BackupState(seal.parent, seal.label, ids, self.seq)
        )

    def _usable_parent(self, parent: str, row: SessionState) -> None:
        found = tables.backups.get(self.state, parent)
        if found is None or (found.forgotten and parent not in row.holds):
            raise NotOnPoint(f"the parent backup {parent} is not on the point any more")

    def _add_disk(
        self, session: str, backup: BackupSeal, seal: DiskSeal, manifest: FileSeal
    ) -> None:
        if tables.disks.get(self.state, seal.disk) is not None:
            raise AlreadyOnPoint(f"disk backup {seal.disk} is on the point already")
        base = ""
        if seal.parent:
            base = self._adopt(seal, backup.parent)
        layer = tables.take_number(self.state, b"next_layer")
        name = file_id(session, manifest.n)
        state = DiskState(backup.backup, seal.capacity, layer, seal.parent, (), name)
        tables.disks.put(self.state, seal.disk, state)
        self._add_manifest(name, manifest, base, users=1)
        if self.index:
            self.index.add_layer(layer, name, root=not seal.parent)

    def _adopt(self, seal: DiskSeal, parent_backup: str) -> str:
        """Notes the child with its parent disk; returns the manifest that it builds on."""
        parent = tables.disks.get(self.state, seal.parent)
        if parent is None or parent.backup != parent_backup:
            raise Refused(f"disk {seal.disk}: parent {seal.parent} is not a disk of the parent")
        if parent.capacity != seal.capacity:
            raise Refused(f"disk {seal.disk}: its parent has another capacity")
        if len(parent.children) >= CHILDREN_LIMIT:
            raise Refused(f"disk {seal.disk}: {len(parent.children)} build on its parent already")
        children = (*parent.children, seal.disk)
        tables.disks.put(
            self.state, seal.parent, msgspec.structs.replace(parent, children=children)
        )
        return parent.manifest

    # Backups go.

    def _live_backup(self, backup: str) -> BackupState:
        row = tables.backups.get(self.state, backup)
        if row is None or row.forgotten:
            raise NotOnPoint(f"backup {backup} is not on the point")
        return row

    def _forget(self, op: Forget) -> None:
        held = tables.held_backups(self.state)
        for backup in op.backups:
            row = msgspec.structs.replace(self._live_backup(backup), forgotten=True)
            tables.backups.put(self.state, backup, row)
            if backup not in held:
                self._release(backup, row)

    def _release(self, backup: str, row: BackupState) -> None:
        """Drops a forgotten backup that nobody holds; its layers go to its children."""
        heirs: set[str] = set()
        for disk in row.disks:
            heirs |= self._release_disk(disk, tables.disks.require(self.state, disk))
        for heir in sorted(heirs):
            self._reparent_backup(heir, row.parent)
        tables.backups.delete(self.state, backup)

    def _release_disk(self, disk: str, state: DiskState) -> set[str]:
        """Drops a disk backup; returns the backups that built on it."""
        children = [(name, tables.disks.require(self.state, name)) for name in state.children]
        layers = self._merge_layers(state, [child.layer for _, child in children])
        for (name, child), layer in zip(children, layers, strict=True):
            moved = msgspec.structs.replace(child, parent=state.parent, layer=layer)
            tables.disks.put(self.state, name, moved)
        self._replace_child(state.parent, disk, state.children)
        tables.disks.delete(self.state, disk)
        self._unuse_manifest(state.manifest)
        return {child.backup for _, child in children}

    def _merge_layers(self, state: DiskState, children: list[int]) -> list[int]:
        """Folds a released layer into the children's; returns the layers that these have then.

        What stood on a lost layer is lost with it; into a lost one there is nothing to fold.
        """
        if state.layer == LOST_LAYER:
            for layer in children:
                if self.index and layer != LOST_LAYER:
                    self.index.merge_layer(layer, (), root=False)
            return [LOST_LAYER] * len(children)
        sound = [at for at, layer in enumerate(children) if layer != LOST_LAYER]
        if self.index:
            layers = [children[at] for at in sound]
            self.index.merge_layer(state.layer, layers, root=not state.parent)
        if sound:
            children[sound[-1]] = state.layer  # merge_layer lets the last one take the layer over
        return children

    def _reparent_backup(self, backup: str, grandparent: str) -> None:
        """A backup of which no disk builds on the grandparent has become a full one."""
        row = tables.backups.require(self.state, backup)
        builds = any(tables.disks.require(self.state, disk).parent for disk in row.disks)
        parent = grandparent if builds else ""
        tables.backups.put(self.state, backup, msgspec.structs.replace(row, parent=parent))

    def _replace_child(self, parent: str, old: str, new: tuple[str, ...]) -> None:
        if not parent:
            return
        row = tables.disks.require(self.state, parent)
        children = tuple(child for child in row.children if child != old) + new
        tables.disks.put(self.state, parent, msgspec.structs.replace(row, children=children))

    # Garbage collection.

    def _retire(self, op: Retire) -> None:
        row = self._open_session(op.session)
        if row.kind != "gc":
            raise Refused(f"session {op.session} is no gc session")
        numbers = self._add_packs(op.session, op.packs)
        if self.index:
            self.index.move(numbers)
            self.index.flush()
        for pack in op.retired:
            self._retire_pack(pack, numbers)
        manifests = {seal.n: seal for seal in op.manifests}
        for rebase in op.rebased:
            self._rebase(op.session, rebase, manifests)
        self._end_session(op.session)

    def _retire_pack(self, pack: str, own: dict[str, int]) -> None:
        state = tables.packs.get(self.state, pack)
        if state is None or pack in own:
            raise Refused(f"pack {pack} is not live")
        if state.live_chunks:
            raise Refused(f"pack {pack} still holds {state.live_chunks} live chunks")
        tables.drop_pack(self.state, pack, state)
        self.garbage.packs.append(pack)

    def _rebase(self, session: str, rebase: Rebase, manifests: dict[int, FileSeal]) -> None:
        """One manifest takes the place of a disk's own part of its chain."""
        state = tables.disks.get(self.state, rebase.disk)
        manifest = manifests.pop(rebase.manifest, None)
        if state is None or manifest is None:
            raise Refused(f"disk {rebase.disk} or its new manifest is not there")
        if (state.manifest, state.parent) != (rebase.was, rebase.parent):
            raise Refused(f"disk {rebase.disk} has changed since its manifest was folded")
        if self.index and state.layer == LOST_LAYER:
            raise FileDamaged(f"disk {rebase.disk} has a whole manifest now: make the view anew")
        base = ""
        if state.parent:
            base = tables.disks.require(self.state, state.parent).manifest
        name = file_id(session, manifest.n)
        followers = self._followers(state)
        self._add_manifest(name, manifest, base, users=1 + len(followers))
        for child, row in followers.items():
            tables.manifests.put(self.state, child, msgspec.structs.replace(row, base=name))
        tables.disks.put(self.state, rebase.disk, msgspec.structs.replace(state, manifest=name))
        self._unuse_manifest(state.manifest, 1 + len(followers))

    def _followers(self, state: DiskState) -> dict[str, ManifestState]:
        """The manifests whose base is the disk's: each is the oldest of a child's own part."""
        found = {}
        for child in state.children:
            name = tables.disks.require(self.state, child).manifest
            while (row := tables.manifests.require(self.state, name)).base != state.manifest:
                name = row.base
            found[name] = row
        return found

    def _checkpoint(self, op: Checkpoint) -> None:
        if op.seq >= self.seq:
            raise Refused(f"a checkpoint of record {op.seq} can't be announced by {self.seq}")
        tables.set_checkpoint_seq(self.state, op.seq)

    # Manifest files live as long as a disk, or another manifest, builds on them.

    def _add_manifest(self, name: str, seal: FileSeal, base: str, users: int) -> None:
        if tables.manifests.get(self.state, name) is not None:
            raise Refused(f"manifest {name} occurs twice")
        row = ManifestState(seal.size_bytes, seal.count, seal.digest, base, users)
        tables.manifests.put(self.state, name, row)
        if base:
            under = tables.manifests.require(self.state, base)
            more = msgspec.structs.replace(under, users=under.users + 1)
            tables.manifests.put(self.state, base, more)

    def _unuse_manifest(self, name: str, count: int = 1) -> None:
        while name:
            row = tables.manifests.require(self.state, name)
            if row.users > count:
                fewer = msgspec.structs.replace(row, users=row.users - count)
                tables.manifests.put(self.state, name, fewer)
                return
            tables.manifests.delete(self.state, name)
            self.garbage.manifests.append(name)
            name, count = row.base, 1
