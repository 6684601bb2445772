"""Step machines of those who read domain 0: a restore, and an import by domain 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from storage.domain.maps import DiskMap
from storage.domain.session import NewBackup
from storage.errors import ChunkMissing, NotOnPoint, StorageError
from storage.format.chunks import ZERO_MARK
from storage.format.manifests import decode_page
from storage.format.record import Abort, Op
from storage.log.rebuild import manifest_chain, merged_pages
from storage.view import tables
from storage.view.memory_tables import MemoryTables
from storage.view.tables import unpack_chunk_row
from storage.view.view import View
from tests.model.chain import Edge
from tests.model.drafts import Draft
from tests.model.files import DiskContents, File, Pages
from tests.model.invariants import SnapshotView
from tests.model.world import Local, Model, Step, World, to, unlink_steps
from tests.model.writers import DONE, disk_of, opening, then_unlink

ATTEMPTS = 2  # of an import


class Restore:
    """Reads one backup that it holds; packs may move meanwhile.

    data: ((chunk, pack), ... still to read, look-ups left).
    """

    domain = 0
    start = Local("open")

    def __init__(self, model: Model, name: str, host: int, backup: str) -> None:
        self.model = model
        self.name = name
        self.host = host
        self.place = len(model.processes)
        self.backup = backup
        self.session = model.new_session()

    def steps(self, world: World) -> Iterator[Step]:
        local = world.locals[self.place]
        append = self.model.append
        match local.pc:
            case "open":
                holds = (self.backup,) if self.model.rules.reader_holds else ()
                op = opening(self, self.session, "read", holds)
                yield from append(world, self, lambda _: [op], self._opened, self._not_opened)
            case "map":
                yield f"{self.name}: map", self._mapped(world)
            case "read":
                yield from self._read(world)
            case "end":
                draft = Draft(self.session, (), {})
                yield from append(world, self, draft.end_ops, self._ended, self._was_over)
            case "unlink":
                yield from unlink_steps(world, self, DONE)

    def _opened(self, world: World, _: Edge) -> World:
        return to(world, self, Local("map"))

    def _not_opened(self, world: World, error: StorageError) -> World:
        gone = self.model.names.backup(0, self.backup) & world.forgot
        self.model.fail(world, self.session, str(error), excuse=bool(gone))
        return to(world, self, DONE)

    def _mapped(self, world: World) -> World:
        """DiskMap and plan_reads, on the host's view as it is."""
        state = self.model.view(world, self).state
        view = cast(View, SnapshotView(state))
        try:
            disk_map = DiskMap.of(view, disk_of(self.backup), 1 << 20)
        except NotOnPoint as error:
            return self._failed(world, str(error))
        chunks = [chunk for _, page in disk_map.pages() for chunk in page.values()]
        rows = state.table("chunks").get_many(chunks)
        chunks += [base for row in rows.values() if (base := unpack_chunk_row(row).base)]
        places = _places(state, chunks)
        if len(places) != len(chunks):
            return self._failed(world, "a chunk is nowhere")
        return to(world, self, Local("read", (places, 3)))

    def _read(self, world: World) -> Iterator[Step]:
        """One chunk. A pack whose name is gone: the log is read, the chunk looked up anew."""
        places, attempts = cast(
            "tuple[tuple[tuple[bytes, str], ...], int]", world.locals[self.place].data
        )
        chunk, pack = places[0]
        if self._holds(world.disk, pack, chunk):
            rest = Local("read", (places[1:], 3)) if places[1:] else Local("end")
            yield f"{self.name}: read", to(world, self, rest)
            return
        world = self.model.refreshed(world, self)
        moved = _places(self.model.view(world, self).state, [chunk])
        dead_end = not moved or moved[0][1] == pack or not attempts
        if dead_end or not self.model.rules.reader_relocates:
            yield f"{self.name}: gone", self._failed(world, f"the pack {pack} is gone")
        else:
            again = Local("read", ((*moved, *places[1:]), attempts - 1))
            yield f"{self.name}: look up anew", to(world, self, again)

    def _holds(self, disk: int, pack: str, chunk: bytes) -> bool:
        own = disk & self.model.files.domains[0]
        return any(
            file.name == pack and any(held.startswith(chunk) for held in file.chunks)
            for file in self.model.files.of(own)
        )

    def _failed(self, world: World, why: str) -> World:
        self.model.fail(world, self.session, why)
        return to(world, self, DONE)

    def _ended(self, world: World, edge: Edge) -> World:
        return to(world, self, then_unlink(edge.garbage, DONE))

    def _was_over(self, world: World, error: StorageError) -> World:
        self.model.fail(world, self.session, str(error))
        return to(world, self, DONE)


def _places(state: MemoryTables, chunks: Sequence[bytes]) -> tuple[tuple[bytes, str], ...]:
    rows = state.table("chunks").get_many(chunks)
    return tuple(
        (chunk, tables.pack_id(state, unpack_chunk_row(rows[chunk]).pack))
        for chunk in chunks
        if chunk in rows
    )


