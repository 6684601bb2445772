"""The step machine of gc, as storage.domain.gc and storage.domain.session do it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from storage.domain import gc
from storage.domain.gc import GcPlan
from storage.domain.session import FoldedChain
from storage.errors import StorageError
from storage.format.record import Abort, Op
from storage.view import tables
from storage.view.memory_tables import MemoryTables
from storage.view.tables import unpack_chunk_row
from tests.model.chain import Edge
from tests.model.drafts import Draft
from tests.model.files import File, Pages
from tests.model.invariants import SnapshotView
from tests.model.world import Local, Model, Step, World, to, unlink_steps
from tests.model.writers import DONE, opening

if TYPE_CHECKING:
    from storage.domain.domain import Domain
    from storage.domain.session import Session


class Run(NamedTuple):
    """What a run has so far. `chains` and `pages`: the manifests that it folded."""

    number: int
    plan: GcPlan
    emptied: tuple[str, ...] = ()
    chunks: tuple[bytes, ...] = ()
    chains: tuple[FoldedChain, ...] = ()
    pages: tuple[Pages, ...] = ()


class Gc:
    """gc runs, as often as there is something to plan; each with a session of its own."""

    domain = 0
    start = Local("plan", (0,))

    def __init__(self, model: Model, name: str, host: int, runs: int = 1) -> None:
        self.model = model
        self.name = name
        self.host = host
        self.place = len(model.processes)
        self.sessions = [model.new_session() for _ in range(runs)]
        if not model.rules.fresh_session_names:
            self.sessions = self.sessions[:1] * runs

    def steps(self, world: World) -> Iterator[Step]:
        """data: (number,) in "plan", (mask, number) where files are unlinked, else (Run,)."""
        pc, data = world.locals[self.place][:2]
        append = self.model.append
        if pc == "plan":
            yield from self._plan(world, cast(int, data[0]))
        elif pc == "unlink":
            yield from unlink_steps(world, self, self._next(cast(int, data[1])))
        elif pc == "early":
            yield from unlink_steps(world, self, Local("retire", data[1:]))
        elif pc != "done":
            run = cast(Run, data[0])
            match pc:
                case "open":
                    op = opening(self, self.sessions[run.number], "gc")
                    yield from append(world, self, lambda _: [op], self._opened, self._refused)
                case "copy":
                    yield f"{self.name}: copy", self._copy(world, run)
                case "fold":
                    yield f"{self.name}: fold", self._fold(world, run)
                case "retire":
                    build = self._retire_ops(run)
                    yield from append(world, self, build, self._retired, self._refused)
                case "abort":
                    abort = Abort(session=self.sessions[run.number])
                    yield from append(world, self, lambda _: [abort], self._aborted, self._over)

    def _next(self, number: int) -> Local:
        return Local("plan", (number + 1,)) if number + 1 < len(self.sessions) else DONE

    def _plan(self, world: World, number: int) -> Iterator[Step]:
        plan = self.model.chains[0].plan(world.heads[0])
        if plan.dead or plan.sparse or plan.long_chains:
            seen = self.model.refreshed(world, self)
            yield f"{self.name}: plan", to(seen, self, Local("open", (Run(number, plan),)))

    def _opened(self, world: World, _: Edge) -> World:
        return to(world, self, Local("copy", world.locals[self.place].data))

    # Own files.

    def _copy(self, world: World, run: Run) -> World:
        """Copies what the host's view places in the sparse packs. A pack that has gone, from the
        view or the disk, ends the run."""
        state = self.model.view(world, self).state
        chunks: list[bytes] = []
        for name in run.plan.sparse:
            row = tables.packs.get(state, name)
            file = row and self.model.files.find(0, "packs", name, row.digest)
            if row is None or not file or not file.bit & world.disk:
                return to(world, self, Local("abort", (run,)))
            chunks += _placed(state, file, row.number)
        run = run._replace(emptied=run.plan.sparse, chunks=tuple(chunks))
        if chunks:
            session = self.sessions[run.number]
            world = self.model.create(world, self.model.files.pack(0, session, 0, run.chunks))
        then = "fold" if run.plan.long_chains else "retire"
        return self._early(world, run) if then == "retire" else to(world, self, Local(then, (run,)))

    def _fold(self, world: World, run: Run) -> World:
        """Writes long chains anew, with the real storage.domain.gc._fold_chains."""
        state = self.model.view(world, self).state
        sink = _ManifestSink(state)
        domain, session = cast("Domain", sink), cast("Session", sink)
        chains = gc._fold_chains(domain, session, run.plan.long_chains)
        run = run._replace(
            chains=tuple(chains), pages=tuple(tuple(pages) for pages in sink.manifests)
        )
        for file in self._manifests(run):
            world = self.model.create(world, file)
        return self._early(world, run)

    def _early(self, world: World, run: Run) -> World:
        if self.model.rules.retires_before_unlink:
            return to(world, self, Local("retire", (run,)))
        retired = {*run.plan.dead, *run.emptied}
        head = self.model.head(world, 0)
        mask = sum(f.bit for f in self.model.files.of(head.files) if f.name in retired)
        return to(world, self, Local("early", (mask, run)))

    def _manifests(self, run: Run) -> list[File]:
        session = self.sessions[run.number]
        return [
            self.model.files.manifest(0, session, n, pages) for n, pages in enumerate(run.pages)
        ]

    # Outcomes.

    def _retire_ops(self, run: Run) -> _RetireOps:
        session = self.sessions[run.number]
        packs = [self.model.files.pack(0, session, 0, run.chunks).seal] if run.chunks else []
        manifests = {
            chain.disk: (file.seal, chain.parent)
            for chain, file in zip(run.chains, self._manifests(run), strict=True)
        }
        draft = Draft(session, packs, manifests)
        return _RetireOps(draft, (*run.plan.dead, *run.emptied), run.chains)

    def _number(self, world: World) -> int:
        return cast(Run, world.locals[self.place].data[0]).number

    def _retired(self, world: World, edge: Edge) -> World:
        return to(world, self, self._unlink(edge.garbage, self._number(world)))

    def _unlink(self, mask: int, number: int) -> Local:
        return Local("unlink", (mask, number)) if mask else self._next(number)

    def _refused(self, world: World, _: StorageError) -> World:
        """The world has moved on: this run comes to nothing, the next one plans anew."""
        return to(world, self, Local("abort", world.locals[self.place].data))

    def _aborted(self, world: World, edge: Edge) -> World:
        """Domain.abort: the session's files that are there now, and what it alone had held."""
        number = self._number(world)
        own = self.model.files.of_session(0, self.sessions[number], world.disk)
        return to(world, self, self._unlink(own | edge.garbage, number))

    def _over(self, world: World, _: StorageError) -> World:
        return to(world, self, self._next(self._number(world)))


