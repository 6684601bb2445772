"""A state of the whole model: two logs, the hosts' views of them, the disk, and every process.

What a process remembers is its Local. Everything else in a World is either on the point or a
ghost: a fact of the run that no process can see, kept so that invariants can be asserted of it.

A crash is not a step of its own: a process that is never scheduled again *is* crashed, a state in
which it stopped and all others go on is explored for each of its steps, and in each state
tests.model.recovery kills everybody and starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

from storage.errors import FileGone, StorageError
from storage.format.record import Op
from storage.view.memory_tables import MemoryTables
from tests.model.chain import Chain, Edge, Image, Names, Node
from tests.model.files import File, Files
from tests.model.invariants import must

FREE, PREPARED, DOUBTFUL = 0, 1, 2
STALE = -1


class Local(NamedTuple):
    """Where a process is. `phase` and `base` are of the append that it is in: not begun; folded on
    top of node `base`, not linked; linked, but the reply was lost."""

    pc: str
    data: tuple[object, ...] = ()
    phase: int = FREE
    base: int = STALE


class World(NamedTuple):
    """Everything but the names is masks: files (Files), names of files, sessions, backups."""

    heads: tuple[int, ...]  # per domain: the node after the log's last record
    views: tuple[int, ...]  # per host: the node that its view holds
    disk: int
    locals: tuple[Local, ...]
    created: int = 0  # names that were ever given to a file
    opened: int = 0  # sessions
    ended: int = 0  # sessions
    forgot: int = 0  # backups that a FORGET in the log names
    acked: int = 0  # backups whose maker was told that they are there
    failed: int = 0  # backups whose maker was told that they are not


@dataclass(frozen=True, slots=True)
class Rules:
    """What processes keep to. Each one can be broken, to see that the model notices."""

    settles_by_nonce: bool = True
    link_never_overwrites: bool = True
    lost_race_is_lost: bool = True
    holds_parent: bool = True
    reader_holds: bool = True
    reader_relocates: bool = True
    retires_before_unlink: bool = True
    aborts_before_delete: bool = True
    lists_before_refresh: bool = True
    refreshes_before_judging: bool = True
    manifest_before_commit: bool = True
    fresh_session_names: bool = True
    import_links: bool = True
    spares_open_sessions: bool = True
    failures_need_a_cause: bool = True  # an invariant; off to see what lies behind it


Step: TypeAlias = tuple[str, World]
Build: TypeAlias = Callable[[MemoryTables], Sequence[Op]]
Done: TypeAlias = Callable[[World, Edge], World]
RefusedStep: TypeAlias = Callable[[World, StorageError], World]


class Process(Protocol):
    """A step machine. `place` is its index in World.locals, `host` in World.views."""

    name: str
    place: int
    host: int
    domain: int
    start: Local

    def steps(self, world: World) -> Iterator[Step]: ...


@dataclass(slots=True)
class Model:
    """What all Worlds of one search share. `hosts`: the domain of each."""

    images: dict[str, Image]
    rules: Rules = field(default_factory=Rules)
    hosts: tuple[int, ...] = (0, 0, 1)
    lossy: frozenset[str] = frozenset()
    files: Files = field(default_factory=Files)
    names: Names = field(default_factory=Names)
    chains: tuple[Chain, ...] = ()
    processes: list[Process] = field(default_factory=list)
    built: dict[tuple[int, str, Local], Edge | StorageError] = field(default_factory=dict)
    sessions: int = 0

    def __post_init__(self) -> None:
        self.chains = tuple(Chain(domain, self.files, self.names, self.images) for domain in (0, 1))

    def new_session(self) -> str:
        self.sessions += 1
        return self.names.session(self.sessions)

    def head(self, world: World, domain: int) -> Node:
        return self.chains[domain].nodes[world.heads[domain]]

    def view(self, world: World, process: Process) -> Node:
        return self.chains[process.domain].nodes[world.views[process.host]]

    def steps(self, world: World) -> Iterator[Step]:
        for process in self.processes:
            yield from process.steps(world)

    # What a step changes.

    def refreshed(self, world: World, process: Process) -> World:
        head = world.heads[process.domain]
        if world.views[process.host] == head:
            return world
        return world._replace(views=_put(world.views, process.host, head))

    def append(
        self, world: World, process: Process, build: Build, done: Done, refused: RefusedStep
    ) -> Iterator[Step]:
        """The steps of storage.domain.domain.Domain.append from this state on."""
        local = world.locals[process.place]
        what = f"{process.name}.{local.pc}"
        if local.phase == FREE:
            yield from self._prepare(world, process, build, refused, what)
        elif local.phase == PREPARED:
            yield from self._publish(world, process, build, done, what)
        elif self.rules.settles_by_nonce:
            # The name is read, and the nonce in it is ours.
            yield (
                f"{what}: settled",
                done(
                    self.refreshed(world, process), self._built(world, process, local.base, build)
                ),
            )
        else:
            yield f"{what}: again", to(world, process, local._replace(phase=FREE, base=STALE))

    def _edge(self, head: int, process: Process, local: Local, build: Build) -> Edge | StorageError:
        key = (head, process.name, local)
        known = self.built.get(key)
        if known is None:
            chain = self.chains[process.domain]
            ops = tuple(build(chain.nodes[head].state))
            known = self.built[key] = chain.extend(head, ops, f"host-{process.host}")
        return known

    def _built(self, world: World, process: Process, base: int, build: Build) -> Edge:
        local = world.locals[process.place]
        found = self._edge(base, process, local._replace(phase=FREE, base=STALE), build)
        must(isinstance(found, _EDGE), "I6: a refused record was linked")
        return found  # type: ignore[return-value]

    def _prepare(
        self, world: World, process: Process, build: Build, refused: RefusedStep, what: str
    ) -> Iterator[Step]:
        """Fold the tail, fold the new ops on top of it in a transaction that stays open."""
        local = world.locals[process.place]
        head = world.heads[process.domain]
        world = self.refreshed(world, process)
        found = self._edge(head, process, local, build)
        missing = isinstance(found, Edge) and found.needs & ~world.disk
        if missing and self.rules.manifest_before_commit:
            found = FileGone("a file of the record is not there")
        if isinstance(found, Edge):
            yield f"{what}: fold", to(world, process, local._replace(phase=PREPARED, base=head))
        else:
            yield f"{what}: {found.code}", refused(world, found)

    def _publish(
        self, world: World, process: Process, build: Build, done: Done, what: str
    ) -> Iterator[Step]:
        """link(2) to the number after `base`."""
        local = world.locals[process.place]
        rules = self.rules
        if local.base == world.heads[process.domain] or not (
            rules.link_never_overwrites or local.base == STALE
        ):
            must(local.base == world.heads[process.domain], "I6: a record was overwritten")
            edge = self._built(world, process, local.base, build)
            after = self._linked(world, process, edge)
            yield f"{what}: link", done(self.refreshed(after, process), edge)
            if process.name in self.lossy:
                doubtful = local._replace(phase=DOUBTFUL)
                yield f"{what}: link, reply lost", to(after, process, doubtful)
        elif rules.lost_race_is_lost:
            yield f"{what}: raced", to(world, process, local._replace(phase=FREE, base=STALE))
        else:
            edge = self._built(world, process, local.base, build)
            yield f"{what}: raced, believed", done(world, edge)

    def _linked(self, world: World, process: Process, edge: Edge) -> World:
        """The record is in the log. I4 and the half of I5 that is about sessions."""
        must(not edge.opened & world.opened, "I5: a session's id recurred")
        must(not edge.ended & world.ended, "I4: a session has two outcomes")
        must(not edge.ended & ~world.opened, "I4: an outcome without an OPEN")
        keep = not (self.rules.link_never_overwrites and self.rules.lost_race_is_lost)
        return world._replace(
            heads=_put(world.heads, process.domain, edge.child),
            locals=world.locals if keep else self._outrun(world, process),
            opened=world.opened | edge.opened,
            ended=world.ended | edge.ended,
            forgot=world.forgot | edge.forgot,
        )

    def _outrun(self, world: World, winner: Process) -> tuple[Local, ...]:
        """Whose number was taken loses the next link; which number it was makes no difference."""
        return tuple(
            local._replace(base=STALE)
            if local.phase == PREPARED and self.processes[place].domain == winner.domain
            else local
            for place, local in enumerate(world.locals)
        )

    def create(self, world: World, file: File) -> World:
        """A file gets its name. The other half of I5."""
        must(not file.name_bit & world.created, f"I5: the name {file.name} recurred")
        return world._replace(disk=world.disk | file.bit, created=world.created | file.name_bit)

    def fail(self, world: World, session: str, why: str, *, excuse: bool = False) -> None:
        """Work may fail because its session was ended by others, or for the excuse given."""
        ended = bool(self.names.sessions[session] & world.ended)
        excuse |= not self.rules.failures_need_a_cause
        must(ended or excuse, f"I7: failed without a cause: {why}")

    def check(self, world: World) -> None:
        """I2 (and so I3), I7, and that what was said is true: in every state."""
        live = 0
        for chain, number in zip(self.chains, world.heads, strict=True):
            node = chain.nodes[number]
            live |= node.live
            must(not node.files & ~world.disk, "I2: a live file is not on the disk")
        must(not world.acked & ~world.forgot & ~live, "I7: an acknowledged backup is gone")
        must(not world.failed & live, "I7: a backup is there that was reported as failed")


_EDGE = Edge


def to(world: World, process: Process, local: Local) -> World:
    """The process goes on at `local`."""
    return world._replace(locals=_put(world.locals, process.place, local))


def unlink_steps(world: World, process: Process, after: Local) -> Iterator[Step]:
    """One file of the mask data[0] goes; after the last one the process is at `after`.

    data: (mask, anything else...).
    """
    local = world.locals[process.place]
    mask = local.data[0]
    assert isinstance(mask, int)
    mask &= world.disk  # what is gone already costs no step
    low = mask & -mask
    rest = mask ^ low
    going_on = local._replace(data=(rest, *local.data[1:])) if rest else after
    gone = world._replace(disk=world.disk & ~low)
    yield f"{process.name}.{local.pc}: unlink", to(gone, process, going_on)


def _put(items: tuple, place: int, item: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:place], item, *items[place + 1 :])
