"""The model's log: a node for each folded state, an edge for each record that was ever appended.

Edges are folded by the real storage.log.fold, once each, and everything that can be asserted of a
state without its disk is asserted there. Two logs of one length that fold to the same tables, but
for the record numbers in their rows, are one node: so orders of independent records meet again.
Numbers stay part of it, or a record prepared before another one could seem to fit after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

import msgspec
from blake3 import blake3

from storage.domain.gc import GcPlan, plan_gc
from storage.errors import StorageError
from storage.format.record import (
    FIRST_PREVIOUS,
    Abort,
    Commit,
    FileSeal,
    Forget,
    Op,
    Open,
    Record,
    Retire,
    decode_record,
    encode_record,
    file_id,
    record_digest,
)
from storage.log.fold import Garbage, fold
from storage.view import tables
from storage.view.memory_tables import MemoryTables
from storage.view.tables import TABLE_NAMES
from tests.model import invariants
from tests.model.files import DiskContents, Files

SPARSE_BELOW = 0.6
BUDGET_BYTES = 1 << 30

Image: TypeAlias = Mapping[int, bytes]  # chunk index -> chunk id


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A state of one domain. `bare`: the same log folded without contents. Masks: see World."""

    number: int
    seq: int
    digest: bytes
    state: MemoryTables
    bare: MemoryTables
    files: int
    live: int
    open_sessions: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """A record that was folded: what it leads to and what it says. `needs`: its own files."""

    child: int
    garbage: int
    opened: int
    ended: int
    forgot: int
    needs: int


@dataclass(slots=True)
class Names:
    """Ids, and the bits that stand for them in a World."""

    sessions: dict[str, int] = field(default_factory=dict)
    backups: dict[tuple[int, str], int] = field(default_factory=dict)

    def session(self, number: int) -> str:
        name = f"{number:032x}"
        self.sessions.setdefault(name, 1 << len(self.sessions))
        return name

    def backup(self, domain: int, backup: str) -> int:
        return self.backups.setdefault((domain, backup), 1 << len(self.backups))


