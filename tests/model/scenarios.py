"""What the searches start from, and who takes part.

Domain 0 begins with three backups: P (chunks A B), Q (C) and a forgotten one, whose pack it shares
with Q: so that pack is sparse, a gc copies C, and a delete of Q at the same time takes C away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from storage.domain.session import NewBackup
from storage.errors import StorageError
from storage.format.chunks import ZERO_MARK
from storage.format.manifests import encode_page
from storage.format.record import Forget, Op, Open
from tests.model.cleaners import Reaper, Sweeper
from tests.model.collector import Gc
from tests.model.drafts import Draft
from tests.model.takers import Import, Restore
from tests.model.world import Model, Process, Rules, World
from tests.model.writers import Backup, Delete, disk_of

A, B, C, D, E, F, G, N, X, Y = (bytes([letter]) * 32 for letter in b"abcdefgnxy")


def _uuid(letter: str) -> str:
    return f"b0000000-0000-0000-0000-00000000000{letter}"


P, Q, R, ONE, TWO, THREE, FOUR, FIVE, SIX, SEVEN = (_uuid(letter) for letter in "0123456789")

# b1 changes P: a chunk that only Q has, and a new one. b2 is full and shares with all. b3 changes
# b1, to a chunk that lies in a pack but is dead, and to zeros.
CHANGES_ONE = {1: C, 2: N}
CHANGES_TWO = {0: C, 1: N, 2: B}
CHANGES_THREE = {0: D, 2: ZERO_MARK}
# Patches: b4 changes P, X being a patch of B; b5 changes b4, Y being a patch of X or of what X is
# one of, and leaves X alone in its pack, which is sparse then. b6 has X from somewhere else, whole;
# b7 changes b6, Y being a patch of X.
CHANGES_FOUR = {0: N, 1: X, 2: G}
CHANGES_FIVE = {0: ZERO_MARK, 2: ZERO_MARK, 3: Y}
CHANGES_SIX = {0: X}
CHANGES_SEVEN = {1: Y}
IMAGES: Mapping[str, Mapping[int, bytes]] = {
    P: {0: A, 1: B},
    Q: {0: C},
    R: {0: D, 1: E, 2: F},
    ONE: {0: A, 1: C, 2: N},
    TWO: {0: C, 1: N, 2: B},
    THREE: {0: D, 1: C},
    FOUR: {0: N, 1: X, 2: G},
    FIVE: {1: X, 3: Y},
    SIX: {0: X},
    SEVEN: {0: X, 1: Y},
}

Cast = Callable[[Model], Process]
CAST: Mapping[str, Cast] = {
    "b1": lambda m: Backup(m, "b1", 0, ONE, CHANGES_ONE, P),
    "b2": lambda m: Backup(m, "b2", 1, TWO, CHANGES_TWO),
    "b3": lambda m: Backup(m, "b3", 0, THREE, CHANGES_THREE, ONE),
    "b4": lambda m: Backup(m, "b4", 0, FOUR, CHANGES_FOUR, P, {X: B}),
    "b5": lambda m: Backup(m, "b5", 0, FIVE, CHANGES_FIVE, FOUR, {Y: X}),
    "b6": lambda m: Backup(m, "b6", 1, SIX, CHANGES_SIX),
    "b7": lambda m: Backup(m, "b7", 1, SEVEN, CHANGES_SEVEN, SIX, {Y: X}),
    "forget-4": lambda m: Delete(m, "forget-4", 1, FOUR),
    "forget-q": lambda m: Delete(m, "forget-q", 0, Q),
    "forget-p": lambda m: Delete(m, "forget-p", 1, P),
    "forget-1": lambda m: Delete(m, "forget-1", 1, ONE),
    "gc": lambda m: Gc(m, "gc", 1, 1),
    "gc2": lambda m: Gc(m, "gc2", 0, 2),
    "sweeper": lambda m: Sweeper(m, "sweeper", 1, 1),
    "sweeper-0": lambda m: Sweeper(m, "sweeper-0", 0, 1),
    "reaper": lambda m: Reaper(m, "reaper", 1, 1),
    "reaper-0": lambda m: Reaper(m, "reaper-0", 0, 2),
    "restore": lambda m: Restore(m, "restore", 0, Q),
    "restore-p": lambda m: Restore(m, "restore-p", 1, P),
    "import": lambda m: Import(m, "import", 2, Q),
    "import-p": lambda m: Import(m, "import-p", 2, P),
    "reaper-2": lambda m: Reaper(m, "reaper-2", 2, 1, domain=1),
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """`lossy`: processes whose replies may get lost. `at_least`: states that it has."""

    name: str
    cast: tuple[str, ...]
    lossy: frozenset[str] = frozenset()
    at_least: int = 1


def start(scenario: Scenario, rules: Rules | None = None) -> tuple[Model, World]:
    """The model and the first state."""
    model = Model(images=dict(IMAGES), rules=rules or Rules(), lossy=scenario.lossy)
    world = World(heads=(0, 0), views=(0, 0, 0), disk=0, locals=())
    world = _commit(model, world, {P: ({0: A, 1: B})}, [(A, B)])
    world = _commit(model, world, {Q: {0: C}, R: {0: D, 1: E, 2: F}}, [(C, D, E, F)])
    world = _record(model, world, [Forget(backups=(R,))])
    for name in scenario.cast:
        model.processes.append(CAST[name](model))
    world = world._replace(
        views=(world.heads[0], world.heads[0], world.heads[1]),
        locals=tuple(process.start for process in model.processes),
    )
    model.check(world)
    return model, world


def _record(model: Model, world: World, ops: Sequence[Op]) -> World:
    edge = model.chains[0].extend(world.heads[0], tuple(ops), "host-0")
    if isinstance(edge, StorageError):
        raise edge
    return world._replace(
        heads=(edge.child, world.heads[1]),
        disk=world.disk & ~edge.garbage,
        opened=world.opened | edge.opened,
        ended=world.ended | edge.ended,
        forgot=world.forgot | edge.forgot,
    )


def _commit(
    model: Model,
    world: World,
    images: Mapping[str, Mapping[int, bytes]],
    packs: Sequence[tuple[bytes, ...]],
) -> World:
    session = model.new_session()
    opened = Open(session=session, kind="backup", host="host-0", incarnation="0")
    world = _record(model, world, [opened])
    files = [model.files.pack(0, session, n, chunks) for n, chunks in enumerate(packs)]
    manifests = {}
    for n, (backup, image) in enumerate(images.items()):
        page = encode_page({at: chunk for at, chunk in image.items() if chunk != ZERO_MARK})
        made = model.files.manifest(0, session, n, ((0, page),))
        manifests[disk_of(backup)] = (made.seal, "")
        files.append(made)
        world = world._replace(acked=world.acked | model.names.backup(0, backup))
    for file in files:
        world = model.create(world, file)
    draft = Draft(session, [file.seal for file in files if file.kind == "packs"], manifests)
    backups = [NewBackup(backup, b"", [disk_of(backup)]) for backup in images]
    return _record(model, world, draft.commit_ops(model.chains[0].nodes[0].state, backups))


def _scenario(name: str, at_least: int, *cast: str, lossy: Sequence[str] = ()) -> Scenario:
    return Scenario(name, cast, frozenset(lossy), at_least)


SMALL = (
    _scenario("dedup", 16_000, "b1", "forget-q", "gc", "reaper"),
    _scenario("two", 50_000, "b1", "b2", "forget-q", "gc", lossy=("gc",)),
    _scenario("replies", 200, "b1", "b2", lossy=("b1", "b2")),
    _scenario("generations", 7_000, "b1", "b3", "forget-1", "forget-p", "gc"),
    _scenario("restore", 14_000, "restore", "b1", "forget-q", "gc"),
    _scenario("held", 9_000, "restore-p", "b1", "forget-p", "forget-1", "gc"),
    _scenario("import", 8_000, "import", "forget-q", "gc", "sweeper"),
    _scenario("patches", 6_000, "b4", "b5", "forget-4", "forget-p", "gc"),
    _scenario("bases", 15_000, "b4", "b6", "b7", "forget-4", "gc"),
    _scenario("orphans", 1_800, "b2", "sweeper-0", "sweeper", "reaper"),
)
FULL = (
    *SMALL,
    _scenario("deletes", 200_000, "b1", "b2", "forget-q", "forget-p", "gc"),
    _scenario("cleaners", 200_000, "b2", "forget-q", "gc", "sweeper-0", "reaper"),
    _scenario("zombies", 300_000, "b1", "b2", "forget-q", "reaper", "reaper-0"),
    _scenario("reading", 100_000, "restore", "b1", "forget-q", "gc", "reaper"),
    _scenario("clusters", 300_000, "import", "b1", "forget-q", "gc", "sweeper"),
    _scenario("imports", 80_000, "import", "reaper-2", "forget-q", "gc", "forget-p"),
    _scenario("lost-replies", 700_000, "b1", "b2", "forget-q", "gc", "sweeper-0", lossy=("gc",)),
)
EVERYBODY = _scenario("everybody", 0, *CAST, lossy=tuple(CAST))