class Import:
    """Domain 1 takes a backup of domain 0 over, as storage.domain.imports does, in some attempts.

    data: (attempt, the foreign node, chunks lacking, packs linked, number of the next pack).
    """

    domain = 1

    def __init__(self, model: Model, name: str, host: int, backup: str) -> None:
        self.model = model
        self.name = name
        self.host = host
        self.place = len(model.processes)
        self.backup = backup
        self.bit = model.names.backup(1, backup)
        self.start = Local("read", (0,))
        self.sessions = [model.new_session() for _ in range(ATTEMPTS)]
        if not model.rules.fresh_session_names:
            self.sessions = self.sessions[:1] * ATTEMPTS

    def steps(self, world: World) -> Iterator[Step]:
        local = world.locals[self.place]
        append = self.model.append
        if local.pc in ("done", "failed"):
            return
        if local.pc == "unlink":
            yield from unlink_steps(world, self, cast(Local, local.data[1]))
            return
        session = self.sessions[cast(int, local.data[0])]
        match local.pc:
            case "read":
                yield f"{self.name}: read log", self._look(world)
            case "open":
                op = opening(self, session, "import")
                yield from append(world, self, lambda _: [op], self._opened, self._refused)
            case "map":
                yield f"{self.name}: map", self._map(world, local)
            case "link":
                yield f"{self.name}: link", self._link(world, local)
            case "commit":
                yield from append(
                    world, self, lambda state: self._ops(state, local), self._acked, self._refused
                )
            case "abort":
                abort = Abort(session=session)
                yield from append(world, self, lambda _: [abort], self._aborted, self._over)

    def _look(self, world: World) -> World:
        foreign = world.heads[0]
        there = self.model.chains[0].nodes[foreign].live & self.model.names.backup(0, self.backup)
        local = world.locals[self.place]
        then = Local("open", (*local.data, foreign)) if there else DONE
        return to(world, self, then)

    def _opened(self, world: World, _: Edge) -> World:
        return to(world, self, Local("map", world.locals[self.place].data))

    def _pages(self, foreign: int) -> tuple[Pages, int]:
        """The backup's whole map, and the mask of the manifests that it is made from."""
        state = self.model.chains[0].nodes[foreign].bare
        row = tables.disks.require(state, disk_of(self.backup))
        chain = manifest_chain(state, row.manifest)
        contents = DiskContents(self.model.files, 0)
        files = [self.model.files.find(0, "manifests", *link).bit for link in chain]
        return tuple(merged_pages(contents, chain, root=True)), sum(files)

    def _manifest(self, attempt: int, foreign: int) -> File:
        session = self.sessions[attempt]
        return self.model.files.manifest(1, session, 0, self._pages(foreign)[0])

    def _map(self, world: World, local: Local) -> World:
        attempt, foreign = cast("tuple[int, int]", local.data)
        pages, needed = self._pages(foreign)
        if needed & ~world.disk:
            return to(world, self, Local("abort", (attempt,)))
        chunks = {chunk for _, page in pages for chunk in decode_page(page).values()} - {ZERO_MARK}
        known = self.model.view(world, self).state.table("chunks").get_many(list(chunks))
        lacking = tuple(sorted(chunks - known.keys()))
        made = self.model.create(world, self._manifest(attempt, foreign))
        return to(made, self, Local("link", (attempt, foreign, lacking, (), 1 << 32)))

    def _link(self, world: World, local: Local) -> World:
        """Links the next pack of the foreign domain that holds something we lack."""
        attempt, foreign, lacking, linked, below = cast(
            "tuple[int, int, tuple[bytes, ...], tuple[File, ...], int]", local.data
        )
        state = self.model.chains[0].nodes[foreign].bare
        rows = sorted(((r.number, p, r.digest) for p, r in tables.packs.scan(state)), reverse=True)
        for number, pack, digest in rows:
            if number >= below or not lacking:
                continue
            file = self.model.files.find(0, "packs", pack, digest)
            if not file.bit & world.disk:
                return to(world, self, Local("abort", (attempt,)))
            if set(file.chunks) & set(lacking):
                own = self.model.files.link(file, 1, self.sessions[attempt], len(linked))
                world = self.model.create(world, own)
                if not self.model.rules.import_links:
                    world = world._replace(disk=world.disk & ~file.bit)
                left = tuple(chunk for chunk in lacking if chunk not in file.chunks)
                rest = (attempt, foreign, left, (*linked, own), number)
                return to(world, self, Local("link", rest))
        if lacking:
            return to(world, self, Local("abort", (attempt,)))
        return to(world, self, Local("commit", (attempt, foreign, linked)))

    def _ops(self, state: MemoryTables, local: Local) -> Sequence[Op]:
        attempt, foreign, linked = cast("tuple[int, int, tuple[File, ...]]", local.data)
        disk = disk_of(self.backup)
        manifests = {disk: (self._manifest(attempt, foreign).seal, "")}
        draft = Draft(self.sessions[attempt], [file.seal for file in linked], manifests)
        return draft.commit_ops(state, [NewBackup(self.backup, b"", [disk])])

    def _acked(self, world: World, edge: Edge) -> World:
        del edge
        return to(world._replace(acked=world.acked | self.bit), self, DONE)

    def _refused(self, world: World, error: StorageError) -> World:
        attempt = cast(int, world.locals[self.place].data[0])
        if isinstance(error, ChunkMissing):
            return to(world, self, Local("abort", (attempt,)))
        self.model.fail(world, self.sessions[attempt], str(error))
        return to(world._replace(failed=world.failed | self.bit), self, Local("failed"))

    def _aborted(self, world: World, edge: Edge) -> World:
        attempt = cast(int, world.locals[self.place].data[0])
        own = self.model.files.of_session(1, self.sessions[attempt], world.disk) | edge.garbage
        again = Local("read", (attempt + 1,)) if attempt + 1 < len(self.sessions) else None
        world = world if again else world._replace(failed=world.failed | self.bit)
        then = again or Local("failed")
        return to(world, self, Local("unlink", (own, then)) if own else then)

    def _over(self, world: World, error: StorageError) -> World:
        attempt = cast(int, world.locals[self.place].data[0])
        self.model.fail(world, self.sessions[attempt], str(error))
        return to(world._replace(failed=world.failed | self.bit), self, Local("failed"))
