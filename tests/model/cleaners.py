"""Step machines of those who end dead sessions and delete what is nobody's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from storage.domain import orphans
from storage.errors import SessionEnded, StorageError
from storage.files.fs import Fs
from storage.format.record import Abort
from tests.model.chain import Edge
from tests.model.invariants import must
from tests.model.world import Local, Model, Step, World, to, unlink_steps
from tests.model.writers import DONE


class UnlinkNotes:
    """Stands for the Fs that storage.domain.orphans unlinks through; notes what was to go."""

    def __init__(self) -> None:
        self.gone: list[str] = []

    def unlink(self, path: str) -> None:
        self.gone.append(path)

    def listdir(self, _: str) -> list[str]:
        return ["not empty, for all that the judgement cares"]

    def stat(self, path: str) -> None:
        raise FileNotFoundError(path)


def orphans_of(model: Model, domain: int, number: int, listed: int) -> int:
    """Which of the listed files the real storage.domain.orphans would unlink, judged by a node."""
    state = model.chains[domain].nodes[number].state
    if not model.rules.spares_open_sessions:
        state = state.copy()
        state.table("sessions").rows.clear()
    found = 0
    for file in model.files.of(listed):
        notes = UnlinkNotes()
        name = file.name.partition("/")[2]
        orphans._sweep_session(cast(Fs, notes), state, file.kind, file.session, [name], file.kind)
        found |= file.bit if notes.gone else 0
    return found


class Sweeper:
    """storage.domain.orphans.sweep, at any time: list, read the log to its end, judge, unlink."""

    domain = 0

    def __init__(self, model: Model, name: str, host: int, sweeps: int = 1) -> None:
        self.model = model
        self.name = name
        self.host = host
        self.place = len(model.processes)
        self.start = Local("list", (sweeps,))
        self._known: dict[tuple[int, int], int] = {}

    def steps(self, world: World) -> Iterator[Step]:
        """data: (sweeps left,), then (files listed, sweeps left), (to go, sweeps left)."""
        pc, data = world.locals[self.place][:2]
        rules = self.model.rules
        match pc:
            case "list":
                seen = world if rules.lists_before_refresh else self.model.refreshed(world, self)
                listed = world.disk & self.model.files.domains[0]
                base = seen.views[self.host]
                found = Local("judge", (listed, data[0], -1))
                if not rules.lists_before_refresh:
                    # The files are listed in the next step, after the log was read.
                    found = Local("judge", (-1, data[0], base))
                yield f"{self.name}: list", to(seen, self, found)
            case "judge":
                yield f"{self.name}: judge", self._judged(world, cast("tuple[int, int, int]", data))
            case "unlink":
                yield from unlink_steps(world, self, self._next(cast(int, data[1])))

    def _judged(self, world: World, data: tuple[int, int, int]) -> World:
        listed, sweeps, base = data
        if listed < 0:
            listed = world.disk & self.model.files.domains[0]
        elif self.model.rules.refreshes_before_judging:
            world = self.model.refreshed(world, self)
        judge = world.views[self.host] if base < 0 else base
        key = (judge, listed)
        if key not in self._known:
            self._known[key] = orphans_of(self.model, 0, judge, listed)
        gone = self._known[key] & world.disk
        then = Local("unlink", (gone, sweeps)) if gone else self._next(sweeps)
        return to(world, self, then)

    def _next(self, sweeps: int) -> Local:
        return Local("list", (sweeps - 1,)) if sweeps > 1 else DONE


class Reaper:
    """Takes any open session's owner for dead, at any time, and ends the session."""

    def __init__(self, model: Model, name: str, host: int, ends: int = 1, domain: int = 0) -> None:
        self.model = model
        self.name = name
        self.host = host
        self.domain = domain
        self.place = len(model.processes)
        self.start = Local("watch", (ends,))

    def steps(self, world: World) -> Iterator[Step]:
        """data: (ends left,), (session, ends left), (mask, ends left)."""
        pc, data = world.locals[self.place][:2]
        match pc:
            case "watch":
                for session in self.model.head(world, self.domain).open_sessions:
                    chosen = Local("abort", (session, data[0]))
                    if not self.model.rules.aborts_before_delete:
                        own = self.model.files.of_session(self.domain, session, world.disk)
                        chosen = Local("early", (own, session, data[0])) if own else chosen
                    yield f"{self.name}: watch", to(world, self, chosen)
            case "early":
                yield from unlink_steps(world, self, Local("abort", data[1:]))
            case "abort":
                op = Abort(session=cast(str, data[0]))
                yield from self.model.append(
                    world, self, lambda _: [op], self._aborted, self._was_over
                )
            case "unlink":
                yield from unlink_steps(world, self, self._next(cast(int, data[1])))

    def _aborted(self, world: World, edge: Edge) -> World:
        session, ends = cast("tuple[str, int]", world.locals[self.place].data)
        mask = self.model.files.of_session(self.domain, session, world.disk) | edge.garbage
        then = Local("unlink", (mask, ends)) if mask else self._next(ends)
        return to(world, self, then)

    def _was_over(self, world: World, error: StorageError) -> World:
        must(isinstance(error, SessionEnded), f"I4: an open session can't be ended: {error}")
        return to(world, self, self._next(cast(int, world.locals[self.place].data[1])))

    def _next(self, ends: int) -> Local:
        return Local("watch", (ends - 1,)) if ends > 1 else DONE