class _RetireOps:
    """Session.retire's own builder, which looks at the state that the record will follow."""

    def __init__(self, draft: Draft, packs: Sequence[str], chains: Sequence[FoldedChain]) -> None:
        self._draft, self._packs, self._chains = draft, packs, chains

    def __call__(self, state: MemoryTables) -> Sequence[Op]:
        return self._draft.retire_ops(state, self._packs, self._chains)


def _placed(state: MemoryTables, file: File, number: int) -> list[bytes]:
    rows = state.table("chunks").get_many([chunk[:32] for chunk in file.chunks])
    return [
        chunk
        for chunk in file.chunks
        if chunk[:32] in rows and _pack_of(rows[chunk[:32]]) == number
    ]


def _pack_of(row: bytes) -> int:
    return unpack_chunk_row(row).pack


class _ManifestSink:
    """Stands for the domain and the session that storage.domain.gc._fold_chain wants."""

    def __init__(self, state: MemoryTables) -> None:
        self.view = SnapshotView(state)
        self.manifests: list[list[tuple[int, bytes]]] = []
        self.writer = self

    def manifest(self, *_: object) -> _ManifestSink:
        self.manifests.append([])
        return self

    def add_page(self, page_no: int, page: bytes) -> None:
        self.manifests[-1].append((page_no, page))