class Chain:
    """All logs of one domain that were met. `images`: what each backup must read as, for ever."""

    def __init__(self, domain: int, files: Files, names: Names, images: Mapping[str, Image]):
        self.domain = domain
        self.nodes: list[Node] = []
        self.edges: dict[tuple[int, tuple[Op, ...]], Edge | StorageError] = {}
        self._files = files
        self._names = names
        self._images = images
        self._contents = DiskContents(files, domain)
        self._numbers: dict[bytes, int] = {}
        self._plans: dict[int, GcPlan] = {}
        self._add(MemoryTables(), MemoryTables(), FIRST_PREVIOUS)

    def extend(self, head: int, ops: tuple[Op, ...], host: str) -> Edge | StorageError:
        """The edge of a record with these ops after `head`, or what the fold says against it."""
        known = self.edges.get((head, ops))
        if known is None:
            try:
                known = self._fold(self.nodes[head], ops, host)
            except StorageError as error:
                if error.code == "data_damaged":
                    raise
                known = error.with_traceback(None)
            self.edges[head, ops] = known
        return known

    def _fold(self, base: Node, ops: tuple[Op, ...], host: str) -> Edge:
        nonce = blake3(repr((base.number, ops)).encode()).digest(16)
        wanted = Record(seq=base.seq + 1, previous=base.digest, nonce=nonce, host=host, ops=ops)
        encoded = encode_record(wanted)
        record, digest = decode_record(encoded, "model"), record_digest(encoded)
        state, bare = base.state.copy(), base.bare.copy()
        garbage = fold(state, record, digest, self._contents, strict=True)
        fold(bare, record, digest, None)
        invariants.retired_by_record(base.state, state, record)
        _share(base.state, state)
        _share(base.bare, bare)
        child = self._add(state, bare, digest)
        return Edge(
            child=child,
            garbage=self._garbage(base, garbage),
            opened=self._sessions(ops, (Open,)),
            ended=self._sessions(ops, (Commit, Retire, Abort)),
            forgot=self._forgotten(ops),
            needs=self._needs(ops),
        )

    def _add(self, state: MemoryTables, bare: MemoryTables, digest: bytes) -> int:
        files, live = self._live_files(state), self._live_backups(state)
        key = _canonical(state)
        known = self._numbers.get(key)
        if known is None:
            invariants.restores(state, self._contents, self._images)
        # Of every log, not of every node: a second log to a known node is rebuilt too.
        invariants.rebuilt(state, bare, DiskContents(self._files, self.domain, files))
        if known is not None:
            return known
        number = self._numbers[key] = len(self.nodes)
        sessions = tuple(name for name, _ in tables.sessions.scan(state))
        seq = tables.applied(state)[0]
        self.nodes.append(Node(number, seq, digest, state, bare, files, live, sessions))
        return number

    def _live_files(self, state: MemoryTables) -> int:
        packs = [
            self._files.find(self.domain, "packs", name, row.digest).bit
            for name, row in tables.packs.scan(state)
        ]
        manifests = [
            self._files.find(self.domain, "manifests", name, row.digest).bit
            for name, row in tables.manifests.scan(state)
        ]
        return sum(packs) + sum(manifests)

    def _live_backups(self, state: MemoryTables) -> int:
        return sum(
            self._names.backup(self.domain, backup)
            for backup, row in tables.backups.scan(state)
            if not row.forgotten
        )

    def _garbage(self, base: Node, garbage: Garbage) -> int:
        gone = {("packs", name) for name in garbage.packs}
        gone |= {("manifests", name) for name in garbage.manifests}
        return sum(
            file.bit for file in self._files.of(base.files) if (file.kind, file.name) in gone
        )

    def _sessions(self, ops: Sequence[Op], kinds: tuple[type[Op], ...]) -> int:
        named = [getattr(op, "session", "") for op in ops if isinstance(op, kinds)]
        return sum(self._names.sessions[session] for session in named)

    def _forgotten(self, ops: Sequence[Op]) -> int:
        return sum(
            self._names.backup(self.domain, backup)
            for op in ops
            if isinstance(op, Forget)
            for backup in op.backups
        )

    def _needs(self, ops: Sequence[Op]) -> int:
        needs = 0
        for op in ops:
            if isinstance(op, Commit | Retire):
                for kind, seals in (("packs", op.packs), ("manifests", op.manifests)):
                    needs |= sum(self._bit(kind, op.session, seal) for seal in seals)
        return needs

    def _bit(self, kind: str, session: str, seal: FileSeal) -> int:
        return self._files.find(self.domain, kind, file_id(session, seal.n), seal.digest).bit

    def plan(self, number: int) -> GcPlan:
        """What the real plan_gc says of a state."""
        known = self._plans.get(number)
        if known is None:
            known = plan_gc(self.nodes[number].state, SPARSE_BELOW, BUDGET_BYTES)
            self._plans[number] = known
        return known


def _share(base: MemoryTables, state: MemoryTables) -> None:
    """Tables that a record did not change are kept once."""
    for name in TABLE_NAMES:
        if state.tables[name].rows == base.tables[name].rows:
            state.tables[name] = base.tables[name]


@lru_cache(maxsize=1 << 16)
def _without(value: bytes, place: int) -> bytes:
    row = msgspec.msgpack.decode(value)
    row[place] = 0
    return msgspec.msgpack.encode(row)


_SEQ_PLACE = {"sessions": 4, "backups": 3}


def _canonical(state: MemoryTables) -> bytes:
    parts = []
    for name in TABLE_NAMES:
        rows = sorted(state.tables[name].rows.items())
        if name in _SEQ_PLACE:
            rows = [(key, _without(value, _SEQ_PLACE[name])) for key, value in rows]
        elif name == "meta":
            rows = [(key, value[:8]) for key, value in rows]
        parts.append(rows)
    return blake3(msgspec.msgpack.encode(parts)).digest(16)
