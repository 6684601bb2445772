"""Step machines of those who change domain 0: backups, deletes, and gc."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias, cast

from storage.domain.session import NewBackup
from storage.errors import ChunkMissing, StorageError
from storage.format.chunks import ZERO_MARK
from storage.format.manifests import encode_page
from storage.format.record import Forget, Op, Open, SessionKind
from storage.view.memory_tables import MemoryTables
from storage.view.tables import unpack_chunk_row
from tests.model.chain import Edge
from tests.model.drafts import Draft
from tests.model.files import Pages
from tests.model.invariants import must
from tests.model.world import Local, Model, Process, Step, World, to, unlink_steps

if TYPE_CHECKING:
    pass

Chunks: TypeAlias = tuple[bytes, ...]
DONE = Local("done")


def disk_of(backup: str) -> str:
    """Every backup here has one disk."""
    return "d" + backup[1:]


def opening(process: Process, session: str, kind: SessionKind, holds: Sequence[str] = ()) -> Open:
    return Open(
        session=session, kind=kind, host=f"host-{process.host}", incarnation="1", holds=tuple(holds)
    )


def then_unlink(mask: int, after: Local) -> Local:
    """Where a process goes that has `mask` to unlink before `after`."""
    return Local("unlink", (mask,)) if mask else after


class Backup:
    """One backup: `changes` (chunk index -> id) against `parent` once that is there, or in full.

    `before`: the predecessors of chunks that it stores as patches, if it may.
    """

    domain = 0
    start = Local("open")

    def __init__(
        self,
        model: Model,
        name: str,
        host: int,
        backup: str,
        changes: Mapping[int, bytes],
        parent: str = "",
        before: Mapping[bytes, bytes] = MappingProxyType({}),
    ) -> None:
        self.model = model
        self.name = name
        self.host = host
        self.place = len(model.processes)
        self.backup = backup
        self.bit = model.names.backup(0, backup)
        self.parent = parent
        self._parent_bit = model.names.backup(0, parent)
        self.session = model.new_session()
        self._before = before
        self._chunks = tuple(sorted(set(changes.values()) - {ZERO_MARK}))
        pages: Pages = ((0, encode_page(dict(changes))),)
        self._manifest = model.files.manifest(0, self.session, 0, pages)

    def steps(self, world: World) -> Iterator[Step]:
        """data: (packs stored so far, chunks that a commit missed)."""
        local = world.locals[self.place]
        match local.pc:
            case "open" if not self.parent or world.acked & self._parent_bit:
                yield from self.model.append(world, self, self._open, self._opened, self._refused)
            case "look":
                yield self._look(world)
            case "manifest":
                written = self.model.create(world, self._manifest)
                yield f"{self.name}: manifest", to(written, self, local._replace(pc="commit"))
            case "commit":
                packs = cast("tuple[Chunks, ...]", local.data[0])
                yield from self.model.append(
                    world, self, lambda state: self._ops(state, packs), self._acked, self._refused
                )
            case "again":
                packs, missing = cast("tuple[tuple[Chunks, ...], Chunks]", local.data)
                yield f"{self.name}: store again", self._store(world, packs, missing, "commit")
            case "late":
                yield f"{self.name}: late", to(self.model.create(world, self._manifest), self, DONE)
            case "unlink":
                yield from unlink_steps(world, self, DONE)

    def _open(self, _: MemoryTables) -> list[Op]:
        holds = (self.parent,) if self.parent and self.model.rules.holds_parent else ()
        return [opening(self, self.session, "backup", holds)]

    def _opened(self, world: World, _: Edge) -> World:
        return to(world, self, Local("look", ((), ())))

    def _look(self, world: World) -> Step:
        """Session.known of all chunks, on the host's view as it is; then a pack with the rest."""
        live = self.model.view(world, self).state.table("chunks").get_many(self._chunks)
        state = self.model.view(world, self).state
        unknown = tuple(
            chunk + self._base(state, chunk) for chunk in self._chunks if chunk not in live
        )
        then = "manifest" if self.model.rules.manifest_before_commit else "commit"
        return f"{self.name}: store {len(unknown)}", self._store(world, (), unknown, then)

    def _base(self, state: MemoryTables, chunk: bytes) -> bytes:
        """As Session.bases; b"" to store it whole."""
        predecessor = state.table("chunks").get(self._before.get(chunk, b"-"))
        if predecessor is None:
            return b""
        base = unpack_chunk_row(predecessor).base or self._before[chunk]
        return base if state.table("chunks").get(base) is not None else b""

    def _store(self, world: World, packs: tuple[Chunks, ...], chunks: Chunks, then: str) -> World:
        if not chunks:
            return to(world, self, Local(then, (packs, ())))
        file = self.model.files.pack(0, self.session, len(packs), chunks)
        return to(self.model.create(world, file), self, Local(then, ((*packs, chunks), ())))

    def _ops(self, state: MemoryTables, packs: tuple[Chunks, ...]) -> Sequence[Op]:
        seals = [
            self.model.files.pack(0, self.session, n, chunks).seal for n, chunks in enumerate(packs)
        ]
        disk, parent_disk = disk_of(self.backup), disk_of(self.parent) if self.parent else ""
        draft = Draft(self.session, seals, {disk: (self._manifest.seal, parent_disk)})
        return draft.commit_ops(state, [NewBackup(self.backup, b"", [disk], self.parent)])

    def _acked(self, world: World, edge: Edge) -> World:
        acked = world._replace(acked=world.acked | self.bit)
        late = not self.model.rules.manifest_before_commit
        return to(acked, self, Local("late") if late else then_unlink(edge.garbage, DONE))

    def _refused(self, world: World, error: StorageError) -> World:
        local = world.locals[self.place]
        if isinstance(error, ChunkMissing):
            missing = tuple(sorted(error.ids))
            return to(world, self, Local("again", (local.data[0], missing)))
        gone = local.pc == "open" and self._parent_bit & world.forgot
        self.model.fail(world, self.session, str(error), excuse=bool(gone))
        return to(world._replace(failed=world.failed | self.bit), self, Local("failed"))


class Delete:
    """Deletes one backup, at any time after it was acknowledged."""

    domain = 0
    start = Local("forget")

    def __init__(self, model: Model, name: str, host: int, backup: str) -> None:
        self.model = model
        self.name = name
        self.host = host
        self.place = len(model.processes)
        self.backup = backup
        self.bit = model.names.backup(0, backup)

    def steps(self, world: World) -> Iterator[Step]:
        match world.locals[self.place].pc:
            case "forget" if world.acked & self.bit:
                yield from self.model.append(world, self, self._ops, self._forgot, self._refused)
            case "unlink":
                yield from unlink_steps(world, self, DONE)

    def _ops(self, _: MemoryTables) -> list[Op]:
        return [Forget(backups=(self.backup,))]

    def _forgot(self, world: World, edge: Edge) -> World:
        return to(world, self, then_unlink(edge.garbage, DONE))

    def _refused(self, world: World, error: StorageError) -> World:
        must(False, f"I7: {self.backup} was there, and can't be deleted: {error}")
        return world
