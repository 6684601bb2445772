"""What services do on a point, as scripts for the crash sweep: small, and each call of each counts.

A script is a list of steps; a step either does all that it says or raises a StorageError, and may
then be done again. Steps find what the ones before them made in `World.sides`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from storage.domain.bundling import Bundling
from storage.domain.heartbeats import Observer, beat
from storage.domain.leftovers import Leftovers
from storage.errors import NotOnPoint
from storage.view import tables
from tests.crash_world import World
from tests.store import CHUNK, Saved, edited, image_of, new_uuid, patches, write_disk

Step = Callable[[World], object]

FULL = image_of(1, 2, 0, 3, 1) + b"tail"
CHANGED = image_of(1, 9, 4, 0, 1) + b"tail"
AGAIN = image_of(0, 9, 5, 6, 1) + b"liat"


def noise(seed: int, chunks: int) -> bytes:
    """Chunks that do not compress: packs fill up and are repacked."""
    source = random.Random(seed)
    return b"".join(source.randbytes(1500) + bytes(CHUNK - 1500) for _ in range(chunks))


# Small changes of noise(1, 6), which are stored as patches: of whole chunks, then of chunks that
# are patches themselves, and beside what makes their packs sparse.
SMALL = edited(noise(1, 6), 5, 20, 40)
SMALLER = edited(SMALL, 6, 40, seed=2)
BESIDE = SMALLER[: 4 * CHUNK] + noise(3, 2)


def saved(world: World, number: int, at: int = 0) -> Saved:
    """The number-th of the backups that live, in the order in which they were acknowledged."""
    return list(world.sides[at].live)[number]


def abandoned(world: World) -> None:
    """A backup that fails by itself in the middle."""
    domain = world.domain()
    with domain.begin("backup") as session:
        session.manifest("11111111-1111-4111-8111-111111111111", CHUNK, None)


def held_restore(world: World) -> None:
    """A backup that is forgotten while it is read, and goes when the reader ends."""
    domain = world.domain()
    one = saved(world, 0)
    try:
        reader = domain.begin("read", [one.backup])
    except NotOnPoint:
        world.forget(one)  # fails, too, unless an attempt before this one had asked for that
        return
    with reader:
        world.forget(one)
        domain.reclaim(sparse_below=0.9)
        reader.end()


def observed(world: World) -> None:
    """The other host's open session is ended because the host is silent."""
    other = world.domain(0, "h2")
    beat(other, 1)
    session = other.begin("backup")
    observer = Observer(patience_s=10)
    observer.end_dead_sessions(world.domain(), 0.0)
    observer.end_dead_sessions(world.domain(), 11.0)
    session._abandon()


def interrupted(image: bytes) -> Callable[[World], None]:
    """A backup whose process dies before it commits; what it had sealed may be taken over."""

    def step(world: World) -> None:
        session = world.domain().begin("backup")
        write_disk(session, world.domain(), image, new_uuid(), "")
        session.packs.close()
        world.close()
        world.domain()

    return step


def rewritten(world: World) -> None:
    """All manifests are written anew from the view, as if they were damaged."""
    domain = world.domain()
    names = domain.view.ask(lambda state: {name for name, _ in tables.manifests.scan(state)})
    domain.rewrite_manifests(names)


def gone_for_good(world: World) -> None:
    """The other host has died; when its heartbeat was silent for long enough what it left goes."""
    beat(world.domain(0, "h2"), 1)
    world.save(CHANGED, None, 0, "h2")
    world.domains.pop((0, "h2")).close()
    leftovers = Leftovers(patience_s=10)
    leftovers.clear(world.domain(), 0.0)
    leftovers.clear(world.domain(), 11.0)


def beats(world: World) -> None:
    for counter in range(2):
        beat(world.domain(), counter)


def save(image: bytes, parent: int | None = None, at: int = 0, host: str = "h1") -> Step:
    return lambda world: world.save(
        image, None if parent is None else saved(world, parent, at), at, host
    )


def forget(*numbers: int, at: int = 0, host: str = "h1") -> Step:
    return lambda world: world.forget(
        *[saved(world, number, at) for number in numbers], at=at, host=host
    )


def reclaim(share: float = 0.9, at: int = 0, host: str = "h1") -> Step:
    return lambda world: world.domain(at, host).reclaim(sparse_below=share)


def restore(number: int, at: int = 0, host: str = "h1") -> Step:
    return lambda world: world.restore(saved(world, number, at), at, host)


def take_over(*numbers: int) -> Step:
    return lambda world: world.take_over(*[saved(world, number) for number in numbers])


def patched(least: int, most: int, at: int = 0) -> Step:
    """That many chunks are patches now: else the script is about something else."""

    def step(world: World) -> None:
        found = len(patches(world.domain(at)))
        assert least <= found <= most, found

    return step


def rebuild(world: World) -> None:
    world.domain().rebuild()


def checkpoint(world: World) -> None:
    world.domain().checkpoint()


def bundle(world: World) -> None:
    Bundling().go_on(world.domain())


def reopen(world: World) -> None:
    world.close()
    world.domain()


def reopen_without_view(world: World) -> None:
    world.close(lose=[(0, "h1")])
    world.domain()


SCRIPTS: dict[str, list[Step]] = {
    "first": [lambda world: world.point(), lambda world: world.domain(), save(FULL)],
    "incremental": [save(FULL), save(CHANGED, 0), save(AGAIN, 1), restore(2), restore(0)],
    "forget": [save(FULL), save(CHANGED, 0), save(AGAIN, 1), forget(1), reclaim(), forget(0, 1)],
    "repack": [save(noise(1, 6)), save(noise(1, 1), None), forget(0), reclaim(), reopen],
    "chain": [
        save(FULL),
        save(CHANGED, 0),
        save(AGAIN, 1),
        save(FULL, 2),
        forget(0, 1, 2),
        reclaim(),
    ],
    "rebuild": [
        save(FULL),
        save(CHANGED, 0),
        forget(0),
        rebuild,
        reopen_without_view,
        save(AGAIN, 0),
    ],
    "checkpoint": [
        save(FULL),
        checkpoint,
        save(CHANGED, 0),
        reopen_without_view,
        checkpoint,
        reopen,
    ],
    "bundle": [
        save(FULL),
        save(CHANGED, 0),
        bundle,
        forget(0),
        save(AGAIN, 0),
        bundle,
        reopen_without_view,
        take_over(0),
        rebuild,
    ],
    "import": [save(FULL), save(CHANGED, 0), take_over(0, 1), forget(0), reclaim(), restore(1, 1)],
    "restore": [save(FULL), save(noise(2, 2)), held_restore, reopen],
    "hosts": [
        save(FULL),
        save(CHANGED, None, 0, "h2"),
        save(AGAIN, 1, 0, "h1"),
        forget(0, host="h2"),
        reclaim(host="h1"),
        restore(1, 0, "h2"),
        observed,
    ],
    "patches": [
        save(noise(1, 6)),
        save(SMALL, 0),
        save(SMALLER, 1),
        patched(3, 6),
        restore(2),
        forget(0, 1),
        reclaim(),
        restore(0),
        reopen_without_view,
        save(BESIDE, 0),
        forget(0),
        reclaim(),
    ],
    "patches taken over": [
        save(noise(1, 3) + noise(5, 1)),
        save(SMALL[: 3 * CHUNK] + noise(6, 1), 0),
        save(SMALL[: 3 * CHUNK], at=1),
        save(SMALLER[: 3 * CHUNK], 0, at=1),
        take_over(1),
        patched(1, 4, at=1),
        forget(0, 1),
        reclaim(),
        restore(2, 1),
    ],
    "failing": [save(FULL), abandoned, beats, reopen],
    "interrupted": [
        interrupted(noise(1, 6)),
        save(noise(1, 6)),
        interrupted(noise(1, 3) + noise(2, 3)),
        save(noise(2, 3) + noise(3, 3), 0),
        forget(0),
        interrupted(noise(4, 4)),
        reclaim(),
        save(noise(4, 4)),
        restore(0),
    ],
    "rewritten": [
        save(FULL),
        save(CHANGED, 0),
        save(AGAIN, 1),
        rewritten,
        forget(1),
        rewritten,
        reopen_without_view,
        restore(1),
    ],
    "gone": [save(FULL), gone_for_good, save(AGAIN, 0), reclaim(), restore(1)],
}


def random_script(seed: int, steps: int = 8) -> list[Step]:
    """Any steps in any order, on one point with two clusters and two hosts in the first."""
    source = random.Random(seed)
    return [save(FULL)] + [_any_step(source.randrange(1 << 30)) for _ in range(steps)]


def _any_step(seed: int) -> Step:
    def step(world: World) -> object:
        source = random.Random(seed)
        at = source.choice((0, 0, 0, 1))
        host = source.choice(("h1", "h1", "h2")) if at == 0 else "h1"
        live = list(world.sides[at].live)
        word = source.choice(("save", "save", "save", "forget", "reclaim", "restore", "other"))
        if word == "forget" and len(live) > 1:
            chosen = source.sample(live, source.randint(1, 2))
            world.forget(*chosen, at=at, host=host)
            return None
        if word == "reclaim":
            return world.domain(at, host).reclaim(sparse_below=source.choice((0.3, 0.6, 0.95)))
        if word == "restore" and live:
            world.domain(at, host).refresh()
            world.restore(source.choice(live), at, host)
            return None
        if word == "other":
            return _any_other(source, world, at, host)
        parents = [one for one, image in world.sides[at].live.items() if len(image) == len(FULL)]
        parent = source.choice([None, *parents])
        image = source.choice((FULL, CHANGED, AGAIN)) if parent else noise(source.randrange(3), 4)
        world.domain(at, host).refresh()
        return world.save(image, parent, at, host)

    return step


def _any_other(source: random.Random, world: World, at: int, host: str) -> object:
    theirs = [one for one in world.sides[0].live if one not in world.sides[1].live]
    theirs = [one for one in theirs if one.backup not in world.sides[1].gone]
    words = ("import", "import", "rebuild", "checkpoint", "bundle", "reopen", "lose")
    word = source.choice((*words, "interrupt", "rewrite"))
    if word == "import" and theirs:
        world.take_over(*source.sample(theirs, min(len(theirs), 2)))
        return None
    if word == "rebuild":
        world.domain(at, host).rebuild()
        return None
    if word == "checkpoint":
        world.domain(at, host).checkpoint()
        return None
    if word == "bundle":
        Bundling().go_on(world.domain(at, host))
        return None
    if word == "interrupt":
        interrupted(noise(source.randrange(3), 4))(world)
        return None
    if word == "rewrite":
        rewritten(world)
        return None
    keys = list(world.domains)
    world.close(lose=[source.choice(keys)] if word == "lose" and keys else [])
    return None
